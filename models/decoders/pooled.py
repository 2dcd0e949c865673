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

from models.decoders.attention import KVCache, Layout, Packed, Selected
from models.decoders.dropout import Dropout
from models.decoders.interface import Decoder
from models.decoders.layers import (
    RegionInput,
    SelfAttentionLayer,
    StackConfig,
    StackOptions,
    initialize_weights,
    region_mask,
    scale_residual_branches,
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


class Pooled(Decoder):
    """Maps regions [B,R,C] and tokens [B,K,T] to logits [B,K,T,V].

    The output layer and the word embedding share one matrix.
    """

    Config, Options = PooledConfig, StackOptions
    config: PooledConfig

    def __init__(self, config: PooledConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.region = RegionInput(config.channels, width, config.dropout)
        self.weight = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        self.pooled_norm = nn.LayerNorm(width)
        self.word = nn.Embedding(config.words, width)
        self.position = nn.Embedding(config.max_prompt + config.max_length + 1, width)
        self.layers = nn.ModuleList(
            SelfAttentionLayer(width, config.heads, config.feedforward, config.dropout)
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.output_bias = nn.Parameter(torch.zeros(config.words))
        initialize_weights(self)
        scale_residual_branches(self.layers, 2)

    def encode(self, regions: Regions) -> PooledMemory:
        x, (mask, is_empty) = self.region(regions), region_mask(regions)
        if not x.shape[1]:  # no image has regions
            return PooledMemory(x.new_zeros(x.shape[0], self.config.width))
        scores = self.weight(x)[:, :, 0].float()
        if mask is not None:
            scores = scores + mask[:, 0, 0]
        vector = self.pooled_norm((scores.softmax(dim=1)[:, None] @ x.float())[:, 0])
        if is_empty is not None:
            vector = vector.masked_fill(is_empty[:, None], 0)
        return PooledMemory(vector)

    def states(
        self, words: Tensor, positions: Tensor, layout: Packed | KVCache, memory: PooledMemory
    ) -> Tensor:
        return self._states(words, positions, layout, layout.image, memory)

    def selected_states(self, words: Tensor, text: Packed, memory: PooledMemory) -> Tensor:
        return self._states(words, text.positions, text, text.image, memory, text.selected)

    def _states(
        self,
        words: Tensor,
        positions: Tensor,
        layout: Layout,
        image: Tensor,
        memory: PooledMemory,
        selected: Selected | None = None,
    ) -> Tensor:
        x = self.word(words) * self.config.width**0.5 + self.position(positions)
        x = self.dropout(x + memory.vector[image])
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer(x, layout, number, selected if number == last else None)
        return self.norm(x)

    def output_layer(self) -> tuple[Tensor, Tensor]:
        return self.word.weight, self.output_bias

    def init_cache(
        self, memory: PooledMemory, texts: int, prompts: Tensor | None = None
    ) -> KVCache:
        like = memory.vector.view(memory.images, self.config.heads, 1, -1)
        return KVCache(self.config.decoder_layers, texts, self.config.max_length + 1, like, prompts)
