"""Resume a run, extend a finished one, and save one that is asked to stop."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from data.cache.reader import differences
from pipeline.checkpoints.checkpoint import (
    load_record,
    load_vocabulary,
    remove_temporary_files,
    save_description,
)
from pipeline.cli import UserError, options_of
from pipeline.terminal import say
from pipeline.training import distributed
from pipeline.training.config import TrainConfig
from pipeline.training.state import Run, restore, save_progress
from pipeline.training.validation import stopped_early


def defaults_of(config: TrainConfig) -> dict[str, Any]:
    """The default of each setting and of each option of the chosen extensions."""
    found = {}
    for item in fields(config):
        found[item.name] = item.default
        found |= {
            option.name: option.default for option in options_of(item, getattr(config, item.name))
        }
    return found


def resume(run: Run) -> Run:
    """Continue the run in the folder; UserError if its settings differ."""
    if not (run.folder / "config.json").is_file():
        raise UserError(f"--resume: {run.folder} holds no run; start it without --resume")
    recorded = load_record(run.folder)
    began = defaults_of(run.config) | recorded["training"]  # the run may be older than some options
    may_change = {
        item.name for item in fields(TrainConfig) if item.metadata.get("may_change_on_resume")
    }
    if wrong := [
        name for name in ("epochs", "eval_steps") if type(began[name]) not in (int, type(None))
    ]:
        raise UserError(
            f"--resume: {run.folder}/config.json has {wrong[0]} {began[wrong[0]]!r}; copy it again"
        )
    # not given: keep the value that was chosen together with the epochs
    if run.config.eval_steps is None:
        run.config = replace(run.config, eval_steps=began["eval_steps"])
        run.checkpoint.training["eval_steps"] = began["eval_steps"]
    more = more_epochs(run, began)
    changed = [
        f"{name.replace('_', '-')}: {began[name]}, now {value}"
        for name, value in run.checkpoint.training.items()
        if name not in may_change
        and not (more and name == "epochs")
        and began[name] != json.loads(json.dumps(value))
    ]
    if (
        recorded["features"] != run.checkpoint.identity
        or recorded["trained_on"] != run.checkpoint.trained_on
    ):
        changed.append("the cache or the photographs")
    changed += differences(
        recorded["provenance"], run.checkpoint.provenance, ("views", "precision", "decode")
    )
    if load_vocabulary(run.folder).words != run.checkpoint.vocabulary.words:
        changed.append("the captions: they have another vocabulary")
    if changed:
        raise UserError(
            f"--resume: {run.folder} was begun with other settings ({'; '.join(changed)}); to use "
            f"its own settings: "
            f"python -m pipeline.train --config {run.folder}/config.json --out {run.folder} "
            "--resume"
        )
    if run.machine.rank == 0:
        remove_temporary_files(run.folder)
    if not (run.folder / "last.safetensors").exists():
        say(f"{run.folder} ended before its first save: starting it again")
        run.journal.begin()
        return run
    restore(run)
    if more:
        extend(run, began)
    at = f"step {run.step:,}" if run.state.step else f"epoch {run.state.epoch}"
    say(f"going on with {run.folder} after {at}")
    return run


def more_epochs(run: Run, began: Mapping[str, Any]) -> bool:
    """Whether --resume asks for more epochs than the run was started with."""
    return bool(began["epochs"] and run.config.epochs and run.config.epochs > began["epochs"])


def extend(run: Run, began: Mapping[str, Any]) -> None:
    """Train a finished run for more epochs, with a new learning rate schedule.

    Raises UserError for an unfinished run, because more epochs would change its current schedule,
    and for a run with --minutes.
    """
    scheduled, config = began["epochs"], run.config
    assert config.epochs is not None  # by `more_epochs`
    if config.minutes:
        raise UserError(
            f"--resume: {run.folder} ends by its --minutes, more epochs do not change that; "
            "train its weights further "
            f"in a new run: --init {run.folder} --epochs {config.epochs - scheduled} --out "
            "ANOTHER_FOLDER"
        )
    begun = 0 < run.state.begin == run.step  # an earlier start was killed before its first step
    if not (begun or run.state.epoch >= scheduled or stopped_early(run)):
        raise UserError(
            f"--resume: {run.folder} is in epoch {run.state.epoch + 1} of {scheduled}; let it "
            "end with "
            f"--epochs {scheduled} first, then resume it with --epochs {config.epochs}"
        )
    run.state.begin = run.step
    distributed.barrier()  # until all processes have read the files that are rewritten below
    save_progress(run)
    if run.machine.rank == 0:
        run.checkpoint.training["resume"] = False
        save_description(run.folder, run.checkpoint)
    done = run.step / run.steps_an_epoch
    say(
        f"{run.folder} had ended after epoch {done:.4g} of {scheduled}; the "
        f"{config.epochs - done:.4g} epochs added get a new "
        f"{config.schedule} schedule of the learning rate, up to {config.lr:g} again"
    )


def save_and_exit(run: Run, signum: int) -> None:
    """Save, print the command that resumes the run, and exit with the signal's status."""
    save_progress(run)
    distributed.barrier()  # an exiting process ends the others, which may still be writing
    launcher = (
        "python" if run.machine.world == 1 else f"torchrun --nproc-per-node {run.machine.world}"
    )
    again = (
        f"{launcher} -m pipeline.train --config {run.folder}/config.json --out "
        f"{run.folder} --resume"
    )
    say(f"saved after step {run.step:,}; go on with: {again}")
    sys.exit(128 + signum)
