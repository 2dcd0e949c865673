"""Write a feature cache: plan shards, write, check and join them.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from data import DataError
from data.cache.reader import (
    BROKEN,
    FORMAT,
    PER_VIEW,
    FeatureCache,
    NewerFormat,
    Rows,
    Unreadable,
    datasets_of,
    endings,
    has_same_cells,
    iterate,
    open_shard,
    read_object,
    reading_shard,
    shard_paths,
    system_errors,
    views_of,
)
from data.files import atomic_write, atomic_write_text
from data.sources import Image

SHARD_IMAGES = 1000
TABLES = ("boxes", "counts", "image_ids", "names", "sizes")


@dataclass(frozen=True)
class Shard:
    """One planned file of a cache and its images. plan: its record in the file."""

    path: Path
    plan: Mapping[str, Any]
    images: tuple[Image, ...]


# ----------------------------------------------------------------------------------------- planning


def plan_shards(images: Sequence[Image], cache: Path) -> list[Shard]:
    """Cut `images` into the shards of a cache, finished ones included (`shard.path.exists()`).

    The shards follow from the list of images alone: every process plans the same ones, however late
    it starts. A plan is known by the digest of its images. Where shards of other plans (another
    split, a smaller folder) hold some of the images, those are left out. Images that no shard holds
    although the file of their shard exists (another plan took its name, or its own shard was
    removed) get shards of their own, numbered after all others.
    """
    digest, total = _digest(images), _shard_count(images)
    existing = _read_existing(cache)
    after_all = max((each.first + each.shards for each in existing), default=0)
    first = next((each.first for each in existing if each.digest == digest), after_all)
    rows_of_others = {i for each in existing if each.digest != digest for i in each.rows}
    held = {i for each in existing for i in (*each.rows, *each.unreadable)}
    shards, orphans = [], []
    for number, members in enumerate(iterate(images, SHARD_IMAGES)):
        path = _shard_path(cache, first + number)
        if path.exists():
            orphans += [image for image in members if image.id not in held]
        mine = tuple(image for image in members if image.id not in rows_of_others)
        if mine:
            plan = {"digest": digest, "first": first, "shards": total}
            shards.append(Shard(path, plan, mine))
    if not orphans:
        return shards
    if len(orphans) < len(images):
        return shards + plan_shards(orphans, cache)
    # no existing file belongs to this plan: all of its images get new shards
    plan = {"digest": _digest(orphans), "first": after_all, "shards": _shard_count(orphans)}
    groups = iterate(orphans, SHARD_IMAGES)
    return [Shard(_shard_path(cache, after_all + n), plan, tuple(g)) for n, g in enumerate(groups)]


class _Existing(NamedTuple):
    """An existing shard: its plan, and the ids of its images with and without a row."""

    digest: str
    first: int
    shards: int
    rows: list[int]
    unreadable: list[int]


def _read_existing(cache: Path) -> list[_Existing]:
    found = []
    for path in shard_paths(cache):
        with reading_shard(path) as file:
            plan = _read_plan(file)
            unreadable = [record[0] for record in json.loads(file.attrs["unreadable"])]
            rows = file["image_ids"][:].tolist()
            found.append(_Existing(plan["digest"], plan["first"], plan["shards"], rows, unreadable))
    return found


def _shard_path(cache: Path, number: int) -> Path:
    return cache / f"shard-{number:05d}.h5"


def _shard_count(images: Sequence[Image]) -> int:
    return -(-len(images) // SHARD_IMAGES)


def _read_plan(file: h5py.File) -> dict[str, Any]:
    """The plan recorded in a shard; ValueError if it is invalid."""
    plan = read_object(file, "plan")
    if not all(type(plan[name]) is int and 0 <= plan[name] < 2**31 for name in ("first", "shards")):
        raise ValueError(f"its plan is {plan}")
    return plan


def plan_retry(
    images: Sequence[Image], cache: Path, every: bool, planned: Sequence[Shard] = ()
) -> list[Shard]:
    """Plan one more shard for unreadable photographs that have changed on disk (`every`: for all of
    them), except those in unfinished shards of `planned`.
    """
    paths = shard_paths(cache)
    if not paths:
        return []
    unreadable = FeatureCache(cache).unreadable
    tried = {image.id for shard in planned if not shard.path.exists() for image in shard.images}
    images = [image for image in images if image.id not in tried]
    again = [
        i
        for i in images
        if i.id in unreadable and (every or stamp(i.path) != tuple(unreadable[i.id][3:5]))
    ]
    if not again:
        return []
    numbers = []
    for path in paths:
        with reading_shard(path) as file:
            plan = _read_plan(file)
            numbers.append(plan["first"] + plan["shards"])
    first = max(numbers)
    return [
        Shard(
            _shard_path(cache, first),
            {"digest": f"retry {first}", "first": first, "shards": 1},
            tuple(again),
        )
    ]


def stamp(path: Path) -> tuple[int, int]:
    """Size and modification time (ns) of a file, by which a later run detects a change; -1, -1
    without a file.
    """
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _digest(images: Sequence[Image]) -> str:
    return hashlib.sha256(json.dumps([image.id for image in images]).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ writing


def write_shard(
    shard: Shard,
    kept: Sequence[Image],
    rows: Sequence[Rows],
    sizes: np.ndarray,
    unreadable: Sequence[Unreadable],
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write one shard whole or not at all; `rows`, one for each of `kept`, are those of the
    photographs as they are and then of each view that the provenance names, as `data.cache.reader`
    says.

    Raises DataError naming the photograph whose features are not finite in float16, OSError for a
    disk that is full.
    """
    arrays: dict[str, np.ndarray] = {}
    for end, part in zip(endings(views_of(provenance)), rows, strict=True):
        features = part.features.astype(np.float16, copy=False)
        for photo, row in zip(kept, features, strict=True):
            if not np.isfinite(row).all():
                raise DataError(
                    f"the features of {photo.path} (image {photo.id}) are not finite in float16; "
                    "try --precision fp32, or other --weights: nothing was written for its shard"
                )
        crc32 = np.array(
            [zlib.crc32(np.ascontiguousarray(row).data) for row in features], np.uint32
        )
        found: tuple[np.ndarray, ...] = (
            features,
            part.boxes.astype(np.float32, copy=False),
            part.counts.astype(np.int16),
            crc32,
        )
        arrays |= {f"{name}{end}": array for name, array in zip(PER_VIEW, found, strict=True)}
    try:
        with atomic_write(shard.path, True) as temporary, _new_file(temporary) as file:
            file.attrs["format"] = FORMAT
            file.attrs["identity"] = json.dumps(identity)
            file.attrs["provenance"] = json.dumps(provenance)
            file.attrs["plan"] = json.dumps(shard.plan)
            file.attrs["unreadable"] = json.dumps(unreadable)
            for name, array in arrays.items():
                file[name] = array
            file["image_ids"] = np.array([image.id for image in kept], np.int64)
            file.create_dataset(
                "names",
                data=[image.name for image in kept],
                shape=len(kept),
                dtype=h5py.string_dtype(),
            )
            file["sizes"] = sizes.astype(np.int32).reshape(-1, 2)
            file.attrs["crc32"] = _tables_crc32(file)
    except FileNotFoundError:
        # else another took it over, wrote it, and removed what was left of this one
        if not shard.path.exists():
            raise


