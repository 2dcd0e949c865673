"""Caption photographs with a trained checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.cache.reader import iterate
from data.datasets.folder import is_caption_list, list_files
from data.files import atomic_write_text, check_outputs
from data.sources import check_name, image_id
from pipeline.cli import DEVICES, PRECISIONS, UserError, command, setting
from pipeline.decoding.captioner import Caption, PhotoCaptioner, load_captioner
from pipeline.decoding.options import DecodingOptions, by_option
from pipeline.extraction.backbone import MAX_PIXELS_HELP
from pipeline.terminal import progress, say


@dataclass(frozen=True)
class CaptionConfig(DecodingOptions):
    """The options of pipeline.caption."""

    photographs: tuple[Path, ...] = setting(
        (), "photographs, or folders of photographs", name="PHOTO_OR_FOLDER..."
    )
    checkpoint: Path = setting(
        Path("runs/sample"), "checkpoint folder written by pipeline.train, or hf-hub:user/name"
    )
    out: Path | None = setting(
        None,
        "JSON file for the captions: file_name, image_id and caption; with --nbest also all "
        "captions with their log-probabilities",
    )
    write_txt: bool = setting(
        False, "write each caption to a .txt file beside its photograph, unless that file exists"
    )
    prefix: str = setting(
        "", "text before each caption in the .txt files, such as a trigger word; needs --write-txt"
    )
    batch: int = setting(16, "images per batch", at_least=1, group="machine")
    limit: int | None = setting(None, "caption only the first N photographs", at_least=1)
    max_pixels: int | None = setting(None, MAX_PIXELS_HELP, at_least=1)
    device: str = setting("auto", "device", choices=DEVICES, group="machine")
    precision: str = setting(
        "auto", "precision of matrix products", choices=PRECISIONS, group="machine"
    )
    seed: int = setting(
        0,
        "random seed of --sample (sampled captions also depend on --batch)",
        at_least=0,
        group="machine",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.photographs:
            raise UserError("no photograph to caption; pass photographs or folders of photographs")
        if self.out and self.out.is_dir():
            raise UserError(
                f"--out {self.out} is a folder; name the file, such as {self.out / 'captions.json'}"
            )
        if self.prefix and not self.write_txt:
            raise UserError(
                "--prefix is the text before each caption in the .txt files; also pass --write-txt"
            )


class Photo(NamedTuple):
    """A photograph to caption. `name` is the path relative to the folder that was passed."""

    path: Path
    name: str
    id: int


@command(CaptionConfig)
def main(config: CaptionConfig) -> None:
    """Caption photographs or folders of photographs.

    The command prints one line per photograph. With --out it also writes the captions as JSON.
    """
    photos = find_photographs(config.photographs)
    if config.out:
        check_outputs([("--out", config.out)], [photo.path for photo in photos])
    photos = photos[: config.limit]
    captioner = load_captioner(config.checkpoint, config.device, config.precision)
    captioner.check_use(has_questions=False)
    captioner.max_pixels = config.max_pixels
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
    records, unreadable, txt_writer = caption_all(config, captioner, photos)
    if config.write_txt:
        txt_writer.report()
    report(config, records, unreadable)
    if failed := txt_writer.failed:
        files = "file" if len(failed) == 1 else "files"
        raise UserError(
            f"{len(failed):,} .txt {files} could not be written: {'; '.join(failed[:5])}; all "
            "other files were written"
        )


def caption_all(
    config: CaptionConfig, captioner: PhotoCaptioner, photos: Sequence[Photo]
) -> tuple[list[dict], list[str], TxtWriter]:
    """Caption the photographs and print the captions.

    Returns:
        The records for --out, the unreadable photographs with the reasons, and the writer of the
        .txt files.
    """
    records, unreadable, txt_writer = [], [], TxtWriter(config.prefix)
    show_bar = len(photos) > config.batch
    with by_option(), progress(len(photos), "photographs", "caption", enabled=show_bar) as bar:
        for number, batch in enumerate(iterate(photos, config.batch)):
            paths = [photo.path for photo in batch]
            results = captioner.try_caption(
                paths, seed=config.seed, number=number, **config.given()
            )
            for photo, (captions, reason) in zip(batch, results, strict=True):
                if reason:
                    unreadable.append(f"{photo.path}: {reason}")
                    continue
                print_captions(photo, captions, config.nbest is not None)
                records.append(make_record(photo, captions, config.nbest is not None))
                if config.write_txt:
                    txt_writer.write(photo.path, captions[0].text)
            bar.step(len(batch))
    return records, unreadable, txt_writer


class TxtWriter:
    """Writes the .txt files beside the photographs, and counts what was written."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.existing = prefix.split(), 0
        self.written: dict[Path, Path] = {}  # path of the .txt file to path of the photograph
        self.not_written: list[str] = []
        self.failed: list[str] = []

    def write(self, photograph: Path, caption: str) -> None:
        """Write the prefix and the caption on one line.

        An existing .txt file is not changed. An error of the system is recorded in `failed`.
        """
        path = photograph.with_suffix(".txt")
        if other := self.written.get(path):
            self.not_written.append(
                f"{photograph}: {other} has the same .txt file; rename one of the two photographs"
            )
        elif os.path.lexists(path):
            self.existing += 1
        elif is_caption_list(path.name):
            self.not_written.append(
                f"{photograph}: {path.name} is the name of a file of captions; rename the "
                "photograph"
            )
        else:
            try:
                atomic_write_text(path, " ".join([*self.prefix, caption]) + "\n")
                self.written[path] = photograph
            except OSError as error:
                self.failed.append(f"{path}: {error.strerror or error}")

    def report(self) -> None:
        """Print the numbers of written and existing files, and each file that was not written."""
        existing = ""
        if self.existing:
            photographs = "photograph has" if self.existing == 1 else "photographs have"
            existing = f"; {self.existing:,} {photographs} one already, which was not changed"
        files = "file" if len(self.written) == 1 else "files"
        say(f"{len(self.written):,} .txt {files} written beside the photographs{existing}")
        for line in [*self.not_written, *self.failed]:
            say(f".txt not written: {line}")


