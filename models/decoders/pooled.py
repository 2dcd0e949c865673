"""The regions of an image as one vector, which is added to every word: the smallest decoder.

The vector is a weighted sum of the regions, and the weights are learnt: the score of each region
comes from a small network, and a softmax makes the scores weights that sum to 1 (Lin et al. 2017).
Layers of self-attention over the words follow.

Letters in shapes: B images, R regions, N rows, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.decoders.attention import KVCache, Packed
from models.decoders.layers import (
    RegionInput,
    StackConfig,
    StackDecoder,
    StackOptions,
    region_mask,
)
from models.regions import Regions


@dataclass(frozen=True)
class PooledConfig(StackConfig):
    """The sizes of a pooled decoder. Raises ModelError if they do not fit together."""


class PooledMemory(NamedTuple):
    """An encoded batch of images: a vector [B,D] per image, 0 for an image without regions."""

    vector: Tensor

    @property
    def images(self) -> int:
        return self.vector.shape[0]

    @property
    def device(self) -> torch.device:
        return self.vector.device

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.vector,)

    def keep(self, images: Tensor, in_place: bool = False) -> PooledMemory:
        return PooledMemory(self.vector[images])


class Pooled(StackDecoder):
    """Maps regions [B,R,C] and tokens [B,K,T] to logits [B,K,T,V]."""

    Config, Options = PooledConfig, StackOptions
    config: PooledConfig

    def __init__(self, config: PooledConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.region = RegionInput(config.channels, width, config.dropout, config.more_channels)
        self.weight = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        self.pooled_norm = nn.LayerNorm(width)
        self.build_stack(config)

    def encode(self, regions: Regions) -> PooledMemory:
        x, (mask, is_empty) = self.region(regions), region_mask(regions)
        scores = self.weight(x)[:, :, 0].float()
        if mask is not None:
            scores = scores + mask[:, 0, 0]
        vector = self.pooled_norm((scores.softmax(dim=1)[:, None] @ x.float())[:, 0])
        if is_empty is None and not x.shape[1]:  # R = 0: an empty mask shows no empty image
            is_empty = torch.ones_like(regions.counts, dtype=torch.bool)
        if is_empty is not None:
            vector = vector.masked_fill(is_empty[:, None], 0)
        return PooledMemory(vector)

    def states(
        self, words: Tensor, positions: Tensor, layout: Packed | KVCache, memory: PooledMemory
    ) -> Tensor:
        return self.run_stack(self._input(words, positions, layout.image, memory), layout)

    def selected_states(self, words: Tensor, text: Packed, memory: PooledMemory) -> Tensor:
        x = self._input(words, text.positions, text.image, memory)
        return self.run_stack(x, text, text.selected)

    def _input(
        self, words: Tensor, positions: Tensor, image: Tensor, memory: PooledMemory
    ) -> Tensor:
        return self.embed(words, positions) + memory.vector[image]

    def init_cache(
        self, memory: PooledMemory, texts: int, prompts: Tensor | None = None
    ) -> KVCache:
        like = memory.vector.view(memory.images, self.config.heads, 1, -1)
        return self.new_cache(like, texts, prompts)
