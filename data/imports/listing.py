"""List the images of imported sources, with their ids, before any features are read.

The id of an image follows from its key in the source, or from a dataset that has the image. All
faults that can be seen without the features are errors here, before anything is written.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data import DataError
from data.image_formats import HEIC, SUFFIXES
from data.imports.interface import Arrays, Entry, Reader
from data.imports.rows import layout_of
from data.sources import Image, Source, check_id, image_id, loose, read_json

COCO_NAME = re.compile(r"(?:COCO|VisualDialog)_\w+_(\d{12})")


class Item(NamedTuple):
    """An image of a source: its reader, its entry, its size in pixels if known."""

    reader: Reader
    entry: Entry
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Imported:
    """The images of all sources, in their order.

    items: by image id. regions: the largest number of an image. boxes: "given", "cells" (of a
    grid) or "none". left_out: number of images that are not in the dataset.
    """

    images: tuple[Image, ...]
    items: Mapping[int, Item]
    regions: int
    channels: int
    boxes: str
    left_out: int = 0

    def where(self, image: Image) -> str:
        """Return the file, the place in it and the id of an image, for messages."""
        item = self.items[image.id]
        return f"{item.reader.where(item.entry)}, image {image.id}"

    def read(self, images: Iterable[Image]) -> Iterator[tuple[Image, Arrays]]:
        """Yield images with their arrays. Each source is opened once for consecutive images."""
        for reader, group in itertools.groupby(images, lambda image: self.items[image.id].reader):
            part = list(group)
            yield from zip(part, reader.read(self.items[i.id].entry for i in part), strict=True)


def list_images(
    readers: Sequence[Reader],
    unit: str,
    sizes: Mapping[int, tuple[int, int]],
    source: Source | None = None,
    wanted: Sequence[Image] = (),
) -> Imported:
    """List and check the images of sources.

    unit: one of BOX_UNITS.
    sizes: (height, width) by image id, for sources without sizes.
    source, wanted: a dataset with the images, and those of its images to import. Without a dataset
        the ids follow from the keys.

    Raises DataError for a duplicate or missing id, and for unequal numbers of channels.
    """
    listed = [(reader, entry) for reader in readers for entry in reader.entries()]
    if not listed:
        raise DataError(
            f"{', '.join(str(reader.path) for reader in readers)}: no image found; "
            "docs/guide.md has the names that each format needs"
        )
    for reader, entry in listed:
        _check_entry(reader, entry)
    chosen = _match(listed, source, wanted) if source else map(_image_of_key, listed)
    images: list[Image] = []
    items: dict[int, Item] = {}
    first = None
    regions = 0
    for image, (reader, entry) in zip(chosen, listed, strict=True):
        if image is None:
            continue
        where = f"{reader.where(entry)}, image {image.id}"
        if image.id in items:
            other = items[image.id]
            raise DataError(
                f"{where}: the id is there twice, also in {other.reader.where(other.entry)}; "
                "remove one of them"
            )
        layout = layout_of(entry.shape, where)
        boxes = "cells" if layout.grid else "none"
        if entry.has_boxes and unit != "none":
            boxes = "given"
        first = first or (layout.channels, boxes, where)
        _check_equal(first, layout.channels, boxes, where)
        items[image.id] = Item(reader, entry, entry.size or sizes.get(image.id))
        images.append(image)
        regions = max(regions, layout.regions)
    if missing := [image for image in wanted if image.id not in items]:
        raise DataError(_missing_message(missing, wanted, readers))
    assert first is not None  # _match raises an error if no image is left
    if not regions:
        raise DataError(f"{first[2]} and all other images have no regions")
    return Imported(tuple(images), items, regions, first[0], first[1], len(listed) - len(images))


def _check_entry(reader: Reader, entry: Entry) -> None:
    """Raise DataError if the key or the size of an entry is invalid."""
    if not entry.key.strip():
        raise DataError(f"{reader.where(entry)} has no image id")
    try:
        entry.key.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{entry.key!r} in {reader.path} is not UTF-8; rename it") from error
    if entry.size is not None and min(entry.size) < 1:
        height, width = entry.size
        raise DataError(
            f"{reader.where(entry)}, image {entry.key}: the size of the image is {width} x "
            f"{height} pixels"
        )


def _check_equal(first: tuple[int, str, str], channels: int, boxes: str, where: str) -> None:
    if channels != first[0]:
        raise DataError(f"{where}: {channels} channels; {first[2]} has {first[0]}")
    if boxes != first[1]:
        texts = {"given": "boxes", "cells": "no boxes, but a grid", "none": "no boxes"}
        raise DataError(
            f"{where} has {texts[boxes]}; {first[2]} has {texts[first[1]]}. Convert them "
            "separately, or pass --box-unit none"
        )


def _missing_message(
    missing: Sequence[Image], wanted: Sequence[Image], readers: Sequence[Reader]
) -> str:
    first = ", ".join(f"{image.id} ({image.name})" for image in missing[:5])
    return (
        f"{', '.join(str(reader.path) for reader in readers)}: {len(missing):,} of {len(wanted):,} "
        f"images of the dataset are missing: image {first}{', ...' if len(missing) > 5 else ''}; "
        "pass all files of the source, a --split, or leave images out with --exclude-ids"
    )


# --------------------------------------------------------------------------------------------- ids


def id_of_key(key: str) -> int:
    """Return the id of an image without a dataset.

    A whole number is the id, and so is the number in a COCO name such as
    COCO_val2014_000000391895. Otherwise the id is `image_id(key)`.
    """
    last, photograph = _without_suffix(key.rpartition("/")[2])
    if coco := COCO_NAME.fullmatch(last):
        return int(coco[1])
    is_number = last.isascii() and last.isdigit() and len(last) < 19
    return int(last) if is_number and not photograph else image_id(key)


def _without_suffix(name: str) -> tuple[str, bool]:
    """Remove the suffix of a photograph. Return the name, and whether it had one."""
    stem, dot, suffix = name.rpartition(".")
    photograph = f"{dot}{suffix}".lower() in {*SUFFIXES, *HEIC}
    return (stem, True) if photograph else (name, False)


def _image_of_key(listed: tuple[Reader, Entry]) -> Image:
    reader, entry = listed
    return Image(id_of_key(entry.key), entry.key, reader.path, "all", ())


def _match(
    listed: Sequence[tuple[Reader, Entry]], source: Source, wanted: Sequence[Image]
) -> list[Image | None]:
    """Return the image of each entry in the dataset; None if it is not wanted.

    All entries are matched by the names of the photographs, or all by their ids: by what fits more.
    Raises DataError if nothing fits.
    """
    by_name = _by_name(source.images)
    keys = [_without_suffix(entry.key)[0] for _, entry in listed]
    named = [by_name.get(loose(key)) or by_name.get(loose(key.rpartition("/")[2])) for key in keys]
    numbered = [source.by_id.get(id_of_key(entry.key)) for _, entry in listed]
    chosen = max(named, numbered, key=lambda images: len(images) - images.count(None))
    ids = {image.id for image in wanted}
    chosen = [image if image is not None and image.id in ids else None for image in chosen]
    if not any(chosen):
        reader, entry = listed[0]
        raise DataError(
            f"{reader.path}: none of its {len(listed):,} images, such as {entry.key}, is among the "
            f"{len(wanted):,} of the dataset, such as image {wanted[0].id} ({wanted[0].name})"
        )
    return chosen


def _by_name(images: Iterable[Image]) -> dict[str, Image | None]:
    """Return images by relative path, and by file name if it is unique, without suffix and case."""
    by_path: dict[str, Image | None] = {}
    by_file: dict[str, Image | None] = {}
    for image in images:
        path = loose(_without_suffix(image.name)[0])
        file = path.rpartition("/")[2]
        by_path[path] = None if path in by_path else image
        by_file[file] = None if file in by_file else image
    return by_file | by_path


# ------------------------------------------------------------------------------------------- sizes


def read_sizes(files: Iterable[Path]) -> dict[int, tuple[int, int]]:
    """Return (height, width) by image id, from JSON files like COCO's caption files.

    {"images": [{"id" or "cocoid" or "imgid", "height", "width"}]}
    """
    sizes = {}
    for file in files:
        for entry in read_json(file, what="a file with the sizes of images")["images"]:
            id_ = next((entry[name] for name in ("cocoid", "id", "imgid") if name in entry), None)
            where = f"image {id_} in {file}"
            size = entry.get("height"), entry.get("width")
            if not all(type(value) is int and value > 0 for value in size):
                raise DataError(f"{where}: height and width are {size}, not numbers of pixels")
            sizes[check_id(id_, where)] = size
    return sizes
