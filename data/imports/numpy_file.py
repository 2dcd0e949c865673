"""Read .npy and .npz files from a disk or from memory. Pickled objects are never read.

The shape of an array is read without the array, so that listing a large source is fast.
"""

from __future__ import annotations

import contextlib
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data import DataError
from data.cache.reader import BROKEN
from data.imports.interface import Arrays, Entry

# Names of the arrays in an .npz file. feat: self-critical.pytorch; x, bbox, image_h, image_w:
# bottom-up-attention.pytorch and openvqa.
FEATURES = ("feat", "features", "x")
BOXES = ("boxes", "bbox")
# Errors that zipfile and numpy raise on a damaged file, in addition to BROKEN. numpy parses the
# header of an array as Python source.
BROKEN_NUMPY = (zipfile.BadZipFile, zlib.error, EOFError, SyntaxError, tokenize.TokenError)


class NumpyFile:
    """An open .npz file, or an .npy file, whose array has the name ""."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.zip = file, None
        if file.read(2) == b"PK":
            self.zip = zipfile.ZipFile(file)
        self.names = (
            [name.removesuffix(".npy") for name in self.zip.namelist()] if self.zip else [""]
        )

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(name) as stream:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, _, dtype = read[version](stream)
            if dtype.hasobject:
                raise ValueError(f"{name or 'the array'} consists of Python objects")
            return shape

    def array(self, name: str) -> np.ndarray:
        with self._open(name) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        if self.zip is None:
            self.file.seek(0)
            yield self.file
        else:
            with self.zip.open(f"{name}.npy") as stream:
                yield stream  # type: ignore[misc]

    def only(self, names: tuple[str, ...], what: str) -> str:
        """Return the array with one of the names, else the only array of the file."""
        if found := [name for name in names if name in self.names]:
            return found[0]
        if len(self.names) == 1:
            return self.names[0]
        raise ValueError(
            f"it has the arrays {', '.join(self.names)}; {what} must be called {' or '.join(names)}"
        )


class NumpyPlace(NamedTuple):
    """The arrays of an image in a file: names of features and boxes ("none" without boxes).

    transposed: whether the features are [C,R], as in openvqa's files.
    """

    features: str
    boxes: str
    transposed: bool


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise errors on damaged content as DataError with the file and the id."""
    try:
        yield
    except DataError:
        raise
    except (*BROKEN, *BROKEN_NUMPY) as error:
        if getattr(error, "errno", None):
            raise
        raise DataError(f"{where} cannot be read: {error or type(error).__name__}") from error


def numpy_entry(key: str, file: BinaryIO, where: str) -> Entry:
    """Return the entry of an image from its .npz or .npy file."""
    with reading(where):
        opened = NumpyFile(file)
        features = opened.only(FEATURES, "the features")
        shape = opened.shape(features)
        boxes = next((name for name in BOXES if name in opened.names), "none")
        transposed = False
        if boxes != "none" and features == "x" and len(shape) == 2:
            count = opened.shape(boxes)[0]
            transposed = shape[0] != count and shape[1] == count
        size = None
        if {"image_h", "image_w"} <= {*opened.names}:
            size = int(opened.array("image_h")), int(opened.array("image_w"))
        place = NumpyPlace(features, boxes, transposed)
        return Entry(key, place, shape[::-1] if transposed else shape, boxes != "none", size)


def numpy_arrays(entry: Entry, file: BinaryIO, where: str) -> Arrays:
    """Read the features and the boxes of an image from its file."""
    place: NumpyPlace = entry.place
    with reading(where):
        opened = NumpyFile(file)
        features = opened.array(place.features)
        boxes = None if place.boxes == "none" else opened.array(place.boxes)
        return Arrays(features.T if place.transposed else features, boxes)


def read_only_array(path: Path, names: tuple[str, ...], what: str, where: str) -> np.ndarray:
    """Read the array with one of the names, else the only array of a file."""
    with reading(where), open(path, "rb") as file:
        opened = NumpyFile(file)
        return opened.array(opened.only(names, what))
