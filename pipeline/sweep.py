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

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from data.files import atomic_write_text
from pipeline import evaluate, train
from pipeline.cli import Settings, UserError, command, flag_of, options_of, read_config, setting
from pipeline.scoring.comparison import Row, compare_runs, write_comparison
from pipeline.sources import SourceOptions
from pipeline.terminal import say

SHARED = ("features", "device", "precision")  # of both commands, beside the options of the dataset
Options = dict[str, Any]


@dataclass(frozen=True)
class SweepConfig(Settings):
    """The options of pipeline.sweep."""

    file: tuple[Path, ...] = setting((), "TOML file with the runs", name="FILE")
    dry_run: bool = setting(False, "print the commands, and run nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.file) != 1:
            raise UserError(f"pass one TOML file with the runs, not {len(self.file)}")


@dataclass(frozen=True)
class Run:
    """A run of the sweep: its name, its folder, and the options of the two commands."""

    name: str
    folder: Path
    train: Options
    evaluate: Options

    @property
    def state_file(self) -> Path:
        """The record of what is done: {"train": options, "evaluate": options, "done": [...]}."""
        return self.folder.with_name(f"{self.name}.json")

    @property
    def scores(self) -> Path:
        return self.folder / "scores.json"

    def commands(self, resume: bool) -> dict[str, list[str]]:
        """The arguments of pipeline.train and pipeline.evaluate, by name of the command."""
        out = ["--out", str(self.folder)]
        if resume:
            trains = ["--config", str(self.folder / "config.json"), *out, "--resume"]
        else:
            trains = [*arguments(self.train), *out]
        scores = ["--checkpoint", str(self.folder), *arguments(self.evaluate)]
        return {"train": trains, "evaluate": [*scores, "--out", str(self.scores)]}


@command(SweepConfig)
def main(config: SweepConfig) -> None:
    """Train and score the runs of a TOML file, and compare them in one table.

    The table is written as comparison.md, comparison.json and comparison.svg.
    """
    out, runs = read_sweep(config.file[0])
    check_runs(runs)
    if config.dry_run:
        for run in runs:
            for name, given in run.commands(resume=False).items():
                click.echo(f"python -m pipeline.{name} {shlex.join(given)}")
        return
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    out.mkdir(parents=True, exist_ok=True)
    failed = [run for run in runs[rank::world] if not finish(run)]
    finished = [run for run in runs if is_done(run, "evaluate", read_state(run))]
    # under torchrun the process that finishes last compares all runs
    if finished and (world == 1 or len(finished) == len(runs)):
        comparison = compare_runs([row_of(run) for run in finished])
        click.echo(write_comparison(comparison, out))
    if failed:
        names = ", ".join(run.name for run in failed)
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {names}; the same command tries them again"
        )


def read_sweep(file: Path) -> tuple[Path, list[Run]]:
    """Read a TOML file. Returns the folder of the runs, and the runs.

    Raises:
        UserError: the file has unknown keys, no runs, or two runs of one name.
    """
    content = read_config(file)
    if unknown := content.keys() - {"out", "train", "evaluate", "grid", "runs"}:
        raise UserError(
            f"{file}: unknown key {min(unknown)!r}; the keys are out, train, evaluate, grid, runs "
            "(options of pipeline.train belong into [train])"
        )
    tables = {name: _table(file, content, name) for name in ("train", "evaluate", "grid")}
    listed = content.get("runs", [])
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise UserError(f"{file}: write each run as a table [[runs]]")
    if not isinstance(content.get("out", ""), str):
        raise UserError(f"{file}: out is {content['out']!r}, it must be the path of a folder")
    for name, values in tables["grid"].items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{file}: {name} of [grid] is {values!r}, it must be a list of values")
    combinations: list[Options] = []
    if tables["grid"]:
        names = list(tables["grid"])
        combinations = [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*tables["grid"].values())
        ]
    out = Path(content.get("out") or Path("runs") / file.stem)
    runs = []
    for options in (*combinations, *({_plain(k): v for k, v in each.items()} for each in listed)):
        name = str(options.pop("name", "") or "-".join(map(_short, options.values())))
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise UserError(f'{file}: {name!r} cannot be the name of a run; add name = "..."')
        training = tables["train"] | options
        scoring = {key: training[key] for key in _shared(training) if key in training}
        runs.append(Run(name, out / name, training, scoring | tables["evaluate"]))
    if not runs:
        raise UserError(f"{file} has no runs; write a table [grid] or [[runs]]")
    seen = [run.name for run in runs]
    if twice := next((name for name in seen if seen.count(name) > 1), None):
        raise UserError(f"{file}: two runs have the name {twice!r}; give them different names")
    return out, runs


def _table(file: Path, content: Mapping[str, Any], name: str) -> Options:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise UserError(f"{file}: {name} is {table!r}, it must be a table [{name}]")
    return {_plain(key): value for key, value in table.items()}


def _plain(key: str) -> str:
    return key.replace("-", "_")


def _short(value: Any) -> str:
    """A value as a part of a run's name: of a path the last part."""
    return Path(value).name if isinstance(value, str) else str(value)


