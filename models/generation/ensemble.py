"""Several captioners as one: the mean of their probabilities for each next word.

It has what the search asks of a captioner: encode, start, decode, next_words. All read the same regions and share a vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.decoders.attention import KVCache
from models.decoders.transformer import Captioner, ExactScores, Memory
from models.regions import Regions


class Memories(tuple[Memory, ...]):
    """Each captioner's encoding of the same images."""

    @property
    def images(self) -> int:
        return self[0].images

    @property
    def keys(self) -> tuple[Tensor, ...]:
        return self[0].keys

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(part for memory in self for part in memory.tensors())

    def keep(self, images: Tensor, in_place: bool = False) -> Memories:
        return Memories(memory.keep(images, in_place) for memory in self)


class Caches(tuple[KVCache, ...]):
    """Each captioner's captions so far."""

    def reorder(self, origin: Tensor) -> None:
        for cache in self:
            cache.reorder(origin)

    def keep(self, images: Tensor) -> None:
        for cache in self:
            cache.keep(images)


class Ensemble(nn.Module):
    """The mean of several captioners' probabilities; captions as long as all of them can write."""

    def __init__(self, captioners: Sequence[Captioner]) -> None:
        super().__init__()
        self.captioners = nn.ModuleList(captioners)
        self.config = replace(captioners[0].config, max_length=min(one.config.max_length for one in captioners))

    def encode(self, regions: Regions) -> Memories:
        return Memories(one.encode(regions) for one in self.captioners)

    def start(self, memory: Memories, captions: int) -> Caches:
        return Caches(one.start(part, captions) for one, part in zip(self.captioners, memory, strict=True))

    def decode(self, tokens: Tensor, memory: Memories, cache: Caches | None = None) -> Tensor:
        """Log of the mean probability of each next word, float32 [B,K,T,V]; arguments as Captioner.decode's."""
        caches = cache or [None] * len(self.captioners)
        found = zip(self.captioners, memory, caches, strict=True)
        return mean([one.decode(tokens, part, own).log_softmax(-1, dtype=torch.float32) for one, part, own in found])

    def next_words(self, tokens: Tensor, memory: Memories, cache: Caches) -> tuple[Tensor, ExactScores | None]:
        """As Captioner.next_words, of the logs of the mean probabilities."""
        found = [one.next_words(tokens, part, own) for one, part, own in zip(self.captioners, memory, cache, strict=True)]
        log_p = [scores.log_softmax(-1, dtype=torch.float32) for scores, _ in found]

        def exact(rows: slice, words: Tensor) -> Tensor:
            return mean([
                own[rows].gather(1, words) - scores[rows].gather(1, words) + exactly(rows, words)
                for own, (scores, exactly) in zip(log_p, found, strict=True)
            ])  # fmt: skip

        return mean(log_p), None if found[0][1] is None else exact


def mean(log_p: Sequence[Tensor]) -> Tensor:
    """The log of the mean of probabilities."""
    return functools.reduce(torch.logaddexp, log_p) - math.log(len(log_p))
