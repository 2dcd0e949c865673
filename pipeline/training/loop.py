"""The training loop.

The random numbers of a step depend only on (seed, step, rank), and the order of the images in an
epoch only on (seed, epoch). Therefore a resumed run gives the same results as an uninterrupted run.
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
from pipeline.terminal import progress as progress_bar
from pipeline.training import distributed
from pipeline.training.config import learning_rate
from pipeline.training.state import Run, save_progress

# the two signals of one stop arrive almost at the same time, but a busy machine delays them
REPEAT_SECONDS = 2


class Stopped(Exception):
    """Raised when Ctrl-C or SIGTERM stops the run. `signum` is the number of the signal."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


# -------------------------------------------------------------------------------------------- steps


def train_until_validation(run: Run) -> dict[str, float]:
    """Train until the next validation: after --eval-steps steps, or at the end of the epoch.

    Returns the mean metrics since the last validation, the learning rate, and of this epoch the
    texts per second and the share of time spent waiting for data. The result is empty if no step
    was done since the last validation.
    """
    while True:
        metrics = train_epoch(run)
        run.state.ended = run.state.ended or distributed.broadcast(
            run.config.minutes is not None and run.progress() >= 1
        )
        if run.should_validate:
            return metrics
        run.state = run.state.next_epoch()


def train_epoch(run: Run) -> dict[str, float]:
    """Train to the end of the epoch, or to the next validation.

    Returns the same metrics as `train_until_validation`. Raises Stopped between two steps, and
    UserError if a loss or a gradient is not finite.
    """
    config, state, objective = run.config, run.state, run.objective
    is_first = run.machine.rank == 0
    run.captioner.train()
    log = StepLog(run)
    name = f"epoch {state.epoch + 1}" + (f"/{config.epochs}" if config.epochs else "")
    total = objective.units_per_epoch(run.train)
    with progress_bar(total, objective.unit, name, enabled=is_first) as bar:
        bar.begin(state.captions)
        for batch, wait_seconds in with_wait_times(prefetch(train_batches(run))):
            save_is_due = is_first and time.monotonic() - run.last_save >= config.save_every * 60
            # One reduction for all numbers. Only rank 0 contributes its progress and its clock.
            counted, units, progress, should_save, signalled = distributed.all_reduce(
                objective.counted(batch),
                objective.units(batch),
                run.progress() if is_first else 0,
                save_is_due,
                run.stop_signal,
            )
            if should_save or signalled:
                log.collect()
            if should_save:
                save_progress(run)
            if signalled:
                raise Stopped(run.stop_signal or signal.SIGTERM)
            time_is_up = config.minutes and progress >= 1
            state.ended = bool(time_is_up and run.step and not run.validated)
            if run.should_validate:
                break
            state.lr = learning_rate(config, progress)
            step_metrics, norm = train_step(run, batch, int(counted), progress)
            log.add(step_metrics, norm, int(units), wait_seconds, batch)
            if state.step % config.log_every == 0:
                metrics = log.line()
                run.journal.add(
                    {"step": run.step, "epoch": run.step / run.steps_per_epoch, "train": metrics}
                )
                shown = f"{objective.shown} {metrics[objective.shown]:.3f}"
                bar.note = f"{shown}, waiting {metrics['waiting']:.1%}"
            bar.step(int(units), bar.note)
    log.collect()
    if not run.sums[0, -1]:
        return {}
    return {
        **mean_metrics(run, 0),
        "lr": state.lr,
        **speed(state.captions, state.training, state.waited),
    }


def mean_metrics(run: Run, row: int) -> dict[str, float]:
    """Divide a row of `run.sums` by its count: the mean of each metric of the objective."""
    *sums, counted = run.sums[row].tolist()
    return {
        name: value / max(counted, 1) for name, value in zip(run.objective.names, sums, strict=True)
    }


def train_batches(run: Run) -> Iterator[Batch]:
    """The remaining batches of the epoch."""
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
        whole=config.scst,  # a reward needs all captions of an image
    )


