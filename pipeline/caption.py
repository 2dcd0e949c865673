"""Caption photographs with a checkpoint folder."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.cache.reader import iterate
from data.datasets.folder import is_caption_list, list_files
from data.files import atomic_write_text
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
        (), "photographs, and folders of them", name="PHOTO_OR_FOLDER..."
    )
    checkpoint: Path = setting(
        Path("runs/sample"), "checkpoint folder written by pipeline.train, or hf-hub:user/name"
    )
    out: Path | None = setting(
        None,
        "write the captions as JSON: file_name, image_id, caption; with --nbest all captions and "
        "their log-probabilities",
    )
    write_txt: bool = setting(
        False, "write each caption to a .txt file beside its photograph, unless that file exists"
    )
    prefix: str = setting(
        "", "text before each caption in the .txt files, such as a trigger word; with --write-txt"
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
            raise UserError("no photograph named; pass photographs or folders of them")
        if self.out and self.out.is_dir():
            raise UserError(
                f"--out {self.out} is a folder; name the file, as {self.out / 'captions.json'}"
            )
        if self.prefix and not self.write_txt:
            raise UserError(
                "--prefix is put before the captions in .txt files; pass --write-txt with it"
            )


class Photo(NamedTuple):
    """A photograph to caption; its name is relative to the folder it was found in."""

    path: Path
    name: str
    id: int


@command(CaptionConfig)
def main(config: CaptionConfig) -> None:
    """Caption photographs or folders of photographs: one line per photograph, JSON with --out."""
    photos = find_photographs(config.photographs)[: config.limit]
    captioner = load_captioner(config.checkpoint, config.device, config.precision)
    captioner.max_pixels = config.max_pixels
    records, unreadable, texts = caption_all(config, captioner, photos)
    if config.write_txt:
        texts.report()
    report(config, records, unreadable)
    if texts.failed:
        raise UserError(
            f"{len(texts.failed):,} .txt could not be written: {'; '.join(texts.failed[:5])}; "
            "all else is done"
        )


def caption_all(
    config: CaptionConfig, captioner: PhotoCaptioner, photos: Sequence[Photo]
) -> tuple[list[dict], list[str], Texts]:
    """Caption and print.

    Returns the records for --out, the unreadable photographs with reasons, and the .txt files.
    """
    records, unreadable, texts = [], [], Texts(config.prefix)
    bar_options = {"enabled": len(photos) > config.batch}
    with by_option(), progress(len(photos), "photographs", "caption", **bar_options) as bar:
        for number, chosen in enumerate(iterate(photos, config.batch)):
            paths = [photo.path for photo in chosen]
            found = captioner.try_caption(paths, seed=config.seed, number=number, **config.given())
            for photo, (captions, reason) in zip(chosen, found, strict=True):
                if reason:
                    unreadable.append(f"{photo.path}: {reason}")
                    continue
                records.append(tell(photo, captions, config.nbest is not None))
                if config.write_txt:
                    texts.write(photo.path, captions[0].text)
            bar.step(len(chosen))
    return records, unreadable, texts


class Texts:
    """The .txt files beside photographs: which were written, and which could not be."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.kept = prefix.split(), 0
        self.written: dict[Path, Path] = {}  # the photograph of each .txt
        self.not_written: list[str] = []
        self.failed: list[str] = []

    def write(self, photograph: Path, caption: str) -> None:
        """Write the caption on one line. An existing .txt is kept, and a failure does not stop the
        run.
        """
        path = photograph.with_suffix(".txt")
        if other := self.written.get(path):
            self.not_written.append(
                f"{photograph}: its .txt would be that of {other}; rename one of the two"
            )
        elif os.path.lexists(path):
            self.kept += 1
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
        have = "photograph has" if self.kept == 1 else "photographs have"
        stays = f"; {self.kept:,} {have} one already, which stays as it is" if self.kept else ""
        files = "file" if len(self.written) == 1 else "files"
        say(f"{len(self.written):,} .txt {files} written beside the photographs{stays}")
        for line in [*self.not_written, *self.failed]:
            say(f".txt not written: {line}")


def tell(photo: Photo, captions: Sequence[Caption], all_of_them: bool) -> dict:
    """Print the captions of a photograph and return its record for --out."""
    record = {"file_name": photo.name, "image_id": photo.id, "caption": captions[0].text}
    if not all_of_them:
        print(f"{photo.name}: {captions[0].text}", flush=True)
        return record
    for caption in captions:
        print(f"{photo.name}: {caption.text}  ({caption.log_p:.2f})", flush=True)
    return record | {"captions": [caption.record() for caption in captions]}


def find_photographs(places: Sequence[Path]) -> list[Photo]:
    """Find the photographs, with names and ids as a cache of the same folder has them; UserError
    for a duplicate id.
    """
    photos: dict[int, Photo] = {}
    for place in places:
        if not (place.is_file() or place.is_dir()):
            raise UserError(
                f"{place} is neither a file nor a folder; pass photographs or folders of them"
            )
        names: Collection[str] = []
        if place.is_file():
            names = [check_name(place.name, str(place.parent))]
        folder = place.parent
        if place.is_dir():
            files = list_files(place)
            names, folder, left_out = files.photographs, place, files.left_out()
            if not names:
                raise UserError(
                    f"folder {place} holds no photograph ({left_out or 'no file that is one'})"
                )
            if left_out:
                say(left_out)
        for name in names:
            photo = Photo(folder / name, name, image_id(name))
            if photo.id in photos:
                raise UserError(
                    f"{photos[photo.id].path} and {photo.path} have the same id, {photo.id}, since "
                    "ids follow from the name "
                    f"{name!r}; caption them in separate runs, or pass the folder above both"
                )
            photos[photo.id] = photo
    return list(photos.values())


def report(config: CaptionConfig, records: list[dict], unreadable: list[str]) -> None:
    """Write the JSON and list the unreadable photographs; UserError if none could be read."""
    if unreadable and not records:
        raise UserError(f"none of the photographs can be read: {'; '.join(unreadable[:5])}")
    for line in unreadable:
        say(f"left out: {line}")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(config.out, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
        say(
            f"{len(records)} captions: "
            f"{config.out}{f'; {len(unreadable)} left out' if unreadable else ''}"
        )


if __name__ == "__main__":
    main()
