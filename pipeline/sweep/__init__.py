"""Train and score a list of configurations, and compare them in one table.

    python -m pipeline.sweep FILE.toml

The file has the options of pipeline.train that all runs share, those of pipeline.evaluate, and the
runs: as lists of values, whose combinations are trained, or one by one.

    out = "runs/decoders"

    [train]
    dataset = "karpathy"
    root = "flickr8k"
    minutes = 10

    [evaluate]
    split = "val"

    [grid]
    decoder = ["transformer", "lstm"]
    features = ["cache/resnet50", "cache/squeezenet"]

    [[runs]]
    name = "wide"
    features = "cache/resnet50"
    width = 1024

Each run is a process of its own. A run that was stopped is continued, a finished one is skipped.
Under torchrun each process trains other runs, on a GPU of its own.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import click
import torch

from data.cache.claims import Claims
from data.cache.writer import Shard
from pipeline.cli import Settings, UserError, command, setting
from pipeline.runtime import Machine
from pipeline.scoring.comparison import compare_runs, write_comparison
from pipeline.sweep.checks import check_run
from pipeline.sweep.file import read_sweep
from pipeline.sweep.process import Launcher, own_gpu
from pipeline.sweep.results import row_of
from pipeline.sweep.runs import Run, finish, is_finished
from pipeline.training import distributed

A_YEAR = timedelta(days=365)  # a process waits for the others while they train


@dataclass(frozen=True)
class SweepConfig(Settings):
    """The options of pipeline.sweep."""

    file: tuple[Path, ...] = setting((), "TOML file with the runs", name="FILE")
    dry_run: bool = setting(False, "check the runs and print their commands, and run nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.file) != 1:
            raise UserError(f"pass one TOML file with the runs, not {len(self.file)}")


@command(SweepConfig)
def main(config: SweepConfig) -> None:
    """Train and score the runs of a TOML file, and compare them in one table.

    The table is written as comparison.md, comparison.json and comparison.svg.
    """
    out, runs = read_sweep(config.file[0])
    for run in runs:
        check_run(run)
    if config.dry_run:
        print_commands(runs)
        return
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    own_runs = runs[rank::world]
    gpu = own_gpu(run.train.get("device", "auto") for run in own_runs)
    with claimed(out, rank), processes(rank, world):
        with Launcher(gpu) as launcher:
            failed = [run.name for run in own_runs if not finish(run, launcher)]
        failed = gather(failed, world)
        if rank == 0:
            report(out, runs, failed)


def print_commands(runs: Sequence[Run]) -> None:
    for run in runs:
        for name, given in run.commands(resume=False).items():
            click.echo(f"python -m pipeline.{name} {shlex.join(given)}")


@contextlib.contextmanager
def claimed(out: Path, rank: int) -> Iterator[None]:
    """Context manager: create the folder of the runs, and claim it for the processes of this sweep.

    Raises UserError if another sweep works in the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    if rank:  # only rank 0 claims it, and the others wait for rank 0 before they train
        yield
        return
    with Claims(out) as claims:
        if not claims.take(Shard(out / "sweep.run", {}, ())):
            raise UserError(
                f"another pipeline.sweep works in {out} ({out / '.sweep.claim'} names its process);"
                " wait until it has ended. If it was killed on another machine, its claim ends "
                "after two minutes"
            )
        yield


def processes(rank: int, world: int) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the processes of torchrun can wait for each other."""
    machine = Machine(torch.device("cpu"), "fp32", rank, world)
    return distributed.process_group(machine, A_YEAR, "The same command continues the sweep")


def gather(failed: list[str], world: int) -> list[str]:
    """Wait until all processes have finished their runs. Return the failed runs of all of them.

    torchrun ends all processes as soon as one fails, so none may fail before.
    """
    if world > 1:  # a process that only waits ends at once
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
    return [name for names in distributed.all_gather(failed) for name in names]


def report(out: Path, runs: Sequence[Run], failed: Sequence[str]) -> None:
    """Compare the finished runs. Raises UserError if runs failed."""
    if finished := [run for run in runs if is_finished(run)]:
        click.echo(write_comparison(compare_runs([row_of(run) for run in finished]), out))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the same command "
            "tries them again"
        )
