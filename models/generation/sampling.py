"""Captions drawn from a captioner's own probabilities. B images, K captions an image, V words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoders.interface import Decoder, Memory
from models.generation.constraints import NEG_INF, bar
from models.generation.options import Captions, Generation, first_tokens, lengths

TOGETHER = 8  # samples whose attention is one product; its mask grows with their square
BLOCK = 128  # words whose probabilities are added up before one of them is chosen


@torch.no_grad()
def sample(
    decoder: Decoder,
    memory: Memory,
    options: Generation,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    prompts: Tensor | None = None,
) -> Captions:
    """num_return_sequences N samples of each image.

    Each word is drawn from softmax(logits / temperature), of which only the `top_k` likeliest words
    (0: all; more where they tie) and then the likeliest that together reach `top_p` (Holtzman et
    al. 2020) are left; log p is under the distribution drawn from, the <eos> included, and -inf
    where the rules leave no word. The loop is as long as the longest caption may be, with no look
    at the device; on a CPU it ends with the last caption.

    uniforms [B,N,L] float32 in [0,1): what each word is drawn by, and all that is drawn; None: from
    `generator`.
    """
    device, eos = memory.device, options.eos_token_id
    limit, barred = options.limit(decoder.config.max_length), options.barred
    parts = -(-options.num_return_sequences // TOGETHER)
    if parts > 1:
        memory = memory.keep(torch.arange(memory.images, device=device).repeat_interleave(parts))
        prompts = None if prompts is None else prompts.repeat_interleave(parts, dim=0)
    images, captions = memory.images, -(-options.num_return_sequences // parts)
    if uniforms is None:
        uniforms = torch.rand(images * captions, limit, generator=generator, device=device)
    else:
        spare = parts * captions - options.num_return_sequences
        uniforms = F.pad(uniforms, (0, 0, 0, spare)).to(device).reshape(images * captions, limit)
    tokens = torch.full((images * captions, limit), eos, dtype=torch.int64, device=device)
    log_p = torch.zeros(images * captions, device=device)
    going = torch.ones(images * captions, dtype=torch.bool, device=device)
    newest = first_tokens(images, options.bos_token_id, device, prompts)[:, None]
    if prompts is None:
        newest = newest.expand(-1, captions, -1)
    cache = decoder.init_cache(memory, captions, prompts)
    for place in range(limit):
        logits = decoder.decode(newest, memory, cache)[:, :, -1].float() / options.temperature
        logits = logits.expand(-1, captions, -1).flatten(0, 1).contiguous()
        bar(logits, options.suppress_tokens)
        barred(logits, tokens[:, :place])
        stuck = logits.amax(1) == NEG_INF  # no word is allowed: the caption ends
        logits[:, eos] = logits[:, eos].masked_fill(stuck, 0)
        log_p.masked_fill_(stuck & going, NEG_INF)
        scores = nucleus(logits, options.top_k, options.top_p).log_softmax(dim=-1)
        drawn = inverse_cdf(scores.exp(), uniforms[:, place])
        log_p += scores.gather(1, drawn[:, None])[:, 0].where(going, 0)
        drawn = drawn.where(going, eos)
        tokens[:, place] = drawn
        newest = drawn.view(images, captions, 1)
        going = going & (drawn != eos)
        if device.type == "cpu" and not going.any():
            break
    scores = log_p / lengths(tokens, eos) ** options.length_penalty
    asked = slice(options.num_return_sequences)
    return Captions(
        *(part.unflatten(0, (images // parts, -1))[:, asked] for part in (tokens, scores, log_p))
    )


def inverse_cdf(p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw words [N] from distributions p [N,V] by uniforms [N] in [0,1).

    The word drawn is the first whose cumulative probability is above the uniform; its probability
    is never 0. First the block of words that holds it is found, then the word in the block, so that
    p is read once and only short rows are added up in order.
    """
    exact = torch.float32 if p.device.type == "mps" else torch.float64  # mps has no float64
    blocks = F.pad(p, (0, -p.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    block_sums = blocks.sum(2).cumsum(1, dtype=exact)
    point = uniforms[:, None] * block_sums[:, -1:]
    block = first_above(block_sums, point)
    p_in_block = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].to(exact)
    before = F.pad(block_sums, (1, 0)).gather(1, block)
    word = block * BLOCK + first_above(before + p_in_block.cumsum(1), point)
    return word[:, 0].clamp(max=p.shape[1] - 1)


def first_above(sums: Tensor, point: Tensor) -> Tensor:
    """Index [N,1] of the first of the rising sums [N,M] that is above point [N,1].

    A point that rounding put at the last sum, or beyond it, is taken to be just below it. NaN rows
    return an arbitrary index; the NaN log-probability reports them.
    """
    last = sums[:, -1:]
    below_last = torch.nextafter(last, torch.zeros_like(last))
    index = torch.searchsorted(sums, torch.minimum(point, below_last), right=True)
    return index.clamp(max=sums.shape[1] - 1)


def nucleus(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [...,V] with -inf for all but the top_k words, and of them those that reach top_p.

    The likeliest word always stays (Holtzman et al. 2020).
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, NEG_INF)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, NEG_INF))
    return logits
