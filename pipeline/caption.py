"""Caption photographs with a checkpoint folder alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.features import iterate, write_whole
from data.folder import photographs_under
from data.sources import image_id
from pipeline.cli import DEVICES, PRECISIONS, UserError, command, setting
from pipeline.decoding import load_captioner
from pipeline.terminal import progress, say


@dataclass(frozen=True)
class CaptionConfig:
    """Which photographs, with which checkpoint."""

    photographs: tuple[Path, ...] = setting((), "photographs, and folders of them", name="PHOTO_OR_FOLDER...")
    checkpoint: Path = setting(Path("runs/sample"), "folder that pipeline.train wrote")
    out: Path | None = setting(None, "captions as JSON: file_name, image_id, caption")
    beam: int | None = setting(None, "beams  [the run's]")
    length_penalty: float | None = setting(None, "exponent of the length  [the run's]")
    batch: int = setting(16, "photographs captioned together")
    limit: int | None = setting(None, "caption only the first N photographs")
    device: str = setting("auto", "where to run", choices=DEVICES)
    precision: str = setting("auto", "of products", choices=PRECISIONS)
    seed: int = setting(0, "unused by beam search; every stage takes it")

    def __post_init__(self) -> None:
        for name in ("beam", "batch", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least 1")
        if not self.photographs:
            raise UserError("no photograph named; pass photographs or folders of them")


class Photo(NamedTuple):
    """A photograph to caption; its name is relative to the folder it was found in."""

    path: Path
    name: str
    id: int


@command(CaptionConfig)
def main(config: CaptionConfig) -> None:
    """Caption photographs, and folders of them: one line a photograph, and JSON with --out."""
    photos = find_photographs(config.photographs)[: config.limit]
    captioner = load_captioner(config.checkpoint, config.device, config.precision)
    records, unreadable = [], []
    with progress(len(photos), "photographs", "caption", enabled=len(photos) > config.batch) as bar:
        for chosen in iterate(photos, config.batch):
            found = captioner.try_caption([photo.path for photo in chosen], config.beam, config.length_penalty)
            for photo, (caption, reason) in zip(chosen, found, strict=True):
                if reason:
                    unreadable.append(f"{photo.path}: {reason}")
                    continue
                print(f"{photo.name}: {caption}", flush=True)
                records.append({"file_name": photo.name, "image_id": photo.id, "caption": caption})
            bar.step(len(chosen))
    report(config, records, unreadable)


def find_photographs(places: Sequence[Path]) -> list[Photo]:
    """Photographs by name and id as a cache of the same folder has them; UserError for an id that comes twice."""
    photos: dict[int, Photo] = {}
    for place in places:
        if not (place.is_file() or place.is_dir()):
            raise UserError(f"{place} is neither a file nor a folder; pass photographs or folders of them")
        names = photographs_under(place) if place.is_dir() else [place.name]
        folder = place if place.is_dir() else place.parent
        if not names:
            raise UserError(f"folder {place} holds no photograph")
        for name in names:
            photo = Photo(folder / name, name, image_id(name))
            if photo.id in photos:
                raise UserError(
                    f"{photos[photo.id].path} and {photo.path} have one id, {photo.id}, since ids follow from the name "
                    f"{name!r}; caption them in separate runs, or pass the folder above both"
                )
            photos[photo.id] = photo
    return list(photos.values())


def report(config: CaptionConfig, records: list[dict], unreadable: list[str]) -> None:
    """Write the JSON, list what could not be read; UserError where nothing could."""
    if unreadable and not records:
        raise UserError(f"none of the photographs can be read: {'; '.join(unreadable[:5])}")
    for line in unreadable:
        say(f"left out: {line}")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(config.out, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
        say(f"{len(records)} captions: {config.out}{f'; {len(unreadable)} left out' if unreadable else ''}")


if __name__ == "__main__":
    main()
