"""Validation on dev: loss, scores, the best weights, and early stopping."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from models.generation.options import Generation
from pipeline.checkpoints.checkpoint import (
    save_weights,
)
from pipeline.decoding.captioner import CaptionGenerator, generate_texts
from pipeline.tasks.base import Task
from pipeline.terminal import progress, say
from pipeline.training import distributed
from pipeline.training.config import PATIENT_STEPS
from pipeline.training.loop import Stopped, averaged
from pipeline.training.objectives import supervised_loss
from pipeline.training.state import Run, save_progress


def should_stop(run: Run) -> bool:
    """Whether all epochs are done, the time is up, or early stopping applies."""
    config = run.config
    if stopped_early(run):
        say(f"no better {run.task.metric} on dev for {config.patience} validations: stopped early")
        return True
    if config.epochs and run.state.epoch >= config.epochs:
        return True
    return run.validated and distributed.broadcast(
        run.state.ended or (config.minutes is not None and run.done() >= 1)
    )


def stopped_early(run: Run) -> bool:
    """Whether dev has not improved for --patience validations, not counting the first PATIENT_STEPS
    steps.
    """
    scored = run.journal.scored
    counted = [
        at for at, line in enumerate(scored) if line["step"] - run.state.begin > PATIENT_STEPS
    ]
    return (
        bool(scored)
        and sum(at > best_of(scored, run.task.metric) for at in counted) >= run.config.patience
    )


def best_of(scored: Sequence[dict[str, Any]], metric: str) -> int:
    """Index of the best validation: the highest `metric` on dev; the lower loss decides ties."""
    return max(
        range(len(scored)), key=lambda at: (scored[at]["dev"][metric], -scored[at]["dev"]["loss"])
    )


def validate(run: Run, trained: dict[str, float]) -> None:
    """Compute loss and scores on dev. Save the weights if they are the best so far (without dev:
    always), and save the training state.
    """
    save_progress(run)
    start, config = time.monotonic(), run.config
    with averaged(run):
        dev = {"loss": dev_loss(run), **dev_scores(run)} if run.dev else {}
        better = not dev or best_of([*run.journal.scored, {"dev": dev}], run.task.metric) == len(
            run.journal.scored
        )
        if better and run.machine.rank == 0:
            save_weights(run.folder, run.captioner.state_dict())
    run.reserve = time.monotonic() - start
    line = {
        "epoch": run.step / run.steps_an_epoch,
        "step": run.step,
        "train": trained,
        **({"dev": dev} if dev else {}),
        "seconds": {"validation": run.reserve, "elapsed": run.seconds},
    }
    run.journal.add(line)
    run.sums[0] = 0
    if run.state.step == run.steps_an_epoch:
        run.state = run.state.next_epoch()
    save_progress(run)
    told = [f"dev loss {dev['loss']:.3f}, dev {shown_scores(run.task, dev)}" if dev else "kept"]
    if better and dev:
        told[0] += " (best)"
    if trained:
        shown, unit = run.objective.shown, run.objective.unit
        told = [
            f"train {shown} {trained[shown]:.3f}",
            *told,
            f"{trained['captions_per_s']:.0f} {unit}/s",
            f"waiting {trained['waiting']:.1%}",
        ]
    say(
        f"epoch {line['epoch']:.4g}{f'/{config.epochs}' if config.epochs else ''}: "
        f"{', '.join(told)}"
    )


@torch.inference_mode()
def dev_loss(run: Run) -> float:
    """Loss on dev in nats per word (of classes: per text), without label smoothing or dropout."""
    assert run.dev is not None and run.config.batch is not None
    run.captioner.eval()
    total, count = 0.0, 0
    for batch in run.dev.batches(
        run.dev_ids, run.config.batch, rank=run.machine.rank, world=run.machine.world
    ):
        batch = batch.to(run.machine.device)
        with run.machine.autocast():
            loss = supervised_loss(run.captioner, batch)
        total, count = total + loss.item() * batch.counted, count + batch.scored
    loss_of_all, count_of_all = distributed.all_reduce(total, count)
    return loss_of_all / count_of_all


def dev_scores(run: Run) -> dict[str, float]:
    """Scores of beam search on dev. The processes share the images."""
    config, machine = run.config, run.machine
    assert run.dev is not None
    mine = run.dev.examples[machine.rank :: machine.world]
    how = Generation(num_beams=config.beam, length_penalty=config.length_penalty)
    generator = CaptionGenerator(
        run.captioner, run.checkpoint.vocabulary, machine, how, answers=run.task.answers
    )

    def step(count: int) -> None:
        if run.stopping and machine.world == 1:
            raise Stopped(run.stopping)
        bar.step(count)

    with progress(len(mine), "images", "dev", enabled=machine.rank == 0) as bar:
        found = generate_texts(generator, run.dev.cache, mine, done=step) if mine else {}
    outputs = {
        id_: texts[0].text for part in distributed.all_gather(found) for id_, texts in part.items()
    }
    if machine.rank:
        return distributed.broadcast(None)
    scores = run.task.score(outputs, run.dev.examples, run.train.examples)
    return distributed.broadcast(
        {name: value for name, value in scores.items() if isinstance(value, float)}
    )


def shown_scores(task: Task, scores: Mapping[str, float]) -> str:
    """The printed scores: the task's metric, then those in `shown`."""
    return ", ".join(
        f"{name} {scores[key]:.3f}"
        for key, name in {task.metric: task.metric, **task.shown}.items()
    )
