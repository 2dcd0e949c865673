"""Log-probabilities of given texts after a prompt, for ranking candidate answers.

The prompt is read once. All candidates of an example continue it in one pass.

Letters in shapes: B examples, K candidates per example, T tokens, P prompt tokens, Q slots of the
packed candidates of an example, N rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoders.interface import Decoder, Memory
from models.generation.ensemble import Ensemble, Memories, log_mean
from models.generation.options import first_tokens

CHUNK_ROWS = 4096  # rows of float32 logits in memory at a time
# Candidates of an example that share a sequence. All tokens of a sequence are compared with each
# other in attention, also those of different candidates, so long sequences cost more.
GROUP = 16


def candidate_log_p(
    decoder: Decoder | Ensemble,
    memory: Memory,
    prompts: Tensor | None,
    candidates: Tensor,
    pad: int = 0,
    bos: int = 1,
    eos: int = 2,
) -> Tensor:
    """Compute the log-probability of each candidate text after its prompt, with its <eos>.

    memory: of B images. prompts: [B,P] int64, padded on the left with `pad`; None: no prompts.
    candidates: [B,K,T] int64, padded on the right with `pad`; a row of `pad` only is no candidate.

    Returns the sums of log p [B,K] float32 in nats, -inf for rows of `pad` only. For an Ensemble,
    p is the mean probability of each word.
    """
    order, candidates = _group(candidates, pad)
    lengths = (candidates != pad).sum(2)
    # word t of a text is predicted by the state before it; <eos> by the last word
    targets = F.pad(candidates, (0, 1), value=pad)
    targets.scatter_(2, lengths[:, :, None], eos)
    parts: list[tuple[Any, Any]] = [(decoder, memory)]
    if isinstance(decoder, Ensemble):
        parts = list(zip(decoder.decoders, cast(Memories, memory), strict=True))
    first, later = zip(
        *(
            _token_log_p(member, part, prompts, candidates, targets, pad, bos)
            for member, part in parts
        ),
        strict=True,
    )
    log_p = log_mean(first)
    is_token = candidates != pad
    example, text, _ = is_token.nonzero(as_tuple=True)
    log_p = log_p.flatten().index_add(0, example * log_p.shape[1] + text, log_mean(later))
    log_p = log_p.masked_fill((lengths == 0).flatten(), float("-inf"))
    return log_p.view(len(order), -1).gather(1, order)


def _group(candidates: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Distribute the K candidates of each example to G sequences of similar total lengths.

    Returns (order, groups): groups [B*G,K/G,T], padded with `pad`, and order [B,K], the position of
    each candidate among the candidates of the groups of its example.
    """
    examples, count, longest = candidates.shape
    candidates = F.pad(candidates, (0, int(longest == 0)), value=pad)
    longest, groups = candidates.shape[2], -(-count // GROUP)
    by_length = (candidates != pad).sum(2).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(count, device=candidates.device)
    place = place % groups * -(-count // groups) + place // groups  # dealt out in turn
    order = torch.empty_like(by_length).scatter_(1, by_length, place.expand_as(by_length))
    grouped = candidates.new_full((examples, groups * -(-count // groups), longest), pad)
    grouped.scatter_(1, order[:, :, None].expand(-1, -1, longest), candidates)
    return order, grouped.view(examples * groups, -1, longest)


def _token_log_p(
    decoder: Decoder,
    memory: Memory,
    prompts: Tensor | None,
    candidates: Tensor,
    targets: Tensor,
    pad: int,
    bos: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the first words, and of all later ones and <eos> [tokens].

    candidates: [B*G,K,T], in G groups per example. targets: [B*G,K,T+1]. The first words are
    [B*G,K]; the later ones are in the order of the tokens of `candidates`.
    """
    cache = decoder.init_cache(memory, 1, prompts)
    begin = first_tokens(memory.images, bos, memory.device, prompts)[:, None]
    logits = decoder.logits(decoder.decode_states(begin, memory, cache)[:, 0, -1])
    groups = len(candidates) // memory.images
    first = logits.log_softmax(1, dtype=torch.float32).repeat_interleave(groups, dim=0)
    first = first.gather(1, targets[:, :, 0])
    memory = memory.keep(torch.arange(memory.images).repeat_interleave(groups).to(memory.device))
    is_token = candidates != pad
    text = cache.continuation(candidates, is_token)
    states = decoder.states(text.words, text.positions, text, memory)[: text.count]
    following = targets[:, :, 1:][is_token]
    log_p = []
    for rows, words in zip(states.split(CHUNK_ROWS), following.split(CHUNK_ROWS), strict=True):
        logits = decoder.logits(rows).float()
        log_p.append(logits.gather(1, words[:, None])[:, 0] - logits.logsumexp(1))
    return first, torch.cat(log_p) if log_p else first.new_zeros(0)
