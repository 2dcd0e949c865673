"""The feature cache: a folder of complete HDF5 shards, written once, read by any number of decoders.

A shard (`shard-00000.h5`, about 1,000 images) is written under a temporary name, fsynced and renamed: a shard that
exists is complete. Rows are contiguous and uncompressed, so a reader maps them without an HDF5 handle.

    features  [N,R,C] float16   zero past counts[n]
    boxes     [N,R,4] float32   x0 y0 x1 y1 in 0..1 of the upright whole original photograph
    counts    [N]     int16
    image_ids [N]     int64
    names     [N]     UTF-8     path relative to the root of the photographs
    sizes     [N,2]   int32     height, width of the original
    crc32     [N]     uint32    of the row's bytes in `features`
    attrs     format, identity, provenance, plan, unreadable (the last four JSON)

`features.h5` joins all shards for any h5py user (HDF5 virtual datasets); `unreadable.jsonl` lists the photographs that
have no row and why.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from data import DataError
from data.sources import Image, same_photograph

FORMAT = 1
SHARD_IMAGES = 1000
PER_IMAGE = ("features", "boxes", "counts", "image_ids", "names", "sizes", "crc32")


class Rows(NamedTuple):
    """features [n,R,C] float16, boxes [n,R,4] float32 in 0..1, counts [n] int16."""

    features: np.ndarray
    boxes: np.ndarray
    counts: np.ndarray


class Unreadable(NamedTuple):
    """A photograph without a row, as a line of unreadable.jsonl."""

    image_id: int
    file_name: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """One planned file of a cache and the images that it will hold; `plan` is its record in the file."""

    path: Path
    plan: Mapping[str, Any]
    images: tuple[Image, ...]


# ------------------------------------------------------------------------------------------------------------- writing


def plan_shards(images: Sequence[Image], cache: Path) -> list[Shard]:
    """Cut `images` into the shards of a cache, finished ones included (`shard.path.exists()`).

    The groups follow from the list of images alone, so every process, however late it starts, makes the same ones.
    Images that a shard of another plan holds (another split, a smaller folder) are left out of their group.
    """
    digest = hashlib.sha256(json.dumps([image.id for image in images]).encode()).hexdigest()[:16]
    total = -(-len(images) // SHARD_IMAGES)
    first, after, foreign = None, 0, set()
    for path in shard_paths(cache):
        with open_shard(path) as file:
            plan = json.loads(file.attrs["plan"])
            if plan["digest"] == digest:
                first = plan["first"]
            else:
                after = max(after, plan["first"] + plan["shards"])
                foreign.update(file["image_ids"][:].tolist())
    first = after if first is None else first
    shards = []
    for group in range(total):
        path = cache / f"shard-{first + group:05d}.h5"
        members = images[group * SHARD_IMAGES : (group + 1) * SHARD_IMAGES]
        members = tuple(image for image in members if image.id not in foreign)
        if members:
            shards.append(Shard(path, {"digest": digest, "first": first, "shards": total}, members))
    return shards


def write_shard(
    shard: Shard,
    kept: Sequence[Image],
    features: np.ndarray,
    boxes: np.ndarray,
    counts: np.ndarray,
    sizes: np.ndarray,
    unreadable: Sequence[Unreadable],
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write one shard whole or not at all; the arrays are one row for each of `kept`, as the module's head says.

    Raises DataError naming the photograph whose features are not finite in float16.
    """
    features = features.astype(np.float16, copy=False)
    finite = np.isfinite(features).all(axis=(1, 2)) if len(features) else np.ones(0, bool)
    if not finite.all():
        photo = kept[int(np.argmin(finite))]
        raise DataError(
            f"the features of {photo.path} (image {photo.id}) are not finite in float16; "
            "try --precision fp32, or other --weights: nothing was written for its shard"
        )
    temporary = shard.path.with_name(f".{shard.path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            file.attrs["format"] = FORMAT
            file.attrs["identity"] = json.dumps(identity)
            file.attrs["provenance"] = json.dumps(provenance)
            file.attrs["plan"] = json.dumps(shard.plan)
            file.attrs["unreadable"] = json.dumps(unreadable)
            file["features"] = features
            file["boxes"] = boxes.astype(np.float32, copy=False)
            file["counts"] = counts.astype(np.int16)
            file["image_ids"] = np.array([image.id for image in kept], np.int64)
            file.create_dataset("names", data=[image.name for image in kept], shape=len(kept), dtype=h5py.string_dtype())
            file["sizes"] = sizes.astype(np.int32).reshape(-1, 2)
            file["crc32"] = np.array([zlib.crc32(np.ascontiguousarray(row)) for row in features], np.uint32)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, shard.path)
    finally:
        temporary.unlink(missing_ok=True)


