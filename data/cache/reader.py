"""Read a feature cache: a folder of HDF5 shards, written once and read by any number of decoders.

A shard (`shard-00000.h5`, about 1,000 images) is written under a temporary name, fsynced and
renamed. Therefore every shard that exists is complete. Rows are contiguous and uncompressed, so
that a reader maps them into memory without an HDF5 handle.

    features  [N,R,C] float16   zero after the first counts[n] regions
    boxes     [N,R,4] float32   x0 y0 x1 y1 in 0..1 of the upright original photograph
    counts    [N]     int16     number of regions
    image_ids [N]     int64
    names     [N]     UTF-8     path relative to the root of the photographs
    sizes     [N,2]   int32     height, width of the original
    crc32     [N]     uint32    of the row's bytes in `features`
    scores    [N,R]   float32   score of each region, 0 to 1  } only if the identity has `classes`
    labels    [N,R]   int16     class of each region          }
    ..._VIEW                    features, boxes, counts, crc32, scores and labels of each view in
                                the provenance: flip, crop1, color1, ...
    ..._KIND, ..._KIND_VIEW     the same of the second kind of regions in the identity: detector
    attrs     format; identity, provenance, plan and unreadable (JSON); crc32 (of everything except
              `features`)

`features.h5` joins all shards as HDF5 virtual datasets for h5py users. `unreadable.jsonl` lists the
photographs without a row, with the reasons. `data.cache.writer` writes these files.
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
# Errors that h5py, json and the checks below raise on a damaged or foreign file.
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
TABLE_TYPES = {"scores": np.float32, "labels": np.int16}  # with classes: [N,R] per view
LONG_LIST = 8  # longer lists are not printed in messages
HOW_TO_ADD = (
    "re-run pipeline.extract over the split with the missing images (without --limit), with the "
    "same --out"
)
HOW_TO_IMPORT = (
    "convert the sources with the missing images too (pipeline.convert); if the dataset has other "
    "ids than the source, convert with --dataset"
)


class Rows(NamedTuple):
    """Rows of n images.

    features: [n,R,C] float16.
    boxes: [n,R,4] float32, x0 y0 x1 y1 in 0..1.
    counts: [n] int16, number of regions; [n,2] for two kinds side by side, as in models.regions.
    """

    features: np.ndarray
    boxes: np.ndarray
    counts: np.ndarray


class Detections(NamedTuple):
    """What the regions of n images show, by a detector. Entries after `counts` are 0.

    scores: [n,R] float32, 0 to 1.
    labels: [n,R] int16, indices of the identity's `classes`; 0 is the background.
    """

    scores: np.ndarray
    labels: np.ndarray


class NewerFormat(DataError):
    """The file was written by a newer version of this program. The file is not damaged."""


class Unreadable(NamedTuple):
    """A photograph without a row: one line of unreadable.jsonl.

    size, mtime_ns: size in bytes and modification time of the file when it was read; -1 if it did
    not exist.
    """

    image_id: int
    file_name: str
    reason: str
    size: int = -1
    mtime_ns: int = -1


def views_of(provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the views in a cache; the original is not one of them."""
    return tuple(provenance.get("views", ()))


class Part(NamedTuple):
    """The datasets of one kind of regions, of the originals or of a view.

    suffix: of the names of its datasets. tables: names of the datasets with a value per region.
    """

    suffix: str
    tables: tuple[str, ...]