@contextlib.contextmanager
def _new_file(path: Path, **options: Any) -> Iterator[h5py.File]:
    """A new HDF5 file, without a lock: it is renamed when whole, and some file systems have no
    locks.

    HDF5's errors while writing are raised as OSError with the system's number.
    """
    with system_errors(path), h5py.File(path, "w", locking=False, **options) as file:
        yield file


def _tables_crc32(file: h5py.File) -> int:
    """CRC-32 of everything in a shard except features: tables and attributes."""
    crc = 0
    for name in (*TABLES, *(name for name in file if name.startswith(("boxes_", "counts_")))):
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
    """Write features.h5 (virtual datasets over all shards) and unreadable.jsonl, each by rename;
    returns the latter.
    """
    opened = FeatureCache(cache)
    with (
        atomic_write(cache / "features.h5") as temporary,
        contextlib.ExitStack() as stack,
        _new_file(temporary, libver=("v110", "v110")) as index,
    ):
        shards = [(path, stack.enter_context(open_shard(path))) for path in shard_paths(cache)]
        for key in ("format", "identity", "provenance"):
            index.attrs[key] = shards[0][1].attrs[key]
        for name in datasets_of(opened.provenance):
            if not len(opened):
                continue
            shape, kind = shards[0][1][name].shape[1:], shards[0][1][name].dtype
            layout, start = h5py.VirtualLayout((len(opened), *shape), kind), 0
            for path, file in shards:  # relative names: the folder can be moved
                source = h5py.VirtualSource(path.name, name, file[name].shape, kind)
                for begin, end in _runs(opened, path, file):
                    layout[start : start + end - begin] = source[begin:end]
                    start += end - begin
            index.create_virtual_dataset(name, layout)
    lines = [
        json.dumps(record._asdict(), ensure_ascii=False) + "\n"
        for record in opened.unreadable.values()
    ]
    atomic_write_text(cache / "unreadable.jsonl", "".join(lines))
    return list(opened.unreadable.values())


