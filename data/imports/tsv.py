"""Read tab-separated files with base64 columns: bottom-up attention (Anderson et al. 2018), LXMERT.

One line per image, without a header line. `boxes` is [num_boxes,4] float32 in pixels, x0 y0 x1 y1;
`features` is [num_boxes,C] float32. Both are the bytes of the array in base64.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DataError
from data.imports.interface import Arrays, Entry

COLUMNS = {
    6: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),  # Anderson et al.
    10: ("image_id", "image_h", "image_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf",
         "num_boxes", "boxes", "features"),  # LXMERT
}  # fmt: skip
LONGEST_LINE = 1 << 28  # bytes; bounds the memory for a file that is not tab-separated


class _Line(NamedTuple):
    number: int
    offset: int


class TsvReader:
    """Reads a .tsv file. The place of an entry is its line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> Iterator[Entry]:
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if line.strip():
                    yield self._entry(line, _Line(number, offset))
                offset += len(line)

    def where(self, entry: Entry) -> str:
        return f"{self.path}, line {entry.place.number}"

    def read(self, entries: Iterable[Entry]) -> Iterator[Arrays]:
        with open(self.path, "rb") as file:
            for entry in entries:
                where = f"{self.where(entry)}, image {entry.key}"
                file.seek(entry.place.offset)
                columns = _columns(file.readline(LONGEST_LINE), where)
                features, boxes = (_array(columns[n], n, where) for n in ("features", "boxes"))
                if features.size != np.prod(entry.shape):
                    raise DataError(f"{where}: the file changed while it was read")
                yield Arrays(features.reshape(entry.shape), boxes.reshape(-1, 4))

    def _entry(self, line: bytes, place: _Line) -> Entry:
        where = f"{self.path}, line {place.number}"
        columns = _columns(line, where)
        key = columns["image_id"].decode(errors="replace")
        where += f", image {key}"
        height, width, regions = (
            _number(columns[name], name, where) for name in ("image_h", "image_w", "num_boxes")
        )
        lengths = {name: _decoded_length(columns[name]) for name in ("features", "boxes")}
        if lengths["boxes"] != 16 * regions:
            raise DataError(
                f"{where}: boxes has {lengths['boxes']} bytes, not {16 * regions} for "
                f"{regions} boxes of four float32"
            )
        if not regions or not lengths["features"] or lengths["features"] % (4 * regions):
            raise DataError(
                f"{where}: features has {lengths['features']} bytes, which is no array of "
                f"{regions} rows of float32"
            )
        return Entry(
            key, place, (regions, lengths["features"] // (4 * regions)), True, (height, width)
        )


def _columns(line: bytes, where: str) -> dict[str, bytes]:
    values = line.rstrip(b"\r\n").split(b"\t")
    if len(values) not in COLUMNS:
        raise DataError(
            f"{where} has {len(values)} columns; a line has the 6 columns "
            f"{', '.join(COLUMNS[6])}, or the 10 of LXMERT. The file may be incomplete"
        )
    return dict(zip(COLUMNS[len(values)], values, strict=True))


def _number(value: bytes, name: str, where: str) -> int:
    if not value.isdigit() or len(value) > 9:
        raise DataError(f"{where}: {name} is {value[:20].decode(errors='replace')!r}, not a number")
    return int(value)


def _decoded_length(text: bytes) -> int:
    """Number of bytes that a base64 text decodes to."""
    return len(text) // 4 * 3 - (len(text) - len(text.rstrip(b"=")))


def _array(text: bytes, name: str, where: str) -> np.ndarray:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: {name} is not float32 in base64: {error}") from error
