"""Read HDF5 files with datasets or a group per image.

    ID_features [R,C], ID_boxes [R,4]        in the root: M2 Transformer (Cornia et al. 2020)
    NAME/features [R,C], boxes [R,4]         a group per image
    NAME/descriptors [C,R], keypoints [R,2]  hloc's local features; a box is the point itself
    NAME/global_descriptor [C]               hloc's global features: one region
    NAME/image_size                          width, height (hloc)

NAME may contain slashes, as in `db/1.jpg`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np

from data import DataError
from data.cache.reader import system_errors
from data.imports.interface import Arrays, Entry
from data.imports.numpy_file import reading

SUFFIX = "_features"
FEATURES = ("features", "descriptors", "global_descriptor")
BOXES = ("boxes", "bboxes", "keypoints")


class Hdf5Reader:
    """Reads one file. The place of an entry is the names of its datasets (features, boxes)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> Iterator[Entry]:
        with self._open() as file, reading(str(self.path)), system_errors(self.path):
            names = set(file)
            if any(name.endswith(SUFFIX) for name in names):
                yield from self._datasets(file, names)
            else:
                yield from self._groups(file, "")

    def where(self, entry: Entry) -> str:
        return f"{self.path}, {entry.place[0]}"

    def read(self, entries: Iterable[Entry]) -> Iterator[Arrays]:
        with self._open() as file:
            for entry in entries:
                where = f"{self.where(entry)}, image {entry.key},"
                with reading(where), system_errors(self.path):
                    arrays = self._arrays(file, *entry.place)
                yield arrays

    def _arrays(self, file: h5py.File, features: str, boxes: str | None) -> Arrays:
        array = file[features][()]
        if features.endswith("/descriptors"):
            array = array.T
        points = None if boxes is None else file[boxes][()]
        if boxes is not None and boxes.endswith("/keypoints"):
            points = np.concatenate([points, points], axis=1)
        return Arrays(array, points)

    def _open(self) -> h5py.File:
        with reading(str(self.path)), system_errors(self.path):
            return h5py.File(self.path, "r", locking=False)

    def _datasets(self, file: h5py.File, names: set[str]) -> Iterator[Entry]:
        for name in file:
            key = name.removesuffix(SUFFIX)
            if name.endswith("_boxes") and name.removesuffix("_boxes") + SUFFIX not in names:
                image = name.removesuffix("_boxes")
                raise DataError(f"{self.path}: image {image} has {name}, but no {image}{SUFFIX}")
            if key != name:
                boxes = f"{key}_boxes" if f"{key}_boxes" in names else None
                yield Entry(key, (name, boxes), self._shape(file, name), boxes is not None)

    def _groups(self, group: h5py.Group, key: str) -> Iterator[Entry]:
        """Yield the groups with features, at any depth. Raises DataError for a group with none."""
        features = next((name for name in FEATURES if name in group), None)
        if key and features is not None and isinstance(group[features], h5py.Dataset):
            yield self._group(group, key, features)
            return
        members = (name for name in group if isinstance(group[name], h5py.Group))
        empty = True
        for name in members:
            empty = False
            yield from self._groups(group[name], f"{key}/{name}" if key else name)
        if empty and key:
            raise DataError(
                f"{self.path}: the group of image {key} has none of {', '.join(FEATURES)}"
            )

    def _group(self, group: h5py.Group, key: str, features: str) -> Entry:
        shape = self._shape(group, features)
        boxes = None
        if features != "global_descriptor":
            boxes = next((name for name in BOXES if name in group), None)
        size = None
        if "image_size" in group:
            width, height = group["image_size"][()].tolist()
            size = int(height), int(width)
        place = f"{key}/{features}", None if boxes is None else f"{key}/{boxes}"
        if features == "descriptors":
            shape = shape[::-1]
        return Entry(key, place, shape, boxes is not None, size)

    def _shape(self, group: h5py.Group, name: str) -> tuple[int, ...]:
        data = group[name]
        if not isinstance(data, h5py.Dataset) or data.shape is None:
            raise DataError(f"{self.path}: {data.name} is not an array")
        return data.shape
