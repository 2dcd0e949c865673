"""Ask questions about photographs with a checkpoint folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from data.files import atomic_write_text
from data.images import UnreadableImage
from data.segmentation import segmented
from data.sources import read_text
from pipeline.cli import DEVICES, PRECISIONS, Settings, UserError, command, setting
from pipeline.decoding.captioner import Caption, PhotoCaptioner, load_captioner
from pipeline.extraction.backbone import MAX_PIXELS_HELP
from pipeline.terminal import progress, say


@dataclass(frozen=True)
class AskConfig(Settings):
    """The options of pipeline.ask."""

    photograph_and_questions: tuple[str, ...] = setting(
        (), "a photograph, and questions about it", name="PHOTO QUESTION..."
    )
    checkpoint: Path = setting(
        Path("runs/sample-vqa"), "checkpoint folder written by pipeline.train, or hf-hub:user/name"
    )
    questions: Path | None = setting(
        None,
        'file with many questions, a line each: {"file_name": ..., "question": ...}; file '
        "names are relative to the file",
    )
    out: Path | None = setting(None, "write the answers as JSON lines")
    top: int = setting(5, "number of answers", at_least=1, at_most=100)
    max_pixels: int | None = setting(None, MAX_PIXELS_HELP, at_least=1)
    device: str = setting("auto", "device", choices=DEVICES, group="machine")
    precision: str = setting(
        "auto", "precision of matrix products", choices=PRECISIONS, group="machine"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.questions) == bool(self.photograph_and_questions):
            raise UserError("pass a photograph and questions, or --questions FILE")
        if len(self.photograph_and_questions) == 1:
            raise UserError(
                f"no question about {self.photograph_and_questions[0]}; write it in quotes: "
                'python -m pipeline.ask PHOTO "What colour is the dog?"'
            )
        if self.out and self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder; name the file")


@command(AskConfig)
def main(config: AskConfig) -> None:
    """Answer questions about a photograph: the best answers with their probabilities."""
    asked = list(questions_of(config))
    captioner = load_captioner(config.checkpoint, config.device, config.precision)
    captioner.max_pixels = config.max_pixels
    name_unknown_words(captioner, [question for _, questions in asked for question in questions])
    records: list[dict[str, Any]] = []
    total = sum(len(questions) for _, questions in asked)
    with progress(total, "questions", "ask", enabled=config.questions is not None) as bar:
        for path, questions in asked:
            try:
                found = captioner.answers(path, questions, config.top)
            except UnreadableImage as error:
                raise UserError(str(error)) from error
            for question, answers in zip(questions, found, strict=True):
                records.append(record(path, question, answers))
                tell(config, records[-1])
            bar.step(len(questions))
    if config.out:
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in records)
        atomic_write_text(config.out, "".join(lines))
        say(f"{len(records):,} answers: {config.out}")


def questions_of(config: AskConfig) -> Iterator[tuple[Path, list[str]]]:
    """Each photograph with its questions."""
    if config.questions is None:
        path, *questions = config.photograph_and_questions
        yield Path(path), questions
        return
    by_path: dict[Path, list[str]] = {}
    for number, line in enumerate(read_text(config.questions).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{config.questions}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}") from error
        fields = ("file_name", "question")
        if not isinstance(entry, dict) or not all(isinstance(entry.get(f), str) for f in fields):
            raise UserError(
                f'{where}: not an object like {{"file_name": "a.jpg", "question": "..."}}'
            )
        path = config.questions.parent / entry["file_name"]
        by_path.setdefault(path, []).append(entry["question"])
    yield from by_path.items()


def name_unknown_words(captioner: PhotoCaptioner, questions: Sequence[str]) -> None:
    vocabulary = captioner.checkpoint.vocabulary
    words = {word for text in questions for word in segmented(text, vocabulary.segment)}
    if unknown := sorted(words - set(vocabulary.words)):
        say(f"words that the model does not know: {', '.join(unknown[:10])}")


def record(path: Path, question: str, answers: Sequence[Caption]) -> dict[str, Any]:
    return {
        "file_name": str(path),
        "question": question,
        "answers": [
            {"answer": answer.text, "probability": math.exp(answer.log_p)} for answer in answers
        ],
    }


def tell(config: AskConfig, line: dict[str, Any]) -> None:
    """Print the answers: as text for one photograph, as JSON lines for many."""
    if config.questions is not None:
        if not config.out:
            click.echo(json.dumps(line, ensure_ascii=False))
        return
    click.echo(line["question"])
    for answer in line["answers"]:
        click.echo(f"  {answer['probability']:6.1%}  {answer['answer']}")


if __name__ == "__main__":
    main()
