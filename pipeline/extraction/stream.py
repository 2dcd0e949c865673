"""Photographs to finished shards, with everything overlapped that can be.

    claimed shards -> batches of paths -> decoded pixels -> regions -> rows of a shard -> written by
    a thread

On a CPU threads decode some batches, then all cores run the backbone: both are bound by the same
cores, so side by side they would only wait for each other. On a GPU processes decode ahead into
pinned memory while the device works, rows come back behind the next batch, and are written behind
that.
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
from data.cache.reader import Rows, Unreadable, iterate, views_of
from data.cache.writer import Shard, stamp, write_shard
from data.images import Framing, Photo, Photographs, stack, try_image
from data.sources import Image
from models.backbones.interface import Backbone
from pipeline.cli import UserError
from pipeline.extraction.backbone import extract_regions, framing_of
from pipeline.extraction.views import view_of
from pipeline.runtime import Machine
from pipeline.terminal import Progress

AHEAD = 4  # batches that threads decode before the backbone runs, so that it rarely waits
BEHIND = 2  # batches whose rows may still be on their way back from a GPU
WRITING = (
    1  # finished shards that may wait for the disk: memory does not grow with the number of images
)


class Work(NamedTuple):
    """A batch of a shard's images. last: whether it is the last batch of the shard."""

    shard: Shard
    images: tuple[Image, ...]
    last: bool


class Decoded(NamedTuple):
    """A decoded batch of photographs.

    pixels [n,3,H,W] uint8, view_boxes [n,4] and originals (height, width) of the n readable ones;
    reasons: for each photograph of the batch why it is unreadable, "" for readable ones.
    """

    pixels: Tensor
    view_boxes: Tensor
    originals: list[tuple[int, int]]
    reasons: list[str]


@dataclass
class Recipe:
    """How rows are made, and what the cache records about it."""

    backbone: Backbone
    machine: Machine
    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    batch: int
    workers: int
    strict: bool = False
    missing: frozenset[int] = frozenset()  # ids of absent photographs, with --allow-missing
    max_pixels: int | None = None  # as Framing has it

    @property
    def views(self) -> tuple[str, ...]:
        return views_of(self.provenance)

    @property
    def shape(self) -> tuple[int, int]:
        """Largest number of regions of an image and number of channels, (R, C)."""
        return self.backbone.shape


class ShardRows:
    """The rows of a shard while it is extracted: one `Rows` per view, of which the first
    `len(kept)` entries are filled.
    """

    def __init__(self, shard: Shard, recipe: Recipe) -> None:
        images, cells, channels = len(shard.images), *recipe.shape
        self.shard = shard
        self.rows = [
            Rows(
                np.empty((images, cells, channels), np.float16),
                np.empty((images, cells, 4), np.float32),
                np.empty(images, np.int16),
            )
            for _ in ("", *recipe.views)
        ]
        self.kept: list[Image] = []
        self.sizes: list[tuple[int, int]] = []
        self.unreadable: list[Unreadable] = []

    def add(
        self, images: Sequence[Image], batch: Decoded, found: Sequence[np.ndarray], strict: bool
    ) -> None:
        """Add a batch. found: features, boxes and counts of each view in turn."""
        for image, reason in zip(images, batch.reasons, strict=True):
            if reason and strict:
                raise UserError(f"--strict: {image.path} cannot be read: {reason}")
            if reason:
                self.unreadable.append(Unreadable(image.id, image.name, reason, *stamp(image.path)))
        readable = [
            image for image, reason in zip(images, batch.reasons, strict=True) if not reason
        ]
        at = slice(len(self.kept), len(self.kept) + len(readable))
        for target, part in zip(itertools.chain(*self.rows), found, strict=True):
            target[at] = part
        self.kept += readable
        self.sizes += batch.originals

    def write(self, recipe: Recipe) -> None:
        rows = [Rows(*(part[: len(self.kept)] for part in view)) for view in self.rows]
        sizes = np.array(self.sizes, np.int32)
        write_shard(
            self.shard, self.kept, rows, sizes, self.unreadable, recipe.identity, recipe.provenance
        )


def extract_shards(
    shards: Iterable[Shard], claims: Claims, recipe: Recipe, bar: Progress
) -> list[Path]:
    """Extract every shard that does not exist and that no other process has claimed. Yields the
    paths of the new shards.
    """
    framing = framing_of(recipe.backbone, recipe.max_pixels)
    work = _batches(shards, claims, recipe)
    decoded = _read_in_processes if recipe.machine.device.type == "cuda" else _read_in_threads
    rows, made, unreadable = None, [], 0
    with ThreadPoolExecutor(1) as disk:
        writing: deque[Future] = deque()
        for (shard, images, last), batch, found in _seen(decoded(work, framing, recipe), recipe):
            rows = rows or ShardRows(shard, recipe)
            rows.add(images, batch, found, recipe.strict)
            unreadable += sum(map(bool, batch.reasons))
            bar.step(len(images), f"{unreadable} unreadable" if unreadable else "")
            if last:
                while len(writing) >= WRITING:
                    writing.popleft().result()
                writing.append(disk.submit(_write, rows, claims, recipe))
                rows = None
                made.append(shard.path)
        for future in writing:
            future.result()
    return made


