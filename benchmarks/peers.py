"""What the decoder is measured against: a plain twin, Hugging Face's GPT-2 with cross-attention,
and the limit of products.

The twin has our weights and is written as people write it: one caption a row, each with its own
copy of the image's encoded regions, padded to the longest, F.cross_entropy; a beam search that
reads all words again at every step.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

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


def flickr8k_tokens(real: Path, images: int, seed: int = 0) -> Tensor:
    """Captions of Flickr8k's lengths with random words: tokens [images,5,T] int64 of `images` train
    photographs.
    """
    found = json.loads((real / "flickr8k" / "captions_train.json").read_text())
    groups: dict[int, list[str]] = {}
    for line in found["annotations"]:
        groups.setdefault(line["image_id"], []).append(line["caption"])
    rng = random.Random(seed)
    chosen = [
        caption for group in rng.sample(list(groups.values()), images) for caption in group[:5]
    ]
    lengths = [len(words) for words in tokenize_all(chosen)]
    tokens = torch.full((images * 5, max(lengths) + 2), PAD)
    generator = torch.Generator().manual_seed(seed)
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length + 1] = BOS, EOS
        row[1 : length + 1] = torch.randint(4, WORDS, (length,), generator=generator)
    return tokens.view(images, 5, -1)


def random_regions(images: int) -> Regions:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, REGIONS, CHANNELS, generator=generator).half()
    return Regions(
        features, grid_boxes(7, 7).expand(images, -1, -1), torch.full((images,), REGIONS)
    )


def our_captioner(dropout: float = 0.0, max_length: int = 40) -> Transformer:
    """Preset base (3+3 layers, width 512) for features [49,2048] and 10,000 words, random
    weights.
    """
    torch.manual_seed(0)
    return Transformer(TransformerConfig(WORDS, CHANNELS, dropout=dropout, max_length=max_length))


# -------------------------------------------------------------------------------- operations, limit


def encoder_operations(config: TransformerConfig) -> float:
    """Floating point operations of encoding one image, products alone: a multiplication and an
    addition are two.
    """
    width, inner = config.width, config.feedforward
    layer = 2 * width * (4 * width + 2 * inner) + 4 * REGIONS * width
    return REGIONS * (
        2 * config.channels * width
        + config.encoder_layers * layer
        + config.decoder_layers * 4 * width * width
    )


def decoder_operations(config: TransformerConfig, before: float) -> float:
    """Of one word's way through decoder and output layer, `before` words (on average) before it."""
    width, inner = config.width, config.feedforward
    layer = 2 * width * (6 * width + 2 * inner) + 4 * (REGIONS + before + 1) * width
    return config.decoder_layers * layer + 2 * width * config.words


def limit(shapes: list[tuple[int, int, int]], machine: Machine) -> float:
    """The most operations a second of products [m,k]x[k,n] of these shapes in the machine's
    precision, best of some runs.
    """
    dtype, runs = (torch.bfloat16, 20) if machine.precision == "bf16" else (torch.float32, 5)
    best = 0.0
    for m, k, n in shapes:
        a, b = (torch.randn(*shape, device=machine.device).to(dtype) for shape in ((m, k), (n, k)))
        seconds = min(
            seconds_of(lambda a=a, b=b: F.linear(a, b), waiter(machine.device)) for _ in range(runs)
        )
        best = max(best, 2 * m * k * n / seconds)
    return best


# --------------------------------------------------------------------------------------- plain twin


def plain_memory(captioner: Transformer, regions: Regions, copies: int) -> Memory:
    """Each image's encoded regions once for each of its captions."""
    memory = captioner.encode(regions)
    return memory.keep(torch.arange(memory.images, device=memory.device).repeat_interleave(copies))


def plain_loss(captioner: Transformer, regions: Regions, tokens: Tensor) -> Tensor:
    """Cross-entropy of tokens [B,K,T], each caption by itself, padding and all."""
    rows = tokens.flatten(0, 1)[:, None]
    logits = captioner.decode(rows[:, :, :-1], plain_memory(captioner, regions, tokens.shape[1]))
    targets = rows[:, :, 1:].masked_fill(rows[:, :, 1:] == PAD, -100)
    return F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten())


@torch.inference_mode()
def plain_beam_search(captioner: Transformer, memory: Memory, beams: int, length: int) -> Tensor:
    """Words [B,K,length] of the best beams after exactly `length` words, all read again for each
    new one.
    """
    images, device = memory.images, memory.device
    copies = memory.keep(torch.arange(images, device=device).repeat_interleave(beams))
    words = torch.full((images, beams, 1), BOS, device=device)
    live = torch.full((images, beams), float("-inf"), device=device)
    live[:, 0] = 0
    for _ in range(length):
        logits = captioner.decode(words.flatten(0, 1)[:, None], copies)[:, 0, -1].float()
        logits[:, [PAD, BOS, EOS, 3]] = float("-inf")
        scores = live[:, :, None] + logits.log_softmax(-1).view(images, beams, -1)
        live, flat = scores.flatten(1).topk(beams, dim=1)
        origin = (flat // scores.shape[2])[:, :, None].expand_as(words)
        words = torch.cat([words.gather(1, origin), (flat % scores.shape[2])[:, :, None]], 2)
    return words[:, :, 1:]


# ------------------------------------------------------------------------------------- Hugging Face


def hugging_face(dropout: float = 0.0, max_length: int = 40) -> nn.Module:
    """GPT-2 with cross-attention of the same width, depth and words; it has no encoder of
    regions.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise click.ClickException(
            "this compares with Hugging Face: pip install -e '.[bench]'"
        ) from error
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
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
    """Loss of tokens [B,K,T], padded to the longest as its collator does; encoded [B,R,D] is
    repeated for each caption.
    """
    rows = tokens.flatten(0, 1)
    there = rows != PAD
    return model(
        input_ids=rows, attention_mask=there.long(), labels=rows.masked_fill(~there, -100),
        encoder_hidden_states=encoded.repeat_interleave(tokens.shape[1], dim=0), use_cache=False,
    ).loss  # fmt: skip


@torch.inference_mode()
def hugging_face_beam_search(model: nn.Module, encoded: Tensor, beams: int, length: int) -> Tensor:
    """`generate` with exactly `length` words."""
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
    return count / statistics.median(seconds)


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], machine: Machine
) -> Callable[[], None]:
    """One update by AdamW in the machine's precision, as a work to time."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with machine.autocast():
            found = loss()
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        optimizer.step()

    return step
