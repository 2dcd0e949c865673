"""Random reads by `FeatureCache`, compared with a copy in memory and with a simple HDF5 file.

    python -m benchmarks.cache [--json FILE]

The simple file has one fp32 dataset per image and is opened for each read. A batch is 64 random
rows of 49 x 2048; the cache has 10,000 rows (2 GB in float16). The page cache is warm because every
row is read once before, as in a first epoch. The destination is reused. The same reads are then
timed in four processes at once.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import h5py
import numpy as np

from benchmarks.measure import header, report
from data.cache.reader import FeatureCache, Rows
from data.cache.writer import plan_shards, write_shard
from data.sources import Image

REGIONS, CHANNELS, BATCH, READS = 49, 2048, 64, 400
IDENTITY = {
    "backbone": "drawn",
    "weights": "none",
    "grid": [7, 7],
    "channels": CHANNELS,
    "regions": "grid",
    "resize": "stretch",
}
rng = np.random.default_rng(os.getpid())
barrier = None  # synchronizes the four processes, so that they read at the same time


@click.command(context_settings={"show_default": True})
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(tempfile.gettempdir()) / "onceover-benchmark-cache",
    help="folder for temporary files",
)
@click.option("--rows", "count", default=10_000, help="rows of the cache")
@click.option("--single", default=1000, help="images of the fp32 file with one dataset per image")
@click.option("--json", "out", type=click.Path(path_type=Path), help="also write the figures here")
def main(work: Path, count: int, single: int, out: Path | None) -> None:
    """Measure reads. All files are removed afterwards."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        figures = measure(work, count, single)
    finally:
        shutil.rmtree(work)
    report(figures, out)


def measure(work: Path, count: int, single: int) -> dict:
    """Write the cache and the simple file to `work`, and return the figures."""
    make_cache(work, count)
    with h5py.File(work / "single.h5", "w") as file:
        for row in range(single):
            file[str(row)] = np.full((REGIONS, CHANNELS), row, np.float32)
    copy, cache = copy_and_cache(work, count)
    file_per_read = statistics.median(
        seconds_of(lambda ids: open_per_read(work / "single.h5", ids % single), count)
        for _ in range(10)
    )
    context = multiprocessing.get_context("spawn")
    with context.Pool(4, set_barrier, (context.Barrier(4),)) as pool:
        pairs = pool.starmap(copy_and_cache, [(work, count)] * 4, chunksize=1)
    four_copy, four_cache = map(statistics.mean, zip(*pairs, strict=True))
    return header() | {
        "rows": count,
        "copy from an array in memory, ms a batch of 64": copy * 1e3,
        "FeatureCache.rows, ms": cache * 1e3,
        "... times the copy": cache / copy,
        "fp32 dataset an image, opened per read, ms": file_per_read * 1e3,
        "... times FeatureCache": file_per_read / cache,
        "four processes, copy from memory, ms": four_copy * 1e3,
        "four processes, FeatureCache.rows, ms": four_cache * 1e3,
        "... times the copy in four": four_cache / four_copy,
    }


def make_cache(work: Path, count: int) -> None:
    """Write a cache of `count` rows of random features."""
    images = [
        Image(number, f"{number}.jpg", Path(f"{number}.jpg"), "train", ())
        for number in range(count)
    ]
    rng = np.random.default_rng(0)
    for shard in plan_shards(images, work):
        n = len(shard.images)
        features = rng.integers(0, 15000, (n, REGIONS, CHANNELS), np.int16).view(np.float16)
        boxes, counts = np.zeros((n, REGIONS, 4), np.float32), np.full(n, REGIONS)
        write_shard(
            shard, shard.images, [Rows(features, boxes, counts)], np.ones((n, 2)), [], IDENTITY, {}
        )


def copy_and_cache(work: Path, count: int) -> tuple[float, float]:
    """Return the median seconds of a numpy copy of 64 random rows and of a read by FeatureCache.

    Both take turns. Each row has been read once before, as in a first epoch.
    """
    cache = FeatureCache(work)
    memory = cache.rows(cache.ids.tolist()).features
    out = cache.empty_rows(BATCH)
    if barrier is not None:
        barrier.wait()

    def copy(ids: np.ndarray) -> None:
        np.take(memory, ids, axis=0, out=out.features, mode="clip")  # "clip": without a buffer

    def read(ids: np.ndarray) -> None:
        cache.rows(ids.tolist(), out)

    pairs = [(seconds_of(copy, count), seconds_of(read, count)) for _ in range(READS)]
    copy_seconds, read_seconds = zip(*pairs, strict=True)
    return statistics.median(copy_seconds), statistics.median(read_seconds)


def seconds_of(read: Callable[[np.ndarray], object], count: int) -> float:
    """Return the seconds of reading a batch of random rows of `count` rows."""
    ids = rng.integers(0, count, BATCH)
    start = time.perf_counter()
    read(ids)
    return time.perf_counter() - start


def open_per_read(path: Path, ids: np.ndarray) -> None:
    for row in ids.tolist():
        with h5py.File(path, "r") as file:
            file[str(row)][()]


def set_barrier(shared: object) -> None:
    global barrier
    barrier = shared


if __name__ == "__main__":
    main()
