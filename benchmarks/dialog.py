"""Visual dialog: the speed of ranking 100 answer options of each of ten rounds.

    python -m benchmarks.dialog [--rounds 3] [--dialogs 2] [--device cuda] [--out FILE]

The decoder has preset base (3+3 layers, width 512), 49 regions of 2048 channels and random weights.
A caption has 10 words, a question 6, an answer 3, and an option 1 to 8 words, 3 on average.

ours          `candidate_log_p`: an image is encoded once for its ten rounds, a prompt is read once
              for its 100 options, and all options continue it in one pass
twin          each option alone: a text of its own with the whole prompt and its own encoding of the
              image. The 100 texts of a round are padded to the longest and computed together
twin_encoded  as twin, but the image is encoded once for the 100 options of a round

All take turns in one process, in the machine's precision. Rates are medians; ratios are medians of
the ratios of the rounds. Memory is the peak above the weights (on a CPU each in its own process).
The log-probabilities of all are compared first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    header,
    in_turn,
    memory_alone,
    peak_of,
    ratio,
    report,
    waiter,
    why_fp32,
)
from benchmarks.peers import CHANNELS, WORDS, median_rate, random_regions
from data.vocabulary import BOS, EOS, PAD, SPECIALS
from models.decoders.attention import Packed
from models.decoders.interface import Decoder, Memory
from models.decoders.registry import create_decoder
from models.decoders.transformer import TransformerConfig
from models.generation.ranking import candidate_log_p
from models.regions import Regions
from pipeline.runtime import Machine, open_machine

ROUNDS, OPTIONS, LONGEST = 10, 100, 8
CAPTION, QUESTION, ANSWER = 10, 6, 3  # words
MARKS = 2  # the marks of a question and of an answer
CONTENDERS = ("ours", "twin", "twin_encoded")


class Dialogs(NamedTuple):
    """Images with ten rounds each.

    prompts: [B*10,P] int64, padded on the left. options: [B*10,100,LONGEST] int64.
    """

    regions: Regions
    prompts: Tensor
    options: Tensor


@click.command(context_settings={"show_default": True})
@click.option("--rounds", default=3, help="timed rounds")
@click.option("--dialogs", default=2, help="dialogues that are ranked in a timed round")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option("--out", type=click.Path(path_type=Path), help="also write the figures here, as JSON")
@click.option("--only-memory", hidden=True)
def main(rounds: int, dialogs: int, device: str, out: Path | None, only_memory: str | None) -> None:
    """Time the ranking of dialogue options, and measure its memory."""
    machine = open_machine(device)
    if only_memory:
        click.echo(memory_of(only_memory, machine, dialogs))
        return
    works = {name: make_ranking(name, machine, dialogs) for name in CONTENDERS}
    log_p = {name: work() for name, work in works.items()}
    differences = [float((log_p["ours"] - other).abs().max()) for other in log_p.values()]
    seconds = in_turn(works, rounds, waiter(machine.device))
    figures = header() | {
        "machine": str(machine),
        "torch": torch.__version__,
        "dialogues": dialogs,
        **why_fp32(machine),
        "largest difference of log p": max(differences),
    }
    for name in CONTENDERS:
        figures[f"{name}, rounds/s"] = median_rate(dialogs * ROUNDS, seconds[name])
        figures[f"{name}, peak GB"] = memory(name, machine, dialogs)
    figures |= {f"ratio_{name}": ratio(seconds[name], seconds["ours"]) for name in CONTENDERS[1:]}
    report(figures, out)


def make_dialogs(count: int) -> Dialogs:
    """Return dialogues of random words about images with random regions."""
    generator = torch.Generator().manual_seed(0)
    lengths = CAPTION + QUESTION + MARKS + torch.arange(ROUNDS) * (QUESTION + ANSWER + MARKS)
    longest = int(lengths.max())
    words = torch.randint(len(SPECIALS), WORDS, (count, ROUNDS, longest), generator=generator)
    is_padding = torch.arange(longest) < longest - lengths[:, None]
    shape = (count * ROUNDS, OPTIONS, LONGEST)
    options = torch.randint(len(SPECIALS), WORDS, shape, generator=generator)
    # 1 to 8 words, 3 on average
    option_lengths = 1 + torch.empty(shape[:2]).geometric_(0.4, generator=generator).long() - 1
    option_lengths = option_lengths.add(torch.rand(shape[:2], generator=generator) > 0.5)
    is_word = torch.arange(LONGEST) < option_lengths.clamp(1, LONGEST)[:, :, None]
    return Dialogs(
        random_regions(count, 49),
        words.masked_fill(is_padding, PAD).flatten(0, 1),
        options.masked_fill(~is_word, PAD),
    )


def make_ranking(name: str, machine: Machine, count: int) -> Callable[[], Tensor]:
    """Return a function that computes log p [rounds,options] as `name` does."""
    torch.manual_seed(0)
    dialogs = make_dialogs(count)
    config = TransformerConfig(
        WORDS, CHANNELS, max_prompt=dialogs.prompts.shape[1], max_length=LONGEST
    )
    decoder = create_decoder("transformer", config).to(machine.device).eval()
    regions = Regions(*(part.to(machine.device) for part in dialogs.regions))
    prompts, options = dialogs.prompts.to(machine.device), dialogs.options.to(machine.device)
    image = torch.arange(count, device=machine.device).repeat_interleave(ROUNDS)

    def rank() -> Tensor:
        with torch.inference_mode(), machine.autocast():
            if name == "ours":
                memory = decoder.encode(regions).keep(image)
                return candidate_log_p(decoder, memory, prompts, options)
            rows = []
            for number in range(len(prompts)):
                copies = OPTIONS if name == "twin" else 1
                own = Regions(*(part[image[number : number + 1]] for part in regions))
                memory = decoder.encode(
                    Regions(*(part.repeat_interleave(copies, 0) for part in own))
                )
                rows.append(plain_log_p(decoder, memory, prompts[number], options[number]))
            return torch.stack(rows)

    return rank


def plain_log_p(decoder: Decoder, memory: Memory, prompt: Tensor, options: Tensor) -> Tensor:
    """Return log p [options] of options [options,T], each a padded text with the whole prompt.

    memory: of one image, or of one copy of it per option.
    """
    prompt = prompt[prompt != PAD]
    begin = torch.cat([prompt, prompt.new_tensor([BOS])]).expand(len(options), -1)
    texts = torch.cat([begin, F.pad(options, (0, 1))], dim=1)
    lengths = (options != PAD).sum(1) + begin.shape[1]
    texts.scatter_(1, lengths[:, None], EOS)
    if memory.images == 1:
        memory = memory.keep(torch.zeros(len(options), dtype=torch.int64, device=texts.device))
    prompt_lengths = torch.full((len(options), 1), len(prompt), device=texts.device)
    text = Packed(texts[:, None, :-1], None, prompt_lengths)
    states = decoder.states(text.words, text.positions, text, memory)[: text.count]
    states = states.view(*texts[:, 1:].shape, -1)[:, len(prompt) :]
    targets = texts[:, 1 + len(prompt) :]
    log_p = decoder.logits(states).log_softmax(2, dtype=torch.float32)
    return (log_p.gather(2, targets[:, :, None])[:, :, 0] * (targets != PAD)).sum(1)


def memory(name: str, machine: Machine, count: int) -> float:
    """Return `memory_of`, on a CPU from a process of its own."""
    options = ("--only-memory", name, "--dialogs", count)
    return memory_alone(
        lambda: memory_of(name, machine, count), machine, "benchmarks.dialog", *options
    )


def memory_of(name: str, machine: Machine, count: int) -> float:
    """Return the peak memory in GB of a ranking above the weights."""
    return peak_of(make_ranking(name, machine, count), machine)


if __name__ == "__main__":
    main()
