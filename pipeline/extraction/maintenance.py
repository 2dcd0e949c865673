"""Maintenance of an existing cache: verify, repair, inspect and pack."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from data import DataError
from data.cache.reader import FeatureCache, cache_header, reading_shard, shard_paths
from data.cache.writer import pack, verify_shard
from pipeline.cli import UserError
from pipeline.runtime import Machine, check_free_space
from pipeline.terminal import human_bytes, progress, say

PRINTED_ROWS = 3  # number of rows that --inspect prints
STATISTICS_ROWS = 500  # number of rows that the statistics of --inspect use


def check(path: Path) -> dict[Path, list[str]]:
    """Read every row of a cache, and return the problems of each damaged file.

    path: a cache folder, or a packed file. Raises UserError if the file system cannot read a file,
    because its content is then unknown.
    """
    files = [path] if path.is_file() else shard_paths(path)
    if not files:
        raise UserError(f"{path} has no shard-*.h5; nothing to check")
    problems, read_errors, identity = {}, [], most_common_identity(files)
    with progress(len(files), "shards", "verify") as bar:
        for file in files:
            try:
                if lines := verify_shard(file, identity):
                    problems[file] = lines
            except OSError as error:
                read_errors.append(f"{file}: {error.strerror}")
            bar.step(1, f"{len(problems)} damaged" if problems else "")
    if read_errors:
        for line in itertools.chain.from_iterable(problems.values()):
            click.echo(line)
        raise UserError(
            f"{len(read_errors)} of {len(files)} files could not be read: "
            f"{'; '.join(read_errors[:5])}. The files may be intact. Nothing was changed; repair "
            "the file system or its permissions and try again"
        )
    return problems


def most_common_identity(files: Sequence[Path]) -> dict | None:
    """Return the identity that most files of a cache have; None if no file can be read."""
    counts: Counter[str] = Counter()
    for path in files:
        with contextlib.suppress(DataError, OSError), reading_shard(path) as file:
            counts[json.dumps(json.loads(file.attrs["identity"]))] += 1
    return json.loads(counts.most_common(1)[0][0]) if counts else None


def verify_cache(path: Path) -> None:
    """Read every row, and print the shards and rows whose checksum differs.

    The exit code is 1 if there are any.
    """
    problems = check(path)
    for line in itertools.chain.from_iterable(problems.values()):
        click.echo(line)
    if problems:
        advice = "run the same pipeline.extract again with --repair"
        identity = most_common_identity(shard_paths(path)) or {}
        if identity.get("regions") == "imported":
            advice = "remove them, and run the same pipeline.convert again"
        say(f"{path}: {len(problems)} damaged files; {advice}")
        sys.exit(1)
    say(f"{path}: {len(FeatureCache(path)):,} rows, all checksums are correct")


def repair_cache(path: Path, machine: Machine) -> None:
    """Rename damaged shards to shard-00000.h5.bad, so that they are extracted again.

    No shard is renamed if a shard cannot be read (see `check`).
    """
    if machine.world > 1:
        raise UserError(
            "--repair runs in one process; start it without torchrun. Afterwards continue the "
            "extraction with torchrun"
        )
    if not shard_paths(path):
        return
    problems = check(path)
    if problems:
        # features.h5 would return zeros for the missing rows. The extraction writes it again.
        (path / "features.h5").unlink(missing_ok=True)
    for file, lines in problems.items():
        backup = unused_name(file)
        file.replace(backup)
        say(f"{lines[0]}; renamed to {backup.name}, and extracted again")


def unused_name(shard: Path) -> Path:
    """The next unused name of shard-00000.h5.bad, .bad2, .bad3, ..."""
    suffixes = itertools.chain(["bad"], (f"bad{number}" for number in itertools.count(2)))
    paths = (shard.with_name(f"{shard.name}.{suffix}") for suffix in suffixes)
    return next(path for path in paths if not path.exists())


def inspect_cache(path: Path) -> None:
    """Print the identity, provenance, size, statistics and some rows of a cache."""
    cache = FeatureCache(path)
    size = sum(file.stat().st_size for file in cache.paths)
    sizes = " + ".join(f"{regions} regions x {channels}" for _, regions, channels in cache.kinds)
    click.echo(
        f"{path}: {len(cache):,} rows of {sizes} float16, "
        f"{human_bytes(size)} in {len(cache.paths)} files; {len(cache.unreadable)} unreadable"
    )
    for title, record in (("identity", cache.identity), ("provenance", cache.provenance)):
        click.echo(f"{title}:")
        for key, value in record.items():
            click.echo(f"  {key}: {json.dumps(value)}")
    if not len(cache):
        return
    positions = np.linspace(0, len(cache) - 1, min(STATISTICS_ROWS, len(cache))).astype(int)
    image_ids = cache.ids[np.unique(positions)]
    rows = cache.rows(image_ids.tolist())
    ends = rows.counts.reshape(len(image_ids), -1).cumsum(1)  # of the regions of each kind
    totals = ends[:, -1]
    for number, (kind, _, channels) in enumerate(cache.kinds):
        slots = np.arange(cache.shape[0])
        is_kind = slots < ends[:, [number]]
        if number:
            is_kind &= slots >= ends[:, [number - 1]]
        values = rows.features[is_kind, :channels].astype(np.float32)
        click.echo(f"{kind}, statistics of {len(image_ids):,} rows: {statistics_of(values)}")
    for row in np.linspace(0, len(image_ids) - 1, PRINTED_ROWS).astype(int):
        image_id = int(image_ids[row])
        start = " ".join(f"{value:.3f}" for value in rows.features[row, 0, :5])
        click.echo(
            f"image {image_id}  {cache.name_of(image_id)}  {totals[row]} regions, "
            f"features of the first: {start} ..."
        )


def statistics_of(values: np.ndarray) -> str:
    """Describe the features [n,C] of regions."""
    if not len(values):
        return "no regions"
    return (
        f"mean {values.mean():.4f}, standard deviation {values.std():.4f}, "
        f"zeros {(values == 0).mean():.1%}, maximum {values.max():.2f}"
    )


def pack_cache(path: Path, target: Path) -> None:
    """Write a whole cache into one HDF5 file. Raises UserError if `path` is not a cache."""
    if cache_header(path) is None:
        raise UserError(f"--pack: {path} is not a cache; pass the cache as --out CACHE")
    cache = FeatureCache(path)
    size = sum(file.stat().st_size for file in cache.paths)
    say(f"{path}: {len(cache):,} rows to {target}, {check_free_space(target.parent, size)}")
    with progress(len(cache), "rows", "pack") as bar:
        pack(cache, target, bar.step)
    say(
        f"{target}: {len(cache):,} rows, {human_bytes(target.stat().st_size)}; pass it as "
        "--features"
    )
