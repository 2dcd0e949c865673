"""What training strives for: the likelihood of the references' words, or by --scst the reward of
what the captioner says.

An objective gives the sum, over what it counts, of a loss to be lowered and of figures to be told;
a step's gradient is that of the sum over all processes and parts, divided by the number counted, so
that one process = two. B images, K samples an image, L words at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import Batch, ImageTexts
from data.vocabulary import EOS, PAD, UNK, Vocabulary
from models.decoders.dropout import drop_regions
from models.decoders.interface import Decoder, Memory, evaluating
from models.generation.beam_search import beam_search
from models.generation.options import Generation, lengths
from models.generation.sampling import sample
from models.losses import Noise, caption_loss, class_loss, self_critical_loss
from models.regions import Regions
from pipeline.cli import UserError
from pipeline.runtime import Machine
from pipeline.tasks.base import Task
from pipeline.training.config import TrainConfig
from pipeline.training.rewards import Rewards


class Sums(NamedTuple):
    """loss: with its gradient. figures [M]: detached, in the order of the objective's `names`, the
    loss first.
    """

    loss: Tensor
    figures: Tensor


def supervised_loss(
    decoder: nn.Module, batch: Batch, label_smoothing: float = 0.0, noise: Noise | None = None
) -> Tensor:
    """The sum of `class_loss` over a batch with labels, else of `caption_loss`, in nats.

    `Batch.scored` is the number of items that it sums over.
    """
    regions, prompts = Regions(batch.features, batch.boxes, batch.counts), batch.prompt_lengths
    noise = noise or Noise()
    if batch.labels is not None:
        return class_loss(decoder, regions, batch.tokens, batch.labels, PAD, noise, prompts)[0]
    return caption_loss(decoder, regions, batch.tokens, PAD, label_smoothing, noise, prompts)[0]


class CrossEntropy:
    """Cross-entropy of the next word of each reference, teacher-forced, in nats per word; of
    batches with labels the binary cross-entropy of all classes, in nats per text.
    """

    names, shown = ("loss",), "loss"

    def __init__(self, config: TrainConfig, machine: Machine, unit: str) -> None:
        self.config, self.machine, self.unit = config, machine, unit

    def counted(self, batch: Batch) -> int:
        """How many items of a batch the mean loss divides by."""
        return batch.scored

    def units(self, batch: Batch) -> int:
        return batch.texts

    def units_an_epoch(self, train: ImageTexts) -> int:
        return train.texts

    def __call__(self, forward: nn.Module, part: Batch, step: int, done: float) -> Sums:
        """Of `part`, on the device; `done`: how much of the training is over, 0 to 1."""
        config = self.config
        noise = Noise(
            config.region_dropout or 0.0, config.word_dropout, config.scheduled_sampling * done, UNK
        )
        with self.machine.autocast():
            loss = supervised_loss(forward, part, config.label_smoothing, noise)
        return Sums(loss, loss.detach()[None])


class SelfCritical:
    """Self-critical sequence training (Rennie et al. 2017): K captions of each image drawn from the
    captioner, each made likelier by its reward less a baseline: the mean reward of the image's
    other samples (Luo 2020), or that of its greedy caption; or the K captions of beam search
    against their mean, as Cornia et al. 2020 have it.

    An image is encoded once a step, with its gradient; samples are drawn over that without one, and
    one teacher-forced pass over them gives their log p. What is drawn follows from (seed, step,
    image id): the same samples in one process and in several. Dropout, also of regions, where there
    is any, acts in both passes.

    The distribution drawn from, and trained, is the captioner's at `temperature`. Below 1 the
    samples are such as decoding gives, and what is learnt is which of those is best; at 1 it is at
    first that likely captions are better than unlikely ones, which decoding knows (docs/log.md has
    what it brings).
    """

    unit, names, shown = "samples", ("loss", "reward", "words", "ended", "nats"), "reward"

    def __init__(
        self, config: TrainConfig, machine: Machine, captioner: Decoder, rewards: Rewards
    ) -> None:
        self.config, self.machine, self.captioner, self.rewards = (
            config,
            machine,
            captioner,
            rewards,
        )
        k = config.num_samples
        search: dict[str, Any] = (
            {"num_beams": k} if config.samples == "beam" else {"num_beams": 1, "do_sample": True}
        )
        self.policy = Generation(
            num_return_sequences=k, temperature=config.temperature or 1.0, **search
        )
        self.greedy = Generation(num_beams=1)

    def counted(self, batch: Batch) -> int:
        return self.units(batch)

    def units(self, batch: Batch) -> int:
        return len(batch.image_ids) * self.config.num_samples if batch.counted else 0

    def units_an_epoch(self, train: ImageTexts) -> int:
        return len(train) * self.config.num_samples

    def __call__(self, forward: nn.Module, part: Batch, step: int, done: float) -> Sums:
        """Of `part`, on the device; UserError for a reward that is not finite."""
        regions = drop_regions(
            Regions(part.features, part.boxes, part.counts), self.config.region_dropout or 0.0
        )
        with self.machine.autocast():
            memory = self.captioner.encode(regions)
        image_ids = cast(list[int], part.image_ids)  # the task's texts all have an image
        samples = self.draw(memory, image_ids, step)
        rewards = self.rewarded(samples, image_ids, step)
        advantages = rewards - self.baseline(memory, rewards, image_ids, step)
        on_host = samples.cpu()
        with self.machine.autocast():
            loss, log_p = self_critical_loss(forward, memory, on_host, advantages, self.policy)
        words = lengths(on_host, EOS)
        ended = (on_host == EOS).any(2)
        told = (loss.detach(), rewards.sum(), words.sum() - ended.sum(), ended.sum(), -log_p.sum())
        return Sums(loss, torch.stack([figure.to(loss.device, torch.float32) for figure in told]))

    def draw(self, memory: Memory, image_ids: Sequence[int], step: int) -> Tensor:
        """Sample K captions of each image: [B,K,L] int64 on the device, <eos> after their end."""
        with torch.no_grad(), self.machine.autocast():
            if self.config.samples == "beam":
                return beam_search(self.captioner, memory, self.policy).tokens.clone()
            shape = self.config.num_samples, self.policy.limit(self.captioner.config.max_length)
            drawn = [
                np.random.default_rng((self.config.seed, step, i)).random(shape, np.float32)
                for i in image_ids
            ]
            return sample(
                self.captioner, memory, self.policy, uniforms=torch.from_numpy(np.stack(drawn))
            ).tokens

    def baseline(
        self, memory: Memory, rewards: Tensor, image_ids: Sequence[int], step: int
    ) -> Tensor:
        """The baseline of the rewards [B,K]: [B,1] or [B,K]."""
        if self.config.samples == "beam":
            return rewards.mean(1, keepdim=True)
        if self.config.baseline == "greedy":
            with torch.no_grad(), self.machine.autocast(), evaluating(self.captioner):
                greedy = beam_search(self.captioner, memory, self.greedy).tokens.clone()
            return self.rewarded(greedy, image_ids, step)
        return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)

    def rewarded(self, samples: Tensor, image_ids: Sequence[int], step: int) -> Tensor:
        rewards = self.rewards(image_ids, samples)
        if rewards.device.type == "cpu" and not (good := rewards.isfinite().all(1)).all():
            wrong = ", ".join(
                str(i) for i, fine in zip(image_ids, good.tolist(), strict=True) if not fine
            )
            raise UserError(
                f"a reward is not a finite number at step {step}, images {wrong}; the run is "
                "as it was last saved"
            )
        return rewards.to(samples.device)


Objective = CrossEntropy | SelfCritical


def make_objective(
    config: TrainConfig,
    machine: Machine,
    task: Task,
    captioner: Decoder,
    train: ImageTexts,
    vocabulary: Vocabulary,
) -> Objective:
    if not config.scst:
        return CrossEntropy(config, machine, task.unit)
    if not task.self_critical:
        raise UserError(f"--scst: --task {task.name} has no rewards; train it without")
    return SelfCritical(config, machine, captioner, Rewards(config.reward, train, vocabulary))