def _batches(shards: Iterable[Shard], claims: Claims, recipe: Recipe) -> Iterator[Work]:
    """Cut shards into batches. A batch never crosses shards, so batches and rows are the same after
    a resume.
    """
    for shard in shards:
        if claims.take(shard):
            pieces = list(iterate(shard.images, recipe.batch))
            for number, piece in enumerate(pieces):
                yield Work(shard, tuple(piece), number + 1 == len(pieces))


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
        while some := list(islice(work, AHEAD)):
            photos = pool.map(read, [image for each in some for image in each.images])
            batches = [_collate(list(islice(photos, len(each.images))), framing) for each in some]
            yield from zip(some, batches, strict=True)


def _read_in_processes(
    work: Iterator[Work], framing: Framing, recipe: Recipe
) -> Iterator[tuple[Work, Decoded]]:
    asked: deque[Work] = deque()

    def paths() -> Iterator[list[str]]:
        for each in work:
            asked.append(each)
            yield ["" if image.id in recipe.missing else str(image.path) for image in each.images]

    loader = DataLoader(
        _ByPath(framing),
        batch_sampler=paths(),
        num_workers=recipe.workers,
        collate_fn=functools.partial(_collate, framing=framing),
        pin_memory=recipe.machine.device.type == "cuda",
        prefetch_factor=4 if recipe.workers else None,
    )
    for decoded in loader:
        yield asked.popleft(), Decoded(*decoded)


class _ByPath(Photographs):
    """A dataset indexed by path instead of by number, so that the reading order is decided while
    reading.
    """

    def __init__(self, framing: Framing) -> None:
        super().__init__([], framing)

    # the batch_sampler yields paths, not indices
    def __getitem__(self, path: str) -> tuple[Photo | None, str]:  # type: ignore[override]
        return try_image(Path(path), self.framing) if path else (None, "missing")


def _collate(photos: Sequence[tuple[Photo | None, str]], framing: Framing) -> Decoded:
    good = [photo for photo, _ in photos if photo is not None]
    pixels, view_boxes = (
        stack(good)
        if good
        else (torch.empty(0, 3, *framing.size, dtype=torch.uint8), torch.empty(0, 4))
    )
    return Decoded(
        pixels, view_boxes, [photo.original for photo in good], [reason for _, reason in photos]
    )


# ------------------------------------------------------------------------------------------ looking


def _seen(
    decoded: Iterable[tuple[Work, Decoded]], recipe: Recipe
) -> Iterator[tuple[Work, Decoded, tuple[np.ndarray, ...]]]:
    """Yield each batch with its rows on the host: features [n,R,C] float16, boxes [n,R,4] and
    counts [n] of each view.
    """
    gpu = recipe.machine.device.type == "cuda"
    coming: deque[tuple[Work, Decoded, list[Tensor], Any]] = deque()
    for work, batch in decoded:
        parts: list[Tensor] = []
        ids = [image.id for image, why in zip(work.images, batch.reasons, strict=True) if not why]
        for view in ("", *recipe.views):
            pixels, view_boxes = view_of(view, batch.pixels, batch.view_boxes, ids)
            parts += (
                extract_regions(recipe.backbone, pixels, recipe.machine, view_boxes)
                if len(pixels)
                else nothing(*recipe.shape)
            )
        copied = None
        if gpu:
            pinned = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in parts]
            parts = [
                target.copy_(part, non_blocking=True)
                for target, part in zip(pinned, parts, strict=True)
            ]
            copied = torch.cuda.Event()
            copied.record()
        coming.append((work, batch, parts, copied))
        while len(coming) > (BEHIND if gpu else 0):
            yield _arrived(*coming.popleft())
    while coming:
        yield _arrived(*coming.popleft())


def nothing(cells: int, channels: int) -> list[Tensor]:
    return [
        torch.empty(0, cells, channels, dtype=torch.float16),
        torch.empty(0, cells, 4),
        torch.empty(0),
    ]


def _arrived(
    work: Work, batch: Decoded, parts: list[Tensor], copied: Any
) -> tuple[Work, Decoded, tuple[np.ndarray, ...]]:
    if copied is not None:
        copied.synchronize()
    return work, batch, tuple(part.numpy() for part in parts)


def decoding_workers(asked: int | None) -> int:
    """Number of decoding threads or processes: `asked`, else one per usable core."""
    if asked is not None:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
