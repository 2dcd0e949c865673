"""Time and memory of a self-critical training step, compared with two plain twins.

    python -m benchmarks.scst [--images 10] [--samples 5] [--device cuda] [--json FILE]

The decoder has preset base (3+3 layers, width 512), features of 49x2048, 10,000 words and random
weights, so that most samples reach the limit of 20 words. The references have random words and the
lengths of Flickr8k's captions. A step samples captions, computes CIDEr rewards, the loss and the
gradient, and updates the weights with AdamW.

twin       the usual simple implementation, in fp32: the features of an image are repeated for each
           sample before the encoder, each step computes all previous words again, and the gradient
           goes through all these steps
twin_kv    in our precision (bf16 if the hardware supports it): images are encoded once and
           repeated, keys and values are cached, and the gradient also goes through all steps

All take turns in one process. Times are medians of the rounds; ratios are medians of the ratios of
the rounds. Memory is the peak of a step above weights and optimizer state (on a CPU each in its own
process, on a GPU only ours). All three use the same reward code.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from benchmarks.measure import (
    header,
    in_turn,
    peak_above,
    ratio,
    real_option,
    report,
    seconds_of,
    waiter,
    why_fp32,
)
from benchmarks.peers import WORDS, flickr8k_tokens, our_captioner, random_regions
from data.batches import Batch
from data.vocabulary import BOS, EOS, PAD, SPECIALS, UNK, Vocabulary
from models.decoders.attention import Layout
from models.decoders.transformer import Transformer
from models.regions import Regions
from pipeline.runtime import Machine, open_machine
from pipeline.training.config import TrainConfig
from pipeline.training.objectives import SelfCritical
from pipeline.training.rewards import Rewards

LIMIT = 20
REFERENCES = 3000  # images with captions for the document frequencies


class Work(NamedTuple):
    """A captioner, its optimizer with initialized state, and a function for one step."""

    captioner: Transformer
    optimizer: torch.optim.Optimizer
    step: Callable[[], None]


@click.command(context_settings={"show_default": True})
@real_option("folder of Flickr8k's captions")
@click.option("--images", default=10, help="images per step")
@click.option("--samples", default=5, help="samples per image")
@click.option("--rounds", default=3, help="timed rounds")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option(
    "--ours-alone", is_flag=True, help="without the twins, for sizes that exceed their memory"
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="also write the figures here")
@click.option("--only-memory", hidden=True)
def main(
    real: Path,
    images: int,
    samples: int,
    rounds: int,
    device: str,
    ours_alone: bool,
    out: Path | None,
    only_memory: str | None,
) -> None:
    """Measure time and memory of steps, and the time of their parts."""
    machine = open_machine(device)
    batch, rewards = make_batch(real, images, machine)
    if only_memory:
        click.echo(peak_above(make_work(only_memory, machine, batch, rewards, samples).step))
        return
    names = ("ours",) if ours_alone else ("ours", "twin", "twin_kv")
    works = {name: make_work(name, machine, batch, rewards, samples) for name in names}
    wait = waiter(machine.device)
    seconds = in_turn({name: work.step for name, work in works.items()}, rounds, wait)
    figures = header() | {
        "machine": str(machine),
        "torch": torch.__version__,
        "images": images,
        "samples": samples,
    }
    figures |= why_fp32(machine)
    figures |= {
        f"{name}, s a step": statistics.median(durations) for name, durations in seconds.items()
    }
    figures["ours, samples/s"] = images * samples / figures["ours, s a step"]
    figures |= {
        f"ratio_{name}": ratio(durations, seconds["ours"])
        for name, durations in seconds.items()
        if name != "ours"
    }
    figures |= parts_of_a_step(works["ours"].captioner, machine, batch, rewards, samples, wait)
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        works["ours"].step()
        figures["ours, GB beyond weights and optimiser"] = (
            torch.cuda.max_memory_allocated() - before
        ) / 1e9
    elif sys.platform == "linux":
        for name in names:
            command = [sys.executable, "-m", "benchmarks.scst", "--only-memory", name]
            command += ["--device", device, "--real", str(real)]
            command += ["--images", str(images), "--samples", str(samples)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            figures[f"{name}, GB beyond weights and optimiser"] = float(result.stdout.split()[-1])
    report(figures, out)


def make_batch(real: Path, images: int, machine: Machine) -> tuple[Batch, Rewards]:
    """Return random regions on the device, and rewards for references with random words."""
    vocabulary = Vocabulary([*SPECIALS, *(f"w{number}" for number in range(len(SPECIALS), WORDS))])
    tokens = flickr8k_tokens(real, max(images, REFERENCES))
    captions = [
        [[vocabulary.words[n] for n in row if n not in (PAD, BOS, EOS)] for row in group]
        for group in tokens.tolist()
    ]
    photographs = [types.SimpleNamespace(id=number, captions=[]) for number in range(len(captions))]
    texts = types.SimpleNamespace(images=photographs, tokens=captions)
    batch = Batch(*random_regions(images), tokens[:images], list(range(images)))
    return batch.to(machine.device), Rewards("CIDEr", texts, vocabulary)


def make_work(name: str, machine: Machine, batch: Batch, rewards: Rewards, samples: int) -> Work:
    """Return the step of `name`: ours, twin or twin_kv."""
    captioner = our_captioner(max_length=LIMIT).to(machine.device).train()
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-5, fused=True)
    for weight in captioner.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # initializes the state
    optimizer.zero_grad(set_to_none=True)
    objective = make_objective(captioner, machine, rewards, samples)
    count = len(batch.image_ids) * samples
    losses = {
        "ours": lambda step: objective(captioner, batch, step, 0.0).loss / count,
        "twin": lambda _: twin_loss(captioner, batch, rewards, samples),
        "twin_kv": lambda _: twin_kv_loss(captioner, machine, batch, rewards, samples),
    }
    steps = 0

    def step() -> None:
        nonlocal steps
        optimizer.zero_grad(set_to_none=True)
        losses[name](steps).backward()
        optimizer.step()
        steps += 1

    return Work(captioner, optimizer, step)


def make_objective(
    captioner: Transformer, machine: Machine, rewards: Rewards, samples: int
) -> SelfCritical:
    return SelfCritical(
        TrainConfig(scst=True, init=Path(), num_samples=samples), machine, captioner, rewards
    )


def parts_of_a_step(
    captioner: Transformer,
    machine: Machine,
    batch: Batch,
    rewards: Rewards,
    samples: int,
    wait: Callable[[], None],
) -> dict[str, float]:
    """Return the seconds of encoding and sampling, of the reward, and of the update.

    The update is the teacher-forced forward pass and the gradient.
    """
    objective, results = make_objective(captioner, machine, rewards, samples), {}

    def sampling() -> None:
        with machine.autocast():
            results["memory"] = captioner.encode(Regions(batch.features, batch.boxes, batch.counts))
        results["samples"] = objective.draw_samples(results["memory"], batch.image_ids, 0)

    def rewarding() -> None:
        results["rewards"] = rewards(batch.image_ids, results["samples"])

    def whole() -> None:
        objective(captioner, batch, 0, 0.0).loss.backward()

    times = {"sampling": [], "reward": [], "whole": []}
    for _ in range(6):
        for name, work in (("sampling", sampling), ("reward", rewarding), ("whole", whole)):
            times[name].append(seconds_of(work, wait))
    median = {name: statistics.median(durations[1:]) for name, durations in times.items()}
    update = median["whole"] - median["sampling"] - median["reward"]
    return {
        "sampling, s": median["sampling"],
        "reward, s": median["reward"],
        "update, s": update,
        "reward_of_step": median["reward"] / median["whole"],
    }


# -------------------------------------------------------------------------------------------- twins


def twin_loss(captioner: Transformer, batch: Batch, rewards: Rewards, samples: int) -> Tensor:
    """Return the loss of `twin`: it computes everything again for each sample and each word."""
    regions = Regions(
        *(
            part.repeat_interleave(samples, 0)
            for part in (batch.features, batch.boxes, batch.counts)
        )
    )
    memory = captioner.encode(regions)
    words = torch.full((len(regions.features), 1, 1), BOS, device=regions.features.device)
    log_p = []
    for _ in range(LIMIT):
        new_words, log_p_word = draw(
            captioner.logits(captioner.decode_states(words, memory)[:, 0, -1])
        )
        words = torch.cat([words, new_words[:, None, None]], 2)
        log_p.append(log_p_word)
    return reinforce(words[:, 0, 1:], torch.stack(log_p, 1), batch, rewards, samples)


class Growing(Layout):
    """A cache that concatenates the keys and values of the words; gradients flow through it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.keys_values: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def pad(self, rows: Tensor) -> Tensor:
        return rows[:, None]

    def unpad(self, sequences: Tensor) -> Tensor:
        return sequences[:, 0]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys_values[layer] is not None:
            keys, values = (
                torch.cat(pair, 2)
                for pair in zip(self.keys_values[layer], (keys, values), strict=True)
            )
        self.keys_values[layer] = keys, values
        return keys, values


