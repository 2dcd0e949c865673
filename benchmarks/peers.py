"""Baselines of the decoder benchmarks: a plain twin, Hugging Face's GPT-2, the hardware's limit.

The plain twin has our weights and the usual simple implementation. Each caption is one row, padded
to the longest caption, with its own copy of the image's encoded regions. The loss is
F.cross_entropy. The beam search computes all words again at every step. GPT-2 has cross-attention.
The limit is the speed of matrix products alone.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import seconds_of, waiter
from data.tokens import tokenize_all
from data.vocabulary import BOS, EOS, PAD
from models.decoders.interface import Memory
from models.decoders.transformer import Transformer, TransformerConfig
from models.regions import Regions, grid_boxes
from pipeline.runtime import Machine

REGIONS, CHANNELS, WORDS = 49, 2048, 10_000
LENGTH_MEAN, LENGTH_SD = 10.8, 3.75  # words of a caption in Flickr8k's training split


def flickr8k_tokens(real: Path, images: int, seed: int = 0) -> Tensor:
    """Return tokens [images,5,T] int64: random words with the lengths of Flickr8k's captions.

    The lengths are those of `images` random train photographs. Without Flickr8k in `real`, they are
    drawn from a normal distribution with LENGTH_MEAN and LENGTH_SD.
    """
    path, rng = real / "flickr8k" / "captions_train.json", random.Random(seed)
    if path.exists():
        groups: dict[int, list[str]] = {}
        for annotation in json.loads(path.read_text())["annotations"]:
            groups.setdefault(annotation["image_id"], []).append(annotation["caption"])
        selected = [
            caption for group in rng.sample(list(groups.values()), images) for caption in group[:5]
        ]
        lengths = [len(words) for words in tokenize_all(selected)]
    else:
        lengths = [max(1, round(rng.gauss(LENGTH_MEAN, LENGTH_SD))) for _ in range(images * 5)]
    tokens = torch.full((images * 5, max(lengths) + 2), PAD)
    generator = torch.Generator().manual_seed(seed)
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length + 1] = BOS, EOS
        row[1 : length + 1] = torch.randint(4, WORDS, (length,), generator=generator)
    return tokens.view(images, 5, -1)


def random_regions(images: int, regions: int = REGIONS) -> Regions:
    """Return random features [images,regions,2048] with the boxes of a square grid."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, regions, CHANNELS, generator=generator).half()
    side = math.isqrt(regions)
    return Regions(
        features, grid_boxes(side, side).expand(images, -1, -1), torch.full((images,), regions)
    )


def our_captioner(dropout: float = 0.0, max_length: int = 40) -> Transformer:
    """Return a decoder of preset base (3+3 layers, width 512) with random weights.

    It is for features [49,2048] and 10,000 words.
    """
    torch.manual_seed(0)
    return Transformer(TransformerConfig(WORDS, CHANNELS, dropout=dropout, max_length=max_length))


# -------------------------------------------------------------------------------- operations, limit


def encoder_operations(config: TransformerConfig, regions: int = REGIONS) -> float:
    """Return the floating-point operations for encoding one image of `regions` regions.

    Only matrix products count. A multiplication and an addition are two operations.
    """
    width, inner = config.width, config.feedforward
    layer = 2 * width * (4 * width + 2 * inner) + 4 * regions * width
    return regions * (
        2 * config.channels * width
        + config.encoder_layers * layer
        + config.decoder_layers * 4 * width * width
    )


def decoder_operations(config: TransformerConfig, before: float) -> float:
    """Return the floating-point operations for one word in the decoder and the output layer.

    before: the average number of previous words.
    """
    width, inner = config.width, config.feedforward
    layer = 2 * width * (6 * width + 2 * inner) + 4 * (REGIONS + before + 1) * width
    return config.decoder_layers * layer + 2 * width * config.words


def limit(shapes: list[tuple[int, int, int]], machine: Machine) -> float:
    """Return the maximum operations per second of matrix products in the machine's precision.

    shapes: (m, k, n) of products [m,k]x[k,n]. The result is the best of several runs. On a GPU a
        run has many products, so that the time to launch a product does not count.
    """
    products = 50 if machine.device.type == "cuda" else 1
    dtype, runs = (torch.bfloat16, 20) if machine.precision == "bf16" else (torch.float32, 5)
    best = 0.0
    for m, k, n in shapes:
        a, b = (torch.randn(*shape, device=machine.device).to(dtype) for shape in ((m, k), (n, k)))

        def run(a: Tensor = a, b: Tensor = b) -> None:
            for _ in range(products):
                F.linear(a, b)

        seconds = min(seconds_of(run, waiter(machine.device)) for _ in range(runs))
        best = max(best, products * 2 * m * k * n / seconds)
    return best


