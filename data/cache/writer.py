"""Write a feature cache: plan, write, join and verify its shards.

A shard is written under a temporary name, fsynced and renamed. `data.cache.claims` decides which
process writes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from data import DataError
from data.cache.reader import (
    BROKEN,
    FORMAT,
    PER_VIEW,
    TABLE_TYPES,
    FeatureCache,
    NewerFormat,
    Rows,
    Unreadable,
    datasets_of,
    has_same_cells,
    iterate,
    open_shard,
    parts_of,
    read_object,
    reading_shard,
    shard_paths,
    system_errors,
    unreadable_in,
)
from data.files import atomic_write, atomic_write_text
from data.remote import Blob
from data.sources import Image

SHARD_IMAGES = 1000
SHARD_NAME = "shard-{:05d}.h5"
TABLES = ("boxes", "counts", "image_ids", "names", "sizes")


@dataclass(frozen=True)
class Shard:
    """A planned file of a cache and its images. `plan` is recorded in the file.

    written: whether the file existed when the plan was made.
    """

    path: Path
    plan: Mapping[str, Any]
    images: tuple[Image, ...]
    written: bool = field(default=False, compare=False)


# ----------------------------------------------------------------------------------------- planning


def plan_shards(
    images: Sequence[Image], cache: Path, existing: Sequence[Existing] | None = None
) -> list[Shard]:
    """Divide images into the shards of a cache, including finished ones (`shard.written`).

    existing: the shards of the cache; None: read them from the folder.

    The plan depends only on the images and the existing shards, so that every process computes the
    same plan at any time. The digest of its images identifies a plan. Images that shards of other
    plans contain (another split, a smaller folder) are omitted. An image may be in no shard
    although the file of its planned shard exists: another plan used the file name, or the image's
    own shard was removed. Such images get additional shards, numbered after all others.
    """
    digest, total = plan_digest(images), _shard_count(images)
    existing = read_existing(cache) if existing is None else existing
    names = {shard.name for shard in existing}
    after_all = max((shard.first + shard.shards for shard in existing), default=0)
    first = next((shard.first for shard in existing if shard.digest == digest), after_all)
    rows_of_others = {i for shard in existing if shard.digest != digest for i in shard.rows}
    processed = processed_ids(existing)
    shards, orphans = [], []
    for number, members in enumerate(iterate(images, SHARD_IMAGES)):
        path = _shard_path(cache, first + number)
        written = path.name in names
        if written:
            orphans += [image for image in members if image.id not in processed]
        remaining = tuple(image for image in members if image.id not in rows_of_others)
        if remaining:
            plan = {"digest": digest, "first": first, "shards": total}
            shards.append(Shard(path, plan, remaining, written))
    if not orphans:
        return shards
    if len(orphans) < len(images):
        return shards + plan_shards(orphans, cache, existing)
    # No existing file belongs to this plan: all images get new shards.
    plan = {"digest": plan_digest(orphans), "first": after_all, "shards": _shard_count(orphans)}
    groups = iterate(orphans, SHARD_IMAGES)
    return [Shard(_shard_path(cache, after_all + n), plan, tuple(g)) for n, g in enumerate(groups)]


class Existing(NamedTuple):
    """An existing shard: its file name and plan, the ids of its rows, and its other photographs.

    name: "" for a plan without any file yet.
    """

    name: str
    digest: str
    first: int
    shards: int
    rows: list[int]
    unreadable: list[Unreadable]


def processed_ids(existing: Sequence[Existing]) -> set[int]:
    """Return the ids of the images that have a row or are unreadable."""
    rows = {image_id for shard in existing for image_id in shard.rows}
    return rows | {record.image_id for shard in existing for record in shard.unreadable}


def read_existing(cache: Path) -> list[Existing]:
    """Return the shards of a local cache, in order."""
    existing = []
    for path in shard_paths(cache):
        with reading_shard(path) as file:
            plan = _read_plan(file)
            unreadable = unreadable_in(file)
            rows = file["image_ids"][:].tolist()
            numbers = plan["digest"], plan["first"], plan["shards"]
            existing.append(Existing(path.name, *numbers, rows, unreadable))
    return existing


def _shard_path(cache: Path, number: int) -> Path:
    return cache / SHARD_NAME.format(number)


def _shard_count(images: Sequence[Image]) -> int:
    return -(-len(images) // SHARD_IMAGES)


def _read_plan(file: h5py.File) -> dict[str, Any]:
    """Return the plan recorded in a shard. Raises ValueError if it is invalid."""
    plan = read_object(file, "plan")
    if not all(type(plan[name]) is int and 0 <= plan[name] < 2**31 for name in ("first", "shards")):
        raise ValueError(f"its plan is {plan}")
    return plan


def plan_retry(
    images: Sequence[Image],
    cache: Path,
    every: bool,
    planned: Sequence[Shard] = (),
    existing: Sequence[Existing] | None = None,
) -> list[Shard]:
    """Plan an additional shard for unreadable photographs that have changed on disk.

    every: include all unreadable photographs, changed or not.
    planned: photographs in unfinished shards of this plan are excluded.
    existing: the shards of the cache; None: read them from the folder.
    """
    existing = read_existing(cache) if existing is None else existing
    unreadable = {record.image_id: record for shard in existing for record in shard.unreadable}
    for image_id in unreadable.keys() & {id_ for shard in existing for id_ in shard.rows}:
        del unreadable[image_id]  # a later shard has its row
    pending = {image.id for shard in planned if not shard.written for image in shard.images}
    retried = [
        image
        for image in images
        if image.id in unreadable
        and image.id not in pending
        and (every or stamp(image.path) != tuple(unreadable[image.id][3:5]))
    ]
    if not retried:
        return []
    plans = [shard.plan for shard in planned]
    first = max(
        *(shard.first + shard.shards for shard in existing),
        *(plan["first"] + plan["shards"] for plan in plans),
        0,
    )
    plan = {"digest": f"retry {first}", "first": first, "shards": 1}
    return [Shard(_shard_path(cache, first), plan, tuple(retried))]


def stamp(path: Path | Blob) -> tuple[int, int]:
    """Return size and modification time (ns) of a file, to detect changes; (-1, -1) if missing."""
    if isinstance(path, Blob):
        return path.stamp()
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def plan_digest(images: Sequence[Image]) -> str:
    """Return the digest of the ids of the images, in order; it identifies a plan."""
    return hashlib.sha256(json.dumps([image.id for image in images]).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ writing


def write_shard(
    shard: Shard,
    readable: Sequence[Image],
    rows: Sequence[Rows],
    sizes: np.ndarray,
    unreadable: Sequence[Unreadable],
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
    tables: Sequence[Mapping[str, np.ndarray]] = (),
) -> None:
    """Write a shard atomically, in the format of `data.cache.reader`.

    readable: the images with rows.
    rows: the rows of `readable`, one entry per part of `parts_of`: of the originals, then of each
        view in the provenance.
    sizes: (height, width) of the originals, [N,2].
    tables: scores and labels [N,R] of each of `rows`; required if the identity has `classes`.

    Raises DataError if features are not finite in float16, and OSError if the disk is full.
    """
    arrays: dict[str, np.ndarray] = {}
    parts = parts_of(identity, provenance)
    for (suffix, _), part in zip(parts, rows, strict=True):
        features = part.features.astype(np.float16, copy=False)
        for photo, row in zip(readable, features, strict=True):
            if not np.isfinite(row).all():
                raise DataError(
                    f"the features of {photo.path} (image {photo.id}) are not finite in float16; "
                    "try --precision fp32 or other --weights. Nothing was written for its shard"
                )
        crc32 = np.array(
            [zlib.crc32(np.ascontiguousarray(row).data) for row in features], np.uint32
        )
        boxes = part.boxes.astype(np.float32, copy=False)
        per_view: tuple[np.ndarray, ...] = features, boxes, part.counts.astype(np.int16), crc32
        arrays |= {f"{name}{suffix}": array for name, array in zip(PER_VIEW, per_view, strict=True)}
    for (suffix, names), values in zip(parts, tables or [{}] * len(parts), strict=True):
        for name in names:
            arrays[f"{name}{suffix}"] = values[name].astype(TABLE_TYPES[name], copy=False)
    try:
        with atomic_write(shard.path, True) as temporary, _new_file(temporary) as file:
            file.attrs["format"] = FORMAT
            file.attrs["identity"] = json.dumps(identity)
            file.attrs["provenance"] = json.dumps(provenance)
            file.attrs["plan"] = json.dumps(shard.plan)
            file.attrs["unreadable"] = json.dumps(unreadable)
            for name, array in arrays.items():
                file[name] = array
            file["image_ids"] = np.array([image.id for image in readable], np.int64)
            file.create_dataset(
                "names",
                data=[image.name for image in readable],
                shape=len(readable),
                dtype=h5py.string_dtype(),
            )
            file["sizes"] = sizes.astype(np.int32).reshape(-1, 2)
            file.attrs["crc32"] = _tables_crc32(file)
    except FileNotFoundError:
        # Another process may have taken over the shard and removed this temporary file.
        if not shard.path.exists():
            raise


@contextlib.contextmanager
def _new_file(path: Path, **options: Any) -> Iterator[h5py.File]:
    """Create an HDF5 file without a lock, because some file systems do not support locks.

    HDF5's errors while writing are raised as OSError with errno.
    """
    with system_errors(path), h5py.File(path, "w", locking=False, **options) as file:
        yield file


def _tables_crc32(file: h5py.File) -> int:
    """Return the CRC-32 of everything in a shard except the features: tables and attributes."""
    crc = 0
    others = (name for name in file if name.startswith(("boxes_", "counts_", *TABLE_TYPES)))
    for name in (*TABLES, *others):
        values = file[name][:]
        data = (
            "\0".join(value.decode() for value in values).encode()
            if name == "names"
            else values.tobytes()
        )
        crc = zlib.crc32(data, crc)
    for name in ("identity", "provenance", "plan", "unreadable"):
        crc = zlib.crc32(file.attrs[name].encode(), crc)
    return crc


def write_index(cache: Path) -> list[Unreadable]:
    """Write features.h5 (virtual datasets over all shards) and unreadable.jsonl, atomically.

    Returns the records of unreadable.jsonl.
    """
    feature_cache = FeatureCache(cache)
    with (
        atomic_write(cache / "features.h5") as temporary,
        contextlib.ExitStack() as stack,
        _new_file(temporary, libver=("v110", "v110")) as index,
    ):
        shards = [(path, stack.enter_context(open_shard(path))) for path in shard_paths(cache)]
        for key in ("format", "identity", "provenance"):
            index.attrs[key] = shards[0][1].attrs[key]
        for name in datasets_of(feature_cache.identity, feature_cache.provenance):
            if not len(feature_cache):
                continue
            shape, dtype = shards[0][1][name].shape[1:], shards[0][1][name].dtype
            layout, start = h5py.VirtualLayout((len(feature_cache), *shape), dtype), 0
            for path, file in shards:  # with relative names, so that the folder can be moved
                source = h5py.VirtualSource(path.name, name, file[name].shape, dtype)
                for begin, end in _runs(feature_cache, path, file):
                    layout[start : start + end - begin] = source[begin:end]
                    start += end - begin
            index.create_virtual_dataset(name, layout)
    lines = [
        json.dumps(record._asdict(), ensure_ascii=False) + "\n"
        for record in feature_cache.unreadable.values()
    ]
    atomic_write_text(cache / "unreadable.jsonl", "".join(lines))
    return list(feature_cache.unreadable.values())


def _runs(cache: FeatureCache, path: Path, file: h5py.File) -> list[tuple[int, int]]:
    """Return the rows of a shard that the cache reads, as runs (begin, end) of consecutive rows.

    Rows of images that a later shard contains again are not read.
    """
    ids = file["image_ids"][:].tolist()
    is_read = [cache.where(image_id) == (path, row) for row, image_id in enumerate(ids)]
    edges = np.flatnonzero(np.diff(np.array([0, *is_read, 0], np.int8))).reshape(-1, 2)
    return [(int(begin), int(end)) for begin, end in edges]


def pack(cache: FeatureCache, target: Path, done=lambda rows: None) -> None:
    """Write all rows of a cache and the backbone's weights into one HDF5 file, atomically.

    done: called with the number of rows after each step, for a progress bar.
    """
    if target.exists():
        raise DataError(f"{target} already exists; pass a new file to --pack")
    if target.name == "features.h5" or target.match("shard-*.h5"):
        raise DataError(f"{target}: caches use this file name; give the packed file another name")
    if not len(cache):
        raise DataError(f"{cache.path} has no row to pack")
    target.parent.mkdir(parents=True, exist_ok=True)
    total = len(cache)
    with atomic_write(target, True) as temporary, _new_file(temporary) as packed:
        for name, value in (
            ("identity", cache.identity),
            ("provenance", cache.provenance),
            ("plan", {}),
        ):
            packed.attrs[name] = json.dumps(value)
        packed.attrs["format"] = FORMAT
        packed.attrs["unreadable"] = json.dumps(list(cache.unreadable.values()))
        start = 0
        for path in cache.paths:
            with open_shard(path) as file:
                for begin, end in _runs(cache, path, file):
                    for name in datasets_of(cache.identity, cache.provenance):
                        if name not in packed:
                            packed.create_dataset(
                                name, (total, *file[name].shape[1:]), file[name].dtype
                            )
                        for row in range(begin, end, 100):
                            chunk = file[name][row : min(row + 100, end)]
                            offset = start + row - begin
                            packed[name][offset : offset + len(chunk)] = chunk
                    start += end - begin
                    done(end - begin)
        weights = cache.path / "backbone.safetensors"
        if weights.exists():
            packed["backbone"] = np.fromfile(weights, np.uint8)
        packed.attrs["crc32"] = _tables_crc32(packed)


# ----------------------------------------------------------------------------------------- checking


def verify_shard(path: Path, identity: Mapping[str, Any] | None = None) -> list[str]:
    """Return the problems of a shard or a packed file; empty if every row is as it was written.

    identity: the identity of the cache that the file should belong to; None: do not check.

    Raises OSError if the file system cannot read the whole file, and NewerFormat for a file of a
    newer version. Neither means that the shard is damaged.
    """
    problems = _problems(path, identity)
    if problems:  # HDF5 reports some errors of the file system as damaged content
        _read_all_bytes(path)
    return problems


def _read_all_bytes(path: Path) -> None:
    """Raise OSError with the path if the file system cannot read the whole file."""
    try:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    except OSError as error:
        number = error.errno or errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _problems(path: Path, identity: Mapping[str, Any] | None) -> list[str]:
    try:
        with open_shard(path) as file, system_errors(path):
            if file["features"].is_virtual:
                return [f"{path} only points to shards; verify the cache's folder"]
            rows = len(file["image_ids"])
            provenance = json.loads(file.attrs["provenance"])
            shard_identity = json.loads(file.attrs["identity"])
            names = datasets_of(shard_identity, provenance)
            incomplete = [name for name in names if len(file[name]) != rows]
            if incomplete:
                return [f"{path}: {', '.join(incomplete)} do not have {rows} rows"]
            problems = []
            regions = file["features"].shape[1]
            if has_same_cells(shard_identity) and rows:
                boxes, counts = file["boxes"][:], file["counts"][:]
                if (boxes != boxes[0]).any() or (counts != regions).any():
                    problems.append(f"{path}: its photographs have different grid cells")
            if "crc32" in file.attrs and _tables_crc32(file) != file.attrs["crc32"]:
                problems.append(
                    f"{path}: its tables ({', '.join(TABLES)}) or attributes are not as they "
                    "were written"
                )
            if identity is not None and shard_identity != identity:
                problems.append(f"{path}: it belongs to another cache")
            parts = parts_of(shard_identity, provenance)
            for row, (suffix, _) in itertools.product(range(rows), parts):
                features = np.ascontiguousarray(file[f"features{suffix}"][row])
                if zlib.crc32(features.data) != file[f"crc32{suffix}"][row]:
                    name = file["names"].asstr()[row]
                    problems.append(
                        f"{path}: row {row}, image {file['image_ids'][row]} ({name}), is not "
                        "as it was written"
                    )
            return problems
    except NewerFormat:
        raise
    except DataError as error:
        return [str(error)]
    except BROKEN as error:
        if getattr(error, "errno", None):
            raise
        return [f"{path} cannot be read as a shard: {error}"]