def write_index(cache: Path) -> list[Unreadable]:
    """Write features.h5 (virtual datasets over all shards) and unreadable.jsonl, each by rename; returns the latter."""
    opened = FeatureCache(cache)
    temporary = cache / f".features.h5.{os.getpid()}.tmp"
    try:
        with contextlib.ExitStack() as stack, h5py.File(temporary, "w", libver=("v110", "v110")) as index:
            shards = [(path, stack.enter_context(open_shard(path))) for path in shard_paths(cache)]
            for key in ("format", "identity", "provenance"):
                index.attrs[key] = shards[0][1].attrs[key]
            for name in PER_IMAGE:
                pieces = [(path.name, file[name]) for path, file in shards if len(file[name])]
                if not pieces:
                    continue
                total = sum(len(data) for _, data in pieces)
                layout = h5py.VirtualLayout((total, *pieces[0][1].shape[1:]), pieces[0][1].dtype)
                start = 0
                for file_name, data in pieces:  # relative names: the folder can be moved
                    layout[start : start + len(data)] = h5py.VirtualSource(file_name, name, data.shape, data.dtype)
                    start += len(data)
                index.create_virtual_dataset(name, layout)
        os.replace(temporary, cache / "features.h5")
    finally:
        temporary.unlink(missing_ok=True)
    lines = [json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in opened.unreadable.values()]
    write_whole(cache / "unreadable.jsonl", "".join(lines))
    return list(opened.unreadable.values())


def write_whole(path: Path, text: str) -> None:
    """Write a small text file under a temporary name and rename it, so that nobody ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- reading


def shard_paths(cache: Path) -> list[Path]:
    return sorted(cache.glob("shard-*.h5"))


def open_shard(path: Path) -> h5py.File:
    """Open a shard to read; DataError where it is not one of ours or its format is another."""
    mend = f"remove it and re-run pipeline.extract with --out {path.parent}, which redoes only what is missing"
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} cannot be opened as HDF5 ({error}); {mend}") from error
    if file.attrs.get("format") != FORMAT:
        found = file.attrs.get("format", "none")
        file.close()
        raise DataError(f"{path} has format {found}, this version reads and writes {FORMAT}; {mend}")
    return file


def cache_header(cache: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Identity and provenance of a cache by its first shard, None where it has no shard yet."""
    for path in shard_paths(cache):
        with open_shard(path) as file:
            return json.loads(file.attrs["identity"]), json.loads(file.attrs["provenance"])
    return None


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any], fields: Iterable[str] = ()) -> list[str]:
    """Where two identities (or provenances) differ, one `field: found, not wanted` for each."""
    keys = list(fields) or list(dict.fromkeys([*wanted, *found]))
    return [f"{key}: {found.get(key)}, not {wanted.get(key)}" for key in keys if wanted.get(key) != found.get(key)]


