"""The training loop: steps over the images of a cache.

All random draws of a step follow from (seed, step, rank), and the order of an epoch from (seed,
epoch). A killed run therefore continues from its last save exactly as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data.batches import Batch, prefetch
from pipeline.cli import UserError
from pipeline.terminal import progress
from pipeline.training import distributed
from pipeline.training.config import learning_rate
from pipeline.training.state import Run, save_progress


class Stopped(Exception):
    """The run was asked to stop by Ctrl-C or SIGTERM; `signum` is the signal."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


# -------------------------------------------------------------------------------------------- steps


def train_until_validation(run: Run) -> dict[str, float]:
    """Train until `run.should_validate`: every --eval-steps, else at each epoch's end.

    Returns the mean figures since the last validation, the learning rate, and for this epoch
    texts/s and the share of time spent waiting for data; {} before the first step.
    """
    while True:
        trained = train_epoch(run)
        run.state.ended = run.state.ended or distributed.broadcast(
            run.config.minutes is not None and run.done() >= 1
        )
        if run.should_validate:
            return trained
        run.state = run.state.next_epoch()


def train_epoch(run: Run) -> dict[str, float]:
    """Train to the epoch's end, or until `run.should_validate`. Returns as train_until_validation.

    Raises Stopped between two steps, and UserError for a loss or gradient that is not finite.
    """
    config, state, objective, first = run.config, run.state, run.objective, run.machine.rank == 0
    run.captioner.train()
    steps = StepLog(run)
    name = f"epoch {state.epoch + 1}" + (f"/{config.epochs}" if config.epochs else "")
    with progress(objective.units_an_epoch(run.train), objective.unit, name, enabled=first) as bar:
        bar.begin(state.captions)
        for batch, waiting in timed(prefetch(train_batches(run))):
            due = first and time.monotonic() - run.saved >= config.save_every * 60
            counted, units, done, saving, stopping = distributed.all_reduce(
                objective.counted(batch),
                objective.units(batch),
                run.done() if first else 0,
                due,
                run.stopping,
            )
            if saving or stopping:
                steps.collect()
            if saving:
                save_progress(run)
            if stopping:
                raise Stopped(run.stopping or signal.SIGTERM)
            state.ended = bool(config.minutes and done >= 1 and run.step and not run.validated)
            if run.should_validate:
                break
            state.lr = learning_rate(config, done)
            steps.add(*train_step(run, batch, int(counted), done), int(units), waiting, batch)
            if state.step % config.log_every == 0:
                figures = steps.line()
                run.journal.add(
                    {"step": run.step, "epoch": run.step / run.steps_an_epoch, "train": figures}
                )
                shown = f"{objective.shown} {figures[objective.shown]:.3f}"
                bar.note = f"{shown}, waiting {figures['waiting']:.1%}"
            bar.step(int(units), bar.note)
    steps.collect()
    if not run.sums[0, -1]:
        return {}
    return {**means(run, 0), "lr": state.lr, **speed(state.captions, state.training, state.waited)}


def means(run: Run, row: int) -> dict[str, float]:
    """The mean of each of the objective's figures, from a row of the sums."""
    *figures, counted = run.sums[row].tolist()
    return {
        name: figure / max(counted, 1)
        for name, figure in zip(run.objective.names, figures, strict=True)
    }


def train_batches(run: Run) -> Iterator[Batch]:
    """The remaining batches of the epoch. Their order follows from seed and epoch alone."""
    config, machine = run.config, run.machine
    order = np.random.default_rng((config.seed, run.state.epoch))
    views = config.views and bool(run.train.cache.views)
    assert config.batch is not None  # set by `resolve`
    return run.train.batches(
        run.train_ids,
        config.batch,
        order,
        views,
        run.state.step,
        machine.rank,
        machine.world,
        whole=config.scst,  # a reward compares with all captions of an image
    )


