"""Resume a run, train a finished run for more epochs, and save a run that a signal stops."""

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


def default_settings(config: TrainConfig) -> dict[str, Any]:
    """The default of each setting and of each option of the chosen extensions."""
    defaults = {}
    for item in fields(config):
        defaults[item.name] = item.default
        defaults |= {
            option.name: option.default for option in options_of(item, getattr(config, item.name))
        }
    return defaults


def resume(run: Run) -> Run:
    """Restore the run in `run.folder`. Raises UserError if its settings or inputs differ."""
    if not (run.folder / "config.json").is_file():
        raise UserError(f"--resume: {run.folder} has no run; start it without --resume")
    record = load_record(run.folder)
    # Settings that are newer than the run have their defaults.
    settings = default_settings(run.config) | record["training"]
    for name in ("epochs", "eval_steps"):
        if type(settings[name]) not in (int, type(None)):
            raise UserError(
                f"--resume: {run.folder}/config.json has {name} {settings[name]!r}, which is not "
                "a whole number; copy the file again"
            )
    # The old --eval-steps was chosen together with the old --epochs, so it is kept.
    if run.config.eval_steps is None:
        run.config = replace(run.config, eval_steps=settings["eval_steps"])
        run.checkpoint.training["eval_steps"] = settings["eval_steps"]
    more_epochs = has_more_epochs(run, settings)
    if changes := changes_since(run, record, settings, more_epochs):
        raise UserError(
            f"--resume: {run.folder} was started with other settings ({'; '.join(changes)}). To "
            "resume it with its own settings: "
            f"python -m pipeline.train --config {run.folder}/config.json --out {run.folder} "
            "--resume"
        )
    if run.machine.rank == 0:
        remove_temporary_files(run.folder)
    if not (run.folder / "last.safetensors").exists():
        say(f"{run.folder} ended before its first save; it starts again")
        run.journal.begin()
        return run
    restore(run)
    if more_epochs:
        extend(run, settings)
    position = f"step {run.step:,}" if run.state.step else f"epoch {run.state.epoch}"
    say(f"resuming {run.folder} after {position}")
    return run


def changes_since(
    run: Run, record: Mapping[str, Any], settings: Mapping[str, Any], more_epochs: bool
) -> list[str]:
    """List the settings and inputs that differ from those at the start of the run.

    record: config.json of the run. settings: its settings, including defaults.
    more_epochs: allow another number of epochs.
    """
    may_change = {
        item.name for item in fields(TrainConfig) if item.metadata.get("may_change_on_resume")
    }
    if more_epochs:
        may_change.add("epochs")
    changes = [
        f"{name.replace('_', '-')}: {settings[name]}, now {value}"
        for name, value in run.checkpoint.training.items()
        if name not in may_change and settings[name] != json.loads(json.dumps(value))
    ]
    same_features = record["features"] == run.checkpoint.identity
    if not same_features or record["trained_on"] != run.checkpoint.trained_on:
        changes.append("the cache or the photographs")
    changes += differences(
        record["provenance"], run.checkpoint.provenance, ("views", "precision", "decode")
    )
    if load_vocabulary(run.folder).words != run.checkpoint.vocabulary.words:
        changes.append("the captions: they have another vocabulary")
    return changes


def has_more_epochs(run: Run, settings: Mapping[str, Any]) -> bool:
    """Whether --epochs is larger than at the start of the run."""
    epochs = settings["epochs"]
    return bool(epochs and run.config.epochs and run.config.epochs > epochs)


def extend(run: Run, settings: Mapping[str, Any]) -> None:
    """Prepare a finished run for more epochs, with a new learning rate schedule.

    Raises UserError for an unfinished run, because more epochs would change its current schedule,
    and for a run with --minutes.
    """
    old_epochs, config = settings["epochs"], run.config
    assert config.epochs is not None  # see has_more_epochs
    if config.minutes:
        raise UserError(
            f"--resume: {run.folder} ends by its --minutes, more epochs do not change that. "
            "To train its weights further, start a new run: "
            f"--init {run.folder} --epochs {config.epochs - old_epochs} --out ANOTHER_FOLDER"
        )
    # An earlier start may have extended the run and then ended before its first step.
    was_extended = 0 < run.state.begin == run.step
    if not (was_extended or run.state.epoch >= old_epochs or stopped_early(run)):
        raise UserError(
            f"--resume: {run.folder} is in epoch {run.state.epoch + 1} of {old_epochs}; first "
            f"finish it with --epochs {old_epochs}, then resume it with --epochs {config.epochs}"
        )
    run.state.begin = run.step
    distributed.barrier()  # all processes must have read the files that are now overwritten
    save_progress(run)
    if run.machine.rank == 0:
        run.checkpoint.training["resume"] = False
        save_description(run.folder, run.checkpoint)
    done = run.step / run.steps_per_epoch
    say(
        f"{run.folder} had ended after epoch {done:.4g} of {old_epochs}; the "
        f"{config.epochs - done:.4g} epochs added get a new {config.schedule} learning rate "
        f"schedule with peak {config.lr:g}"
    )


def save_and_exit(run: Run, signum: int) -> None:
    """Save the run, print the command that resumes it, and exit with the code 128 + `signum`."""
    save_progress(run)
    # When one process exits, torchrun ends the others. Wait until rank 0 has written the file.
    distributed.barrier()
    launcher = (
        "python" if run.machine.world == 1 else f"torchrun --nproc-per-node {run.machine.world}"
    )
    say(
        f"saved after step {run.step:,}; continue with: {launcher} -m pipeline.train "
        f"--config {run.folder}/config.json --out {run.folder} --resume"
    )
    sys.exit(128 + signum)
