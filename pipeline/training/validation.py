"""Validation on dev: loss, scores, the best weights, and early stopping."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from models.generation.options import Generation
from pipeline.checkpoints.checkpoint import save_weights
from pipeline.decoding.captioner import CaptionGenerator
from pipeline.decoding.outputs import task_outputs
from pipeline.tasks.base import Task
from pipeline.terminal import progress, say
from pipeline.training import distributed
from pipeline.training.config import PATIENT_STEPS
from pipeline.training.loop import Stopped, averaged_weights
from pipeline.training.objectives import supervised_loss
from pipeline.training.state import Run, save_progress


def should_stop(run: Run) -> bool:
    """Whether all epochs are done, the time of --minutes is up, or early stopping applies."""
    config = run.config
    if stopped_early(run):
        say(
            f"early stop: {config.patience} validations without a better {run.task.metric} on dev "
            "(--patience)"
        )
        return True
    if config.epochs and run.state.epoch >= config.epochs:
        return True
    return run.validated and distributed.broadcast(
        run.state.ended or (config.minutes is not None and run.progress() >= 1)
    )


def stopped_early(run: Run) -> bool:
    """Whether the last --patience validations were not better than an earlier one.

    Validations in the first PATIENT_STEPS steps are not counted.
    """
    scored = run.journal.scored
    if not scored:
        return False
    best = best_of(scored, run.task.metric)
    not_better = [
        line for line in scored[best + 1 :] if line["step"] - run.state.begin > PATIENT_STEPS
    ]
    return len(not_better) >= run.config.patience


def best_of(scored: Sequence[dict[str, Any]], metric: str) -> int:
    """Index of the best validation line: the highest `metric` on dev, then the lowest loss."""
    return max(
        range(len(scored)), key=lambda i: (scored[i]["dev"][metric], -scored[i]["dev"]["loss"])
    )


def validate(run: Run, train_metrics: dict[str, float]) -> None:
    """Compute the loss and the scores on dev, write a log line, and save the training state.

    The weights are saved if this validation is the best one so far. With --train-on-dev they are
    always saved.

    train_metrics: metrics since the last validation, as `train_until_validation` returns them.
    """
    save_progress(run)
    start, scored = time.monotonic(), run.journal.scored
    with averaged_weights(run):
        dev = {"loss": dev_loss(run), **dev_scores(run)} if run.dev else {}
        is_best = not dev or best_of([*scored, {"dev": dev}], run.task.metric) == len(scored)
        if is_best and run.machine.rank == 0:
            save_weights(run.folder, run.captioner.state_dict())
    run.validation_seconds = time.monotonic() - start
    line = {
        "epoch": run.step / run.steps_per_epoch,
        "step": run.step,
        "train": train_metrics,
        **({"dev": dev} if dev else {}),
        "seconds": {"validation": run.validation_seconds, "elapsed": run.seconds},
    }
    run.journal.add(line)
    run.sums[0] = 0
    if run.state.step == run.steps_per_epoch:
        run.state = run.state.next_epoch()
    save_progress(run)
    print_validation(run, line, is_best)


def print_validation(run: Run, line: dict[str, Any], is_best: bool) -> None:
    """Print a validation line of the log in short."""
    parts, objective, train, dev = [], run.objective, line["train"], line.get("dev")
    if train:
        parts.append(f"train {objective.shown} {train[objective.shown]:.3f}")
    if dev:
        best = " (best)" if is_best else ""
        parts.append(f"dev loss {dev['loss']:.3f}, dev {shown_scores(run.task, dev)}{best}")
    else:
        parts.append("weights saved")
    if train:
        parts.append(f"{train['captions_per_s']:.0f} {objective.unit}/s")
        parts.append(f"waiting {train['waiting']:.1%}")
    epochs = f"/{run.config.epochs}" if run.config.epochs else ""
    say(f"epoch {line['epoch']:.4g}{epochs}: {', '.join(parts)}")


@torch.inference_mode()
def dev_loss(run: Run) -> float:
    """Compute the loss on dev, without label smoothing and dropout.

    The result is in nats per word, or for a decoder with classes in nats per text.
    """
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
    total_loss, total_count = distributed.all_reduce(total, count)
    return total_loss / total_count


def dev_scores(run: Run) -> dict[str, float]:
    """Generate the texts of dev by beam search, or rank its candidates, and score the result.

    Each process generates or ranks a part.
    """
    config, machine, task = run.config, run.machine, run.task
    assert run.dev is not None
    ranked = [example for example in run.dev.examples if task.candidates(example)]
    examples = (ranked or run.dev.examples)[machine.rank :: machine.world]
    options = Generation(num_beams=config.beam, length_penalty=config.length_penalty)
    generator = CaptionGenerator(
        run.captioner, run.checkpoint.vocabulary, machine, options, answers=task.answers
    )

    def step(count: int) -> None:
        if run.stop_signal and machine.world == 1:
            raise Stopped(run.stop_signal)
        bar.step(count)

    outputs: dict[Any, Any] = {}
    with progress(len(examples), "examples", "dev", enabled=machine.rank == 0) as bar:
        if examples:
            outputs = task_outputs(task, generator, run.dev.cache, examples, done=step).by_id
    outputs = {
        id_: output for part in distributed.all_gather(outputs) for id_, output in part.items()
    }
    if machine.rank:
        return distributed.broadcast(None)
    scorable = task.scorable(run.dev.examples)
    scores = task.score(outputs, scorable or run.dev.examples, run.train.examples)
    return distributed.broadcast(
        {name: value for name, value in scores.items() if isinstance(value, float)}
    )


def shown_scores(task: Task, scores: Mapping[str, float]) -> str:
    """Format the scores that are printed: the task's metric, then those in `task.shown`."""
    return ", ".join(
        f"{name} {scores[key]:.3f}"
        for key, name in {task.metric: task.metric, **task.shown}.items()
    )
