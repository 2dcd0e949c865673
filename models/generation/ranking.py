"""Log-probabilities of given texts after a prompt, for ranking candidate answers.

The prompt is read once. All candidates of an example continue it in one pass.

Letters in shapes: B examples, K candidates per example, T tokens, P prompt tokens, Q slots of the
packed candidates of an example, N rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoders.attention import KVCache, Packed, additive_mask
from models.decoders.interface import Decoder, Memory
from models.generation.ensemble import Ensemble, log_mean
from models.generation.options import first_tokens

CHUNK_ROWS = 4096  # rows of float32 logits in memory at a time


class Continuation(Packed):
    """The layout of texts that continue the prompt of their example, which a KVCache holds.

    A token attends to the prompt, to itself and to the preceding tokens of its text.
    """

    def __init__(self, tokens: Tensor, is_token: Tensor, cache: KVCache) -> None:
        """
        tokens: [B,K,T] int64. is_token: [B,K,T] bool, False for padding.
        cache: of one text per example, after the call that read the prompts.
        """
        super().__init__(tokens, is_token)
        self.cache = cache
        read = torch.arange(cache.length, device=tokens.device)
        padding = (
            torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
            if cache.padding is None
            else cache.padding
        )
        visible = additive_mask(read >= padding[:, None])[:, None, None]
        self.mask = torch.cat([visible.expand(-1, -1, self.shape[1], -1), self.mask], dim=3)
        self.positions = self.positions + (cache.length - padding)[self.image]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        read = self.cache.length
        keys = torch.cat([self.cache.keys[layer][:, :, :read], keys], dim=2)
        return keys, torch.cat([self.cache.values[layer][:, :, :read], values], dim=2)


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
    lengths = (candidates != pad).sum(2)
    # word t of a text is predicted by the state before it; <eos> by the last word
    targets = F.pad(candidates, (0, 1), value=pad)
    targets.scatter_(2, lengths[:, :, None], eos)
    if isinstance(decoder, Ensemble):
        parts = zip(decoder.decoders, memory, strict=True)  # type: ignore[call-overload]
    else:
        parts = [(decoder, memory)]
    first, later = zip(
        *(_token_log_p(*part, prompts, candidates, targets, pad, bos) for part in parts),
        strict=True,
    )
    log_p = log_mean(first)
    is_token = candidates != pad
    example, text, _ = is_token.nonzero(as_tuple=True)
    log_p = log_p.flatten().index_add(0, example * log_p.shape[1] + text, log_mean(later))
    return log_p.view(lengths.shape).masked_fill(lengths == 0, float("-inf"))


def _token_log_p(
    decoder: Decoder,
    memory: Memory,
    prompts: Tensor | None,
    candidates: Tensor,
    targets: Tensor,
    pad: int,
    bos: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the first words [B,K], and of all later ones and <eos> [tokens].

    targets: [B,K,T+1]. The later ones are in the order of the tokens of `candidates`.
    """
    cache = decoder.init_cache(memory, 1, prompts)
    begin = first_tokens(memory.images, bos, memory.device, prompts)[:, None]
    logits = decoder.logits(decoder.decode_states(begin, memory, cache)[:, 0, -1])
    first = logits.log_softmax(1, dtype=torch.float32).gather(1, targets[:, :, 0])
    is_token = candidates != pad
    text = Continuation(candidates, is_token, cache)
    states = decoder.states(text.words, text.positions, text, memory)[: text.count]
    following = targets[:, :, 1:][is_token]
    log_p = [
        decoder.logits(rows).log_softmax(1, dtype=torch.float32).gather(1, words[:, None])[:, 0]
        for rows, words in zip(states.split(CHUNK_ROWS), following.split(CHUNK_ROWS), strict=True)
    ]
    return first, torch.cat(log_p) if log_p else first.new_zeros(0)
