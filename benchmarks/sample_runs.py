"""Several decoders of one task, trained on the embedded sample at the same time."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from pipeline import evaluate, extract, train
from pipeline.demo import run_command, set_aside


def sample_command(main: Callable) -> click.Command:
    """Make a command with the options of all benchmarks on the sample."""
    work = click.Path(file_okay=False, path_type=Path)
    for option in (
        click.option(
            "--json", "out", type=click.Path(path_type=Path), help="also write the figures here"
        ),
        click.option("--seeds", default="0,1,2", help="seeds of the runs, separated by commas"),
        click.option(
            "--work",
            type=work,
            default=Path("."),
            help="folder for the sample, the cache and the runs",
        ),
    ):
        main = option(main)
    return click.command(context_settings={"show_default": True})(main)


class Job(NamedTuple):
    """A decoder to train and score. `options` are options of pipeline.train."""

    work: Path
    task: str
    name: str
    options: tuple[str, ...]

    @property
    def sample(self) -> Path:
        return self.work / "datasets/sample"

    @property
    def cache(self) -> Path:
        return self.work / "cache/sample"

    @property
    def run(self) -> Path:
        return self.work / f"runs/sample-{self.task}-{self.name.replace(' ', '-')}"


def train_all(
    work: Path, task: str, options: Mapping[str, Sequence[str]]
) -> dict[str, tuple[Job, dict[str, Any]]]:
    """Train a decoder for each entry, each in a process of one thread, as many as there are cores.

    options: options of pipeline.train by the name of the decoder.

    Returns by name the job and its scores on test, with the seconds that it took.
    """
    jobs = [Job(work, task, name, tuple(given)) for name, given in options.items()]
    dataset = ["--dataset", "sample", "--root", str(jobs[0].sample)]
    run_command(extract.main, *dataset, "--out", str(jobs[0].cache))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(len(jobs), cores or 1), torch.set_num_threads, (1,)) as pool:
        scores = pool.map(train_one, jobs, chunksize=1)
    return {job.name: (job, each) for job, each in zip(jobs, scores, strict=True)}


def train_one(job: Job) -> dict[str, Any]:
    """Train and score one decoder."""
    start = time.monotonic()
    set_aside(job.run)
    dataset = ["--dataset", "sample", "--root", str(job.sample)]
    dataset += [] if "--features" in job.options else ["--features", str(job.cache)]
    run_command(train.main, "--task", job.task, *dataset, *job.options, "--out", str(job.run))
    run_command(evaluate.main, "--checkpoint", str(job.run), *dataset, "--split", "test")
    scores = json.loads((job.run / "scores-test.json").read_text())["scores"]
    return scores | {"seconds": time.monotonic() - start}
