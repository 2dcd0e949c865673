"""A training run in memory, and how its state is saved and restored."""

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
    """Position of a run. It is saved as `place` in last.safetensors.

    seconds: time spent on the run before this start.
    ended: whether the time of --minutes is up.
    epoch: number of the epoch, from 0.
    step: number of steps done in this epoch.
    captions: number of texts (or samples) processed in this epoch.
    training: seconds spent on this epoch.
    waited: seconds of this epoch spent waiting for data.
    lr: learning rate of the last step.
    begin: step of the run at which the learning rate schedule began.
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
        """Read the state from the record in last.safetensors.

        Raises TypeError for a value of a wrong type or out of range.
        """
        state = cls(**record)
        for item in fields(cls):
            value = getattr(state, item.name)
            types = (int, float) if isinstance(item.default, float) else (type(item.default),)
            if type(value) not in types or not 0 <= value < 2**53:
                raise TypeError(f"{item.name} is {value!r}")
        return state

    def next_epoch(self) -> TrainState:
        return TrainState(self.seconds, self.ended, self.epoch + 1, lr=self.lr, begin=self.begin)


@dataclass
class Run:
    """A training run in memory. The training loop reads and changes it."""

    config: TrainConfig
    folder: Path
    machine: Machine
    task: Task
    train: ImageTexts
    dev: ImageTexts | None  # None with --train-on-dev
    checkpoint: Checkpoint
    journal: Journal
    # the captioner, wrapped by torch.compile and DistributedDataParallel if they are used
    forward: nn.Module = field(init=False)
    objective: Objective = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    average: list[Tensor] | None = field(init=False)  # moving average of the weights (--ema)
    # [2,M+1] float64: sums of the objective's M metrics and of the counted items. Row 0 is since
    # the last validation, row 1 since the last log line.
    sums: Tensor = field(init=False)
    state: TrainState = field(default_factory=TrainState)
    # Duration of the last validation. --minutes includes one more validation at the end.
    validation_seconds: float = 0.0
    stop_signal: int = 0  # the signal that stops the run, or 0
    start_time: float = field(default_factory=time.monotonic)
    last_save: float = field(default_factory=time.monotonic)

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
        """Token ids of the dev texts."""
        assert self.dev is not None
        sizes = self.captioner.config
        return self.dev.encode(self.checkpoint.vocabulary, sizes.max_length, sizes.max_prompt)

    @property
    def steps_per_epoch(self) -> int:
        assert self.config.batch is not None  # set by `resolve`
        return -(-len(self.train) // self.config.batch)

    @property
    def step(self) -> int:
        """Number of steps done since the start of the run."""
        return self.state.epoch * self.steps_per_epoch + self.state.step

    @property
    def seconds(self) -> float:
        """Seconds spent on the run, including earlier starts."""
        return self.state.seconds + time.monotonic() - self.start_time

    @property
    def validated(self) -> bool:
        """Whether there was a validation after the last step."""
        validations = self.journal.validations
        return bool(validations) and validations[-1]["step"] == self.step

    @property
    def should_validate(self) -> bool:
        """Whether a validation is due before the next step."""
        config, step = self.config, self.step
        if self.validated:
            return False
        if self.state.ended:
            return True
        if step == 0:
            return config.init is not None  # score the weights of --init
        is_last_step = config.epochs and step == config.epochs * self.steps_per_epoch
        if config.eval_steps is None or is_last_step:
            return self.state.step == self.steps_per_epoch
        return step % config.eval_steps == 0

    def progress(self) -> float:
        """Progress of the training, 0 to 1: the larger one of the progress by steps and by time.

        It is computed for the middle of the next step, so that no step has a learning rate of 0.
        """
        config, by_step, by_time = self.config, 0.0, 0.0
        if config.epochs:
            begin = self.state.begin
            by_step = (self.step - begin + 0.5) / (config.epochs * self.steps_per_epoch - begin)
        if config.minutes:
            by_time = self.seconds / max(config.minutes * 60 - self.validation_seconds, 1e-9)
        return min(1.0, max(by_step, by_time))


def make_optimizer(decoder: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Create AdamW, with weight decay for matrices but not for biases, norms and embeddings."""
    embeddings = {
        id(p)
        for module in decoder.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    with_decay: list[nn.Parameter] = []
    without_decay: list[nn.Parameter] = []
    for p in decoder.parameters():
        (with_decay if p.ndim > 1 and id(p) not in embeddings else without_decay).append(p)
    groups = [
        {"params": with_decay, "weight_decay": config.weight_decay},
        {"params": without_decay, "weight_decay": 0.0},
    ]
    assert config.lr is not None  # set by `resolve`
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-9, fused=True)


def save_progress(run: Run) -> None:
    """Write last.safetensors, which `restore` reads. Only rank 0 writes."""
    run.last_save = time.monotonic()
    if run.machine.rank:
        return
    tensors = {f"model.{name}": value for name, value in run.captioner.state_dict().items()}
    for number, (name, weight) in enumerate(run.captioner.named_parameters()):
        for key, value in run.optimizer.state[weight].items():
            tensors[f"optimizer.{name}.{key}"] = value
        if run.average is not None:
            tensors[f"average.{name}"] = run.average[number]
    tensors["sums"] = run.sums
    record = {
        "place": asdict(run.state) | {"seconds": run.seconds},
        "epochs": run.journal.validations,
        "wandb": run.journal.wandb_id,
        "world": run.machine.world,
    }
    save_training_state(run.folder, tensors, record)


def restore(run: Run) -> None:
    """Restore weights, optimizer, moving average, training state and log from last.safetensors.

    Raises UserError if the file does not fit the run.
    """
    tensors, record = load_training_state(run.folder)
    try:
        run.captioner.load_state_dict(
            {name: tensors[f"model.{name}"] for name in run.captioner.state_dict()}
        )
        for number, (name, weight) in enumerate(run.captioner.named_parameters()):
            # before the first step, the optimizer has no state
            has_state = f"optimizer.{name}.step" in tensors
            for key in ("step", "exp_avg", "exp_avg_sq") if has_state else ():
                value = tensors[f"optimizer.{name}.{key}"]
                if value.shape != (torch.Size() if key == "step" else weight.shape):
                    raise RuntimeError(f"optimizer.{name}.{key} is {tuple(value.shape)}")
                run.optimizer.state[weight][key] = value.to(weight)
            if run.average is not None:
                run.average[number].copy_(tensors[f"average.{name}"].view(weight.shape))
        run.sums = tensors["sums"].view(run.sums.shape).double()
        run.state = TrainState.from_record(record["place"])
        validations, wandb_id, world = record["epochs"], record["wandb"], record["world"]
        for line in validations:
            numbers = [line["step"], line["seconds"]["validation"]]
            numbers += [line["dev"][run.task.metric], line["dev"]["loss"]] if run.dev else []
            if not all(type(number) in (int, float) for number in numbers):
                raise TypeError(f"a validation line is {line}")
        run.validation_seconds = validations[-1]["seconds"]["validation"] if validations else 0.0
    except (KeyError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{run.folder / 'last.safetensors'} does not fit the run: {error}; start the run again "
            "in another --out"
        ) from error
    if world != run.machine.world:
        say(
            f"warning: the run was started with {world} processes and has now "
            f"{run.machine.world}; its random numbers differ from those of an uninterrupted run"
        )
    run.journal.begin(validations, run.step, wandb_id)
