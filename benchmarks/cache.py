"""Random rows by `FeatureCache` against a copy from memory and against one fp32 dataset an image,
opened per read.

    python -m benchmarks.cache [--json FILE]

Batches of 64 new random rows of 49 x 2048, 10,000 rows (2 GB in float16), warm page cache, every
row read once before, as in a first epoch, the destination reused; then the same from four processes
at once.
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
meeting = None  # where four processes wait for each other, so that all read at once


@click.command(context_settings={"show_default": True})
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(tempfile.gettempdir()) / "onceover-benchmark-cache",
)
@click.option("--rows", "count", default=10_000)
@click.option("--single", default=1000, help="images of the fp32 file with a dataset each")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(work: Path, count: int, single: int, out: Path | None) -> None:
    """Measure reads in one run; all files are removed after it."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        figures = measure(work, count, single)
    finally:
        shutil.rmtree(work)
    report(figures, out)


def measure(work: Path, count: int, single: int) -> dict:
    make_cache(work, count)
    with h5py.File(work / "single.h5", "w") as file:
        for row in range(single):
            file[str(row)] = np.full((REGIONS, CHANNELS), row, np.float32)
    plain, cache = copy_and_cache(work, count)
    file_per_read = statistics.median(
        seconds_of(lambda ids: open_per_read(work / "single.h5", ids % single), count)
        for _ in range(10)
    )
    context = multiprocessing.get_context("spawn")
    with context.BeamHypotheses(4, meet_at, (context.Barrier(4),)) as pool:
        pairs = pool.starmap(copy_and_cache, [(work, count)] * 4, chunksize=1)
    four_plain, four = (statistics.mean(pair[which] for pair in pairs) for which in (0, 1))
    return header() | {
        "rows": count,
        "copy from an array in memory, ms a batch of 64": plain * 1e3,
        "FeatureCache.rows, ms": cache * 1e3,
        "... times the copy": cache / plain,
        "fp32 dataset an image, opened per read, ms": file_per_read * 1e3,
        "... times FeatureCache": file_per_read / cache,
        "four processes, copy from memory, ms": four_plain * 1e3,
        "four processes, FeatureCache.rows, ms": four * 1e3,
        "... times the copy in four": four / four_plain,
    }


def make_cache(work: Path, count: int) -> None:
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
    """Median seconds of a numpy copy of 64 random rows in memory and of a read by FeatureCache, in
    turn, after each row has been read once, as in a first epoch."""
    cache = FeatureCache(work)
    memory = cache.rows(cache.ids.tolist()).features
    out = cache.empty_rows(BATCH)
    if meeting is not None:
        meeting.wait()
    pairs = [
        (
            seconds_of(
                lambda ids: np.take(memory, ids, axis=0, out=out.features, mode="clip"), count
            ),  # unbuffered
            seconds_of(lambda ids: cache.rows(ids.tolist(), out), count),
        )
        for _ in range(READS)
    ]
    return statistics.median(pair[0] for pair in pairs), statistics.median(
        pair[1] for pair in pairs
    )


def seconds_of(read: Callable[[np.ndarray], object], count: int) -> float:
    ids = rng.integers(0, count, BATCH)
    start = time.perf_counter()
    read(ids)
    return time.perf_counter() - start


def open_per_read(path: Path, ids: np.ndarray) -> None:
    for row in ids.tolist():
        with h5py.File(path, "r") as file:
            file[str(row)][()]


def meet_at(barrier: object) -> None:
    global meeting
    meeting = barrier


if __name__ == "__main__":
    main()
