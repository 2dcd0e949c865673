"""The feature cache: a folder of complete HDF5 shards, written once, read by any number of
decoders.

A shard (`shard-00000.h5`, about 1,000 images) is written under a temporary name, fsynced and
renamed: a shard that exists is complete. Rows are contiguous and uncompressed, so a reader maps
them without an HDF5 handle.

    features  [N,R,C] float16   zero past counts[n]
    boxes     [N,R,4] float32   x0 y0 x1 y1 in 0..1 of the upright whole original photograph
    counts    [N]     int16
    image_ids [N]     int64
    names     [N]     UTF-8     path relative to the root of the photographs
    sizes     [N,2]   int32     height, width of the original
    crc32     [N]     uint32    of the row's bytes in `features`
    ..._VIEW                    features, boxes, counts and crc32 of each view of the photograph
                                that the provenance names: flip, crop1, color1, ...
    attrs     format, identity, provenance, plan, unreadable (the last four JSON), crc32 (of all but
              `features`)

`features.h5` joins all shards for any h5py user (HDF5 virtual datasets); `unreadable.jsonl` lists
the photographs that have no row and why. `data.cache.writer` writes all of this; here it is read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from data import DataError
from data.sources import Image, same_photograph

FORMAT = 1
PER_IMAGE = ("features", "boxes", "counts", "image_ids", "names", "sizes", "crc32")
# Errors of h5py, json and the checks below for a file that extraction did not write.
BROKEN = (
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)
HEAP = b"GCOL\x01\0\0\0"  # signature and version of a global heap (HDF5 file format, III.E)
HEAP_BLOCK = struct.Struct("<H6xQ")
PER_VIEW = ("features", "boxes", "counts", "crc32")


class Rows(NamedTuple):
    """features [n,R,C] float16, boxes [n,R,4] float32 in 0..1, counts [n] int16."""

    features: np.ndarray
    boxes: np.ndarray
    counts: np.ndarray


class NewerFormat(DataError):
    """A file written by a newer version of this program. It is not damaged."""


class Unreadable(NamedTuple):
    """A photograph without a row, as a line of unreadable.jsonl. `size` and `mtime_ns` of the file
    at that time, -1 if there was none.
    """

    image_id: int
    file_name: str
    reason: str
    size: int = -1
    mtime_ns: int = -1


def views_of(provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the views in a cache besides the photographs as they are."""
    return tuple(provenance.get("views", ()))


def endings(views: Iterable[str]) -> tuple[str, ...]:
    """The suffixes of the datasets in PER_VIEW: "" for the photographs as they are, then one per
    view.
    """
    return "", *(f"_{view}" for view in views)


