"""Several decoders as one: the mean of their probabilities for each next word.

It has what generation asks of a decoder: encode, init_cache, decode, next_words. All read the same
    regions and share a vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from models.decoders.attention import KVCache
from models.decoders.interface import Decoder, ExactLogits, Memory
from models.regions import Regions


class Memories(tuple[Memory, ...]):
    """Each decoder's encoding of the same images."""

    @property
    def images(self) -> int:
        return self[0].images

    @property
    def device(self) -> torch.device:
        return self[0].device

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(part for memory in self for part in memory.tensors())

    def keep(self, images: Tensor, in_place: bool = False) -> Memories:
        return Memories(memory.keep(images, in_place) for memory in self)


class Caches(tuple[KVCache, ...]):
    """Each decoder's captions so far."""

    def reorder(self, beam_idx: Tensor) -> None:
        for cache in self:
            cache.reorder(beam_idx)

    def keep(self, images: Tensor) -> None:
        for cache in self:
            cache.keep(images)

    def regroup(self, image: Tensor, text: Tensor) -> None:
        for cache in self:
            cache.regroup(image, text)


class Ensemble(nn.Module):
    """The mean of several decoders' probabilities; captions as long as all of them can write."""

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(decoders)
        configs = [one.config for one in decoders]
        lengths = {
            name: min(getattr(config, name) for config in configs)
            for name in ("max_length", "max_prompt")
        }
        self.config = replace(configs[0], **lengths)

    def _each(self) -> Iterable[Decoder]:
        return cast(Iterable[Decoder], self.decoders)

    def encode(self, regions: Regions) -> Memories:
        return Memories(one.encode(regions) for one in self._each())

    def init_cache(self, memory: Memories, texts: int, prompts: Tensor | None = None) -> Caches:
        return Caches(
            one.init_cache(part, texts, prompts)
            for one, part in zip(self._each(), memory, strict=True)
        )

    def decode(self, tokens: Tensor, memory: Memories, cache: Caches | None = None) -> Tensor:
        """Log of the mean probability of each next word, float32 [B,K,T,V]; arguments as
        Decoder.decode's.
        """
        caches = cache or [None] * len(self.decoders)
        found = zip(self._each(), memory, caches, strict=True)
        return mean(
            [
                one.decode(tokens, part, own).log_softmax(-1, dtype=torch.float32)
                for one, part, own in found
            ]
        )

    def next_words(
        self, tokens: Tensor, memory: Memories, cache: Caches
    ) -> tuple[Tensor, ExactLogits | None]:
        """As Decoder.next_words, of the logs of the mean probabilities."""
        outputs = [
            one.next_words(tokens, part, own)
            for one, part, own in zip(self._each(), memory, cache, strict=True)
        ]
        log_p = [scores.log_softmax(-1, dtype=torch.float32) for scores, _ in outputs]

        def exact(rows: slice, words: Tensor) -> Tensor:
            parts = []
            for own, (scores, exactly) in zip(log_p, outputs, strict=True):
                chosen = own[rows].gather(1, words)
                if exactly is not None:
                    chosen = chosen - scores[rows].gather(1, words) + exactly(rows, words)
                parts.append(chosen)
            return mean(parts)

        rounded = any(exactly is not None for _, exactly in outputs)
        return mean(log_p), exact if rounded else None


def mean(log_p: Sequence[Tensor]) -> Tensor:
    """The log of the mean of probabilities."""
    return functools.reduce(torch.logaddexp, log_p) - math.log(len(log_p))