def print_captions(photo: Photo, captions: Sequence[Caption], nbest: bool) -> None:
    """Print the best caption, or with `nbest` all captions with their log-probabilities."""
    if not nbest:
        print(f"{photo.name}: {captions[0].text}", flush=True)
        return
    for caption in captions:
        print(f"{photo.name}: {caption.text}  ({caption.log_p:.2f})", flush=True)


def make_record(photo: Photo, captions: Sequence[Caption], nbest: bool) -> dict:
    """Return the entry of a photograph in the JSON file."""
    record = {"file_name": photo.name, "image_id": photo.id, "caption": captions[0].text}
    if not nbest:
        return record
    return record | {"captions": [caption.record() for caption in captions]}


def find_photographs(paths: Sequence[Path]) -> list[Photo]:
    """Return the photographs among the files and in the folders.

    A photograph gets the same name and id as in a cache of the same folder.

    Raises:
        UserError: a path does not exist, a folder has no photograph, or two photographs have the
            same id.
    """
    photos: dict[int, Photo] = {}
    for path in paths:
        if path.is_dir():
            folder, files = path, list_files(path)
            names: Collection[str] = files.photographs
            ignored = files.left_out()
            if not names:
                raise UserError(
                    f"folder {path} contains no photograph{f' ({ignored})' if ignored else ''}"
                )
            if ignored:
                say(ignored)
        elif path.is_file():
            folder, names = path.parent, [check_name(path.name, str(path.parent))]
        else:
            raise UserError(
                f"{path} is neither a file nor a folder; pass photographs or folders of photographs"
            )
        for name in names:
            photo = Photo(folder / name, name, image_id(name))
            if photo.id in photos:
                raise UserError(
                    f"{photos[photo.id].path} and {photo.path} have the same id, {photo.id}, "
                    f"because the id is computed from the name {name!r}; caption them in separate "
                    "runs, or pass a folder that contains both"
                )
            photos[photo.id] = photo
    return list(photos.values())


def report(config: CaptionConfig, records: list[dict], unreadable: list[str]) -> None:
    """List the unreadable photographs and write the JSON file.

    Raises:
        UserError: no photograph could be read.
    """
    if unreadable and not records:
        raise UserError(f"none of the photographs can be read: {'; '.join(unreadable[:5])}")
    for line in unreadable:
        say(f"left out: {line}")
    if config.out is not None:
        atomic_write_text(config.out, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
        left_out = f"; {len(unreadable)} photographs left out" if unreadable else ""
        say(f"{len(records)} captions: {config.out}{left_out}")


if __name__ == "__main__":
    main()
