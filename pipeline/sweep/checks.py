"""What is checked of all runs before the first one starts."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click

from models import ModelError
from models.decoders.registry import DECODERS
from models.generation.options import Generation
from pipeline.cli import UserError, flag_of
from pipeline.decoding.options import NAMES, by_option
from pipeline.evaluate.config import EvaluateConfig
from pipeline.evaluate.task import refuse_options
from pipeline.sweep.runs import COMMANDS, Run, read_state
from pipeline.tasks.registry import TASKS
from pipeline.training.config import PRESETS, TrainConfig
from pipeline.training.rewards import BUILT_IN, find_callable, parse_rewards


def check_run(run: Run) -> None:
    """Check the options of a run, and its folder, before the first run starts.

    Raises:
        UserError: a command does not accept an option or its value, the folder has a run of another
            origin, or the run was trained with other options.
    """
    train_arguments, evaluate_arguments = run.commands(resume=False).values()
    try:
        training = COMMANDS["train"].configuration(train_arguments)
        scoring = COMMANDS["evaluate"].configuration(evaluate_arguments)
        assert isinstance(training, TrainConfig) and isinstance(scoring, EvaluateConfig)
        check_sizes(training)
        check_decoding(training, scoring)
        for name, _ in parse_rewards(training.reward) if training.scst else ():
            if name not in BUILT_IN:
                find_callable(name)
    except ModelError as error:
        raise UserError(f"run {run.name}: {error}") from error
    except click.ClickException as error:
        raise UserError(f"run {run.name}: {error.format_message()}") from error
    if run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"{run.folder} is a file, but run {run.name} needs a folder of this name")
    old, new = read_state(run)["train"], run.train
    if not run.is_started:  # an earlier try failed before it trained, so the options may change
        return
    if not run.state_file.exists():
        raise UserError(
            f"{run.folder} has a run that pipeline.sweep did not start; give the run {run.name} "
            "another name, or move the folder to another place"
        )
    if old != new:
        key = next(k for k in (*old, *new) if old.get(k) != new.get(k))
        raise UserError(
            f"run {run.name} was trained with {key} = {old.get(key)!r}, but the file has "
            f"{new.get(key)!r}; give the run another name, or delete {run.folder}"
        )


def check_sizes(config: TrainConfig) -> None:
    """Raise ModelError if a decoder cannot have the sizes, whatever the data.

    Without --preset the data choose one, so an error is raised if the sizes fit no preset.
    """
    if config.init:  # the sizes are those of the other run
        return
    decoder_config = DECODERS[config.decoder].Config
    names = {item.name for item in fields(decoder_config)}
    presets = [config.preset] if config.preset else [*PRESETS]
    for preset in presets:
        sizes = {name: value for name, value in PRESETS[preset].items() if name in names}
        try:
            # the numbers of words and channels come from the data
            decoder_config(words=1000, channels=1000, **{**sizes, **config.decoder_options})
            return
        except ModelError:
            if preset == presets[-1]:
                raise


def check_decoding(training: TrainConfig, scoring: EvaluateConfig) -> None:
    """Raise UserError if the task cannot be evaluated with the options of the evaluation."""
    task = TASKS[training.task](training.options("task"))
    refuse_options(scoring, task, f"the run is of --task {task.name}")
    given = scoring.given()
    if given and task.output == "classes":
        raise UserError(
            f"{flag_of(next(iter(given)))} has no effect: --task {task.name} chooses among its "
            "answers; remove the option from [evaluate]"
        )
    for name in ("consensus", "bad_words", "force_words"):  # checked with the vocabulary of the run
        given.pop(name, None)
    options: dict[str, Any] = {
        "beam": training.beam,
        "length_penalty": training.length_penalty,
    } | given
    if scoring.sample:
        del options["beam"]
    with by_option():
        Generation(**{NAMES.get(name, name): value for name, value in options.items()})
