"""A training step, compared with a plain twin, Hugging Face's GPT-2 and the hardware's limit.

    python -m benchmarks.train [--json FILE]

A step computes the loss and the gradient of 50 images with five captions each, and updates the
weights with AdamW. Features are 49x2048. Captions have the lengths of Flickr8k's captions and
random words of a vocabulary of 10,000. Ours and the twin encode the images. Hugging Face's model
has no encoder; its input is encoded regions, repeated for each caption. All take turns in one
process. Rates are medians; ratios are medians of the ratios of the rounds. `of_limit` is the
achieved share of the operations per second of the fastest matrix product. Only necessary operations
count, without padding and repeated images. Ours and the twin run in bf16 if the hardware supports
it. Otherwise all run in fp32 with 10 images, and the report says so.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import click
import torch

from benchmarks.measure import (
    header,
    in_turn,
    peak_of,
    precisions,
    ratio,
    real_option,
    report,
    waiter,
    why_fp32,
)
from benchmarks.peers import (
    WORDS,
    decoder_operations,
    encoder_operations,
    flickr8k_tokens,
    hugging_face,
    hugging_face_loss,
    limit,
    median_rate,
    our_captioner,
    plain_loss,
    random_regions,
    training_step,
)
from data.vocabulary import PAD
from models.losses import caption_loss
from models.regions import Regions
from pipeline.runtime import Machine, open_machine


@click.command(context_settings={"show_default": True})
@real_option("folder of Flickr8k's captions")
@click.option(
    "--images", type=int, help="images per step, with five captions each  [50; 10 in fp32]"
)
@click.option("--rounds", type=int, help="timed rounds  [7; 3 in fp32]")
@click.option("--dropout", "dropouts", multiple=True, default=(0.0, 0.1), help="may be repeated")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option("--compile", "compiled", is_flag=True, help="compile ours with torch.compile")
@click.option("--ours-alone", is_flag=True, help="without the twin and Hugging Face's model")
@click.option("--json", "out", type=click.Path(path_type=Path), help="also write the figures here")
def main(
    real: Path,
    images: int | None,
    rounds: int | None,
    dropouts: tuple[float, ...],
    device: str,
    compiled: bool,
    ours_alone: bool,
    out: Path | None,
) -> None:
    """Time training steps with each dropout everywhere."""
    machine = open_machine(device)
    is_bf16 = machine.precision == "bf16"
    images = images or (50 if is_bf16 else 10)
    rounds = rounds or (7 if is_bf16 else 3)
    tokens = flickr8k_tokens(real, images)
    figures = header() | {
        "machine": str(machine),
        "torch": torch.__version__,
        "images": images,
        "mean words": ((tokens != PAD).sum() / tokens[:, :, 0].numel() - 2).item(),
        "longest": tokens.shape[2] - 2,
        **why_fp32(machine),
    }
    for dropout in dropouts:
        measured = measure(tokens, dropout, rounds, machine, compiled, ours_alone)
        figures |= {
            f"{name}{f' (dropout {dropout:g})' if dropout else ''}": value
            for name, value in measured.items()
        }
    report(figures, out)


def measure(
    tokens: torch.Tensor,
    dropout: float,
    rounds: int,
    machine: Machine,
    compiled: bool,
    ours_alone: bool = False,
) -> dict[str, object]:
    """Return the captions per second of each implementation, the ratios, and on a GPU the peak
    memory of a step above weights, optimizer state and gradients.
    """
    device = machine.device
    images, captions = tokens.shape[0], tokens[:, :, 0].numel()
    regions_on_cpu = random_regions(images)
    regions = Regions(*(part.to(device) for part in regions_on_cpu))
    encoded, on_device = torch.randn(images, 49, 512, device=device), tokens.to(device)
    captioner, twin = (our_captioner(dropout).to(device) for _ in range(2))
    peers = {}
    if not ours_alone:
        peers = {precision: hugging_face(dropout).to(device) for precision in precisions(machine)}
    ours = torch.compile(captioner, dynamic=True) if compiled else captioner

    def our_loss() -> torch.Tensor:
        loss, words = caption_loss(ours, regions, tokens, PAD)
        return loss / words

    works = {"ours": training_step(captioner, our_loss, machine)}
    if not ours_alone:
        twin_loss = functools.partial(plain_loss, twin, regions, on_device)
        works["twin"] = training_step(twin, twin_loss, machine)
    for precision, peer in peers.items():
        their_loss = functools.partial(hugging_face_loss, peer, encoded, on_device)
        works[f"hf_{precision}"] = training_step(
            peer, their_loss, replace(machine, precision=precision)
        )
    seconds = in_turn(works, rounds, waiter(device))
    # the decoder computes a row for each token except the last token of each caption
    words = (tokens != PAD).sum().item() - captions
    operations = 3 * (
        images * encoder_operations(captioner.config)
        + words * decoder_operations(captioner.config, words / captions / 2)
    )
    max_rate = limit([(3000, 512, 2048), (3000, 512, WORDS), (4096, 4096, 4096)], machine)
    figures: dict[str, object] = {
        f"{name}, captions/s": median_rate(captions, durations)
        for name, durations in seconds.items()
    }
    figures |= {
        f"ratio_{name}": ratio(durations, seconds["ours"])
        for name, durations in seconds.items()
        if name != "ours"
    }
    rate = median_rate(1, seconds["ours"]) * operations
    if device.type == "cuda":
        figures["ours, peak GB"] = peak_of(works["ours"], machine)
    return figures | {
        "operations a step, GFLOP": operations / 1e9,
        "operations a second, GFLOP/s": rate / 1e9,
        "limit, GFLOP/s": max_rate / 1e9,
        "of_limit": rate / max_rate,
    }


if __name__ == "__main__":
    main()
