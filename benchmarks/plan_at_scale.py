"""Plan an extraction of 1e9 photographs, part by part: how much time and memory does it take?

    python -m benchmarks.plan_at_scale --rows 1e9 --part 1e6

A billion photographs are extracted in parts, each with its own folder of tars and its own cache
(see docs/scale.md). For every part this script makes the images of a WebDataset source, and then
runs the code of pipeline.extract that does not depend on the pixels:

    plan     shards of a new remote cache, and its plan file
    resume   the listing of a cache of which half of the shards exist, and the plan of the rest
    index    the end of an extraction: the listing, the images that are left, unreadable.jsonl

The store is memory://, and the shards in it are empty, because none of these steps opens a shard.
With --local, the script also writes the shards of one part with rows of one number to a disk, and
measures features.h5 and the opening of the cache.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from benchmarks.measure import header
from data.cache.outputs import RemoteOutput
from data.cache.reader import FeatureCache, Rows, Unreadable
from data.cache.writer import Shard, plan_shards, processed_ids, write_index, write_shard
from data.files import json_lines
from data.remote import Blob, as_path
from data.sources import Image, image_id

TAR_IMAGES = 10_000  # photographs in a tar
IDENTITY = {"regions": "grid", "resize": "stretch"}


def images_of(part: int, size: int) -> list[Image]:
    """The images of a part, as data.datasets.webdataset makes them from kept indexes."""
    images = []
    for number in range(size):
        tar = f"s3://bucket/part-{part:05d}/{number // TAR_IMAGES:05d}.tar"
        key = f"{part:05d}{number:09d}.jpg"
        name = f"{number // TAR_IMAGES:05d}.tar/{key}"
        path = Blob(tar, key, number % TAR_IMAGES * 150_000, 150_000)
        images.append(Image(image_id(f"{part}/{name}"), name, path, "train", ()))  # type: ignore[arg-type]
    return images


def plan_part(images: Sequence[Image], cache: str) -> dict[str, float]:
    """Plan, resume and index one part. Returns the CPU seconds of the three steps."""
    seconds: dict[str, float] = {}

    def timed(name: str, start: float) -> float:
        seconds[name] = time.process_time() - start
        return time.process_time()

    start = time.process_time()
    output = RemoteOutput(as_path(cache))
    shards = plan_shards(images, output.folder, output.existing(images))
    output.prepare(images, shards, IDENTITY, {}, None)
    start = timed("plan", start)
    for shard in shards[::2]:
        output.fs.pipe_file(f"{output.path}/{shard.path.name}", b"")
    start = time.process_time()
    output = RemoteOutput(as_path(cache))
    resumed = plan_shards(images, output.folder, output.existing(images))
    assert [shard.written for shard in resumed] == [n % 2 == 0 for n in range(len(shards))]
    start = timed("resume", start)
    for shard in shards[1::2]:
        output.fs.pipe_file(f"{output.path}/{shard.path.name}", b"")
    for shard in shards:  # one unreadable photograph in every shard
        record = Unreadable(shard.images[0].id, shard.images[0].name, "broken", 0, 0)
        lines = json_lines([record._asdict()]).encode()
        output.fs.pipe_file(f"{output.path}/{shard.path.stem}.unreadable.jsonl", lines)
    start = time.process_time()
    processed = processed_ids(output.existing(images))
    assert not [image for image in images if image.id not in processed]
    unreadable, _ = output.finish()
    assert len(unreadable) == len(shards)
    timed("index", start)
    output.fs.rm(output.path, recursive=True)
    return seconds


def measure_local(images: Sequence[Image]) -> dict[str, float]:
    """Write the shards of a part with rows of one number. Returns the seconds of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        for shard in plan_shards(images, cache):
            write_row_of_one_number(shard)
        start = time.process_time()
        write_index(cache)
        indexed = time.process_time()
        FeatureCache(cache)
        return {"features.h5": indexed - start, "open the cache": time.process_time() - indexed}


def write_row_of_one_number(shard: Shard) -> None:
    n = len(shard.images)
    arrays = np.ones((n, 1, 1), np.float16), np.zeros((n, 1, 4), np.float32), np.ones(n, np.int16)
    write_shard(shard, shard.images, [Rows(*arrays)], np.ones((n, 2)), [], IDENTITY, {})


@click.command()
@click.option("--rows", default=1e9, type=float, help="photographs in total")
@click.option("--part", default=1e6, type=float, help="photographs of a part")
@click.option("--parts", default=None, type=int, help="stop after this number of parts")
@click.option("--local", is_flag=True, help="also measure a local cache of one part")
def main(rows: float, part: float, parts: int | None, local: bool) -> None:
    total, size = int(rows), int(part)
    count = -(-total // size)
    seconds: Counter[str] = Counter()
    done = 0
    peaks: list[int] = []
    for number in range(count if parts is None else min(parts, count)):
        start = time.process_time()
        images = images_of(number, min(size, total - number * size))
        seconds["images"] += time.process_time() - start
        seconds.update(plan_part(images, f"memory://cache/part-{number:05d}"))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        done += len(images)
    report = {
        **header(),
        "rows planned": f"{done:,} of {total:,} in {len(peaks):,} of {count:,} parts",
        "CPU seconds per part": {k: round(v / len(peaks), 2) for k, v in seconds.items()},
        "peak memory in MB after the first and the last part": [peaks[0], peaks[-1]],
        "CPU hours for all rows, at this rate": round(
            sum(seconds.values()) / done * total / 3600, 2
        ),
    }
    if local:
        report["local cache of one part, CPU seconds"] = {
            name: round(value, 1) for name, value in measure_local(images).items()
        }
    click.echo(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
