"""The state of a run in memory, and how it is saved and restored."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.batches import ImageTexts
from models.decoders.interface import Decoder
from pipeline.checkpoints.checkpoint import Checkpoint, load_training_state, save_training_state
from pipeline.cli import UserError
from pipeline.runtime import Machine
from pipeline.tasks.base import Task
from pipeline.terminal import say
from pipeline.training.config import TrainConfig
from pipeline.training.logger import Journal
from pipeline.training.objectives import Objective, make_objective


@dataclass
class TrainState:
    """Where a run stands. It is saved with the weights, under the name `place`.

    seconds: spent on the run before this start. ended: whether the time of --minutes is up.
    epoch: from 0; the next five are of this epoch: step, the steps done; captions, the texts (or
    samples) seen; training and waited, seconds in all and seconds waiting for data; lr, of the
    last step.
    begin: the step at which the schedule of the learning rate began.
    """

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
    def from_record(cls, record: dict[str, Any]) -> TrainState:
        """The state recorded in last.safetensors; TypeError for a value of a wrong type."""
        state = cls(**record)
        for item in fields(cls):
            value = getattr(state, item.name)
            kinds = (int, float) if isinstance(item.default, float) else (type(item.default),)
            if type(value) not in kinds or not 0 <= value < 2**53:
                raise TypeError(f"{item.name} is {value!r}")
        return state

    def next_epoch(self) -> TrainState:
        return TrainState(self.seconds, self.ended, self.epoch + 1, lr=self.lr, begin=self.begin)


@dataclass
class Run:
    """A training run in memory: what the loop reads and changes."""

    config: TrainConfig
    folder: Path
    machine: Machine
    task: Task
    train: ImageTexts
    dev: ImageTexts | None  # None with --train-on-dev
    checkpoint: Checkpoint
    journal: Journal
    # the decoder, compiled or wrapped for several processes
    forward: nn.Module = field(init=False)
    objective: Objective = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    average: list[Tensor] | None = field(init=False)  # moving average of the weights (--ema)
    # [2,M+1] float64: sums of the objective's figures and what was counted, since the last
    # validation and since the last line of the log
    sums: Tensor = field(init=False)
    state: TrainState = field(default_factory=TrainState)
    reserve: float = 0.0  # seconds of the last validation, reserved from --minutes
    stopping: int = 0  # the signal that asked the run to stop, or 0
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
        """Token ids of the train texts."""
        sizes = self.captioner.config
        return self.train.encode(self.checkpoint.vocabulary, sizes.max_length, sizes.max_prompt)

    @functools.cached_property
    def dev_ids(self) -> list[list[list[int]]]:
        assert self.dev is not None
        sizes = self.captioner.config
        return self.dev.encode(self.checkpoint.vocabulary, sizes.max_length, sizes.max_prompt)

    @property
    def steps_an_epoch(self) -> int:
        assert self.config.batch is not None  # set by `resolve`
        return -(-len(self.train) // self.config.batch)

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.state.epoch * self.steps_an_epoch + self.state.step

    @property
    def seconds(self) -> float:
        """Seconds spent on the run, over all its starts."""
        return self.state.seconds + time.monotonic() - self.started

    @property
    def validated(self) -> bool:
        """Whether dev was scored after the last step."""
        return bool(self.journal.epochs) and self.journal.epochs[-1]["step"] == self.step

    @property
    def should_validate(self) -> bool:
        """Whether dev must be scored before the next step."""
        config, step = self.config, self.step
        if self.validated:
            return False
        if self.state.ended or step == 0:
            return self.state.ended or config.init is not None
        if config.eval_steps is None or (
            config.epochs and step == config.epochs * self.steps_an_epoch
        ):
            return self.state.step == self.steps_an_epoch
        return step % config.eval_steps == 0

    def done(self) -> float:
        """Progress of the training in 0..1, by steps or by time, whichever is larger.

        It is measured at the middle of a step, so that no step has a learning rate of zero.
        """
        config, by_step, by_time = self.config, 0.0, 0.0
        if config.epochs:
            begin = self.state.begin
            by_step = (self.step - begin + 0.5) / (config.epochs * self.steps_an_epoch - begin)
        if config.minutes:
            by_time = self.seconds / max(config.minutes * 60 - self.reserve, 1e-9)
        return min(1.0, max(by_step, by_time))


def make_optimizer(decoder: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices only, not for biases, norms and embeddings."""
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
    assert config.lr is not None  # set by `resolve`
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-9, fused=True)


def save_progress(run: Run) -> None:
    """Save everything that `restore` needs. Only rank 0 writes."""
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
    place = asdict(run.state) | {"seconds": run.seconds}
    record = {
        "place": place,
        "epochs": run.journal.epochs,
        "wandb": run.journal.wandb_id,
        "world": run.machine.world,
    }
    save_training_state(run.folder, tensors, record)


def restore(run: Run) -> None:
    """Restore weights, optimizer, average, training state and log from last.safetensors; UserError
    if they do not fit the run.
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
        run.sums, run.state = (
            tensors["sums"].view(run.sums.shape).double(),
            TrainState.from_record(record["place"]),
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
            f"warning: begun by {world} processes, now {run.machine.world}: random draws differ "
            f"from those of one uninterrupted run"
        )
    run.journal.begin(epochs, run.step, wandb_id)