def datasets_of(provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of all datasets with one row per image."""
    return *PER_IMAGE, *(
        name + end for end in endings(views_of(provenance))[1:] for name in PER_VIEW
    )


def shard_paths(cache: Path) -> list[Path]:
    return sorted(cache.glob("shard-*.h5"))


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raise HDF5's errors that come from the operating system as OSError with number, reason and
    `path`.

    HDF5 writes the number into its message only. What is left says that the content is not HDF5.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        found = re.search(r"errno = (\d+)", str(error))
        number = getattr(error, "errno", None) or (int(found[1]) if found else None)
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def open_shard(path: Path) -> h5py.File:
    """Open a shard to read, without a lock: a shard never changes after it was renamed.

    Raises DataError where the content is not a shard of this version, OSError where the file
    system does not let it be read.
    """
    advice = "it is not a cache of this program"
    if path.match("shard-*.h5"):
        advice = (
            f"remove it and re-run pipeline.extract with --out {path.parent}, which "
            "redoes only what is missing"
        )
    try:
        with system_errors(path):
            file = h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path} cannot be opened as HDF5 ({error}); {advice}") from error
    found = _attribute(file, "format")
    if found != FORMAT:
        file.close()
        newer = isinstance(found, int) and found > FORMAT
        if newer:
            advice = "it was made by a newer version: update this one, or pass another folder"
        kind = NewerFormat if newer else DataError
        raise kind(f"{path} has format {found}, this version reads and writes {FORMAT}; {advice}")
    if _has_endless_heap(path, file):
        file.close()
        raise DataError(
            f"{path} is damaged: a part of it is zeros, as a power cut may leave it; {advice}"
        )
    return file


def _has_endless_heap(path: Path, file: h5py.File) -> bool:
    """Whether HDF5 would never end reading text from this file: a heap of it has a free block of
    size 0.

    HDF5 keeps text of variable length in heaps: the signature, the heap's size (8 bytes), then
    blocks of number (2 bytes), references (2), zeros (4), size (8) and content up to the next
    multiple of 8. Block 0 is the free space; its size includes these 16 bytes. Where zeros follow,
    HDF5 2.0 goes on from a block of size 0 to that same block without end. Features are not
    searched.
    """
    skipped = []
    with contextlib.suppress(*BROKEN):
        for name in [name for name in file if name.startswith("features")]:
            data = file[name].id
            if data.get_offset() is not None:
                skipped.append((data.get_offset(), data.get_offset() + data.get_storage_size()))
    with open(path, "rb") as opened:
        size, start = os.fstat(opened.fileno()).st_size, 0
        for begin, end in [*sorted(skipped), (size, size)]:
            opened.seek(start)
            if _heap_with_empty_block(opened.read(max(0, begin - start))):
                return True
            start = end
    return False


def _heap_with_empty_block(content: bytes) -> bool:
    heap = content.find(HEAP)
    while heap >= 0:
        end = min(heap + int.from_bytes(content[heap + 8 : heap + 16], "little"), len(content))
        block = heap + 16
        while block + 16 <= end:
            number, length = HEAP_BLOCK.unpack_from(content, block)
            if number == 0 and length == 0:
                return True
            if number == 0:
                break
            block += 16 + -(-length // 8) * 8
        heap = content.find(HEAP, heap + 1)
    return False


def _attribute(file: h5py.File, name: str) -> Any:
    """An attribute as a Python value; "none" if it is absent or cannot be read."""
    try:
        value = file.attrs[name]
    except (KeyError, OSError, RuntimeError, TypeError, ValueError):
        return "none"
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


@contextlib.contextmanager
def reading_shard(path: Path) -> Iterator[h5py.File]:
    """Open a shard to read all of it; DataError if some content is not what extraction writes."""
    with open_shard(path) as file:
        try:
            with system_errors(path):
                yield file
        except DataError:
            raise
        except BROKEN as error:
            if getattr(error, "errno", None):
                raise
            raise DataError(
                f"{path} is damaged ({error}); check it with pipeline.extract --verify, make "
                "it again "
                "with --repair"
            ) from error


def cache_header(cache: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Identity and provenance of a cache, from its first shard; None if it has no shard yet."""
    for path in shard_paths(cache):
        with reading_shard(path) as file:
            return read_object(file, "identity"), read_object(file, "provenance")
    return None


def read_object(file: h5py.File, name: str) -> dict[str, Any]:
    """The JSON object of an attribute; ValueError if it is not one."""
    found = json.loads(file.attrs[name])
    if not isinstance(found, dict):
        raise ValueError(f"its attribute {name} is no JSON object")
    return found


def differences(
    wanted: Mapping[str, Any], found: Mapping[str, Any], fields: Iterable[str] = ()
) -> list[str]:
    """The differences between two identities (or provenances), as `field: found, not wanted`."""
    keys = list(fields) or list(dict.fromkeys([*wanted, *found]))
    return [
        f"{key}: {found.get(key)}, not {wanted.get(key)}"
        for key in keys
        if wanted.get(key) != found.get(key)
    ]


def has_same_cells(identity: Mapping[str, Any]) -> bool:
    """Whether all rows of a cache have the same boxes and counts, as grid cells of whole
    photographs do.
    """
    return (identity.get("regions"), identity.get("resize")) == ("grid", "stretch")


def packed_backbone(file: Path) -> bytes | None:
    """The backbone's weights inside a packed cache, as the bytes of a safetensors file."""
    with reading_shard(file) as opened:
        if "backbone" not in opened:
            return None
        weights = opened["backbone"]
        if weights.dtype != np.uint8 or weights.ndim != 1:
            raise ValueError(
                f"backbone is {weights.dtype} {weights.shape}, not the bytes of a file"
            )
        return weights[:].tobytes()


class FeatureCache:
    """Random access by image id to the rows of a cache, or of one packed file; safe to share with
    forked or spawned workers.

    `identity` (equal to be used together), `provenance` (recorded), `ids` int64 [N] in the cache's
    order, `unreadable` {image id: Unreadable}, `shape` (R, C), `views` (those that it
    has).
    Raises DataError where the folder is no cache.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.name == "features.h5" and shard_paths(self.path.parent):
            self.path = self.path.parent
        self.paths = paths = [self.path] if self.path.is_file() else shard_paths(self.path)
        if not paths:
            what = "holds no shard-*.h5" if self.path.is_dir() else "is not there"
            raise DataError(
                f"cache {self.path} {what}; make it with: python -m pipeline.extract ... --out "
                f"{self.path}"
            )
        self._files: list[Path] = []
        # by view (0: as it is), then by file
        self._maps: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []
        self._where: dict[int, tuple[int, int]] = {}
        self._names: dict[int, str] = {}
        self.unreadable: dict[int, Unreadable] = {}
        identity = None
        for path in paths:
            with reading_shard(path) as file:
                if identity is None:
                    identity = file.attrs["identity"]
                    self.identity, self.provenance = (
                        read_object(file, "identity"),
                        read_object(file, "provenance"),
                    )
                    self.views = views_of(self.provenance)
                    self._maps = [[] for _ in endings(self.views)]
                    self.shape = _shape_of(file)
                elif file.attrs["identity"] != identity:
                    what = "; ".join(differences(self.identity, read_object(file, "identity")))
                    raise DataError(
                        f"{path} does not belong to the cache of {paths[0].name} ({what}); "
                        "remove it"
                    )
                self._add(path, file)
                for record in json.loads(file.attrs["unreadable"]):
                    self.unreadable[record[0]] = Unreadable(*record)
        # All whole photographs have the same cells: they are not read row by row.
        self._crops = {
            view for view, name in enumerate(self.views, start=1) if name.startswith("crop")
        }
        self._cells = (
            self._maps[0][0][1][0].copy() if has_same_cells(self.identity) and self._files else None
        )
        for image_id in (
            self._where.keys() & self.unreadable.keys()
        ):  # a later plan was able to read it
            del self.unreadable[image_id]
        self.ids = np.fromiter(self._where, np.int64, len(self._where))

    def _add(self, path: Path, file: h5py.File) -> None:
        ids = file["image_ids"][:].tolist()
        if not ids:
            return
        number = len(self._files)
        self._files.append(path)
        for end in endings(self.views):
            if f"features{end}" not in file:
                raise DataError(
                    f"{path} has no features{end}, as its cache's other files have; remove it "
                    "and extract again"
                )
        _check_layout(path, file, len(ids), self.shape, self.views)
        for maps, end in zip(self._maps, endings(self.views), strict=True):
            features, boxes = _map(file[f"features{end}"], path), _map(file[f"boxes{end}"], path)
            counts = file[f"counts{end}"][:]
            if counts.min() < 0 or counts.max() > self.shape[0]:
                raise ValueError(f"counts{end} are not all in 0 to {self.shape[0]}")
            maps.append((features, boxes, counts))
        for row, (image_id, name) in enumerate(zip(ids, file["names"].asstr()[:], strict=True)):
            self._where[image_id] = (number, row)
            self._names[image_id] = name

    def where(self, image_id: int) -> tuple[Path, int]:
        """The file and row of an image."""
        number, row = self._where[image_id]
        return self._files[number], row

    def name_of(self, image_id: int) -> str:
        """The photograph's path relative to the root of its extraction."""
        return self._names[image_id]

    def dataset(self, captions: Mapping[int, Sequence[str]]) -> Any:
        """A torch Dataset of the images of `captions` (texts by image id), for a DataLoader with
        any number of workers.

        Item i is (features [R,C] float16, boxes [R,4] float32, count, image id, captions);
        DataError here for an image without a row.
        """
        from data.cache.torch_dataset import (
            CachedImages,  # imported here: reading a cache does not need torch
        )

        return CachedImages(self, captions)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, image_id: int) -> bool:
        return image_id in self._where

    def __getitem__(self, image_id: int) -> Rows:
        """One image's features [R,C], boxes [R,4] and count."""
        return Rows(*(part[0] for part in self.rows([image_id])))

    def rows(
        self,
        image_ids: Sequence[int],
        out: Rows | None = None,
        tables_only: bool = False,
        views: Sequence[int] | None = None,
    ) -> Rows:
        """Copies of the rows of `image_ids`, in that order; DataError for an id that the cache has
        not.

        out: arrays of the right shapes to copy into, as `empty_rows` gives; fresh memory costs more
            than the copy.
        tables_only: leave the features as they are in memory, read only boxes and counts.
        views: which view of each, 0 as it is, v the cache's `views[v - 1]`; None: all as they are.
        """
        rows = self.empty_rows(len(image_ids)) if out is None else out
        try:
            found = [self._where[image_id] for image_id in image_ids]
        except KeyError as error:
            raise DataError(self._absent(error.args[0])) from None
        maps = self._maps
        places = [
            (maps[view][number], row)
            for view, (number, row) in zip(views or [0] * len(found), found, strict=True)
        ]
        if not tables_only:
            for target, (parts, row) in zip(rows.features, places, strict=True):
                target[...] = parts[0][row]
        own_boxes: Iterable[int] = range(len(places))
        if self._cells is not None:
            rows.boxes[:], rows.counts[:] = self._cells, len(self._cells)
            own_boxes = [at for at, view in enumerate(views or ()) if view in self._crops]
        for at in own_boxes:
            parts, row = places[at]
            rows.boxes[at], rows.counts[at] = parts[1][row], parts[2][row]
        return rows

    @property
    def feature_bytes(self) -> int:
        """Memory of all features of all views, in bytes."""
        return sum(features.nbytes for maps in self._maps for features, _, _ in maps)

    def keep_in_memory(self, memory: np.ndarray | None = None, filled: bool = False) -> None:
        """Read all features from memory from now on (a pickled cache opens its files again).

        memory: a float16 buffer of `feature_bytes`; None: a new one. filled: another process has
        already filled it.
        """
        memory, start = (
            np.empty(self.feature_bytes // 2, np.float16) if memory is None else memory,
            0,
        )
        for maps in self._maps:
            for number, (features, boxes, counts) in enumerate(maps):
                kept = memory[start : start + features.size].reshape(features.shape)
                if not filled:
                    kept[...] = features
                maps[number] = kept, boxes, counts
                start += features.size

    def empty_rows(self, count: int) -> Rows:
        """Uninitialised arrays for `count` rows."""
        regions, channels = self.shape
        return Rows(
            np.empty((count, regions, channels), np.float16),
            np.empty((count, regions, 4), np.float32),
            np.empty(count, np.int16),
        )

    def select(self, images: Iterable[Image]) -> tuple[list[Image], int]:
        """The images that have rows, and how many are left out because unreadable.jsonl lists them.

        Raises DataError for any other image without a row, and where cache and source name an id
        differently.
        """
        kept, left_out = [], 0
        for image in images:
            if image.id in self.unreadable:
                left_out += 1
                continue
            if image.id not in self._where:
                raise DataError(self._absent(image.id))
            if not same_photograph(self._names[image.id], image.name):
                raise DataError(
                    f"image {image.id} is {self._names[image.id]} in {self.path} and "
                    f"{image.name} in the captions; "
                    "the cache was made from other photographs: pass the --features that "
                    "belong to these captions"
                )
            kept.append(image)
        return kept, left_out

    def require(self, image_id: int) -> None:
        """Raise DataError if the cache has no row for an image."""
        if image_id not in self._where:
            raise DataError(self._absent(image_id))

    def _absent(self, image_id: int) -> str:
        if image_id in self.unreadable:
            record = self.unreadable[image_id]
            return f"image {image_id} ({record.file_name}) could not be read: {record.reason}"
        return (
            f"image {image_id} is not in {self.path} ({len(self)} images); "
            "re-run pipeline.extract over the split that has it (without --limit), with the "
            "same --out"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FeatureCache.__init__(self, state["path"])


def _shape_of(file: h5py.File) -> tuple[int, int]:
    """(R, C) of a shard's features; ValueError if they are not [N,R,C]."""
    shape = file["features"].shape
    if len(shape) != 3 or not shape[2] >= 1:
        raise ValueError(f"features are {shape}, not [images, regions, channels]")
    return shape[1], shape[2]


def _check_layout(
    path: Path, file: h5py.File, rows: int, shape: tuple[int, int], views: Iterable[str]
) -> None:
    """Raise DataError unless the datasets of a file have the types and shapes that extraction
    writes.
    """
    regions, channels = shape
    if file["features"].shape != (rows, regions, channels):
        raise DataError(f"{path}: its rows are not the {regions} regions x {channels} of its cache")
    wanted = {"image_ids": ("i8", (rows,)), "sizes": ("i4", (rows, 2))}
    for end in endings(views):
        wanted[f"features{end}"] = "f2", (rows, regions, channels)
        wanted[f"boxes{end}"] = "f4", (rows, regions, 4)
        wanted[f"counts{end}"] = "i2", (rows,)
        wanted[f"crc32{end}"] = "u4", (rows,)
    for name, (kind, size) in wanted.items():
        if (file[name].dtype, file[name].shape) != (np.dtype(kind), size):
            raise ValueError(
                f"{name} is {file[name].dtype} {file[name].shape}, not {np.dtype(kind)} {size}"
            )
    if h5py.check_string_dtype(file["names"].dtype) is None or file["names"].shape != (rows,):
        raise ValueError(
            f"names is {file['names'].dtype} {file['names'].shape}, not text {(rows,)}"
        )


def _map(data: h5py.Dataset, path: Path) -> np.ndarray:
    """Map a dataset of a file into memory. Returns a plain array, because each index of a
    numpy.memmap costs microseconds.
    """
    if data.is_virtual:
        raise DataError(
            f"{path} only points to shards that are not beside it; copy the whole folder, or "
            "pack it"
        )
    if (offset := data.id.get_offset()) is None:
        raise DataError(
            f"{path}: the rows of {data.name} are not contiguous, as extraction writes them"
        )
    try:
        return np.asarray(np.memmap(path, data.dtype, "r", offset, data.shape))
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL, errno.ENOSYS):
            raise
        raise DataError(
            f"{path}: its file system does not map files into memory "
            f"({os.strerror(error.errno)}), as reading rows needs; "
            "copy the cache to a local disk"
        ) from error


def iterate(sequence: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces of length `size`; the last one may be shorter."""
    for start in range(0, len(sequence), size):
        yield sequence[start : start + size]
