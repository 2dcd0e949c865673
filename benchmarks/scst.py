"""A self-critical step of ours against its plain twins: time, memory, and where it goes.

    python -m benchmarks.scst [--images 10] [--samples 5] [--device cuda] [--json FILE]

Preset base (3+3 layers, width 512) over 49x2048 features, 10,000 words, random weights, so that
samples seldom end before their limit of 20 words; references of Flickr8k's lengths with random
words; draw, reward by CIDEr, loss, gradient, AdamW.

twin       as people write it, fp32: each image's features repeated for each sample before the
           encoder, all words read again at every step, the gradient backwards through all those
           steps
twin_kv    in our precision (bf16 where the machine computes in it), images encoded once and
           repeated, keys and values of the words kept, backwards through the steps as well

All take turns in one process, medians of the rounds, ratios medians of the rounds' ratios; memory
is the peak of a step beyond weights and optimiser (on a CPU each in a process of its own, on a GPU
ours alone). Rewards are the same code for all three.
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
REFERENCES = 3000  # photographs whose captions make the document frequencies


class Work(NamedTuple):
    """A captioner with its optimiser, whose state is there, and a step of it."""

    captioner: Transformer
    optimizer: torch.optim.Optimizer
    step: Callable[[], None]


@click.command(context_settings={"show_default": True})
@real_option("folder of Flickr8k's captions")
@click.option("--images", default=10)
@click.option("--samples", default=5)
@click.option("--rounds", default=3)
@click.option("--device", default="auto")
@click.option("--ours-alone", is_flag=True, help="without the twins, as for sizes they cannot take")
@click.option("--json", "out", type=click.Path(path_type=Path), help="write the figures here too")
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
    """Time steps and their parts, and measure their memory."""
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
    figures |= {f"{name}, s a step": statistics.median(each) for name, each in seconds.items()}
    figures["ours, samples/s"] = images * samples / figures["ours, s a step"]
    figures |= {
        f"ratio_{name}": ratio(each, seconds["ours"])
        for name, each in seconds.items()
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
            command = [
                sys.executable,
                "-m",
                "benchmarks.scst",
                "--only-memory",
                name,
                "--device",
                device,
                "--real",
                str(real),
                "--images",
                str(images),
                "--samples",
                str(samples),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures[f"{name}, GB beyond weights and optimiser"] = float(done.stdout.split()[-1])
    report(figures, out)


def make_batch(real: Path, images: int, machine: Machine) -> tuple[Batch, Rewards]:
    """Random regions on the device, and rewards by references with random words."""
    vocabulary = Vocabulary([*SPECIALS, *(f"w{number}" for number in range(len(SPECIALS), WORDS))])
    tokens = flickr8k_tokens(real, max(images, REFERENCES))
    captions = [
        [[vocabulary.words[n] for n in row if n not in (PAD, BOS, EOS)] for row in group]
        for group in tokens.tolist()
    ]
    photographs = [types.SimpleNamespace(id=number, captions=[]) for number in range(len(captions))]
    rewards = Rewards(
        "CIDEr", types.SimpleNamespace(images=photographs, tokens=captions), vocabulary
    )
    return Batch(*random_regions(images), tokens[:images], list(range(images))).to(
        machine.device
    ), rewards


def make_work(name: str, machine: Machine, batch: Batch, rewards: Rewards, samples: int) -> Work:
    captioner = our_captioner(max_length=LIMIT).to(machine.device).train()
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-5, fused=True)
    for weight in captioner.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # makes its state
    optimizer.zero_grad(set_to_none=True)
    ours = critical(captioner, machine, rewards, samples)
    losses = {
        "ours": lambda step: (
            ours(captioner, batch, step, 0.0).loss / (len(batch.image_ids) * samples)
        ),
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


def critical(
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
    """Seconds of encoding and sampling, of the reward, and of the update (teacher-forced pass,
    gradient), each by itself.
    """
    ours, found = critical(captioner, machine, rewards, samples), {}

    def sampling() -> None:
        with machine.autocast():
            found["memory"] = captioner.encode(Regions(batch.features, batch.boxes, batch.counts))
        found["samples"] = ours.draw(found["memory"], batch.image_ids, 0)

    def rewarding() -> None:
        found["rewards"] = rewards(batch.image_ids, found["samples"])

    def whole() -> None:
        ours(captioner, batch, 0, 0.0).loss.backward()

    times = {"sampling": [], "reward": [], "whole": []}
    for _ in range(6):
        for name, work in (("sampling", sampling), ("reward", rewarding), ("whole", whole)):
            times[name].append(seconds_of(work, wait))
    median = {name: statistics.median(each[1:]) for name, each in times.items()}
    update = median["whole"] - median["sampling"] - median["reward"]
    return {
        "sampling, s": median["sampling"],
        "reward, s": median["reward"],
        "update, s": update,
        "reward_of_step": median["reward"] / median["whole"],
    }


# -------------------------------------------------------------------------------------------- twins


def twin_loss(captioner: Transformer, batch: Batch, rewards: Rewards, samples: int) -> Tensor:
    """Everything again for each sample and each word."""
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
        drawn, likely = draw(captioner.logits(captioner.decode_states(words, memory)[:, 0, -1]))
        words = torch.cat([words, drawn[:, None, None]], 2)
        log_p.append(likely)
    return reinforce(words[:, 0, 1:], torch.stack(log_p, 1), batch, rewards, samples)


class Growing(Layout):
    """Keys and values of one caption's words, put behind those before; the gradient goes through
    all.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def spread(self, rows: Tensor) -> Tensor:
        return rows[:, None]

    def gather(self, sequences: Tensor) -> Tensor:
        return sequences[:, 0]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept[layer] is not None:
            keys, values = (
                torch.cat(pair, 2) for pair in zip(self.kept[layer], (keys, values), strict=True)
            )
        self.kept[layer] = keys, values
        return keys, values


def twin_kv_loss(
    captioner: Transformer, machine: Machine, batch: Batch, rewards: Rewards, samples: int
) -> Tensor:
    with machine.autocast():
        memory = captioner.encode(Regions(batch.features, batch.boxes, batch.counts))
        each = torch.arange(memory.images, device=machine.device).repeat_interleave(samples)
        memory, cache = memory.keep(each), Growing(captioner.config.decoder_layers)
        newest, drawn_words, log_p = torch.full_like(each, BOS), [], []
        for place in range(LIMIT):
            states = captioner.states(newest, torch.full_like(newest, place), cache, memory)
            newest, likely = draw(captioner.logits(states).float())
            drawn_words.append(newest)
            log_p.append(likely)
        return reinforce(
            torch.stack(drawn_words, 1), torch.stack(log_p, 1), batch, rewards, samples
        )


def draw(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Words [N] and their log p [N] by logits [N,V]."""
    barred = torch.zeros_like(logits[0], dtype=torch.bool)
    barred[[PAD, BOS, UNK]] = True
    log_p = logits.masked_fill(barred, float("-inf")).log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp(), 1)
    return drawn[:, 0], log_p.gather(1, drawn)[:, 0]


def reinforce(words: Tensor, log_p: Tensor, batch: Batch, rewards: Rewards, samples: int) -> Tensor:
    ended = (words == EOS).cumsum(1)
    there = (ended == 0) | ((ended == 1) & (words == EOS))
    tokens = words.masked_fill(~there, EOS).view(-1, samples, LIMIT)
    reward = rewards(batch.image_ids, tokens)
    advantage = reward - (reward.sum(1, keepdim=True) - reward) / (samples - 1)
    return -(advantage.flatten() * (log_p * there).sum(1)).mean()


if __name__ == "__main__":
    main()
