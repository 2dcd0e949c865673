"""Turn the arrays of an imported image into a row of a cache, with all checks of their values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data import DataError
from data.imports.interface import Arrays, Entry

BOX_UNITS = ("pixel", "fraction", "none")
MOST_REGIONS = np.iinfo(np.int16).max  # the type of `counts` in a cache
LARGEST = float(np.finfo(np.float16).max)
TOLERANCE = 0.01  # how far a box may reach over the edge, relative to the image; at least a pixel


class Layout(NamedTuple):
    """Number of regions and channels, and the rows and columns of a grid (None: no grid)."""

    regions: int
    channels: int
    grid: tuple[int, int] | None


def layout_of(shape: tuple[int, ...], where: str) -> Layout:
    """Return the layout of features [C], [R,C] or [rows,columns,C]; leading axes may have length 1.

    Raises DataError for another shape.
    """
    axes = shape
    while len(axes) > 2 and axes[0] == 1:
        axes = axes[1:]
    expected = "[channels], [regions, channels] or [rows, columns, channels]"
    if not 1 <= len(axes) <= 3 or not axes[-1]:
        raise DataError(f"{where}: the features have shape {shape}, not {expected}")
    if len(axes) == 3 and axes[2] < axes[0]:
        raise DataError(
            f"{where}: the features have shape {shape}; a grid is [rows, columns, channels]. They "
            "seem to have the channels first: transpose them"
        )
    regions = int(np.prod(axes[:-1]))
    if regions > MOST_REGIONS:
        raise DataError(f"{where}: {regions:,} regions; a cache has at most {MOST_REGIONS:,}")
    return Layout(regions, axes[-1], axes[:2] if len(axes) == 3 else None)


def row_of(
    entry: Entry, arrays: Arrays, unit: str, size: tuple[int, int] | None, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return features [R,C] float16 and boxes [R,4] float32 in 0..1.

    Without boxes, a grid has its cells as boxes, and every other region the whole image.

    unit: one of BOX_UNITS; "none": ignore the boxes.
    size: (height, width) of the image, for boxes in pixels.

    Raises DataError if a value is NaN, infinite, or too large for float16, or if a box is invalid.
    """
    if arrays.features.shape != entry.shape:
        raise DataError(f"{where}: the file changed while it was read")
    layout = layout_of(entry.shape, where)
    features = _as_float16(arrays.features.reshape(layout.regions, layout.channels), where)
    if arrays.boxes is not None and unit != "none":
        if arrays.boxes.shape != (layout.regions, 4):
            raise DataError(
                f"{where}: the boxes have shape {arrays.boxes.shape}, not ({layout.regions}, 4)"
            )
        return features, _fractions(arrays.boxes, size if unit == "pixel" else None, where)
    if layout.grid:
        return features, _cells(*layout.grid)
    return features, np.tile(np.array([0, 0, 1, 1], np.float32), (layout.regions, 1))


def _as_float16(features: np.ndarray, where: str) -> np.ndarray:
    _check_real(features, "features", where)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = features.astype(np.float16)
    if np.isfinite(rounded).all():
        return rounded
    region, channel = np.argwhere(~np.isfinite(rounded))[0]
    value = features[region, channel]
    if np.isfinite(value):
        raise DataError(
            f"{where}: region {region} has the value {value:.6g}, too large for float16 (at most "
            f"{LARGEST:.0f}); scale the features"
        )
    raise DataError(f"{where}: region {region} has the value {value}; extract this image again")


def _check_real(array: np.ndarray, what: str, where: str) -> None:
    if array.dtype.kind not in "fiu":
        raise DataError(f"{where}: the {what} have type {array.dtype}, not real numbers")


def _fractions(boxes: np.ndarray, size: tuple[int, int] | None, where: str) -> np.ndarray:
    """Return boxes [R,4] as fractions of the image. size: None if they are fractions already."""
    _check_real(boxes, "boxes", where)
    height, width = size or (1, 1)
    if size and len(boxes) and boxes.max() <= 1 < max(size):
        raise DataError(
            f"{where}: no coordinate of a box is above 1; they seem to be fractions, not pixels: "
            "pass --box-unit fraction"
        )
    fractions = boxes.astype(np.float64) / [width, height, width, height]
    pixel = 1 / np.array([width, height] * 2) if size else 0
    over = np.maximum(TOLERANCE, pixel)
    start, end = fractions[:, :2], fractions[:, 2:]
    inside = (fractions >= -over) & (fractions <= 1 + over)  # also False for NaN
    valid = inside.all(axis=1) & (start <= end).all(axis=1)
    if not valid.all():
        number = int(np.argmin(valid))
        box = " ".join(f"{value:g}" for value in boxes[number].tolist())
        unit = f"{width} x {height} pixels" if size else "fractions"
        raise DataError(
            f"{where}: box {number} is {box}, not x0 y0 x1 y1 inside the image ({unit}); correct "
            "it, or pass --box-unit none to leave all boxes out"
        )
    return fractions.clip(0, 1).astype(np.float32)


def _cells(rows: int, columns: int) -> np.ndarray:
    """Return the boxes [rows*columns,4] of the cells of a grid over the whole image, row by row."""
    y, x = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    cells = np.stack([x / columns, y / rows, (x + 1) / columns, (y + 1) / rows], axis=1)
    return cells.astype(np.float32)
