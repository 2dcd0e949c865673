"""A run of a sweep: its two commands, and the record of what is done."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import atomic_write_text
from pipeline import evaluate, train
from pipeline.cli import UserError, flag_of
from pipeline.sweep.process import Launcher
from pipeline.terminal import say

Options = dict[str, Any]
COMMANDS = {"train": train.main, "evaluate": evaluate.main}


@dataclass(frozen=True)
class Run:
    """A run of the sweep: its name, its folder, and the options of the two commands."""

    name: str
    folder: Path
    train: Options
    evaluate: Options

    @property
    def state_file(self) -> Path:
        """The record of what is done, with the keys of `read_state`."""
        return self.folder / "sweep.json"

    @property
    def scores(self) -> Path:
        return self.folder / "scores.json"

    @property
    def is_started(self) -> bool:
        return (self.folder / "config.json").exists()

    def commands(self, resume: bool) -> dict[str, list[str]]:
        """The arguments of pipeline.train and pipeline.evaluate, by name of the command."""
        out = ["--out", str(self.folder)]
        if resume:
            trains = ["--config", str(self.folder / "config.json"), *out, "--resume"]
        else:
            trains = [*arguments(self.train), *out]
        scores = ["--checkpoint", str(self.folder), *arguments(self.evaluate)]
        return {"train": trains, "evaluate": [*scores, "--out", str(self.scores)]}


def arguments(options: Options) -> list[str]:
    """Options by name as arguments of a command."""
    given: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            given.append(flag_of(name) if value else f"--no-{flag_of(name)[2:]}")
            continue
        for text in map(str, value if isinstance(value, list) else [value]):
            # a value such as "--config" must not be read as an option
            given += [f"{flag_of(name)}={text}"] if text[:1] == "-" else [flag_of(name), text]
    return given


def read_state(run: Run) -> dict[str, Any]:
    """Read the record of a run; of a new one it is empty.

    Returns {"train": options, "evaluate": options, "done": names of commands, "peak_bytes": most
    memory by name of the command}. Raises UserError if the file is something else.
    """
    empty: dict[str, Any] = {"train": {}, "evaluate": {}, "done": [], "peak_bytes": {}}
    if not run.state_file.exists():
        return empty
    try:
        state = json.loads(run.state_file.read_text(encoding="utf-8"))
        valid = all(type(state[key]) is type(value) for key, value in empty.items())
        valid = valid and all(type(size) is int for size in state["peak_bytes"].values())
    # ValueError: not UTF-8, or not JSON. TypeError: not an object.
    except (ValueError, TypeError, KeyError, RecursionError):
        valid = False
    if not valid:
        raise UserError(
            f"{run.state_file} is damaged, so what is done of run {run.name} is unknown; delete "
            f"{run.folder} to train the run again, or move it to another place"
        )
    return state


def is_done(run: Run, name: str, state: Mapping[str, Any]) -> bool:
    """Whether a command of a run is done with the options of the file, and its result exists."""
    result = run.folder / "model.safetensors" if name == "train" else run.scores
    return name in state["done"] and state[name] == getattr(run, name) and result.exists()


def is_finished(run: Run) -> bool:
    state = read_state(run)
    return run.is_started and all(is_done(run, name, state) for name in COMMANDS)


def finish(run: Run, launcher: Launcher) -> bool:
    """Do what is not done of a run. Returns False if a command failed."""
    state = read_state(run)
    for name in COMMANDS:
        launcher.exit_if_stopped()
        if is_done(run, name, state):
            continue
        if name == "evaluate":  # scores with other options must not be taken for the new ones
            run.scores.unlink(missing_ok=True)
        given = run.commands(resume=run.is_started)[name]
        # new weights also need a new evaluation
        state |= {name: getattr(run, name), "done": [] if name == "train" else ["train"]}
        write_state(run, state)
        say(f"\n$ python -m pipeline.{name} {shlex.join(given)}")
        code, peak = launcher.run([sys.executable, "-m", f"pipeline.{name}", *given])
        if code:
            launcher.exit_if_stopped()
            say(f"run {run.name}: pipeline.{name} ended with exit status {code}")
            return False
        state["peak_bytes"][name] = max(peak, state["peak_bytes"].get(name, 0))
        state["done"].append(name)
        write_state(run, state)
    if not run.scores.exists():
        say(f"run {run.name}: pipeline.evaluate wrote no scores; choose a split with references")
        return False
    say(f"run {run.name} is finished")
    return True


def write_state(run: Run, state: Mapping[str, Any]) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(run.state_file, json.dumps(state, indent=1, ensure_ascii=False) + "\n")
