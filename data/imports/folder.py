"""Read folders with one .npz or .npy file per image, such as cocobu_att of self-critical.pytorch.

The key of an image is the file name without .npz or .npy. The boxes are in the same .npz file, or
in a second folder under the same names (cocobu_box).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import DataError
from data.imports.interface import Arrays, Entry
from data.imports.numpy_file import BOXES, numpy_arrays, numpy_entry, read_only_array


class FolderReader:
    """Reads the files with one suffix in a folder and its subfolders.

    boxes: folder of the boxes; None: they are in the same files, or there are none.
    """

    def __init__(self, path: Path, suffix: str, boxes: Path | None = None) -> None:
        self.path, self.suffix, self.boxes = path, suffix, boxes
        self.box_files: dict[str, Path] = {}

    def entries(self) -> Iterator[Entry]:
        if self.boxes is not None:
            self._list_boxes(self.boxes)
        for key in keys(self.path, self.suffix):
            where = self._where(key)
            with open(self._file(key), "rb") as file:
                entry = numpy_entry(key, file, where)
            if self.boxes is not None and key not in self.box_files:
                raise DataError(f"{where} has no boxes: {self.boxes / key}.npy does not exist")
            yield entry._replace(has_boxes=entry.has_boxes or self.boxes is not None)

    def _list_boxes(self, folder: Path) -> None:
        """List the files of boxes. Raises DataError for one without features."""
        for suffix in (".npy", ".npz"):
            for key in keys(folder, suffix):
                self.box_files[key] = folder / f"{key}{suffix}"
                if not self._file(key).exists():
                    raise DataError(
                        f"{self.box_files[key]}: image {key} has boxes, but {self._file(key)} "
                        "does not exist"
                    )

    def where(self, entry: Entry) -> str:
        return str(self._file(entry.key))

    def read(self, entries: Iterable[Entry]) -> Iterator[Arrays]:
        for entry in entries:
            with open(self._file(entry.key), "rb") as file:
                arrays = numpy_arrays(entry, file, self._where(entry.key))
            if self.boxes is not None:
                path = self.box_files[entry.key]
                where = f"{path}, image {entry.key},"
                boxes = read_only_array(path, BOXES, "the boxes", where)
                arrays = Arrays(arrays.features, boxes)
            yield arrays

    def _file(self, key: str) -> Path:
        return self.path / f"{key}{self.suffix}"

    def _where(self, key: str) -> str:
        return f"{self._file(key)}, image {key},"


def keys(folder: Path, suffix: str) -> Iterator[str]:
    """Yield the relative paths of the files with a suffix, without the suffix, in order."""

    def stop(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=stop):
        folders.sort()
        relative = Path(place).relative_to(folder)
        for name in sorted(names):
            if name.endswith(suffix) and not name.startswith("."):
                yield (relative / name.removesuffix(suffix)).as_posix()
