"""Several decoders of one task, trained on the embedded sample at the same time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from pipeline import extract
from pipeline.demo import run_command, set_aside, shuffled_scores, train_task
from pipeline.extraction.stream import decoding_workers

WITHOUT_REGIONS = "without regions"


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
    """A decoder to train and score. `options` are further options of pipeline.train."""

    work: Path
    task: str
    name: str
    options: tuple[str, ...]
    regions: bool

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

    options: further options of pipeline.train by the name of the decoder. The one that is named
        "without regions" is trained without features.

    Returns by name the job and its scores on test, with the seconds that it took, and those with
    the features of another image as "shuffled".
    """
    jobs = [
        Job(work, task, name, tuple(given), name != WITHOUT_REGIONS)
        for name, given in options.items()
    ]
    dataset = ["--dataset", "sample", "--root", str(jobs[0].sample)]
    run_command(extract.main, *dataset, "--out", str(jobs[0].cache))
    cores = decoding_workers(None)  # one per usable core
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(len(jobs), cores), torch.set_num_threads, (1,)) as pool:
        scores = pool.map(train_one, jobs, chunksize=1)
    return {job.name: (job, each) for job, each in zip(jobs, scores, strict=True)}


def train_one(job: Job) -> dict[str, Any]:
    """Train and score one decoder."""
    start = time.monotonic()
    set_aside(job.run)
    cache = job.cache if job.regions else None
    scores = train_task(job.task, job.sample, cache, job.run, *job.options)
    if job.regions:
        scores["shuffled"] = shuffled_scores(job.sample, job.cache, job.run)
    return scores | {"seconds": time.monotonic() - start}