def twin_kv_loss(
    captioner: Transformer, machine: Machine, batch: Batch, rewards: Rewards, samples: int
) -> Tensor:
    """Return the loss of `twin_kv`: it encodes images once and caches keys and values."""
    with machine.autocast():
        memory = captioner.encode(Regions(batch.features, batch.boxes, batch.counts))
        image_of_row = torch.arange(memory.images, device=machine.device).repeat_interleave(samples)
        memory, cache = memory.keep(image_of_row), Growing(captioner.config.decoder_layers)
        words, drawn_words, log_p = torch.full_like(image_of_row, BOS), [], []
        for position in range(LIMIT):
            states = captioner.states(words, torch.full_like(words, position), cache, memory)
            words, log_p_word = draw(captioner.logits(states).float())
            drawn_words.append(words)
            log_p.append(log_p_word)
        return reinforce(
            torch.stack(drawn_words, 1), torch.stack(log_p, 1), batch, rewards, samples
        )


def draw(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sample words [N] from logits [N,V]; return them and their log-probabilities [N]."""
    is_banned = torch.zeros_like(logits[0], dtype=torch.bool)
    is_banned[[PAD, BOS, UNK]] = True
    log_p = logits.masked_fill(is_banned, float("-inf")).log_softmax(-1)
    samples = torch.multinomial(log_p.detach().exp(), 1)
    return samples[:, 0], log_p.gather(1, samples)[:, 0]


def reinforce(words: Tensor, log_p: Tensor, batch: Batch, rewards: Rewards, samples: int) -> Tensor:
    """Return the REINFORCE loss. The baseline is the mean reward of the image's other samples."""
    eos_count = (words == EOS).cumsum(1)
    is_sampled = (eos_count == 0) | ((eos_count == 1) & (words == EOS))
    tokens = words.masked_fill(~is_sampled, EOS).view(-1, samples, LIMIT)
    reward = rewards(batch.image_ids, tokens)
    advantage = reward - (reward.sum(1, keepdim=True) - reward) / (samples - 1)
    return -(advantage.flatten() * (log_p * is_sampled).sum(1)).mean()


if __name__ == "__main__":
    main()