class FeatureCache:
    """Random access by image id to the rows of a cache; safe to share with forked or spawned workers.

    `identity` (equal to be used together), `provenance` (recorded), `ids` int64 [N] in the cache's order,
    `unreadable` {image id: Unreadable}, `shape` (R, C). Raises DataError where the folder is no cache.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        paths = shard_paths(self.path)
        if not paths:
            what = "holds no shard-*.h5" if self.path.is_dir() else "is not there"
            raise DataError(f"cache {self.path} {what}; make it with: python -m pipeline.extract ... --out {self.path}")
        self._maps: list[tuple[np.memmap, np.memmap, np.ndarray]] = []
        self._where: dict[int, tuple[int, int]] = {}
        self._names: dict[int, str] = {}
        self.unreadable: dict[int, Unreadable] = {}
        identity = None
        for path in paths:
            with open_shard(path) as file:
                if identity is None:
                    identity = file.attrs["identity"]
                    self.identity: dict[str, Any] = json.loads(identity)
                    self.provenance: dict[str, Any] = json.loads(file.attrs["provenance"])
                elif file.attrs["identity"] != identity:
                    what = "; ".join(differences(self.identity, json.loads(file.attrs["identity"])))
                    raise DataError(f"{path} does not belong to the cache of {paths[0].name} ({what}); remove it")
                self._add(file)
                for record in json.loads(file.attrs["unreadable"]):
                    self.unreadable[record[0]] = Unreadable(*record)
        for image_id in self._where.keys() & self.unreadable.keys():  # a later plan could read it
            del self.unreadable[image_id]
        self.ids = np.fromiter(self._where, np.int64, len(self._where))
        self.shape = (self.identity["grid"][0] * self.identity["grid"][1], self.identity["channels"])

    def _add(self, file: h5py.File) -> None:
        ids = file["image_ids"][:].tolist()
        if not ids:
            return
        number = len(self._maps)
        self._maps.append((_map(file["features"]), _map(file["boxes"]), file["counts"][:]))
        for row, (image_id, name) in enumerate(zip(ids, file["names"].asstr()[:], strict=True)):
            self._where[image_id] = (number, row)
            self._names[image_id] = name

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, image_id: int) -> bool:
        return image_id in self._where

    def __getitem__(self, image_id: int) -> Rows:
        """One image's features [R,C], boxes [R,4] and count."""
        return Rows(*(part[0] for part in self.rows([image_id])))

    def rows(self, image_ids: Sequence[int]) -> Rows:
        """Copies of the rows of `image_ids`, in that order; DataError for an id that the cache has not."""
        regions, channels = self.shape
        rows = Rows(
            np.empty((len(image_ids), regions, channels), np.float16),
            np.empty((len(image_ids), regions, 4), np.float32),
            np.empty(len(image_ids), np.int16),
        )
        for at, image_id in enumerate(image_ids):
            try:
                number, row = self._where[int(image_id)]
            except KeyError:
                raise DataError(self._absent(int(image_id))) from None
            for target, origin in zip(rows, self._maps[number], strict=True):
                target[at] = origin[row]
        return rows

    def select(self, images: Iterable[Image]) -> tuple[list[Image], int]:
        """The images that have rows, and how many are left out because unreadable.jsonl lists them.

        Raises DataError for any other image without a row, and where cache and source name an id differently.
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
                    f"image {image.id} is {self._names[image.id]} in {self.path} and {image.name} in the captions; "
                    "the cache was made from other photographs: pass the --features that belong to these captions"
                )
            kept.append(image)
        return kept, left_out

    def _absent(self, image_id: int) -> str:
        return (
            f"image {image_id} is not in {self.path} ({len(self)} images); "
            "re-run pipeline.extract over the split that has it, with the same --out"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])


def _map(data: h5py.Dataset) -> np.memmap:
    return np.memmap(data.file.filename, data.dtype, "r", data.id.get_offset(), data.shape)


def iterate(sequence: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces of `size`, the last one shorter."""
    for start in range(0, len(sequence), size):
        yield sequence[start : start + size]
