"""The formats of imported features, and which one a path has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py

from data import DataError
from data.cache.reader import shard_paths, system_errors
from data.imports.folder import FolderReader, keys
from data.imports.hdf5 import Hdf5Reader
from data.imports.interface import Reader
from data.imports.lmdb_file import LmdbReader
from data.imports.numpy_file import reading
from data.imports.tsv import TsvReader

FORMATS: dict[str, Callable[[Path], Reader]] = {
    "tsv": TsvReader,
    "npz": lambda path: FolderReader(path, ".npz"),
    "npy": lambda path: FolderReader(path, ".npy"),
    "lmdb": LmdbReader,
    "hdf5": Hdf5Reader,
}
FOLDERS = ("npz", "npy")


def open_reader(path: Path, name: str | None = None, boxes: Path | None = None) -> Reader:
    """Open a source of imported features.

    name: the format; None: detect it from the path.
    boxes: folder of the boxes, for `npz` and `npy` only.

    Raises DataError if the path does not exist or has no known format.
    """
    for each in (path, boxes):
        if each is not None and not each.exists():
            raise DataError(f"{each} does not exist")
    name = name or detect(path)
    if path.is_dir() != (name in FOLDERS) and name != "lmdb":
        raise DataError(f"{path} is not a {'folder' if name in FOLDERS else 'file'} ({name})")
    if boxes is None:
        return FORMATS[name](path)
    if name not in FOLDERS:
        raise DataError(
            f"--boxes is for the formats npz and npy; {path} ({name}) has its own boxes"
        )
    if not boxes.is_dir():
        raise DataError(f"--boxes {boxes} is not a folder")
    return FolderReader(path, f".{name}", boxes)


def detect(path: Path) -> str:
    """Return the format of a path from its suffix or content. Raises DataError if unknown."""
    known = f"known formats: {', '.join(FORMATS)}; pass --format to choose one"
    if path.is_file():
        if ".tsv" in path.suffixes:  # the published files are also called .tsv.0, .tsv.1
            return "tsv"
        if path.suffix == ".lmdb":
            return "lmdb"
        if not h5py.is_hdf5(path):
            raise DataError(f"{path} has no known format; {known}")
        _refuse_cache(path)
        return "hdf5"
    if (path / "data.mdb").exists():
        return "lmdb"
    if shard_paths(path):
        raise DataError(f"{path} is already a cache; pass it as --features")
    found = [name for name in FOLDERS if next(keys(path, f".{name}"), None) is not None]
    if len(found) != 1:
        has = "both .npz and .npy files" if found else "no .npz, .npy or data.mdb file"
        raise DataError(f"{path} has {has}; {known}")
    return found[0]


def _refuse_cache(path: Path) -> None:
    with reading(str(path)), system_errors(path), h5py.File(path, "r", locking=False) as file:
        if {"format", "identity"} <= {*file.attrs}:
            raise DataError(f"{path} is already a cache; pass it as --features")