def train_step(run: Run, batch: Batch, counted: int, progress: float) -> tuple[Tensor, Tensor]:
    """Do one optimizer step.

    The loss is the mean over the tokens (or samples) of the step, over all processes and all parts
    of --accumulate.

    counted: number of tokens (or samples) of the step in all processes.
    progress: progress of the training, 0 to 1.

    Returns the sums of the objective's metrics over the batch of this process, [M], and the
    gradient norm.
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
    metrics, parts = [], batch.split(config.accumulate)
    ddp = cast(DistributedDataParallel, run.forward)  # only used with several processes
    for number, part in enumerate(parts):
        synchronize = number + 1 == len(parts) or machine.world == 1
        with contextlib.nullcontext() if synchronize else ddp.no_sync():
            sums = objective(run.forward, part.to(machine.device), run.step, progress)
            loss = sums.loss * part.counted
            scaled = loss * (machine.world / counted)  # DistributedDataParallel divides by world
            scaled.backward()
        metrics.append(sums.metrics * part.counted)
    norm = torch.nn.utils.clip_grad_norm_(run.captioner.parameters(), config.clip)
    step_metrics = torch.stack(metrics).sum(0)
    if machine.device.type == "cpu":  # on a GPU, StepLog checks them later, so that no step waits
        check_finite(
            run, step_metrics.tolist(), norm.item(), run.step, run.state.lr, batch.image_ids
        )
    run.optimizer.step()
    if run.average is not None:
        update_average(run, run.average)
    return step_metrics, norm


def update_average(run: Run, average: list[Tensor]) -> None:
    """Update the moving average of the weights in place."""
    decay = cast(float, run.config.ema)  # set by `resolve`
    if not run.config.init:  # new weights change fast in the first steps
        decay = min(decay, (1 + run.step) / (10 + run.step))
    weights = [weight.detach() for weight in run.captioner.parameters()]
    torch._foreach_lerp_(average, weights, 1 - decay)


def check_finite(
    run: Run,
    metrics: list[float],
    norm: float,
    step: int,
    lr: float,
    image_ids: Sequence[int | None],
) -> None:
    """Raise UserError if a metric or the gradient norm of a step is infinite or NaN."""
    names = (*run.objective.names, "norm of the gradient")
    for name, value in zip(names, (*metrics, norm), strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"the {name} is {value} at step {step}, lr {lr:.2g}, images "
                f"{', '.join(map(str, image_ids))}; the last save of the run is unchanged. "
                "Try a lower --lr or --clip, or --precision fp32"
            )


class StepLog:
    """Collects the metrics of the steps of an epoch.

    Metrics are copied from the device only for a log line or a save, so that steps do not wait.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.norm = run, 0.0
        # metrics, norm, step, lr, counted, image ids
        self.pending: list[tuple[Tensor, Tensor, int, float, int, list[int | None]]] = []
        self.clock = time.monotonic()
        self.last_totals = self._totals()

    def add(
        self, metrics: Tensor, norm: Tensor, captions: int, waited: float, batch: Batch
    ) -> None:
        """Add a step.

        metrics: [M] sums over the batch of this process.
        captions: number of texts (or samples) of the step in all processes.
        waited: seconds spent waiting for the batch.
        """
        run, state, now = self.run, self.run.state, time.monotonic()
        counted = run.objective.counted(batch)
        self.pending.append((metrics, norm, run.step, state.lr, counted, batch.image_ids))
        state.training += now - self.clock
        self.clock = now
        state.step += 1
        state.captions += captions
        state.waited += waited

    def collect(self) -> None:
        """Add the pending metrics to `run.sums`. Raises UserError if one is not finite."""
        if not self.pending:
            return
        table = torch.stack(
            [torch.cat([metrics, norm[None]]) for metrics, norm, *_ in self.pending]
        ).tolist()
        for (*metrics, norm), (*_, step, lr, counted, image_ids) in zip(
            table, self.pending, strict=True
        ):
            check_finite(self.run, metrics, norm, step, lr, image_ids)
            self.run.sums += torch.tensor(
                distributed.all_reduce(*metrics, counted), dtype=torch.float64
            )
        self.norm, self.pending = norm, []

    def line(self) -> dict[str, float]:
        """Return the metrics since the previous log line, and start the next line."""
        self.collect()
        metrics = mean_metrics(self.run, 1)
        self.run.sums[1] = 0
        totals = self._totals()
        increases = (now - before for now, before in zip(totals, self.last_totals, strict=True))
        self.last_totals = totals
        return {
            **metrics,
            "lr": self.run.state.lr,
            "gradient": self.norm,
            **speed(*increases),
        }

    def _totals(self) -> tuple[float, float, float]:
        return self.run.state.captions, self.run.state.training, self.run.state.waited


def speed(captions: float, training: float, waited: float) -> dict[str, float]:
    """Captions per second, and the share of the `training` seconds spent waiting for data."""
    return {
        "captions_per_s": captions / max(training, 1e-9),
        "waiting": waited / max(training, 1e-9),
    }


def with_wait_times(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Yield each batch with the seconds spent waiting for it."""
    while True:
        start = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.monotonic() - start


@contextlib.contextmanager
def averaged_weights(run: Run) -> Iterator[None]:
    """Context manager: the captioner has the averaged weights (--ema), if the run has them."""
    weights = [weight.data for weight in run.captioner.parameters()]
    if run.average is not None:
        for weight, mean in zip(run.captioner.parameters(), run.average, strict=True):
            weight.data = mean
    try:
        yield
    finally:
        for weight, original in zip(run.captioner.parameters(), weights, strict=True):
            weight.data = original


@contextlib.contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """Context manager: Ctrl-C or SIGTERM stops the run after the current step and saves it.

    A second signal ends the process immediately. A repetition of the first one within
    REPEAT_SECONDS has no effect: Slurm and pipeline.sweep may both send one.
    """
    first = 0.0

    def restore(signum: int) -> None:
        handler = handlers[signum]
        # None: the handler was not set from Python, and Python cannot set it again
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def stop(signum: int, _: Any) -> None:
        nonlocal first
        if not run.stop_signal:
            run.stop_signal, first = signum, time.monotonic()
        elif time.monotonic() - first > REPEAT_SECONDS:
            restore(signum)
            signal.raise_signal(signum)

    handlers: dict[int, Any] = {
        signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for signum in handlers:
            restore(signum)