def train_step(run: Run, batch: Batch, counted: int, done: float) -> tuple[Tensor, Tensor]:
    """One update by the mean loss over all tokens (or samples) of the step, in all processes and
    accumulation parts.

    Returns this process's sums of the objective's figures [M] and the gradient norm.
    """
    config, machine, objective = run.config, run.machine, run.objective
    for group in run.optimizer.param_groups:
        group["lr"] = run.state.lr
    torch.manual_seed(
        np.random.SeedSequence((config.seed, run.step, machine.rank))
        .generate_state(1, np.uint64)
        .item()
    )
    run.optimizer.zero_grad(set_to_none=True)
    figures, parts = [], batch.split(config.accumulate)
    several = cast(DistributedDataParallel, run.forward)  # only used with several processes
    for number, part in enumerate(parts):
        ready = number + 1 == len(parts) or machine.world == 1
        with contextlib.nullcontext() if ready else several.no_sync():
            sums = objective(run.forward, part.to(machine.device), run.step, done)
            loss = sums.loss * part.counted
            scaled = loss * (machine.world / counted)  # DistributedDataParallel divides by world
            scaled.backward()
        figures.append(sums.figures * part.counted)
    norm = torch.nn.utils.clip_grad_norm_(run.captioner.parameters(), config.clip)
    sums_of_step = torch.stack(figures).sum(0)
    if machine.device.type == "cpu":
        refuse_not_finite(
            run, sums_of_step.tolist(), norm.item(), run.step, run.state.lr, batch.image_ids
        )
    run.optimizer.step()
    if run.average is not None:
        decay = cast(float, config.ema)  # set by `resolve`
        if not config.init:  # a shorter average in the first steps
            decay = min(decay, (1 + run.step) / (10 + run.step))
        torch._foreach_lerp_(
            run.average, [weight.detach() for weight in run.captioner.parameters()], 1 - decay
        )
    return sums_of_step, norm


def refuse_not_finite(
    run: Run,
    figures: list[float],
    norm: float,
    step: int,
    lr: float,
    image_ids: Sequence[int | None],
) -> None:
    for what, value in (
        *zip(run.objective.names, figures, strict=True),
        ("norm of the gradient", norm),
    ):
        if not math.isfinite(value):
            raise UserError(
                f"the {what} is {value} at step {step}, lr {lr:.2g}, images "
                f"{', '.join(map(str, image_ids))}; the run is as it was last saved. "
                "Try a lower --lr or --clip, or --precision fp32"
            )


class StepLog:
    """Collects the figures of steps. They are read from the device only for a log line or a save,
    so that no step waits.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.norm = run, 0.0
        self.pending: list[tuple[Tensor, Tensor, int, float, int, list[int | None]]] = []
        self.clock = time.monotonic()
        self.last_line = self._stand()

    def add(
        self, figures: Tensor, norm: Tensor, captions: int, waited: float, batch: Batch
    ) -> None:
        state, now = self.run.state, time.monotonic()
        self.pending.append(
            (
                figures,
                norm,
                self.run.step,
                state.lr,
                self.run.objective.counted(batch),
                batch.image_ids,
            )
        )
        state.training, self.clock = state.training + now - self.clock, now
        state.step, state.captions, state.waited = (
            state.step + 1,
            state.captions + captions,
            state.waited + waited,
        )

    def collect(self) -> None:
        """Add the pending figures to the run's sums; UserError if a loss is not finite."""
        if not self.pending:
            return
        table = torch.stack(
            [torch.cat([figures, norm[None]]) for figures, norm, *_ in self.pending]
        ).tolist()
        for (*figures, norm), (*_, step, lr, counted, image_ids) in zip(
            table, self.pending, strict=True
        ):
            refuse_not_finite(self.run, figures, norm, step, lr, image_ids)
            self.run.sums += torch.tensor(
                distributed.all_reduce(*figures, counted), dtype=torch.float64
            )
        self.norm, self.pending = norm, []

    def line(self) -> dict[str, float]:
        """The figures since the previous log line."""
        self.collect()
        found = means(self.run, 1)
        self.run.sums[1] = 0
        captions, training, waited = (
            now - then for now, then in zip(self._stand(), self.last_line, strict=True)
        )
        self.last_line = self._stand()
        return {
            **found,
            "lr": self.run.state.lr,
            "gradient": self.norm,
            **speed(captions, training, waited),
        }

    def _stand(self) -> tuple[float, float, float]:
        return self.run.state.captions, self.run.state.training, self.run.state.waited


def speed(captions: float, training: float, waited: float) -> dict[str, float]:
    return {
        "captions_per_s": captions / max(training, 1e-9),
        "waiting": waited / max(training, 1e-9),
    }


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Yield each batch with the seconds spent waiting for it."""
    while True:
        start = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.monotonic() - start


@contextlib.contextmanager
def averaged(run: Run) -> Iterator[None]:
    """Use the moving average of the weights inside the block, if there is one."""
    weights = [weight.data for weight in run.captioner.parameters()]
    if run.average is not None:
        for weight, mean in zip(run.captioner.parameters(), run.average, strict=True):
            weight.data = mean
    try:
        yield
    finally:
        for weight, own in zip(run.captioner.parameters(), weights, strict=True):
            weight.data = own


@contextlib.contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM finishes the step and saves; the second ends the process at
    once.
    """

    def restore(signum: int) -> None:
        handler = before[signum]
        # None: a handler that was not set from Python, which Python cannot set again
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def stop(signum: int, _: Any) -> None:
        run.stopping = signum
        restore(signum)

    before: dict[int, Any] = {
        signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for signum in before:
            restore(signum)
