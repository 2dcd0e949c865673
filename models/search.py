"""Captions from a captioner: beam search, where a finished image leaves the batch, and sampling.

A hypothesis of a beam scores sum(log p) / words**length_penalty, its <eos> counted as a word (0: the plain sum; 1: the mean).
Of B images each has K beams; V words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.captioner import Captioner, Memory

NEVER = float("-inf")


@torch.inference_mode()
def beam_search(
    captioner: Captioner,
    memory: Memory,
    beams: int,
    max_length: int,
    bos: int,
    eos: int,
    never: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The best caption of each image: tokens [B,max_length] int64, <eos> after its end, and its score [B] float32.

    `never` are ids that are not generated. A beam that reaches `max_length` words without <eos> competes as it stands.
    Ends for an image when no live beam can still beat its best finished caption: exact, since log p <= 0.
    """
    images, device = memory.keys[0].shape[0], memory.keys[0].device
    best_tokens = torch.full((images, max_length), eos, dtype=torch.int64, device=device)
    best_scores = torch.full((images,), NEVER, device=device)
    where = torch.arange(images, device=device)  # the image in each place of the shrinking batch
    live = torch.full((images, beams), NEVER, device=device)
    live[:, 0] = 0.0  # all beams begin alike: only one counts
    words = torch.full((images, beams, max_length), eos, dtype=torch.int64, device=device)
    newest = torch.full((images, beams, 1), bos, dtype=torch.int64, device=device)
    cache = captioner.start(memory, beams)
    barred = torch.tensor(list(never), dtype=torch.int64, device=device)

    for length in range(1, max_length + 1):
        logits = captioner.decode(newest, memory, cache)[:, :, -1].float()
        logits[:, :, barred] = NEVER
        scores = live[:, :, None] + logits.log_softmax(dim=-1)
        ended = scores[:, :, eos] / length**length_penalty
        _keep_best(best_tokens, best_scores, where, ended, words)

        scores[:, :, eos] = NEVER
        width = scores.shape[2]
        live, flat = scores.flatten(1).topk(min(beams, beams * width), dim=1)
        origin, newest = flat // width, (flat % width)[:, :, None]
        words = words.gather(1, origin[:, :, None].expand(-1, -1, max_length))
        words[:, :, length - 1 : length] = newest
        cache.reorder(origin)

        bound = live[:, 0] / (max_length if length_penalty > 0 else length) ** length_penalty
        going = bound > best_scores[where]
        if length == max_length:
            _keep_best(best_tokens, best_scores, where, live / length**length_penalty, words)
        elif not going.all():
            kept = going.nonzero()[:, 0]
            if not len(kept):
                break
            where, live, words, newest = where[kept], live[kept], words[kept], newest[kept]
            memory = memory.keep(kept)
            cache.keep(kept)
    return best_tokens, best_scores


def _keep_best(best_tokens: Tensor, best_scores: Tensor, where: Tensor, scores: Tensor, words: Tensor) -> None:
    """Put the best of each image's hypotheses, `scores` [b,K] and `words` [b,K,L], where it beats the best so far."""
    top, beam = scores.max(dim=1)
    better = top > best_scores[where]
    found = words[torch.arange(len(where), device=where.device), beam]
    best_tokens[where[better]] = found[better]
    best_scores[where[better]] = top[better]


@torch.inference_mode()
def sample(
    captioner: Captioner,
    memory: Memory,
    captions: int,
    max_length: int,
    bos: int,
    eos: int,
    never: Sequence[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`captions` samples of each image: tokens [B,K,max_length] int64, <eos> after their end, and log p [B,K] float32.

    Each word is drawn from softmax(logits / temperature), of which only the `top_k` likeliest words (0: all) and then the
    likeliest that together reach `top_p` (Holtzman et al. 2020) are left; log p is under the distribution drawn from, the
    <eos> included. The loop is as long as `max_length`, with no look at the device; on a CPU it ends with the last caption.
    """
    images, device = memory.keys[0].shape[0], memory.keys[0].device
    tokens = torch.full((images, captions, max_length), eos, dtype=torch.int64, device=device)
    total = torch.zeros(images, captions, device=device)
    going = torch.ones(images, captions, dtype=torch.bool, device=device)
    newest = torch.full((images, captions, 1), bos, dtype=torch.int64, device=device)
    cache = captioner.start(memory, captions)
    barred = torch.tensor(list(never), dtype=torch.int64, device=device)
    for place in range(max_length):
        logits = captioner.decode(newest, memory, cache)[:, :, -1].float() / temperature
        logits[:, :, barred] = NEVER
        scores = _likeliest(logits, top_k, top_p).log_softmax(dim=-1)
        drawn = torch.multinomial(scores.exp().flatten(0, 1), 1, generator=generator).view(images, captions, 1)
        total += scores.gather(2, drawn)[:, :, 0].where(going, 0)
        newest = drawn.where(going[:, :, None], eos)
        tokens[:, :, place] = newest[:, :, 0]
        going = going & (newest[:, :, 0] != eos)
        if device.type == "cpu" and not going.any():
            break
    return tokens, total


def _likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [...,V] with all but the likeliest words at -inf; the likeliest of all always stays."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, NEVER)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, NEVER))
    return logits
