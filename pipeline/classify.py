"""Predict the labels of photographs with texts, with a checkpoint of --task sentiment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from data.datasets.folder import list_files
from data.datasets.folder import read as read_folder
from data.files import atomic_write_text, check_outputs, json_lines
from data.images import UnreadableImage
from data.sources import check_caption
from pipeline.cli import DEVICES, PRECISIONS, Settings, UserError, command, setting
from pipeline.decoding.captioner import PhotoCaptioner, load_captioner
from pipeline.extraction.backbone import MAX_PIXELS_HELP
from pipeline.terminal import progress, say


@dataclass(frozen=True)
class ClassifyConfig(Settings):
    """The options of pipeline.classify."""

    photograph: tuple[Path, ...] = setting(
        (),
        "a photograph, or a folder of photographs whose metadata has their texts; none for a "
        "checkpoint that reads no images",
        name="PHOTO_OR_FOLDER",
    )
    checkpoint: Path = setting(
        Path("runs/sample-sentiment"),
        "checkpoint folder written by pipeline.train, or hf-hub:user/name",
    )
    text: str | None = setting(None, "the text that belongs to the photograph")
    encoding: str = setting("utf-8", "encoding of the metadata of a folder, such as gb18030")
    out: Path | None = setting(None, "output file for the labels of a folder, as JSON lines")
    max_pixels: int | None = setting(None, MAX_PIXELS_HELP, at_least=1)
    device: str = setting("auto", "device", choices=DEVICES, group="machine")
    precision: str = setting(
        "auto", "precision of matrix products", choices=PRECISIONS, group="machine"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.photograph) > 1:
            raise UserError(
                f"{len(self.photograph)} photographs are passed; pass one, or a folder with "
                "metadata.jsonl (text in quotes after --text)"
            )
        if self.encoding != "utf-8" and not self.is_folder:
            raise UserError("--encoding is that of the metadata of a folder; omit it")
        if self.photograph and not self.photograph[0].exists():
            raise UserError(f"{self.photograph[0]}: there is no such photograph or folder")
        if not self.photograph and self.text is None:
            raise UserError('pass a photograph and its text: PHOTO --text "..."')
        if self.is_folder and self.text is not None:
            raise UserError("the texts of a folder are in its metadata; omit --text")
        if self.out and not self.is_folder:
            raise UserError("--out is the file of a folder's labels; one photograph is printed")
        if self.out and self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder; name the file")

    @property
    def is_folder(self) -> bool:
        """Whether a folder is classified. Then the labels are JSON lines."""
        return bool(self.photograph) and self.photograph[0].is_dir()


@command(ClassifyConfig)
def main(config: ClassifyConfig) -> None:
    """Print the labels of a photograph with its text, and their probabilities."""
    photographs = read_photographs(config)
    if config.out:
        inputs = [photo for photo, _ in photographs if photo]
        inputs += [config.photograph[0] / name for name in list_files(config.photograph[0]).others]
        check_outputs([("--out", config.out)], inputs)
    captioner = load_captioner(config.checkpoint, config.device, config.precision)
    captioner.max_pixels = config.max_pixels
    if not config.is_folder:
        say_unread(captioner, *photographs[0])
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
    records = classify_all(config, captioner, photographs)
    if not records:
        raise UserError(f"no labels: none of {len(photographs):,} photographs can be read")
    if config.out:
        atomic_write_text(config.out, json_lines(records))
        say(f"{len(records):,} labels: {config.out}")


def read_photographs(config: ClassifyConfig) -> list[tuple[Path | None, list[str]]]:
    """Return the photographs with their texts. A photograph without metadata has an empty text.

    Raises:
        UserError: the folder has no photographs.
    """
    if not config.is_folder:
        photo = config.photograph[0] if config.photograph else None
        check_caption(str(photo), "PHOTO", "file name")
        return [(photo, [check_caption(config.text or "", "--text", "text")])]
    folder = config.photograph[0]
    if not list_files(folder).photographs:
        raise UserError(f"{folder} has no photographs")
    source = read_folder("folder", folder, None, None, encoding=config.encoding)
    texts: dict[int, list[str]] = {}
    for text in source.texts:
        texts.setdefault(text.image_id, []).append(text.text)
    return [
        (image.path, list(dict.fromkeys([*texts.get(image.id, []), *image.captions])) or [""])
        for image in source.images
    ]


def say_unread(captioner: PhotoCaptioner, photo: Path | None, texts: list[str]) -> None:
    """Print what of a photograph and its text is not read."""
    checkpoint, (text,) = captioner.checkpoint, texts
    task = checkpoint.new_task()
    if photo and not task.uses_images:
        say("the checkpoint reads no images, so the photograph has no effect")
    if not task.reads_texts:
        if text:
            say("the checkpoint reads no texts, so --text has no effect")
    elif not text:
        say("without --text, the labels are those of an empty text")
    else:
        if unknown := checkpoint.unknown_words([text]):
            say(f"words that the model does not know: {', '.join(unknown[:10])}")
        if checkpoint.count_cut([text]):
            say(f"the text has more than {captioner.captioner.config.max_prompt} words; its first "
                "words are not read")  # fmt: skip


def classify_all(
    config: ClassifyConfig,
    captioner: PhotoCaptioner,
    photographs: list[tuple[Path | None, list[str]]],
) -> list[dict[str, Any]]:
    """Classify all texts, and print the labels. Unreadable photographs of a folder are left out.

    Raises:
        UnreadableImage: the only photograph is unreadable.
    """
    records: list[dict[str, Any]] = []
    with progress(len(photographs), "photographs", "classify", enabled=config.is_folder) as bar:
        for photo, texts in photographs:
            try:
                answers = captioner.classify(photo, texts)  # the photograph is encoded once
            except UnreadableImage as error:
                if not config.is_folder:
                    raise
                say(f"left out: {error}")
                continue
            finally:
                bar.step(1)
            assert isinstance(answers, list)
            for text, probabilities in zip(texts, answers, strict=True):
                label = next(iter(probabilities))
                record = {"file_name": str(photo), "text": text, "label": label}
                records.append(record | {"probabilities": probabilities})
                if not config.is_folder:
                    for name, probability in probabilities.items():
                        click.echo(f"  {probability:6.1%}  {name}")
                elif not config.out:
                    click.echo(json.dumps(records[-1], ensure_ascii=False))
    return records


if __name__ == "__main__":
    main()
