"""Kill extractions with SIGKILL at random moments, and hold what is left against an uninterrupted
one.

    python -m tests.kill_extraction PHOTOGRAPHS WORK [--kills 50] [--seed 0] [--limit N] [--backbone
    B --weights W] [--regions KIND]

After every kill each shard that is there must be whole; once a run comes through, the cache must
equal the uninterrupted one's row for row, bit for bit. Then a new folder is begun, until all kills
are spent; at last two runs share one folder.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import click
import numpy as np

from data.cache import writer as shards
from data.cache.reader import FeatureCache, shard_paths
from data.cache.writer import verify_shard
from pipeline import extract


@click.command()
@click.argument("photographs", type=click.Path(path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--kills", default=50)
@click.option("--seed", default=0)
@click.option("--limit", default=1500)
@click.option("--shard-images", default=100)
@click.option("--backbone", default="test_resnet")
@click.option("--weights", default="scenes")
@click.option("--regions", default="grid")
def main(
    photographs: Path,
    work: Path,
    kills: int,
    seed: int,
    limit: int,
    shard_images: int,
    backbone: str,
    weights: str,
    regions: str,
) -> None:
    shards.SHARD_IMAGES = shard_images
    options = ["--dataset", "folder", "--root", photographs, "--limit", limit, "--regions", regions]
    if "grid" in regions:
        options += ["--backbone", backbone, "--weights", weights]
    if "detector" in regions:
        options += ["--detector-backbone", "test_resnet", "--detector-weights", "scenes"]
    start = time.monotonic()
    wait(begin(options, work / "whole"))
    seconds = time.monotonic() - start
    whole = FeatureCache(work / "whole")
    print(
        f"uninterrupted: {len(whole):,} rows in {len(whole.paths)} shards, {seconds:.1f} s",
        flush=True,
    )
    rng, killed, through, kept = random.Random(seed), 0, 0, 0
    cache = work / "killed"
    while killed < kills:
        run = begin(options, cache)
        time.sleep(rng.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run, signal.SIGKILL)
        ended = os.waitpid(run, 0)[1]
        for path in shard_paths(cache):
            assert verify_shard(path) == [], verify_shard(path)
        before = {path: path.stat().st_mtime_ns for path in shard_paths(cache)}
        if os.WIFSIGNALED(ended):
            killed += 1
            kept += len(before)
        if not os.WIFSIGNALED(ended) or killed % 10 == 0 or killed == kills:
            wait(begin(options, cache))
            assert all(path.stat().st_mtime_ns == then for path, then in before.items()), (
                "a finished shard was made again"
            )
            same(whole, cache)
            through += 1
            shutil.rmtree(cache)
    print(
        f"killed {killed} times, {kept / max(killed, 1):.1f} shards there on average, all "
        "whole; went on to the same cache "
        f"{through} times",
        flush=True,
    )
    for run in [begin(options, cache), begin(options, cache)]:
        wait(run)
    same(whole, cache)
    print("two runs at once into one folder: the same cache", flush=True)


def begin(options: list, cache: Path) -> int:
    """A run in a process group of its own; only here does torch start its threads."""
    run = os.fork()
    if run:
        return run
    status = 1
    try:
        os.setsid()
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        extract.main.main(
            [str(option) for option in [*options, "--out", cache]], standalone_mode=False
        )
        status = 0
    finally:
        os._exit(status)


def wait(run: int) -> None:
    assert os.waitpid(run, 0)[1] == 0, "an extraction failed"


def same(whole: FeatureCache, cache: Path) -> None:
    """Bit for bit the same rows, ids and index, and nothing left over but what a killed process was
    writing.
    """
    found = FeatureCache(cache)
    assert found.ids.tolist() == whole.ids.tolist() and found.identity == whole.identity
    ids = whole.ids.tolist()
    for part, other in zip(whole.rows(ids), found.rows(ids), strict=True):
        assert np.array_equal(part, other)
    assert found.unreadable == whole.unreadable
    names = sorted(path.name for path in cache.iterdir() if path.suffix != ".tmp")
    assert names == sorted(path.name for path in whole.path.iterdir()), names


if __name__ == "__main__":
    main()
