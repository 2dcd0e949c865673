"""Read given boxes of photographs, from a file in COCO's annotation format.

    {"images": [{"id", "file_name", "width", "height"}],
     "annotations": [{"image_id", "bbox": [x, y, width, height], "category_id", "score"}],
     "categories": [{"id", "name"}]}

Lengths are in pixels of the upright photograph. `score`, 0 to 1, is optional; it is 1 if absent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import DataError
from data.sources import Image, check_id, check_name, parse_json, same_photograph

MAX_COUNT = 32767  # largest int16, the type of the counts and labels of a cache


class ImageBoxes(NamedTuple):
    """The boxes of one photograph.

    boxes: [n,4] float32, x0 y0 x1 y1 in 0..1. scores: [n] float32. labels: [n] int64, from 1.
    size: (height, width) of the photograph in pixels.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    size: tuple[int, int]


class GivenBoxes(NamedTuple):
    """The boxes of a dataset's photographs.

    by_id: by image id. classes: names of the labels; 0 is "background". digest: of the file.
    largest: the largest number of boxes of an image in the file, at least 1.
    """

    by_id: Mapping[int, ImageBoxes]
    classes: tuple[str, ...]
    digest: str
    largest: int


def read_boxes(file: Path, images: Sequence[Image]) -> GivenBoxes:
    """Read the boxes of `images`.

    An image of the file belongs to the photograph with the same id and file name, else to that with
    the same path, else to the only photograph with the same file name.

    Raises DataError if the file is not in the format, and if it lacks an image of `images`.
    """
    content = parse_json(file)
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), list) and all(isinstance(e, dict) for e in content[name])
        for name in parts
    ):
        raise DataError(
            f"{file} is not in COCO's annotation format: it must be a JSON object with the lists "
            f"{', '.join(parts)}"
        )
    labels, classes = _categories(file, content["categories"])
    annotations: dict[int, list[dict]] = defaultdict(list)
    for number, entry in enumerate(content["annotations"]):
        image = check_id(entry.get("image_id"), f"{file}: annotations[{number}]")
        annotations[image].append(entry)
    by_id: dict[int, tuple[str, ImageBoxes]] = {}
    for number, entry in enumerate(content["images"]):
        where = f"{file}: images[{number}]"
        name = check_name(entry.get("file_name"), where)
        size = (
            _pixels(entry.get("height"), "height", where),
            _pixels(entry.get("width"), "width", where),
        )
        image = check_id(entry.get("id"), where)
        if image in by_id:
            raise DataError(f"{where}: id {image} occurs twice")
        by_id[image] = name, _image_boxes(file, annotations.pop(image, []), labels, size)
    if annotations:
        raise DataError(f"{file}: annotations of image {next(iter(annotations))}, not in images")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    largest = max([1, *(len(boxes.boxes) for _, boxes in by_id.values())])
    return GivenBoxes(_of_images(file, images, by_id), classes, digest, largest)


def _categories(file: Path, entries: Sequence[dict]) -> tuple[dict[int, int], tuple[str, ...]]:
    """Return the label of each category id, and the names of the labels."""
    if len(entries) > MAX_COUNT:
        raise DataError(f"{file}: {len(entries):,} categories; a cache has at most {MAX_COUNT:,}")
    labels: dict[int, int] = {}
    classes = ["background"]
    for number, entry in enumerate(entries):
        where = f"{file}: categories[{number}]"
        id_, name = check_id(entry.get("id"), where, "category"), entry.get("name")
        if id_ in labels:
            raise DataError(f"{where}: id {id_} occurs twice")
        if not isinstance(name, str):
            raise DataError(f"{where}: name is {json.dumps(name)[:80]}, not a text")
        labels[id_] = len(classes)
        classes.append(name)
    return labels, tuple(classes)


def _image_boxes(
    file: Path, entries: Sequence[dict], labels: Mapping[Any, int], size: tuple[int, int]
) -> ImageBoxes:
    height, width = size
    boxes, scores, numbers = [], [], []
    if len(entries) > MAX_COUNT:
        raise DataError(
            f"{file}: image {entries[0]['image_id']} has {len(entries):,} boxes; a cache has at "
            f"most {MAX_COUNT:,}"
        )
    for entry in entries:
        box, score = entry.get("bbox"), entry.get("score", 1.0)
        where = f"{file}: annotation of image {entry['image_id']}"
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(_is_number(value) for value in (*box, score))
        ):
            raise DataError(f"{where}: bbox is {box} and score {score}; bbox must be 4 numbers")
        if not 0 <= score <= 1:
            raise DataError(f"{where}: score is {score}; it must be 0 to 1")
        x, y, w, h = box
        if w <= 0 or h <= 0 or x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            raise DataError(
                f"{where}: bbox {box} is not inside the photograph of {width}x{height} pixels"
            )
        category = entry.get("category_id")
        if type(category) is not int or category not in labels:
            raise DataError(f"{where}: category_id {category!r} is not in categories")
        boxes.append([x / width, y / height, (x + w) / width, (y + h) / height])
        scores.append(score)
        numbers.append(labels[category])
    return ImageBoxes(
        np.array(boxes, np.float32).reshape(-1, 4).clip(0, 1),
        np.array(scores, np.float32),
        np.array(numbers, np.int64),
        (height, width),
    )


def _is_number(value: Any) -> bool:
    # a larger int has no float
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _pixels(value: Any, name: str, where: str) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise DataError(f"{where}: {name} is {value}, not a length in pixels")
    return value


def _of_images(
    file: Path, images: Sequence[Image], by_id: Mapping[int, tuple[str, ImageBoxes]]
) -> dict[int, ImageBoxes]:
    by_name: dict[str, list[ImageBoxes]] = defaultdict(list)
    by_path: dict[str, list[ImageBoxes]] = defaultdict(list)
    for name, boxes in by_id.values():
        by_path[name].append(boxes)
        by_name[name.rpartition("/")[2]].append(boxes)
    result, missing = {}, []
    for image in images:
        with_id = by_id.get(image.id)
        same_name = by_path.get(image.name) or by_name.get(image.name.rpartition("/")[2], [])
        if with_id is not None and same_photograph(with_id[0], image.name):
            result[image.id] = with_id[1]
        elif len(same_name) == 1:
            result[image.id] = same_name[0]
        else:
            missing.append(image.name)
    if missing:
        raise DataError(
            f"{file} has no entry in images, or several, for {len(missing):,} of {len(images):,} "
            f"photographs: {', '.join(missing[:5])}; write one entry for each path (an image "
            "without annotations is one region)"
        )
    return result
