"""Read LMDB databases whose values are .npz or .npy files, as self-critical.pytorch writes them.

The key of a value is the key of the image, with or without the suffix .npz or .npy. Entries like
`__keys__` and `__len__` are left out.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data import DataError
from data.imports.interface import Arrays, Entry
from data.imports.numpy_file import numpy_arrays, numpy_entry

INSTALL = "pip install 'onceover[convert]'"


class LmdbReader:
    """Reads a database: a folder with data.mdb, or one file. Needs the package lmdb."""

    def __init__(self, path: Path) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise DataError(f"{path}: reading LMDB needs the package lmdb: {INSTALL}") from error
        self.path, self.lmdb = path, lmdb

    def entries(self) -> Iterator[Entry]:
        with self._open() as transaction:
            for key, value in transaction.cursor():
                if not (key.startswith(b"__") and key.endswith(b"__")):
                    name = key.decode(errors="replace")
                    entry = numpy_entry(name, io.BytesIO(value), self._where(name))
                    stem = name.removesuffix(".npz").removesuffix(".npy")
                    yield entry._replace(key=stem, place=(key, entry.place))

    def where(self, entry: Entry) -> str:
        return f"{self.path}, key {entry.place[0].decode(errors='replace')}"

    def read(self, entries: Iterable[Entry]) -> Iterator[Arrays]:
        with self._open() as transaction:
            for entry in entries:
                key, place = entry.place
                where = self._where(key.decode(errors="replace"))
                value = transaction.get(key)
                if value is None:
                    raise DataError(f"{where} was removed while the database was read")
                yield numpy_arrays(entry._replace(place=place), io.BytesIO(value), where)

    def _where(self, key: str) -> str:
        return f"{self.path}, image {key},"

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with (
                self.lmdb.open(
                    str(self.path), subdir=self.path.is_dir(), readonly=True, lock=False,
                    readahead=False, create=False,
                ) as database,
                database.begin() as transaction,
            ):  # fmt: skip
                self._check_length(database)
                yield transaction
        except self.lmdb.Error as error:
            raise DataError(f"{self.path} cannot be read as LMDB: {error}") from error

    def _check_length(self, database: Any) -> None:
        """Raise DataError if the file is cut; reading the missing part would end the process."""
        path = self.path / "data.mdb" if self.path.is_dir() else self.path
        pages = database.info()["last_pgno"] + 1
        if pages * database.stat()["psize"] > path.stat().st_size:
            raise DataError(f"{path} is cut: its end is missing; copy or download it again")
