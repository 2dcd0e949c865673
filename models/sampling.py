"""Captions drawn from a captioner's own probabilities. B images, K captions an image, V words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.generation import Captions, Generation, lengths
from models.rules import NEVER, bar

if TYPE_CHECKING:
    from models.captioner import Captioner, Memory

TOGETHER = 8  # samples whose attention is one product; its mask grows with their square


@torch.inference_mode()
def sample(
    captioner: Captioner, memory: Memory, options: Generation, generator: torch.Generator | None = None
) -> Captions:
    """num_return_sequences samples of each image.

    Each word is drawn from softmax(logits / temperature), of which only the `top_k` likeliest words (0: all; more where they
    tie) and then the likeliest that together reach `top_p` (Holtzman et al. 2020) are left; log p is under the distribution
    drawn from, the <eos> included, and -inf where the rules leave no word. The loop is as long as the longest caption may be,
    with no look at the device; on a CPU it ends with the last caption.
    """
    device, eos = memory.keys[0].device, options.eos_token_id
    limit, barred = options.limit(captioner), options.barred
    parts = -(-options.num_return_sequences // TOGETHER)
    memory = memory.keep(torch.arange(memory.images, device=device).repeat_interleave(parts)) if parts > 1 else memory
    images, captions = memory.images, -(-options.num_return_sequences // parts)
    tokens = torch.full((images * captions, limit), eos, dtype=torch.int64, device=device)
    log_p = torch.zeros(images * captions, device=device)
    going = torch.ones(images * captions, dtype=torch.bool, device=device)
    newest = torch.full((images, captions, 1), options.bos_token_id, dtype=torch.int64, device=device)
    cache = captioner.start(memory, captions)
    for place in range(limit):
        logits = captioner.decode(newest, memory, cache)[:, :, -1].flatten(0, 1).float() / options.temperature
        bar(logits, options.suppress_tokens)
        barred(logits, tokens[:, :place])
        stuck = logits.amax(1) == NEVER  # the rules leave no word: such a caption ends, and counts as none
        logits[:, eos] = logits[:, eos].masked_fill(stuck, 0)
        log_p.masked_fill_(stuck & going, NEVER)
        scores = nucleus(logits, options.top_k, options.top_p).log_softmax(dim=-1)
        drawn = torch.multinomial(scores.exp(), 1, generator=generator)
        log_p += scores.gather(1, drawn)[:, 0].where(going, 0)
        drawn = drawn[:, 0].where(going, eos)
        tokens[:, place] = drawn
        newest = drawn.view_as(newest)
        going = going & (drawn != eos)
        if device.type == "cpu" and not going.any():
            break
    scores = log_p / lengths(tokens, eos) ** options.length_penalty
    asked = slice(options.num_return_sequences)
    return Captions(*(part.unflatten(0, (images // parts, -1))[:, asked] for part in (tokens, scores, log_p)))


def nucleus(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [...,V] with all but the likeliest words at -inf; the likeliest of all always stays."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, NEVER)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, NEVER))
    return logits
