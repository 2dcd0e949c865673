"""The training loop: steps over a cache's images, and where a run stands, so that it goes on
exactly.

All that is drawn in a step follows from (seed, step, rank), and the order of an epoch from (seed,
epoch): a run that is killed goes on from its last save as if nothing had been.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.batches import Batch, ImageTexts, prefetch
from models.decoders.interface import Decoder
from pipeline.checkpoints.checkpoint import Checkpoint, load_training_state, save_training_state
from pipeline.cli import UserError
from pipeline.runtime import Machine
from pipeline.tasks.base import Task
from pipeline.terminal import progress, say
from pipeline.training import distributed
from pipeline.training.config import TrainConfig, learning_rate
from pipeline.training.logger import Journal
from pipeline.training.objectives import Objective, make_objective


class Stopped(Exception):
    """Somebody asked the run to stop (Ctrl-C, or a scheduler's SIGTERM); `signum` is the signal."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


@dataclass
class TrainState:
    """Where a run stands: seconds spent on it, its `epoch` (from 0), and of that the steps done,
    captions (or samples) seen, seconds of training and of waiting for data; `lr` of the last step;
    whether the time was up; `begin`, the step at which the schedule of the learning rate began."""

    seconds: float = 0.0
    ended: bool = False
    epoch: int = 0
    step: int = 0
    captions: int = 0
    training: float = 0.0
    waited: float = 0.0
    lr: float = 0.0
    begin: int = 0

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> TrainState:
        """The place that last.safetensors records; TypeError where a value is not of its kind."""
        place = cls(**record)
        for item in fields(cls):
            value, kind = getattr(place, item.name), type(item.default)
            kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
            if type(value) not in kinds or not 0 <= value < 2**53:
                raise TypeError(f"{item.name} is {value!r}")
        return place

    def of_next_epoch(self) -> TrainState:
        return TrainState(self.seconds, self.ended, self.epoch + 1, lr=self.lr, begin=self.begin)


@dataclass
class Run:
    """A training run in memory: what the loop changes and what it needs."""

    config: TrainConfig
    folder: Path
    machine: Machine
    task: Task
    train: ImageTexts
    dev: ImageTexts | None  # None: nothing is chosen
    checkpoint: Checkpoint
    journal: Journal
    forward: nn.Module = field(
        init=False
    )  # the captioner as training calls it: compiled, in several processes
    objective: Objective = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    average: list[Tensor] | None = field(init=False)  # of the weights, by --ema
    sums: Tensor = field(
        init=False
    )  # [2,M+1] float64: the objective's figures and what was counted, since the last
    # validation and since the last line of the journal
    place: TrainState = field(default_factory=TrainState)
    reserve: float = 0.0  # seconds that the last validation took: kept back of --minutes
    stopping: int = 0  # the signal that asked to stop
    started: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        config, captioner = self.config, self.captioner
        self.objective = make_objective(
            config, self.machine, self.task, captioner, self.train, self.checkpoint.vocabulary
        )
        self.sums = torch.zeros(2, len(self.objective.names) + 1, dtype=torch.float64)
        self.forward = captioner
        if config.compile:
            self.forward = cast(nn.Module, torch.compile(captioner, dynamic=True))
        if self.machine.world > 1:
            self.forward = DistributedDataParallel(self.forward)
        self.optimizer = make_optimizer(captioner, config)
        self.average = (
            [weight.detach().clone() for weight in captioner.parameters()] if config.ema else None
        )

    @property
    def captioner(self) -> Decoder:
        return self.checkpoint.captioner

    @functools.cached_property
    def train_ids(self) -> list[list[list[int]]]:
        """Train's texts, encoded once."""
        sizes = self.captioner.config
        return self.train.encode(self.checkpoint.vocabulary, sizes.max_length, sizes.max_prompt)

    @functools.cached_property
    def dev_ids(self) -> list[list[list[int]]]:
        assert self.dev is not None
        sizes = self.captioner.config
        return self.dev.encode(self.checkpoint.vocabulary, sizes.max_length, sizes.max_prompt)

    @property
    def steps_an_epoch(self) -> int:
        assert self.config.batch is not None  # by `resolve`
        return -(-len(self.train) // self.config.batch)

    @property
    def step(self) -> int:
        """Steps done in all."""
        return self.place.epoch * self.steps_an_epoch + self.place.step

    @property
    def seconds(self) -> float:
        """Spent on the run, by all its starts."""
        return self.place.seconds + time.monotonic() - self.started

    @property
    def validated(self) -> bool:
        """Whether dev was looked at after the last step."""
        return bool(self.journal.epochs) and self.journal.epochs[-1]["step"] == self.step

    @property
    def should_validate(self) -> bool:
        """Whether dev is to be looked at before the next step."""
        config, step = self.config, self.step
        if self.validated:
            return False
        if self.place.ended or step == 0:
            return self.place.ended or config.init is not None
        if config.eval_steps is None or (
            config.epochs and step == config.epochs * self.steps_an_epoch
        ):
            return self.place.step == self.steps_an_epoch
        return step % config.eval_steps == 0

    def done(self) -> float:
        """How much of the training is over, 0 to 1: by steps or by time, whichever ends it first.
        Looked at in the middle of a step, so that neither the first nor the last has a learning
        rate of zero. By the first process's clock."""
        config, by_step, by_time = self.config, 0.0, 0.0
        if config.epochs:
            begin = self.place.begin
            by_step = (self.step - begin + 0.5) / (config.epochs * self.steps_an_epoch - begin)
        if config.minutes:
            by_time = self.seconds / max(config.minutes * 60 - self.reserve, 1e-9)
        return min(1.0, max(by_step, by_time))


def make_optimizer(decoder: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases, norms and embeddings do not."""
    embeddings = {
        id(p)
        for module in decoder.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    decayed = [p for p in decoder.parameters() if p.ndim > 1 and id(p) not in embeddings]
    chosen = {id(p) for p in decayed}
    rest = [p for p in decoder.parameters() if id(p) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    assert config.lr is not None  # by `resolve`
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-9, fused=True)


# -------------------------------------------------------------------------------------------- steps


def train_until_due(run: Run) -> dict[str, float]:
    """Train until dev is to be looked at (after every --eval-steps, else at each epoch's end, and
    at the training's end); returns the figures since the last time (none before the first step),
    learning rate, and of the epoch captions/s and the share of time waiting for data."""
    while True:
        trained = train_epoch(run)
        run.place.ended = run.place.ended or distributed.broadcast(
            run.config.minutes is not None and run.done() >= 1
        )
        if run.should_validate:
            return trained
        run.place = run.place.of_next_epoch()


def train_epoch(run: Run) -> dict[str, float]:
    """The rest of an epoch, or of it what comes before dev is due; returns as train_until_due.

    Raises Stopped between two steps, and UserError for a figure or a gradient that is not finite.
    """
    config, place, objective, first = run.config, run.place, run.objective, run.machine.rank == 0
    run.captioner.train()
    window = Window(run)
    name = f"epoch {place.epoch + 1}" + (f"/{config.epochs}" if config.epochs else "")
    with progress(objective.units_an_epoch(run.train), objective.unit, name, enabled=first) as bar:
        bar.begin(place.captions)
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
                window.settle()
            if saving:
                save_progress(run)
            if stopping:
                raise Stopped(run.stopping or signal.SIGTERM)
            place.ended = bool(config.minutes and done >= 1 and run.step and not run.validated)
            if run.should_validate:
                break
            place.lr = learning_rate(config, done)
            window.took(*train_step(run, batch, int(counted), done), int(units), waiting, batch)
            if place.step % config.log_every == 0:
                line = window.tell()
                run.journal.add(
                    {"step": run.step, "epoch": run.step / run.steps_an_epoch, "train": line}
                )
                bar.note = (
                    f"{objective.shown} {line[objective.shown]:.3f}, waiting {line['waiting']:.1%}"
                )
            bar.step(int(units), bar.note)
    window.settle()
    if not run.sums[0, -1]:
        return {}
    return {**means(run, 0), "lr": place.lr, **speed(place.captions, place.training, place.waited)}


def means(run: Run, row: int) -> dict[str, float]:
    """The mean of each of the objective's figures, of a row of the sums."""
    *figures, counted = run.sums[row].tolist()
    return {
        name: figure / max(counted, 1)
        for name, figure in zip(run.objective.names, figures, strict=True)
    }


def train_batches(run: Run) -> Iterator[Batch]:
    """The rest of the epoch's batches, in an order that follows from seed and epoch alone."""
    config, machine = run.config, run.machine
    order = np.random.default_rng((config.seed, run.place.epoch))
    views = config.views and bool(run.train.cache.views)
    assert config.batch is not None  # by `resolve`
    return run.train.batches(
        run.train_ids,
        config.batch,
        order,
        views,
        run.place.step,
        machine.rank,
        machine.world,
        whole=config.scst,
    )  # a reward has no captions to leave out


def train_step(run: Run, batch: Batch, counted: int, done: float) -> tuple[Tensor, Tensor]:
    """One update by the mean loss over what the whole step counts, all processes and parts; returns
    this process's sums of the objective's figures [M] and the norm of the gradient."""
    config, machine, objective = run.config, run.machine, run.objective
    for group in run.optimizer.param_groups:
        group["lr"] = run.place.lr
    torch.manual_seed(
        np.random.SeedSequence((config.seed, run.step, machine.rank))
        .generate_state(1, np.uint64)
        .item()
    )
    run.optimizer.zero_grad(set_to_none=True)
    figures, parts = [], batch.split(config.accumulate)
    several = cast(DistributedDataParallel, run.forward)  # where there are several processes
    for number, part in enumerate(parts):
        ready = number + 1 == len(parts) or machine.world == 1
        with contextlib.nullcontext() if ready else several.no_sync():
            sums = objective(run.forward, part.to(machine.device), run.step, done)
            loss = sums.loss * part.counted
            (
                loss * (machine.world / counted)
            ).backward()  # DistributedDataParallel divides by the processes
        figures.append(sums.figures * part.counted)
    norm = torch.nn.utils.clip_grad_norm_(run.captioner.parameters(), config.clip)
    told = torch.stack(figures).sum(0)
    if machine.device.type == "cpu":
        refuse_not_finite(run, told.tolist(), norm.item(), run.step, run.place.lr, batch.image_ids)
    run.optimizer.step()
    if run.average is not None:
        assert config.ema is not None  # without it there is no average
        decay = (
            config.ema if config.init else min(config.ema, (1 + run.step) / (10 + run.step))
        )  # at first: little to average
        torch._foreach_lerp_(
            run.average, [weight.detach() for weight in run.captioner.parameters()], 1 - decay
        )
    return told, norm


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
                f"{', '.join(map(str, image_ids))}; the run is "
                "as it was last saved: a lower --lr or --clip mends it mostly, --precision "
                "fp32 sometimes"
            )


class Window:
    """Steps since the last line: a GPU is only looked at when a line or a save is due, so that no
    step waits for it.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.norm = run, 0.0
        self.pending: list[tuple[Tensor, Tensor, int, float, int, list[int | None]]] = []
        self.clock = time.monotonic()
        self.told_at = self._stand()

    def took(
        self, figures: Tensor, norm: Tensor, captions: int, waited: float, batch: Batch
    ) -> None:
        place, now = self.run.place, time.monotonic()
        self.pending.append(
            (
                figures,
                norm,
                self.run.step,
                place.lr,
                self.run.objective.counted(batch),
                batch.image_ids,
            )
        )
        place.training, self.clock = place.training + now - self.clock, now
        place.step, place.captions, place.waited = (
            place.step + 1,
            place.captions + captions,
            place.waited + waited,
        )

    def settle(self) -> None:
        """Add what is pending to the run's sums; UserError where a loss is not finite."""
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

    def tell(self) -> dict[str, float]:
        """The figures of a line, since the one before."""
        self.settle()
        found = means(self.run, 1)
        self.run.sums[1] = 0
        captions, training, waited = (
            now - then for now, then in zip(self._stand(), self.told_at, strict=True)
        )
        self.told_at = self._stand()
        return {
            **found,
            "lr": self.run.place.lr,
            "gradient": self.norm,
            **speed(captions, training, waited),
        }

    def _stand(self) -> tuple[float, float, float]:
        return self.run.place.captions, self.run.place.training, self.run.place.waited


def speed(captions: float, training: float, waited: float) -> dict[str, float]:
    return {
        "captions_per_s": captions / max(training, 1e-9),
        "waiting": waited / max(training, 1e-9),
    }


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that were spent waiting for it."""
    while True:
        start = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.monotonic() - start


@contextlib.contextmanager
def averaged(run: Run) -> Iterator[None]:
    """The captioner with its averaged weights for a while, where there are any."""
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
    """The first Ctrl-C or SIGTERM lets the step end and be saved; a second one ends the process at
    once.
    """

    def stop(signum: int, _: Any) -> None:
        run.stopping = signum
        signal.signal(signum, before[signum])

    before: dict[int, Any] = {
        signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# ---------------------------------------------------------------------------------- where it stands


def save_progress(run: Run) -> None:
    """Everything `restore` needs, by the process that writes."""
    run.saved = time.monotonic()
    if run.machine.rank:
        return
    tensors = {f"model.{name}": value for name, value in run.captioner.state_dict().items()}
    for number, (name, weight) in enumerate(run.captioner.named_parameters()):
        for key, value in run.optimizer.state[weight].items():
            tensors[f"optimizer.{name}.{key}"] = value
        if run.average is not None:
            tensors[f"average.{name}"] = run.average[number]
    tensors["sums"] = run.sums
    place = asdict(run.place) | {"seconds": run.seconds}
    record = {
        "place": place,
        "epochs": run.journal.epochs,
        "wandb": run.journal.wandb_id,
        "world": run.machine.world,
    }
    save_training_state(run.folder, tensors, record)


def restore(run: Run) -> None:
    """Take up weights, optimiser, average, place and journal from last.safetensors; UserError where
    it is not the run's.
    """
    tensors, record = load_training_state(run.folder)
    try:
        run.captioner.load_state_dict(
            {name: tensors[f"model.{name}"] for name in run.captioner.state_dict()}
        )
        for number, (name, weight) in enumerate(run.captioner.named_parameters()):
            for key in (
                ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{name}.step" in tensors else ()
            ):
                value = tensors[f"optimizer.{name}.{key}"]
                if value.shape != (torch.Size() if key == "step" else weight.shape):
                    raise RuntimeError(f"optimizer.{name}.{key} is {tuple(value.shape)}")
                run.optimizer.state[weight][key] = value.to(weight)
            if run.average is not None:
                run.average[number].copy_(tensors[f"average.{name}"].view(weight.shape))
        run.sums, run.place = (
            tensors["sums"].view(run.sums.shape).double(),
            TrainState.of_record(record["place"]),
        )
        epochs, wandb_id, world = record["epochs"], record["wandb"], record["world"]
        for line in epochs:
            numbers = [line["step"], line["seconds"]["validation"]]
            numbers += [line["dev"][run.task.metric], line["dev"]["loss"]] if run.dev else []
            if not all(type(number) in (int, float) for number in numbers):
                raise TypeError(f"an epoch is {line}")
        run.reserve = epochs[-1]["seconds"]["validation"] if epochs else 0.0
    except (KeyError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{run.folder / 'last.safetensors'} does not fit the run: {error}; start the run anew"
        ) from error
    if world != run.machine.world:
        say(
            f"warning: begun by {world} processes, now {run.machine.world}: what is drawn is "
            "not what it would have been"
        )
    run.journal.begin(epochs, run.step, wandb_id)