def kinds_of(identity: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the identity of each kind of regions in a cache; usually there is one."""
    return identity.get("kinds", [identity])


def parts_of(identity: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[Part]:
    """Return the parts of each row: the kinds of the originals, then those of each view."""
    return [
        Part(
            (f"_{kind['regions']}" if number else "") + (f"_{view}" if view else ""),
            tables_of(kind),
        )
        for view in ("", *views_of(provenance))
        for number, kind in enumerate(kinds_of(identity))
    ]


def tables_of(identity: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the datasets with one value per region."""
    return tuple(TABLE_TYPES) if "classes" in identity else ()


def datasets_of(identity: Mapping[str, Any], provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of all datasets with one row per image."""
    parts = parts_of(identity, provenance)
    of_parts = (name + part.suffix for part in parts for name in (*PER_VIEW, *part.tables))
    return tuple(dict.fromkeys((*PER_IMAGE, *of_parts)))


def shard_paths(cache: Path) -> list[Path]:
    """Return the complete shards of a cache, in order."""
    return sorted(cache.glob("shard-*.h5"))


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Convert HDF5's errors from the operating system to OSError with errno, reason and path.

    HDF5 gives the errno only in the text of its message. Other errors mean that the content is not
    valid HDF5; they are raised unchanged.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        match = re.search(r"errno = (\d+)", str(error))
        number = getattr(error, "errno", None) or (int(match[1]) if match else None)
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def open_shard(path: Path) -> h5py.File:
    """Open a shard for reading, without a lock, because a complete shard never changes.

    Raises DataError if the content is not a shard of this format version, and OSError if the file
    system fails to read it.
    """
    advice = "this program did not write it"
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
    version = _attribute(file, "format")
    if version != FORMAT:
        file.close()
        newer = isinstance(version, int) and version > FORMAT
        if newer:
            advice = "it was made by a newer version: update this program, or pass another folder"
        error_type = NewerFormat if newer else DataError
        raise error_type(
            f"{path} has format {version}, this version reads and writes {FORMAT}; {advice}"
        )
    if _has_endless_heap(path, file):
        file.close()
        raise DataError(
            f"{path} is damaged: a part of it is zeros, perhaps after a power failure; {advice}"
        )
    return file


def _has_endless_heap(path: Path, file: h5py.File) -> bool:
    """Return whether HDF5 would loop forever on this file, because a heap has a block of size 0.

    HDF5 stores text of variable length in heaps. A heap consists of a signature, its size (8
    bytes), and blocks of number (2 bytes), reference count (2), zeros (4), size (8) and content
    padded to a multiple of 8. Block 0 is the free space, and its size includes this header of 16
    bytes. If the file has zeros there, HDF5 2.0 advances from a block of size 0 to the same block
    again. Feature datasets are not searched.
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
            block_number, length = HEAP_BLOCK.unpack_from(content, block)
            if block_number == 0 and length == 0:
                return True
            if block_number == 0:
                break
            block += 16 + -(-length // 8) * 8
        heap = content.find(HEAP, heap + 1)
    return False


def _attribute(file: h5py.File, name: str) -> Any:
    """Return an attribute as a Python value; "none" if it is absent or cannot be read."""
    try:
        value = file.attrs[name]
    except (KeyError, OSError, RuntimeError, TypeError, ValueError):
        return "none"
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def unreadable_in(file: h5py.File) -> list[Unreadable]:
    """Return the photographs of an open shard that have no row."""
    return [Unreadable(*record) for record in json.loads(file.attrs["unreadable"])]


@contextlib.contextmanager
def reading_shard(path: Path) -> Iterator[h5py.File]:
    """Open a shard for reading. Errors on damaged content are raised as DataError."""
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
                f"{path} is damaged ({error}); check the cache with pipeline.extract --verify, "
                "repair it with --repair"
            ) from error


def cache_header(cache: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return identity and provenance of a cache, from its first shard; None without a shard."""
    for path in shard_paths(cache):
        with reading_shard(path) as file:
            return read_object(file, "identity"), read_object(file, "provenance")
    return None


def read_object(file: h5py.File, name: str) -> dict[str, Any]:
    """Return the JSON object in an attribute. Raises ValueError if it is not an object."""
    value = json.loads(file.attrs[name])
    if not isinstance(value, dict):
        raise ValueError(f"its attribute {name} is not a JSON object")
    return value


def differences(
    expected: Mapping[str, Any], actual: Mapping[str, Any], fields: Iterable[str] = ()
) -> list[str]:
    """Return the differences of two identities or provenances, as `field: actual, not expected`.

    Of two kinds of regions, and of long lists such as names of classes, only the entries that
    differ are named. The other fields of different kinds of regions are not compared.
    """
    keys = list(fields) or list(dict.fromkeys([*expected, *actual]))
    if not fields and expected.get("regions") != actual.get("regions"):
        keys = ["regions"]
    lines: list[str] = []
    for key in keys:
        if expected.get(key) != actual.get(key):
            lines += _describe(key, expected.get(key), actual.get(key))
    return lines


def _describe(key: str, expected: Any, actual: Any) -> list[str]:
    """Describe the difference of two values of a record, as `differences` does."""
    if not isinstance(expected, list) or not isinstance(actual, list):
        return [f"{key}: {actual}, not {expected}"]
    if len(expected) == len(actual) and all(isinstance(e, dict) for e in (*expected, *actual)):
        return [
            f"{ours.get('regions', key)}: {line}"
            for ours, theirs in zip(expected, actual, strict=True)
            for line in differences(ours, theirs)
        ]
    if len(expected) <= LONG_LIST:
        return [f"{key}: {actual}, not {expected}"]
    if len(expected) != len(actual):
        return [f"{key}: {len(actual)} entries, not {len(expected)}"]
    pairs = zip(expected, actual, strict=True)
    number = next(n for n, (ours, theirs) in enumerate(pairs) if ours != theirs)
    return [f"{key}, entry {number}: {actual[number]}, not {expected[number]}"]


def has_same_cells(identity: Mapping[str, Any]) -> bool:
    """Return whether all rows of a cache have the same boxes and counts.

    This is the case for grid cells of whole photographs.
    """
    return (identity.get("regions"), identity.get("resize")) == ("grid", "stretch")


def packed_backbone(file: Path) -> bytes | None:
    """Return the backbone's weights in a packed cache, as the bytes of a safetensors file."""
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
    """Random access by image id to the rows of a cache or of one packed file.

    Forked and spawned workers can use the same object.

    identity: how the features were made; must be equal for caches that are used together.
    provenance: recorded facts that may differ.
    ids: [N] int64, in the order of the cache.
    unreadable: {image id: Unreadable}.
    shape: (R, C). With two kinds of regions side by side: all regions, and the largest C.
    kinds: (kind, R, C) of each kind of regions; usually there is one.
    views: the names of the views.

    Raises DataError if the path is not a cache.
    """

    alternative = ""  # what else the message about images without a row advises

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.name == "features.h5" and shard_paths(self.path.parent):
            self.path = self.path.parent
        self.paths = paths = [self.path] if self.path.is_file() else shard_paths(self.path)
        if not paths:
            problem = "contains no shard-*.h5" if self.path.is_dir() else "does not exist"
            raise DataError(
                f"cache {self.path} {problem}; make it with: python -m pipeline.extract ... --out "
                f"{self.path}"
            )
        self._files: list[Path] = []
        # features, boxes and counts by part (of `parts_of`), then by file
        self._maps: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []
        self._tables: list[dict[str, np.ndarray]] = []  # scores and labels, by file
        self._where: dict[int, tuple[int, int]] = {}
        self._names: dict[int, str] = {}
        self.unreadable: dict[int, Unreadable] = {}
        identity = None
        for path in paths:
            with reading_shard(path) as file:
                if identity is None:
                    identity = file.attrs["identity"]
                    self.identity = read_object(file, "identity")
                    self.provenance = read_object(file, "provenance")
                    self.views = views_of(self.provenance)
                    self._parts = parts_of(self.identity, self.provenance)
                    self._maps = [[] for _ in self._parts]
                    self.kinds = [
                        (str(kind.get("regions")), *_shape_of(file, part.suffix))
                        for kind, part in zip(kinds_of(self.identity), self._parts, strict=False)
                    ]
                    self.shape = (
                        sum(regions for _, regions, _ in self.kinds),
                        max(channels for _, _, channels in self.kinds),
                    )
                elif file.attrs["identity"] != identity:
                    changes = "; ".join(differences(self.identity, read_object(file, "identity")))
                    raise DataError(
                        f"{path} does not belong to the cache of {paths[0].name} ({changes}); "
                        "remove it"
                    )
                self._add(path, file)
                self.unreadable |= {record.image_id: record for record in unreadable_in(file)}
        # All whole photographs have the same cells, so they are not read row by row. Crops differ.
        self._crops = {
            view for view, name in enumerate(self.views, start=1) if name.startswith("crop")
        }
        self._cells = (
            self._maps[0][0][1][0].copy() if has_same_cells(self.identity) and self._files else None
        )
        # A later extraction may have read a photograph that was unreadable before.
        for image_id in self._where.keys() & self.unreadable.keys():
            del self.unreadable[image_id]
        self.ids = np.fromiter(self._where, np.int64, len(self._where))

    def _add(self, path: Path, file: h5py.File) -> None:
        ids = file["image_ids"][:].tolist()
        if not ids:
            return
        file_index = len(self._files)
        self._files.append(path)
        for suffix, _ in self._parts:
            if f"features{suffix}" not in file:
                raise DataError(
                    f"{path} has no features{suffix}, which the other files of the cache have; "
                    "remove it and extract again"
                )
        shapes = [kind[1:] for kind in self.kinds] * (1 + len(self.views))
        _check_layout(path, file, len(ids), list(zip(self._parts, shapes, strict=True)))
        for suffix, tables in self._parts[: len(self.kinds)]:
            if tables:
                self._tables.append({name: _map(file[name + suffix], path) for name in tables})
        for maps, (suffix, _), shape in zip(self._maps, self._parts, shapes, strict=True):
            features = _map(file[f"features{suffix}"], path)
            boxes = _map(file[f"boxes{suffix}"], path)
            counts = file[f"counts{suffix}"][:]
            if counts.min() < 0 or counts.max() > shape[0]:
                raise ValueError(f"counts{suffix} are not all in 0 to {shape[0]}")
            maps.append((features, boxes, counts))
        for row, (image_id, name) in enumerate(zip(ids, file["names"].asstr()[:], strict=True)):
            self._where[image_id] = (file_index, row)
            self._names[image_id] = name

    def where(self, image_id: int) -> tuple[Path, int]:
        """Return the file and the row of an image."""
        file_index, row = self._where[image_id]
        return self._files[file_index], row

    def name_of(self, image_id: int) -> str:
        """Return the path of the photograph relative to the root of the extraction."""
        return self._names[image_id]

    def dataset(self, captions: Mapping[int, Sequence[str]]) -> Any:
        """Return a torch Dataset of the images of `captions` (texts by image id).

        Each item is (features [R,C] float16, boxes [R,4] float32, count, image id, captions). A
        DataLoader may use any number of workers. Raises DataError for an image without a row.
        """
        # Imported here, because reading a cache does not need torch.
        from data.cache.torch_dataset import CachedImages

        return CachedImages(self, captions)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, image_id: int) -> bool:
        return image_id in self._where

    def __getitem__(self, image_id: int) -> Rows:
        """Return the features [R,C], boxes [R,4] and count of one image."""
        return Rows(*(part[0] for part in self.rows([image_id])))

    def rows(
        self,
        image_ids: Sequence[int],
        out: Rows | None = None,
        tables_only: bool = False,
        views: Sequence[int] | None = None,
    ) -> Rows:
        """Return copies of the rows of `image_ids`, in that order.

        out: arrays to copy into, from `empty_rows`. Allocating new memory costs more than the copy.
        tables_only: read only boxes and counts; the features stay uninitialized.
        views: the view of each image: 0 for the original, v for `views[v - 1]` of the cache; None:
            the originals.

        Raises DataError for an id that is not in the cache.
        """
        rows = self.empty_rows(len(image_ids)) if out is None else out
        try:
            file_rows = [self._where[image_id] for image_id in image_ids]
        except KeyError as error:
            raise DataError(self._why_absent(error.args[0])) from None
        if len(self.kinds) > 1:
            self._copy_kinds(rows, file_rows, tables_only, views)
            return rows
        maps = self._maps
        sources = [
            (maps[view][file], row)
            for view, (file, row) in zip(views or [0] * len(file_rows), file_rows, strict=True)
        ]
        if not tables_only:
            for target, (arrays, row) in zip(rows.features, sources, strict=True):
                target[...] = arrays[0][row]
        with_own_boxes: Iterable[int] = range(len(sources))
        if self._cells is not None:
            rows.boxes[:], rows.counts[:] = self._cells, len(self._cells)
            with_own_boxes = [i for i, view in enumerate(views or ()) if view in self._crops]
        for i in with_own_boxes:
            arrays, row = sources[i]
            rows.boxes[i], rows.counts[i] = arrays[1][row], arrays[2][row]
        return rows

    def _copy_kinds(
        self,
        rows: Rows,
        file_rows: Sequence[tuple[int, int]],
        tables_only: bool,
        views: Sequence[int] | None,
    ) -> None:
        """Copy the regions of several kinds one after the other, without gaps."""
        rows.boxes[:] = 0
        if not tables_only:
            rows.features[:] = 0
        kinds = len(self.kinds)
        for index, (file, row) in enumerate(file_rows):
            start, view = 0, views[index] if views else 0
            for kind in range(kinds):
                features, boxes, counts = self._maps[view * kinds + kind][file]
                end = start + int(counts[row])
                if not tables_only:
                    rows.features[index, start:end, : features.shape[2]] = features[
                        row, : end - start
                    ]
                rows.boxes[index, start:end] = boxes[row, : end - start]
                rows.counts[index, kind] = end - start
                start = end

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes of a detector's regions; None without a detector."""
        named = [kind["classes"] for kind in kinds_of(self.identity) if "classes" in kind]
        return named[0] if named else None

    def detections(self, image_ids: Sequence[int]) -> Detections:
        """Return scores and labels of the regions of `image_ids`, of the originals.

        Raises DataError if the cache has no classes, and for an id that is not in the cache.
        """
        if self.classes is None:
            raise DataError(f"{self.path} has no scores and labels, because no detector made it")
        for image_id in image_ids:
            self.require(image_id)
        places = [self._where[image_id] for image_id in image_ids]
        scores, labels = (
            np.array([self._tables[file][name][row] for file, row in places], dtype)
            for name, dtype in TABLE_TYPES.items()
        )
        return Detections(scores, labels)

    @property
    def feature_bytes(self) -> int:
        """Size of the features of all views, in bytes."""
        return sum(features.nbytes for maps in self._maps for features, _, _ in maps)

    def keep_in_memory(self, memory: np.ndarray | None = None, filled: bool = False) -> None:
        """Load all features into memory. An unpickled copy of the cache reads its files again.

        memory: a float16 buffer of `feature_bytes`; None: allocate one.
        filled: the buffer already contains the features, because another process filled it.
        """
        if memory is None:
            memory = np.empty(self.feature_bytes // 2, np.float16)
        start = 0
        for maps in self._maps:
            for file_index, (features, boxes, counts) in enumerate(maps):
                loaded = memory[start : start + features.size].reshape(features.shape)
                if not filled:
                    loaded[...] = features
                maps[file_index] = loaded, boxes, counts
                start += features.size

    def empty_rows(self, count: int) -> Rows:
        """Return uninitialized arrays for `count` rows."""
        regions, channels = self.shape
        kinds = len(self.kinds)
        return Rows(
            np.empty((count, regions, channels), np.float16),
            np.empty((count, regions, 4), np.float32),
            np.empty(count if kinds == 1 else (count, kinds), np.int16),
        )

    def select(self, images: Iterable[Image]) -> tuple[list[Image], int]:
        """Return the images with rows, and how many images are omitted as unreadable.

        Raises DataError for any other images without a row (with their number and the first five),
        and if cache and source have different file names for one id.
        """
        selected, left_out, absent = [], 0, []
        for image in images:
            if image.id in self.unreadable:
                left_out += 1
                continue
            if image.id not in self._where:
                absent.append(image.id)
                continue
            # An imported cache may have only the id of an image in place of its file name.
            name = self._names[image.id]
            if "." in name and not same_photograph(name, image.name):
                raise DataError(
                    f"image {image.id} is {self._names[image.id]} in {self.path} and "
                    f"{image.name} in the captions; the cache was made from other photographs: "
                    "pass the --features that belong to these captions"
                )
            selected.append(image)
        if len(absent) > 1:
            first = ", ".join(map(str, absent[:5]))
            raise DataError(
                f"{len(absent):,} images are not in {self.path} ({len(self):,} images), such as "
                f"{first}; {self._how_to_add()}{self.alternative}"
            )
        if absent:
            raise DataError(self._why_absent(absent[0]))
        return selected, left_out

    def require(self, image_id: int) -> None:
        """Raise DataError if the cache has no row for an image."""
        if image_id not in self._where:
            raise DataError(self._why_absent(image_id))

    def _why_absent(self, image_id: int) -> str:
        if image_id in self.unreadable:
            record = self.unreadable[image_id]
            return f"image {image_id} ({record.file_name}) could not be read: {record.reason}"
        return f"image {image_id} is not in {self.path} ({len(self)} images); {self._how_to_add()}"

    def _how_to_add(self) -> str:
        return HOW_TO_IMPORT if self.identity.get("regions") == "imported" else HOW_TO_ADD

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FeatureCache.__init__(self, state["path"])


def _shape_of(file: h5py.File, suffix: str) -> tuple[int, int]:
    """Return (R, C) of a shard's features. Raises ValueError if they are not [N,R,C]."""
    shape = file[f"features{suffix}"].shape
    if len(shape) != 3 or not shape[2] >= 1:
        raise ValueError(f"features are {shape}, not [images, regions, channels]")
    return shape[1], shape[2]


def _check_layout(
    path: Path,
    file: h5py.File,
    rows: int,
    parts: Sequence[tuple[Part, tuple[int, int]]],
) -> None:
    """Check the types and shapes of a file's datasets. Raises DataError or ValueError."""
    regions, channels = parts[0][1]
    if file["features"].shape != (rows, regions, channels):
        raise DataError(f"{path}: its rows are not {regions} regions x {channels} as in its cache")
    expected = {"image_ids": ("i8", (rows,)), "sizes": ("i4", (rows, 2))}
    for (suffix, tables), (regions, channels) in parts:
        expected[f"features{suffix}"] = "f2", (rows, regions, channels)
        expected[f"boxes{suffix}"] = "f4", (rows, regions, 4)
        expected[f"counts{suffix}"] = "i2", (rows,)
        expected[f"crc32{suffix}"] = "u4", (rows,)
        for name in tables:
            expected[f"{name}{suffix}"] = np.dtype(TABLE_TYPES[name]).str, (rows, regions)
    for name, (kind, size) in expected.items():
        if (file[name].dtype, file[name].shape) != (np.dtype(kind), size):
            raise ValueError(
                f"{name} is {file[name].dtype} {file[name].shape}, not {np.dtype(kind)} {size}"
            )
    if h5py.check_string_dtype(file["names"].dtype) is None or file["names"].shape != (rows,):
        raise ValueError(
            f"names is {file['names'].dtype} {file['names'].shape}, not text {(rows,)}"
        )


def _map(data: h5py.Dataset, path: Path) -> np.ndarray:
    """Map a dataset of a file into memory.

    Returns a plain array, because indexing a numpy.memmap costs microseconds.
    """
    if data.is_virtual:
        raise DataError(
            f"{path} only points to shards that are not in its folder; copy the whole folder, or "
            "pack it"
        )
    if (offset := data.id.get_offset()) is None:
        raise DataError(
            f"{path}: the rows of {data.name} are not contiguous; extraction writes contiguous rows"
        )
    try:
        return np.asarray(np.memmap(path, data.dtype, "r", offset, data.shape))
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL, errno.ENOSYS):
            raise
        raise DataError(
            f"{path}: its file system cannot map files into memory "
            f"({os.strerror(error.errno)}), which reading rows requires; "
            "copy the cache to a local disk"
        ) from error


def iterate(sequence: Sequence[Any], size: int) -> Iterator[Any]:
    """Yield consecutive slices of length `size`; the last one may be shorter."""
    for start in range(0, len(sequence), size):
        yield sequence[start : start + size]