# --------------------------------------------------------------------------------------- plain twin


def plain_memory(captioner: Transformer, regions: Regions, copies: int) -> Memory:
    """Return the encoded regions of each image, repeated for each of its captions."""
    memory = captioner.encode(regions)
    return memory.keep(torch.arange(memory.images, device=memory.device).repeat_interleave(copies))


def plain_loss(captioner: Transformer, regions: Regions, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of tokens [B,K,T]. Each caption is one padded row."""
    rows = tokens.flatten(0, 1)[:, None]
    logits = captioner.decode(rows[:, :, :-1], plain_memory(captioner, regions, tokens.shape[1]))
    targets = rows[:, :, 1:].masked_fill(rows[:, :, 1:] == PAD, -100)
    return F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten())


@torch.inference_mode()
def plain_beam_search(captioner: Transformer, memory: Memory, beams: int, length: int) -> Tensor:
    """Return the words [B,K,length] of the best beams after exactly `length` words.

    Each step computes all previous words again.
    """
    images, device = memory.images, memory.device
    copies = memory.keep(torch.arange(images, device=device).repeat_interleave(beams))
    words = torch.full((images, beams, 1), BOS, device=device)
    beam_scores = torch.full((images, beams), float("-inf"), device=device)
    beam_scores[:, 0] = 0
    for _ in range(length):
        logits = captioner.decode(words.flatten(0, 1)[:, None], copies)[:, 0, -1].float()
        logits[:, [PAD, BOS, EOS, 3]] = float("-inf")
        scores = beam_scores[:, :, None] + logits.log_softmax(-1).view(images, beams, -1)
        beam_scores, flat_idx = scores.flatten(1).topk(beams, dim=1)
        beam_idx = (flat_idx // scores.shape[2])[:, :, None].expand_as(words)
        words = torch.cat([words.gather(1, beam_idx), (flat_idx % scores.shape[2])[:, :, None]], 2)
    return words[:, :, 1:]


# ------------------------------------------------------------------------------------- Hugging Face


def import_transformers() -> Any:
    """Return the package transformers, or say how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise click.ClickException(
            "the comparison needs Hugging Face transformers: pip install -e '.[bench]'"
        ) from error
    return transformers


def hugging_face(dropout: float = 0.0, max_length: int = 40) -> nn.Module:
    """Return GPT-2 with cross-attention and the same width, depth and number of words.

    It has no encoder of regions.
    """
    transformers = import_transformers()
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_positions=max_length + 1,
            n_embd=512,
            n_layer=3,
            n_head=8,
            n_inner=2048,
            add_cross_attention=True,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def hugging_face_loss(model: nn.Module, encoded: Tensor, tokens: Tensor) -> Tensor:
    """Return the loss of tokens [B,K,T], padded to the longest, as in Hugging Face's collator.

    encoded: [B,R,D], repeated for each caption.
    """
    rows = tokens.flatten(0, 1)
    is_token = rows != PAD
    return model(
        input_ids=rows, attention_mask=is_token.long(), labels=rows.masked_fill(~is_token, -100),
        encoder_hidden_states=encoded.repeat_interleave(tokens.shape[1], dim=0), use_cache=False,
    ).loss  # fmt: skip


@torch.inference_mode()
def hugging_face_beam_search(model: nn.Module, encoded: Tensor, beams: int, length: int) -> Tensor:
    """Run Hugging Face's `generate` with exactly `length` words."""
    start = torch.full((len(encoded), 1), BOS, device=encoded.device)
    return model.generate(
        start,
        attention_mask=torch.ones_like(start),
        encoder_hidden_states=encoded,
        num_beams=beams,
        do_sample=False,
        min_new_tokens=length,
        max_new_tokens=length,
        length_penalty=1.0,
    )


def median_rate(count: int, seconds: list[float]) -> float:
    """Return `count` per second for the median duration."""
    return count / statistics.median(seconds)


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], machine: Machine
) -> Callable[[], None]:
    """Return a function that runs one step of AdamW in the machine's precision."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with machine.autocast():
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step
