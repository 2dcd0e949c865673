"""The extraction pipeline: photographs to finished shards.

    claimed shards -> batches of images -> decoded pixels -> regions -> rows of a shard -> file

On a CPU, threads decode a few batches, then the backbone processes them on all cores. Running both
at the same time would not be faster, because they use the same cores.

On a GPU, four stages overlap: processes decode the next batches into pinned memory, the GPU runs
the backbone, rows are copied back to the host, and a thread writes finished shards.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.cache.claims import Claims
from data.cache.reader import TABLE_TYPES, Rows, Unreadable, iterate, views_of
from data.cache.writer import Shard, stamp, write_shard
from data.images import Framing, Photo, Photographs, Pixels, stack_inputs, try_image
from data.remote import Blob, FetchError
from data.sources import Image
from models.backbones.interface import Backbone
from pipeline.cli import UserError
from pipeline.extraction.backbone import extract_with_tables, framing_of
from pipeline.extraction.views import view_of
from pipeline.runtime import Machine
from pipeline.terminal import Progress

DECODE_BATCHES = 4  # batches that threads decode at a time on a CPU
PENDING_COPIES = 2  # maximum number of batches that are being copied from the GPU
PENDING_WRITES = 1  # maximum number of finished shards that wait for the disk; bounds the memory


class Work(NamedTuple):
    """A batch of images to process. last: whether it is the last batch of its shard."""

    shard: Shard
    images: tuple[Image, ...]
    last: bool


class Decoded(NamedTuple):
    """A decoded batch of photographs, of which n are readable.

    pixels: [n,3,H,W] uint8, or n images [3,H,W] of different sizes.
    view_boxes: [n,4], the part of each photograph that the pixels show, x0 y0 x1 y1 in 0..1.
    originals: n sizes (height, width) of the files.
    reasons: for each photograph of the batch, why it is unreadable; "" if it is readable.
    more: pixels and view_boxes of further kinds of regions.
    """

    pixels: Pixels
    view_boxes: Tensor
    originals: list[tuple[int, int]]
    reasons: list[Any]
    more: Sequence[tuple[Pixels, Tensor]] = ()


@dataclass
class Recipe:
    """Settings of an extraction.

    identity, provenance: what the cache records about its features.
    batch: photographs per forward pass of the backbone.
    workers: number of decoding threads or processes.
    strict: raise an error for an unreadable photograph.
    missing: ids of missing photographs, with --allow-missing.
    max_pixels: as in `Framing`.
    """

    backbone: Backbone
    machine: Machine
    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    batch: int
    workers: int
    strict: bool = False
    missing: frozenset[int] = frozenset()
    max_pixels: int | None = None

    @property
    def views(self) -> tuple[str, ...]:
        return views_of(self.provenance)

    @property
    def parts(self) -> list[tuple[str, Backbone]]:
        """The view and the backbone of each part of a row, in the order of the shards."""
        return [(view, part) for view in ("", *self.views) for part in self.backbone.parts]


class ShardRows:
    """The rows of a shard during its extraction.

    rows: for each of `Recipe.parts`: features, boxes, counts and the tables of the backbone. The
    first `len(readable)` entries of each array are filled.
    """

    def __init__(self, shard: Shard, recipe: Recipe) -> None:
        self.shard = shard
        self.rows = [_empty_rows(len(shard.images), part) for _, part in recipe.parts]
        self.readable: list[Image] = []
        self.sizes: list[tuple[int, int]] = []  # (height, width) of the files
        self.unreadable: list[Unreadable] = []

    def add(
        self, images: Sequence[Image], batch: Decoded, arrays: Sequence[np.ndarray], strict: bool
    ) -> None:
        """Add a batch. Raises UserError for an unreadable photograph if `strict`.

        arrays: features, boxes, counts and tables of the readable photographs, then those of each
            view.
        """
        for image, reason in zip(images, batch.reasons, strict=True):
            if reason and strict:
                raise UserError(f"--strict: {image.path} cannot be read: {reason}")
            if reason:
                self.unreadable.append(Unreadable(image.id, image.name, reason, *stamp(image.path)))
        readable = [
            image for image, reason in zip(images, batch.reasons, strict=True) if not reason
        ]
        start = len(self.readable)
        for target, values in zip(itertools.chain(*self.rows), arrays, strict=True):
            target[start : start + len(readable)] = values
        self.readable += readable
        self.sizes += batch.originals

    def write(self, recipe: Recipe) -> None:
        """Write the shard to its file."""
        count = len(self.readable)
        rows = [Rows(*(part[:count] for part in view[:3])) for view in self.rows]
        tables = [
            {name: array[:count] for name, array in zip(part.tables, row[3:], strict=True)}
            for (_, part), row in zip(recipe.parts, self.rows, strict=True)
        ]
        write_shard(
            self.shard,
            self.readable,
            rows,
            np.array(self.sizes, np.int32),
            self.unreadable,
            recipe.identity,
            recipe.provenance,
            tables,
        )


def _empty_rows(images: int, backbone: Backbone) -> tuple[np.ndarray, ...]:
    regions, channels = backbone.shape
    return (
        np.empty((images, regions, channels), np.float16),
        np.empty((images, regions, 4), np.float32),
        np.empty(images, np.int16),
        *(np.empty((images, regions), TABLE_TYPES[name]) for name in backbone.tables),
    )


def extract_shards(
    shards: Iterable[Shard], claims: Claims, recipe: Recipe, bar: Progress
) -> list[Path]:
    """Extract each shard that does not exist and that no other process has claimed.

    Returns the paths of the new shards. Raises UserError for an unreadable photograph if
    `recipe.strict`.
    """
    framing = framing_of(recipe.backbone, recipe.max_pixels)
    work = _batches(shards, claims, recipe)
    decode = _read_in_processes if recipe.machine.device.type == "cuda" else _read_in_threads
    rows, paths, unreadable = None, [], 0
    with ThreadPoolExecutor(1) as writer:
        pending: deque[Future] = deque()
        extracted = _extract_batches(decode(work, framing, recipe), recipe)
        for (shard, images, last), batch, arrays in extracted:
            rows = rows or ShardRows(shard, recipe)
            rows.add(images, batch, arrays, recipe.strict)
            unreadable += sum(map(bool, batch.reasons))
            bar.step(len(images), f"{unreadable} unreadable" if unreadable else "")
            if last:
                while len(pending) >= PENDING_WRITES:
                    pending.popleft().result()
                pending.append(writer.submit(_write, rows, claims, recipe))
                rows = None
                paths.append(shard.path)
        for future in pending:
            future.result()
    return paths


def _batches(shards: Iterable[Shard], claims: Claims, recipe: Recipe) -> Iterator[Work]:
    """Claim shards and split them into batches.

    A batch has images of one shard only. Therefore a resumed extraction has the same batches and
    computes the same rows.
    """
    for shard in shards:
        if claims.take(shard):
            batches = list(iterate(shard.images, recipe.batch))
            for number, batch in enumerate(batches, 1):
                yield Work(shard, tuple(batch), number == len(batches))


def _write(rows: ShardRows, claims: Claims, recipe: Recipe) -> None:
    rows.write(recipe)
    claims.release(rows.shard.path)


# ----------------------------------------------------------------------------------------- decoding


def _read_in_threads(
    work: Iterator[Work], framing: Framing, recipe: Recipe
) -> Iterator[tuple[Work, Decoded]]:
    def read(image: Image) -> tuple[Photo | None, str]:
        return (None, "missing") if image.id in recipe.missing else try_image(image.path, framing)

    with ThreadPoolExecutor(max(1, recipe.workers)) as pool:
        while group := list(islice(work, DECODE_BATCHES)):
            photos = pool.map(read, [image for item in group for image in item.images])
            batches = [_collate(list(islice(photos, len(item.images))), framing) for item in group]
            yield from zip(group, batches, strict=True)


def _read_in_processes(
    work: Iterator[Work], framing: Framing, recipe: Recipe
) -> Iterator[tuple[Work, Decoded]]:
    requested: deque[Work] = deque()  # batches that the workers read

    def paths() -> Iterator[list[str | Blob]]:
        for item in work:
            requested.append(item)
            yield ["" if image.id in recipe.missing else _sent(image) for image in item.images]

    loader = DataLoader(
        _ByPath(framing),
        batch_sampler=paths(),
        num_workers=recipe.workers,
        collate_fn=functools.partial(_collate, framing=framing),
        pin_memory=recipe.machine.device.type == "cuda",
        prefetch_factor=4 if recipe.workers else None,
    )
    for decoded in loader:
        batch = Decoded(*decoded)
        # A DataLoader would raise the error of a worker with its traceback in the message.
        for reason in batch.reasons:
            if isinstance(reason, FetchError):
                raise reason
        yield requested.popleft(), batch


def _sent(image: Image) -> str | Blob:
    """What is sent to a worker: a local path as text, which is faster to send than a Path."""
    path: Any = image.path
    return path if isinstance(path, Blob) else str(path)


class _ByPath(Photographs):
    """A dataset that is indexed by path instead of by number.

    The list of files is not known in advance, because shards are claimed during the extraction.
    """

    def __init__(self, framing: Framing) -> None:
        super().__init__([], framing)

    # the batch_sampler yields paths, not indices
    def __getitem__(self, path: str | Blob) -> tuple[Photo | None, Any]:  # type: ignore[override]
        if not path:
            return None, "missing"
        try:
            return try_image(path, self.framing)
        except FetchError as error:
            return None, error


def _collate(photos: Sequence[tuple[Photo | None, Any]], framing: Framing) -> Decoded:
    readable = [photo for photo, _ in photos if photo is not None]
    none: tuple[Pixels, Tensor] = (
        torch.empty(0, 3, *framing.size, dtype=torch.uint8),
        torch.empty(0, 4),
    )
    (pixels, view_boxes), *more = stack_inputs(readable) if readable else [none]
    originals = [photo.original for photo in readable]
    return Decoded(pixels, view_boxes, originals, [reason for _, reason in photos], more)


# ----------------------------------------------------------------------------------------- backbone


def _extract_batches(
    decoded: Iterable[tuple[Work, Decoded]], recipe: Recipe
) -> Iterator[tuple[Work, Decoded, tuple[np.ndarray, ...]]]:
    """Yield each batch with its rows: features [n,R,C] float16, boxes [n,R,4], counts [n] and
    tables [n,R], for the n readable photographs, of each of `Recipe.parts`.
    """
    gpu = recipe.machine.device.type == "cuda"
    pending: deque[tuple[Work, Decoded, list[Tensor], Any]] = deque()
    for work, batch in decoded:
        readable_ids = [
            image.id for image, reason in zip(work.images, batch.reasons, strict=True) if not reason
        ]
        tensors = _extract_batch(batch, readable_ids, recipe)
        copy_done = None
        if gpu:
            pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            tensors = [
                target.copy_(source, non_blocking=True)
                for target, source in zip(pinned, tensors, strict=True)
            ]
            copy_done = torch.cuda.Event()
            copy_done.record()
        pending.append((work, batch, tensors, copy_done))
        while len(pending) > (PENDING_COPIES if gpu else 0):
            yield _to_numpy(*pending.popleft())
    while pending:
        yield _to_numpy(*pending.popleft())


def _extract_batch(batch: Decoded, readable_ids: Sequence[int], recipe: Recipe) -> list[Tensor]:
    """The rows of a batch: features, boxes, counts and tables, of each of `Recipe.parts`."""
    if not readable_ids:
        return [torch.from_numpy(a) for _, part in recipe.parts for a in _empty_rows(0, part)]
    tensors: list[Tensor] = []
    inputs = [(batch.pixels, batch.view_boxes), *batch.more] * (1 + len(recipe.views))
    for (view, backbone), (pixels, view_boxes) in zip(recipe.parts, inputs, strict=True):
        view_pixels, view_boxes = view_of(view, pixels, view_boxes, readable_ids)
        regions, tables = extract_with_tables(
            backbone, view_pixels, recipe.machine, view_boxes, readable_ids
        )
        tensors += [*regions, *tables]
    return tensors


def _to_numpy(
    work: Work, batch: Decoded, tensors: list[Tensor], copy_done: Any
) -> tuple[Work, Decoded, tuple[np.ndarray, ...]]:
    if copy_done is not None:
        copy_done.synchronize()
    return work, batch, tuple(tensor.numpy() for tensor in tensors)


def decoding_workers(workers: int | None) -> int:
    """Number of decoding threads or processes: `workers`, else one per usable core."""
    if workers is not None:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
