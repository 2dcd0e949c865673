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

SHOWN, LOOKED_AT = 3, 500  # rows that are shown, rows that the statistics use


def check(path: Path) -> dict[Path, list[str]]:
    """Read every row and list the problems of each shard (or of a packed file).

    Raises UserError where the file system fails to read a file: its content is then unknown.
    """
    files = [path] if path.is_file() else shard_paths(path)
    if not files:
        raise UserError(f"{path} holds no shard-*.h5; nothing to check")
    problems, unknown, identity = {}, [], most_common_identity(files)
    with progress(len(files), "shards", "verify") as bar:
        for file in files:
            try:
                if found := verify_shard(file, identity):
                    problems[file] = found
            except OSError as error:
                unknown.append(f"{file}: {error.strerror}")
            bar.step(1, f"{len(problems)} bad" if problems else "")
    if unknown:
        for line in itertools.chain.from_iterable(problems.values()):
            click.echo(line)
        raise UserError(
            f"{len(unknown)} of {len(files)} files could not be read, which does not mean that "
            f"they are damaged: "
            f"{'; '.join(unknown[:5])}. Nothing was changed; repair the file system or its "
            f"permissions and try again"
        )
    return problems


def most_common_identity(files: Sequence[Path]) -> dict | None:
    """The identity that most files of a cache have. A file with another identity does not belong to
    it.
    """
    found: Counter[str] = Counter()
    for file in files:
        with contextlib.suppress(DataError, OSError), reading_shard(file) as opened:
            found[json.dumps(json.loads(opened.attrs["identity"]))] += 1
    return json.loads(found.most_common(1)[0][0]) if found else None


def verify_cache(path: Path) -> None:
    """Read every row; exit with 1 and name the shards and rows whose checksum differs."""
    problems = check(path)
    for found in problems.values():
        for line in found:
            click.echo(line)
    if problems:
        say(f"{path}: {len(problems)} damaged; run its extraction again with --repair")
        sys.exit(1)
    say(f"{path}: {len(FeatureCache(path)):,} rows, all as they were written")


def repair_cache(path: Path, machine: Machine) -> None:
    """Rename damaged shards to shard-00000.h5.bad, so that the next extraction makes them again.

    Nothing is renamed unless every shard could be read completely.
    """
    if machine.world > 1:
        raise UserError(
            "--repair runs as one process; start it without torchrun, and go on with torchrun "
            "after it"
        )
    if not shard_paths(path):
        return
    problems = check(path)
    if problems:
        # it would read zeros for missing rows; it is written again
        (path / "features.h5").unlink(missing_ok=True)
    for file, found in problems.items():
        aside = unused_name(file)
        file.replace(aside)
        say(f"{found[0]}; moved to {aside.name} and extracted again")


def unused_name(shard: Path) -> Path:
    """The next free name: shard-00000.h5.bad, then .bad2, .bad3, ..."""
    names = itertools.chain(["bad"], (f"bad{number}" for number in itertools.count(2)))
    return next(
        path for name in names if not (path := shard.with_name(f"{shard.name}.{name}")).exists()
    )


def inspect_cache(path: Path) -> None:
    """Print the identity, provenance, rows, size, statistics and three sample rows of a cache."""
    cache = FeatureCache(path)
    size = sum(file.stat().st_size for file in cache.paths)
    regions, channels = cache.shape
    click.echo(
        f"{path}: {len(cache):,} rows of {regions} regions x {channels} float16, "
        f"{human_bytes(size)} in "
        f"{len(cache.paths)} files; {len(cache.unreadable)} unreadable"
    )
    for what, record in (("identity", cache.identity), ("provenance", cache.provenance)):
        click.echo(f"{what}:")
        for key, value in record.items():
            click.echo(f"  {key}: {json.dumps(value)}")
    if not len(cache):
        return
    chosen = cache.ids[
        np.unique(np.linspace(0, len(cache) - 1, min(LOOKED_AT, len(cache))).astype(int))
    ]
    rows = cache.rows(chosen.tolist())
    values = rows.features[np.arange(regions) < rows.counts[:, None]].astype(np.float32)
    click.echo(f"of {len(chosen):,} rows: mean {values.mean():.4f}, deviation {values.std():.4f}, "
               f"zeros {(values == 0).mean():.1%}, largest {values.max():.2f}")  # fmt: skip
    for at in np.linspace(0, len(chosen) - 1, SHOWN).astype(int):
        image_id, first = int(chosen[at]), rows.features[at, 0, :5]
        shown = " ".join(f"{value:.3f}" for value in first)
        click.echo(
            f"image {image_id}  {cache.name_of(image_id)}  {rows.counts[at]} regions  {shown} ..."
        )


def pack_cache(cache: Path, target: Path) -> None:
    """Write a whole cache into one plain HDF5 file."""
    if cache_header(cache) is None:
        raise UserError(
            f"--pack writes the cache that --out names, and {cache} is none; pass --out CACHE"
        )
    opened = FeatureCache(cache)
    size = sum(file.stat().st_size for file in opened.paths)
    say(f"{cache}: {len(opened):,} rows to {target}, {check_free_space(target.parent, size)}")
    with progress(len(opened), "rows", "pack") as bar:
        pack(opened, target, bar.step)
    say(
        f"{target}: {len(opened):,} rows, {human_bytes(target.stat().st_size)}; pass it as "
        "--features"
    )
