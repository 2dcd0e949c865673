"""An ensemble of decoders: the mean of their probabilities of each next word.

All decoders read the same regions and share one vocabulary. The ensemble has the methods of a
decoder that generation needs: encode, init_cache, decode, next_words and class_logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from models.decoders.interface import Decoder, DecodingCache, ExactLogits, Memory
from models.regions import Regions


class Memories(tuple[Memory, ...]):
    """The memories of the same images, one per decoder."""

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


class Caches(tuple[DecodingCache, ...]):
    """The decoding caches of the same texts, one per decoder."""

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
    """Predicts the mean of the probabilities of several decoders.

    Its maximum lengths of texts and prompts are the smallest of the decoders.
    """

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(decoders)
        configs = [decoder.config for decoder in decoders]
        lengths = {
            name: min(getattr(config, name) for config in configs)
            for name in ("max_length", "max_prompt")
        }
        self.config = replace(configs[0], **lengths)

    def _members(self) -> Iterable[Decoder]:
        return cast(Iterable[Decoder], self.decoders)

    def encode(self, regions: Regions) -> Memories:
        return Memories(decoder.encode(regions) for decoder in self._members())

    def init_cache(self, memory: Memories, texts: int, prompts: Tensor | None = None) -> Caches:
        return Caches(
            decoder.init_cache(part, texts, prompts)
            for decoder, part in zip(self._members(), memory, strict=True)
        )

    def decode(self, tokens: Tensor, memory: Memories, cache: Caches | None = None) -> Tensor:
        """Compute the log of the mean probability of each next word, [B,K,T,V] float32.

        Arguments as in Decoder.decode.
        """
        caches = cache or [None] * len(self.decoders)
        members = zip(self._members(), memory, caches, strict=True)
        log_p = [
            decoder.decode(tokens, part, state).log_softmax(-1, dtype=torch.float32)
            for decoder, part, state in members
        ]
        return log_mean(log_p)

    def class_logits(self, tokens: Tensor, memory: Memories, cache: Caches) -> Tensor:
        """As Decoder.class_logits; the logits are logs of the mean probabilities of the answers."""
        members = zip(self._members(), memory, cache, strict=True)
        return log_mean(
            [
                decoder.class_logits(tokens, part, state).log_softmax(-1, dtype=torch.float32)
                for decoder, part, state in members
            ]
        )

    def next_words(
        self, tokens: Tensor, memory: Memories, cache: Caches
    ) -> tuple[Tensor, ExactLogits | None]:
        """As Decoder.next_words; the logits are logs of the mean probabilities."""
        outputs = [
            decoder.next_words(tokens, part, state)
            for decoder, part, state in zip(self._members(), memory, cache, strict=True)
        ]
        all_log_p = [logits.log_softmax(-1, dtype=torch.float32) for logits, _ in outputs]

        def exact_logits(rows: slice, words: Tensor) -> Tensor:
            selected = []
            for log_p, (logits, exact) in zip(all_log_p, outputs, strict=True):
                values = log_p[rows].gather(1, words)
                if exact is not None:
                    values = values - logits[rows].gather(1, words) + exact(rows, words)
                selected.append(values)
            return log_mean(selected)

        rounded = any(exact is not None for _, exact in outputs)
        return log_mean(all_log_p), exact_logits if rounded else None


def log_mean(log_p: Sequence[Tensor]) -> Tensor:
    """The log of the mean of several probabilities, from their logs."""
    return functools.reduce(torch.logaddexp, log_p) - math.log(len(log_p))