def _runs(cache: FeatureCache, path: Path, file: h5py.File) -> list[tuple[int, int]]:
    """The rows of a shard that the cache reads, as (begin, end) of consecutive ones: not those that
    a later shard has too.
    """
    ids = file["image_ids"][:].tolist()
    read = np.array(
        [0, *(cache.where(image_id) == (path, row) for row, image_id in enumerate(ids)), 0], np.int8
    )
    edges = np.flatnonzero(np.diff(read)).reshape(-1, 2)
    return [(int(begin), int(end)) for begin, end in edges]


def pack(cache: FeatureCache, target: Path, done=lambda rows: None) -> None:
    """Write all rows of a cache into one plain HDF5 file, with the backbone's weights: whole or not
    at all.
    """
    if target.exists():
        raise DataError(f"{target} is there already; --pack writes a new file")
    if target.name == "features.h5" or target.match("shard-*.h5"):
        raise DataError(f"{target}: caches have files of that name; give the packed file another")
    if not len(cache):
        raise DataError(f"{cache.path} holds no row to pack")
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
                    for name in datasets_of(cache.provenance):
                        if name not in packed:
                            packed.create_dataset(
                                name, (total, *file[name].shape[1:]), file[name].dtype
                            )
                        for at in range(begin, end, 100):
                            upto = min(at + 100, end)
                            packed[name][start + at - begin : start + upto - begin] = file[name][
                                at:upto
                            ]
                    start += end - begin
                    done(end - begin)
        weights = cache.path / "backbone.safetensors"
        if weights.exists():
            packed["backbone"] = np.fromfile(weights, np.uint8)
        packed.attrs["crc32"] = _tables_crc32(packed)


# ----------------------------------------------------------------------------------------- checking


def verify_shard(path: Path, identity: Mapping[str, Any] | None = None) -> list[str]:
    """What is wrong with a shard (or a packed file), a line each; empty where every row is as it
    was written.

    Only bytes that were read are judged. OSError where the file system does not let all of them
    be read, and NewerFormat for a file of a newer version: neither says that the shard is bad.
    """
    problems = _problems(path, identity)
    if problems:  # HDF5 does not tell every error of the file system from bad content
        _read_through(path)
    return problems


def _read_through(path: Path) -> None:
    """Read all bytes of a file; OSError with its path if the file system fails."""
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
                return [f"{path} only points to shards; check the cache's folder"]
            rows = len(file["image_ids"])
            provenance = json.loads(file.attrs["provenance"])
            wrong = [name for name in datasets_of(provenance) if len(file[name]) != rows]
            if wrong:
                return [f"{path}: {', '.join(wrong)} have not {rows} rows"]
            problems = []
            found = json.loads(file.attrs["identity"])
            cells = file["features"].shape[1]
            if has_same_cells(found) and rows:
                unlike = (file["boxes"][:] != file["boxes"][0]).any() or (
                    file["counts"][:] != cells
                ).any()
                problems += (
                    [f"{path}: the cells of its photographs are not the same for each"]
                    if unlike
                    else []
                )
            if "crc32" in file.attrs and _tables_crc32(file) != file.attrs["crc32"]:
                problems.append(
                    f"{path}: its tables ({', '.join(TABLES)}) or attributes are not as they "
                    "were written"
                )
            if identity is not None and found != identity:
                problems.append(f"{path}: it belongs to another cache")
            for row, end in itertools.product(range(rows), endings(views_of(provenance))):
                if (
                    zlib.crc32(np.ascontiguousarray(file[f"features{end}"][row]).data)
                    != file[f"crc32{end}"][row]
                ):
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