def _shared(options: Options) -> list[str]:
    """The names of options that pipeline.evaluate gets from those of pipeline.train."""
    dataset = next(item for item in fields(SourceOptions) if item.name == "dataset")
    of_dataset = options_of(dataset, options.get("dataset", dataset.default))
    names = [item.name for item in (*fields(SourceOptions), *of_dataset)]
    # the images to train on are often not those to score
    return [name for name in (*names, *SHARED) if name not in ("ids", "exclude_ids")]


def arguments(options: Options) -> list[str]:
    """Options by name as arguments of a command."""
    given: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            given.append(flag_of(name) if value else f"--no-{flag_of(name)[2:]}")
            continue
        for each in value if isinstance(value, list) else [value]:
            given += [flag_of(name), str(each)]
    return given


def check_runs(runs: Sequence[Run]) -> None:
    """Check the options of all runs before the first one starts.

    Raises:
        UserError: a command does not have an option or does not accept its value, or a run was
            trained with other options.
    """
    for run in runs:
        for name, given in run.commands(resume=False).items():
            program = train.main if name == "train" else evaluate.main
            try:
                program.make_context(f"pipeline.{name}", list(given))
            except click.ClickException as error:
                raise UserError(f"run {run.name}: {error.format_message()}") from error
        old, new = read_state(run)["train"], run.train
        if old and old != new:
            key = next(k for k in (*old, *new) if old.get(k) != new.get(k))
            raise UserError(
                f"run {run.name} was trained with {key} = {old.get(key)!r}, but the file has "
                f"{new.get(key)!r}; give the run another name, or delete {run.folder} and "
                f"{run.state_file}"
            )


def read_state(run: Run) -> dict[str, Any]:
    """Read the record of a run; of a new one it is empty."""
    if run.state_file.exists():
        return json.loads(run.state_file.read_text())
    return {"train": {}, "evaluate": {}, "done": [], "peak_bytes": {}}


def is_done(run: Run, name: str, state: Mapping[str, Any]) -> bool:
    """Whether a command of a run is done, with the options of the file."""
    return name in state["done"] and state[name] == getattr(run, name)


def finish(run: Run) -> bool:
    """Do what is not done of a run. Returns False if a command failed."""
    state = read_state(run)
    for name in ("train", "evaluate"):
        if is_done(run, name, state):
            continue
        resume = name == "train" and (run.folder / "config.json").exists()
        given = run.commands(resume)[name]
        state |= {
            name: getattr(run, name),
            "done": [each for each in state["done"] if each != name],
        }
        write_state(run, state)
        say(f"\n$ python -m pipeline.{name} {shlex.join(given)}")
        code, peak = run_process([sys.executable, "-m", f"pipeline.{name}", *given])
        if code:
            say(f"run {run.name}: pipeline.{name} ended with exit status {code}")
            return False
        state["peak_bytes"][name] = max(peak, state["peak_bytes"].get(name, 0))
        state["done"].append(name)
        write_state(run, state)
    say(f"run {run.name} is finished")
    return True


def write_state(run: Run, state: Mapping[str, Any]) -> None:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(run.state_file, json.dumps(state, indent=1, ensure_ascii=False) + "\n")


def run_process(arguments: Sequence[str]) -> tuple[int, int]:
    """Run a program. Returns its exit status and the most memory in bytes that it held.

    A process of torchrun gets the GPU of its local rank for itself. 0 bytes: the system does not
    say.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _TORCHRUN}
    if "LOCAL_RANK" in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        local_rank = int(os.environ["LOCAL_RANK"])
        device = visible[local_rank] if local_rank < len(visible) and visible[0] else local_rank
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    process = subprocess.Popen(arguments, env=environment)
    try:
        if not hasattr(os, "wait4"):
            return process.wait(), 0
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # Ctrl-C reaches both; the run saves its state and ends
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return process.returncode, usage.ru_maxrss * unit


_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def row_of(run: Run) -> Row:
    """Read what the comparison says about a finished run."""
    from pipeline.checkpoints.checkpoint import load_checkpoint

    record = json.loads(run.scores.read_text())
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "seconds" in line]
    rates = [line["train"]["captions_per_s"] for line in validations if line["train"]]
    checkpoint = load_checkpoint(run.folder)
    each = next(
        path
        for name in ("scores-images.jsonl", "scores-outputs.jsonl", "predictions.jsonl")
        if (path := run.folder / name).exists()
    )
    return Row(
        name=run.name,
        metric=checkpoint.new_task().metric,
        scores=record["scores"],
        intervals=record["intervals"],
        examples=[json.loads(line) for line in each.read_text().splitlines()],
        parameters=sum(p.numel() for p in checkpoint.captioner.parameters()),
        trained_per_s=sum(rates) / max(len(rates), 1),
        decoded_per_s=record["decoded_per_s"],
        minutes=validations[-1]["seconds"]["elapsed"] / 60,
        peak_bytes=max(read_state(run)["peak_bytes"].values()),
    )


if __name__ == "__main__":
    main()
