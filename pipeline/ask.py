"""Answer questions about photographs with a trained checkpoint."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from data import DataError
from data.datasets.folder import list_files
from data.files import atomic_write_text, check_outputs, json_lines
from data.images import UnreadableImage
from data.segmentation import segmented
from data.sources import check_caption, read_text
from pipeline.cli import DEVICES, PRECISIONS, Settings, UserError, command, setting
from pipeline.decoding.captioner import Caption, PhotoCaptioner, load_captioner
from pipeline.decoding.chat import Chat, read_conversation
from pipeline.extraction.backbone import MAX_PIXELS_HELP
from pipeline.terminal import progress, say

ANSWERS = 5  # answers that are printed for a question


@dataclass(frozen=True)
class AskConfig(Settings):
    """The options of pipeline.ask."""

    photograph_and_questions: tuple[str, ...] = setting(
        (),
        "a photograph, or a folder of photographs, and questions about it",
        name="PHOTO QUESTION...",
    )
    checkpoint: Path = setting(
        Path("runs/sample-vqa"), "checkpoint folder written by pipeline.train, or hf-hub:user/name"
    )
    questions: Path | None = setting(
        None,
        'file with one question per line: {"file_name": ..., "question": ...}; file names are '
        "relative to the folder of this file",
    )
    chat: bool = setting(
        False,
        "hold a conversation about one photograph, with a checkpoint of --task dialog: read "
        "questions, and the commands /save FILE, /photo PATH, /reset and /quit, from the terminal "
        "or standard input",
    )
    resume: Path | None = setting(None, "file that /save wrote, to continue a conversation")
    caption: str = setting("", "caption of the photograph, which the conversation begins with")
    out: Path | None = setting(None, "output file for the answers, as JSON lines")
    top: int | None = setting(
        None, f"number of answers per question  [{ANSWERS}]", at_least=1, at_most=100
    )
    max_pixels: int | None = setting(None, MAX_PIXELS_HELP, at_least=1)
    device: str = setting("auto", "device", choices=DEVICES, group="machine")
    precision: str = setting(
        "auto", "precision of matrix products", choices=PRECISIONS, group="machine"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat:
            return self._check_chat()
        if self.resume or self.caption:
            raise UserError("--resume and --caption are options of --chat; also pass --chat")
        if bool(self.questions) == bool(self.photograph_and_questions):
            raise UserError("pass a photograph and questions, or --questions FILE")
        if not all(map(str.strip, self.photograph_and_questions)):
            raise UserError("a question is empty; write it in quotes")
        if len(self.photograph_and_questions) == 1:
            raise UserError(
                f"no question about {self.photograph_and_questions[0]}; write it in quotes: "
                'python -m pipeline.ask PHOTO "What colour is the dog?"'
            )
        questions = self.photograph_and_questions[1:]
        if len(questions) > 1 and are_words_of_one(questions):
            raise UserError(
                f"each of the {len(questions)} questions is one word; write a question in quotes: "
                f'"{" ".join(questions)}"'
            )
        if self.out and self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder; name the file")

    def _check_chat(self) -> None:
        if self.questions or self.out:
            raise UserError("--chat asks questions one by one: omit --questions and --out")
        if self.top:
            raise UserError("--chat prints the best answer alone: omit --top")
        if self.caption and self.resume:
            raise UserError("--resume continues with the caption of the file; omit --caption")
        if len(self.photograph_and_questions) != (0 if self.resume else 1):
            raise UserError(
                "--chat takes one photograph, and no question; with --resume FILE it takes the "
                "photograph of the file"
            )

    @property
    def has_many(self) -> bool:
        """Whether there may be many photographs. Then answers are JSON lines."""
        return self.questions is not None or Path(self.photograph_and_questions[0]).is_dir()


@command(AskConfig)
def main(config: AskConfig) -> None:
    """Answer questions about photographs, and print the best answers with their probabilities.

    With --chat, hold a conversation about one photograph.
    """
    if config.chat:
        return chat(config)
    questions_by_path = read_questions(config)
    if config.out:
        inputs = [config.questions] if config.questions else []
        check_outputs([("--out", config.out)], [*inputs, *questions_by_path])
    captioner = load_captioner(config.checkpoint, config.device, config.precision)
    captioner.check_use(has_questions=True)
    captioner.max_pixels = config.max_pixels
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
    all_questions = [question for group in questions_by_path.values() for question in group]
    print_what_is_lost(captioner, all_questions)
    records = answer_all(config, captioner, questions_by_path)
    if not records:
        raise UserError(f"no answers: none of {len(questions_by_path):,} photographs can be read")
    if config.out:
        atomic_write_text(config.out, json_lines(records))
        say(f"{len(records):,} answers: {config.out}")


def chat(config: AskConfig) -> None:
    """Read questions and commands from the terminal or standard input, and print the answers."""
    if config.resume:
        photo, caption, rounds = read_conversation(config.resume)
    else:
        photo, caption, rounds = Path(config.photograph_and_questions[0]), config.caption, []
    check_caption(str(photo), "PHOTO", "file name")
    captioner = load_captioner(config.checkpoint, config.device, config.precision)
    captioner.max_pixels = config.max_pixels
    conversation = Chat(captioner, photo, caption, rounds)
    if not conversation.has_history:
        say("the model was trained with --no-history: it reads each question alone")
    at_terminal = sys.stdin.isatty()
    for question, answer in rounds:
        click.echo(f"> {question}\n{answer}")
    while True:
        if at_terminal:
            click.echo("> ", nl=False)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            say("the line is not UTF-8; write it again")
            continue
        if not line or line.strip() == "/quit":
            break
        if line.strip():
            respond(conversation, line.strip())


def respond(conversation: Chat, line: str) -> None:
    """Answer a question or carry out a command. A mistake is printed, and the chat goes on."""
    command, _, argument = line.partition(" ")
    try:
        if command == "/reset":
            conversation.reset()
            say("the rounds so far are forgotten")
        elif command == "/photo" and argument.strip():
            conversation.look(Path(argument.strip()))
            say(f"the photograph is now {argument.strip()}; /reset forgets the rounds so far")
        elif command == "/save" and argument.strip():
            conversation.save(Path(argument.strip()))
            say(f"saved: {argument.strip()}")
        elif command.startswith("/"):
            say(f"{line}: the commands are /save FILE, /photo PATH, /reset and /quit")
        else:
            click.echo(conversation.ask(line))
            if conversation.forgotten:
                say("the oldest rounds no longer fit into what the model reads")
    except (DataError, UserError) as error:
        say(str(error))
    except OSError as error:
        say(f"{error.filename}: {error.strerror}")


def are_words_of_one(questions: Sequence[str]) -> bool:
    """Whether the questions look like the words of one question without quotes."""
    return all(len(text.split()) == 1 and text.isascii() for text in questions) and not any(
        "?" in text for text in questions[:-1]
    )


def answer_all(
    config: AskConfig, captioner: PhotoCaptioner, questions_by_path: Mapping[Path, Sequence[str]]
) -> list[dict[str, Any]]:
    """Answer all questions, and print the answers. Unreadable photographs of many are left out.

    Raises:
        UserError: the only photograph is unreadable.
    """
    count = sum(map(len, questions_by_path.values()))
    records: list[dict[str, Any]] = []
    with progress(count, "questions", "ask", enabled=config.has_many) as bar:
        for path, questions in questions_by_path.items():
            try:
                answers_per_question = captioner.answers(path, questions, config.top or ANSWERS)
            except UnreadableImage as error:
                if not config.has_many:
                    raise UserError(str(error)) from error
                say(f"left out: {error}")
                bar.step(len(questions))
                continue
            for question, answers in zip(questions, answers_per_question, strict=True):
                records.append(make_record(path, question, answers))
                print_answers(config, records[-1])
            bar.step(len(questions))
    return records


def read_questions(config: AskConfig) -> dict[Path, list[str]]:
    """Return the questions about each photograph, by the path of the photograph.

    Raises:
        DataError: a question or the name of a photograph is not UTF-8.
        UserError: a line of --questions is not a JSON object with a file name and a question, or a
            folder has no photographs.
    """
    if config.questions is None:
        photograph, *questions = config.photograph_and_questions
        check_caption(photograph, "PHOTO", "file name")
        for question in questions:
            check_caption(question, "QUESTION", "question")
        folder = Path(photograph)
        if not folder.exists():
            hint = " (the photograph comes first)" if Path(questions[-1]).is_file() else ""
            raise UserError(f"{photograph}: there is no such photograph or folder{hint}")
        if not folder.is_dir():
            return {folder: questions}
        files = list_files(folder)
        if not files.photographs:
            raise UserError(f"{folder} has no photographs; {files.left_out() or 'it is empty'}")
        return {folder / name: questions for name in sorted(files.photographs)}
    questions_by_path: dict[Path, list[str]] = {}
    for number, line in enumerate(read_text(config.questions).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{config.questions}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f'{where}: not JSON; write {{"file_name": "a.jpg", "question": "..."}}: {error}'
            ) from error
        keys = ("file_name", "question")
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
            raise UserError(
                f'{where}: not an object like {{"file_name": "a.jpg", "question": "..."}}'
            )
        for key in keys:
            check_caption(entry[key], where, key)
        if not entry["question"].strip():
            raise UserError(f"{where}: the question is empty")
        path = config.questions.parent / entry["file_name"]
        questions_by_path.setdefault(path, []).append(entry["question"])
    if not questions_by_path:
        raise UserError(f"{config.questions} has no questions; write one JSON object per line")
    return questions_by_path


def print_what_is_lost(captioner: PhotoCaptioner, questions: Sequence[str]) -> None:
    """Print the words that are not in the vocabulary, and how many questions are too long."""
    vocabulary = captioner.checkpoint.vocabulary
    known = set(vocabulary.words)
    words = {text: set(segmented(text, vocabulary.segment)) for text in questions}
    if unknown := captioner.checkpoint.unknown_words(questions):
        say(f"words that the model does not know: {', '.join(unknown[:10])}")
    if unread := [text for text in words if not words[text] & known]:
        say(
            f"{unread[0][:60]!r} has no word that the model knows, so the answer comes from the "
            f"photograph alone ({len(unread):,} such)"
        )
    if cut := captioner.checkpoint.count_cut(questions):
        unit, max_prompt = vocabulary.unit, captioner.captioner.config.max_prompt
        say(f"{cut:,} questions have more than {max_prompt} {unit} and lose their first {unit}")


def make_record(path: Path, question: str, answers: Sequence[Caption]) -> dict[str, Any]:
    """Return the answers to a question as a line of the output file."""
    return {
        "file_name": str(path),
        "question": question,
        "answers": [
            {"answer": answer.text, "probability": math.exp(answer.log_p)} for answer in answers
        ],
    }


def print_answers(config: AskConfig, record: dict[str, Any]) -> None:
    """Print the answers to a question about one photograph as text.

    Answers about many photographs are printed as JSON lines, unless --out is passed.
    """
    if config.has_many:
        if not config.out:
            click.echo(json.dumps(record, ensure_ascii=False))
        return
    click.echo(record["question"])
    for answer in record["answers"]:
        click.echo(f"  {answer['probability']:6.1%}  {answer['answer']}")


if __name__ == "__main__":
    main()
