"""Training objectives: cross-entropy of texts or classes, and self-critical training (--scst).

An objective computes sums over the counted items (words or samples) of a part of a batch. A step
adds the sums of all processes and parts, and divides by the number of counted items. Therefore one
process and several processes give the same gradient.

B: images. K: samples per image. L: maximum number of words. M: number of metrics.
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
    """Sums over the counted items.

    loss: scalar, with a gradient.
    metrics: [M], detached, in the order of the objective's `names`. The first one is the loss.
    """

    loss: Tensor
    metrics: Tensor


def supervised_loss(
    decoder: nn.Module, batch: Batch, label_smoothing: float = 0.0, noise: Noise | None = None
) -> Tensor:
    """The sum of `class_loss` over a batch with labels, else of `caption_loss`, in nats.

    `Batch.scored` is the number of items that it sums over.
    """
    regions, prompts = Regions(batch.features, batch.boxes, batch.counts), batch.prompt_lengths
    noise = noise or Noise()
    if batch.labels is not None:
        smoothing = label_smoothing if batch.exclusive else None
        return class_loss(
            decoder, regions, batch.tokens, batch.labels, PAD, noise, prompts, smoothing
        )[0]
    return caption_loss(decoder, regions, batch.tokens, PAD, label_smoothing, noise, prompts)[0]


class CrossEntropy:
    """Cross-entropy, with teacher forcing, in nats per word of the references. For batches with
    labels: binary cross-entropy summed over classes, in nats per text.

    Attributes of every objective:

    names: names of the metrics.
    shown: name of the metric that the progress bar and the validation line show.
    unit: name of the texts or samples, in the plural.
    """

    names, shown = ("loss",), "loss"

    def __init__(self, config: TrainConfig, machine: Machine, unit: str) -> None:
        self.config, self.machine, self.unit = config, machine, unit

    def counted(self, batch: Batch) -> int:
        """Number of items of a batch over which the loss is averaged."""
        return batch.scored

    def units(self, batch: Batch) -> int:
        """Number of texts or samples of a batch."""
        return batch.texts

    def units_per_epoch(self, train: ImageTexts) -> int:
        return train.texts

    def __call__(self, forward: nn.Module, part: Batch, step: int, progress: float) -> Sums:
        """Compute the sums over a part of a batch.

        forward: the decoder, or a wrapper of it such as DistributedDataParallel.
        part: a part of a batch, on the device.
        progress: progress of the training, 0 to 1.
        """
        config = self.config
        noise = Noise(
            regions=config.region_dropout or 0.0,
            words=config.word_dropout,
            sampled=config.scheduled_sampling * progress,
            unknown=UNK,
        )
        with self.machine.autocast():
            loss = supervised_loss(forward, part, config.label_smoothing, noise)
        return Sums(loss, loss.detach()[None])


class SelfCritical:
    """Self-critical sequence training (Rennie et al. 2017).

    A step samples K captions of each image. The gradient raises the log-probability of each sample
    in proportion to its advantage: its reward minus a baseline. The baseline is the mean reward of
    the other samples of the image (Luo 2020) or the reward of the greedy caption. With --samples
    beam, the samples are the K captions of a beam search, and the baseline is their mean reward
    (Cornia et al. 2020).

    A step encodes each image once, with a gradient. Sampling reads the encoding without a gradient.
    One pass with teacher forcing then computes the log-probabilities of the samples. Dropout,
    including region dropout, is active in both passes. Random samples depend only on (seed, step,
    image id), so one process and several processes draw the same samples.

    Samples are drawn from the captioner's distribution at `temperature`, and the same distribution
    is trained. Below 1, samples are similar to decoded captions, and training learns which of them
    is best. At 1, training first learns that likely captions are better than unlikely ones, which
    decoding already uses. docs/log.md has measurements.

    The metrics are means per sample: the loss, the reward, the number of words, the share of
    samples that end with <eos>, and the negative log-probability in nats.
    """

    unit, names, shown = "samples", ("loss", "reward", "words", "ended", "nats"), "reward"

    def __init__(
        self, config: TrainConfig, machine: Machine, captioner: Decoder, rewards: Rewards
    ) -> None:
        self.config, self.machine = config, machine
        self.captioner, self.rewards = captioner, rewards
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

    def units_per_epoch(self, train: ImageTexts) -> int:
        return len(train) * self.config.num_samples

    def __call__(self, forward: nn.Module, part: Batch, step: int, progress: float) -> Sums:
        """Compute the sums over a part of a batch, on the device. Raises UserError if a reward is
        not finite.
        """
        regions = drop_regions(
            Regions(part.features, part.boxes, part.counts), self.config.region_dropout or 0.0
        )
        with self.machine.autocast():
            memory = self.captioner.encode(regions)
        image_ids = cast(list[int], part.image_ids)  # with --scst every text has an image
        samples = self.draw_samples(memory, image_ids, step)
        rewards = self.compute_rewards(samples, image_ids, step)
        advantages = rewards - self.baseline(memory, rewards, image_ids, step)
        cpu_samples = samples.cpu()
        with self.machine.autocast():
            loss, log_p = self_critical_loss(forward, memory, cpu_samples, advantages, self.policy)
        tokens = lengths(cpu_samples, EOS).sum()
        ended = (cpu_samples == EOS).any(2).sum()
        # in the order of `names`
        metrics = (loss.detach(), rewards.sum(), tokens - ended, ended, -log_p.sum())
        return Sums(loss, torch.stack([value.to(loss.device, torch.float32) for value in metrics]))

    def draw_samples(self, memory: Memory, image_ids: Sequence[int], step: int) -> Tensor:
        """Sample K captions of each image: [B,K,L] int64 on the device, padded with <eos>."""
        with torch.no_grad(), self.machine.autocast():
            if self.config.samples == "beam":
                return beam_search(self.captioner, memory, self.policy).tokens.clone()
            shape = self.config.num_samples, self.policy.limit(self.captioner.config.max_length)
            uniforms = [
                np.random.default_rng((self.config.seed, step, image_id)).random(shape, np.float32)
                for image_id in image_ids
            ]
            return sample(
                self.captioner, memory, self.policy, uniforms=torch.from_numpy(np.stack(uniforms))
            ).tokens

    def baseline(
        self, memory: Memory, rewards: Tensor, image_ids: Sequence[int], step: int
    ) -> Tensor:
        """Compute the baseline of `rewards` [B,K]: [B,1] or [B,K]."""
        if self.config.samples == "beam":
            return rewards.mean(1, keepdim=True)
        if self.config.baseline == "greedy":
            with torch.no_grad(), self.machine.autocast(), evaluating(self.captioner):
                greedy = beam_search(self.captioner, memory, self.greedy).tokens.clone()
            return self.compute_rewards(greedy, image_ids, step)
        return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)

    def compute_rewards(self, samples: Tensor, image_ids: Sequence[int], step: int) -> Tensor:
        """Compute the rewards of `samples` [B,K,L]: [B,K] float32 on the device of the samples.

        Raises UserError if a reward is not finite.
        """
        rewards = self.rewards(image_ids, samples)
        # checked on the CPU only, because a GPU would have to wait
        if rewards.device.type == "cpu" and not rewards.isfinite().all():
            wrong_ids = np.array(image_ids)[~rewards.isfinite().all(1).numpy()]
            raise UserError(
                f"a reward is not a finite number at step {step}, images "
                f"{', '.join(map(str, wrong_ids))}; the last save of the run is unchanged"
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
    """Create the objective that `config` selects. Raises UserError if the task does not support
    --scst.
    """
    if not config.scst:
        return CrossEntropy(config, machine, task.unit)
    if not task.self_critical:
        raise UserError(f"--scst: --task {task.name} has no rewards; train it without --scst")
    return SelfCritical(config, machine, captioner, Rewards(config.reward, train, vocabulary))
