"""A training step of our decoder against its plain twin, Hugging Face's GPT-2 and the limit of the
machine's products.

    python -m benchmarks.train [--json FILE]

50 images of 49x2048 features with five captions of Flickr8k's lengths each, random words of 10,000;
loss, gradient and AdamW. Ours and the twin encode the images; Hugging Face is given encoded
regions, repeated for each caption, and has no encoder. All take turns in one process; figures are
medians, ratios medians of the rounds' ratios. `of_limit` is the share of the best product's
operations a second that went into operations that training needs: padding and repeated images do
not count. Ours and the twin run in bf16 where the machine computes in it; else all is in fp32, with
10 images, and the report says so.
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
    "--images", type=int, help="images a step, five captions each  [50; 10 where all is in fp32]"
)
@click.option("--rounds", type=int, help="[7; 3 where all is in fp32]")
@click.option("--device", default="auto")
@click.option("--compile", "compiled", is_flag=True, help="ours by torch.compile")
@click.option("--json", "out", type=click.Path(path_type=Path), help="write the figures here too")
def main(
    real: Path,
    images: int | None,
    rounds: int | None,
    device: str,
    compiled: bool,
    out: Path | None,
) -> None:
    """Time training steps with dropout 0, then with dropout 0.1 everywhere."""
    machine = open_machine(device)
    images, rounds = (
        images or (50 if machine.precision == "bf16" else 10),
        rounds or (7 if machine.precision == "bf16" else 3),
    )
    tokens = flickr8k_tokens(real, images)
    figures = header() | {
        "machine": str(machine),
        "torch": torch.__version__,
        "images": images,
        "mean words": ((tokens != PAD).sum() / tokens[:, :, 0].numel() - 2).item(),
        "longest": tokens.shape[2] - 2,
        **why_fp32(machine),
    }
    for dropout in (0.0, 0.1):
        found = measure(tokens, dropout, rounds, machine, compiled)
        figures |= {
            f"{name}{' (dropout 0.1)' if dropout else ''}": value for name, value in found.items()
        }
    report(figures, out)


def measure(
    tokens: torch.Tensor, dropout: float, rounds: int, machine: Machine, compiled: bool
) -> dict[str, object]:
    device = machine.device
    images, captions = tokens.shape[0], tokens[:, :, 0].numel()
    there = random_regions(images)
    regions = Regions(*(part.to(device) for part in there))
    encoded, on_device = torch.randn(images, 49, 512, device=device), tokens.to(device)
    captioner, twin = (our_captioner(dropout).to(device) for _ in range(2))
    peers = {precision: hugging_face(dropout).to(device) for precision in precisions(machine)}
    ours = torch.compile(captioner, dynamic=True) if compiled else captioner

    def our_loss() -> torch.Tensor:
        loss, words = caption_loss(ours, regions, tokens, PAD)
        return loss / words

    works = {
        "ours": training_step(captioner, our_loss, machine),
        "twin": training_step(twin, lambda: plain_loss(twin, regions, on_device), machine),
    }
    for precision, peer in peers.items():
        their_loss = functools.partial(hugging_face_loss, peer, encoded, on_device)
        works[f"hf_{precision}"] = training_step(
            peer, their_loss, replace(machine, precision=precision)
        )
    seconds = in_turn(works, rounds, waiter(device))
    # rows of the decoder: all but each caption's last token
    words = (tokens != PAD).sum().item() - captions
    operations = 3 * (
        images * encoder_operations(captioner.config)
        + words * decoder_operations(captioner.config, words / captions / 2)
    )
    best = limit([(3000, 512, 2048), (3000, 512, WORDS), (4096, 4096, 4096)], machine)
    figures: dict[str, object] = {
        f"{name}, captions/s": median_rate(captions, found) for name, found in seconds.items()
    }
    figures |= {
        f"ratio_{name}": ratio(found, seconds["ours"])
        for name, found in seconds.items()
        if name != "ours"
    }
    rate = median_rate(1, seconds["ours"]) * operations
    return figures | {
        "operations a step, GFLOP": operations / 1e9,
        "operations a second, GFLOP/s": rate / 1e9,
        "limit, GFLOP/s": best / 1e9,
        "of_limit": rate / best,
    }


if __name__ == "__main__":
    main()
