"""What the reader of a format of imported features has to do.

A reader first lists the images of a source, without their features. Then it reads the features,
one image at a time. Therefore a source of any size needs little memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class Entry(NamedTuple):
    """One image of a source.

    key: the name or the number of the image, as the source writes it.
    place: where the reader finds the image.
    shape: of the features: [C], [R,C] or [rows,columns,C].
    has_boxes: whether the source has a box for each region.
    size: (height, width) of the photograph in pixels; None if the source does not have it.
    """

    key: str
    place: Any
    shape: tuple[int, ...]
    has_boxes: bool
    size: tuple[int, int] | None = None


class Arrays(NamedTuple):
    """The arrays of one image as the source has them.

    features: of the shape in `Entry`, any type of real numbers.
    boxes: [R,4], x0 y0 x1 y1; None without boxes.
    """

    features: np.ndarray
    boxes: np.ndarray | None


class Reader(Protocol):
    """Reads one source. All methods raise DataError for damaged content."""

    path: Path

    def entries(self) -> Iterator[Entry]:
        """Yield the images of the source, without reading their features."""
        ...

    def where(self, entry: Entry) -> str:
        """Return the file and the place in it, for messages."""
        ...

    def read(self, entries: Iterable[Entry]) -> Iterator[Arrays]:
        """Yield the arrays of images, in that order."""
        ...
