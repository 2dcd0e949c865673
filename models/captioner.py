"""The captioner: a Transformer that encodes an image's regions once and decodes its K captions over them.

Pre-norm layers (Xiong et al. 2020) of Vaswani et al. 2017. B images, R regions, C channels, K captions an image,
T tokens, V words, D model width, H heads, d = D/H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ModelError
from models.attention import CrossAttention, KVCache, SelfAttention
from models.dropout import Dropout
from models.grid import Regions

BOX_WAVES = 4  # frequencies pi/2 to 4 pi a coordinate: a grid of up to about 16 cells a side keeps its places apart


@dataclass(frozen=True)
class CaptionerConfig:
    """The sizes of a captioner; `words` V and `channels` C follow from the vocabulary and the cache."""

    words: int
    channels: int
    width: int = 512
    heads: int = 8
    encoder_layers: int = 3
    decoder_layers: int = 3
    feedforward: int = 2048
    dropout: float = 0.1
    max_length: int = 20

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ModelError(f"width {self.width} is not a multiple of heads {self.heads}")
        for name in ("words", "channels", "width", "heads", "decoder_layers", "feedforward", "max_length"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout is {self.dropout}, it must be in [0, 1)")


class Memory(NamedTuple):
    """An encoded batch of images: keys and values [B,H,R,d] for each decoder layer, mask [B,1,1,R] or None (all true)."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None

    def keep(self, images: Tensor) -> Memory:
        """Only these images, `images` [b] int64."""
        mask = None if self.mask is None else self.mask[images]
        return Memory(tuple(k[images] for k in self.keys), tuple(v[images] for v in self.values), mask)


class FeedForward(nn.Sequential):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class EncoderLayer(nn.Module):
    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B,R,D] to [B,R,D]; mask [B,1,1,R] True where a region is."""
        x = x + self.dropout(self.attention(self.norms[0](x), mask))
        return x + self.dropout(self.feedforward(self.norms[1](x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads)
        self.cross = CrossAttention(config.width, config.heads)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Memory, layer: int, cache: KVCache | None) -> Tensor:
        """x [B,K,T,D] to [B,K,T,D]; with a cache, x holds only the new tokens."""
        inner = self.norms[0](x)
        if cache is None:
            inner = self.attention(inner.flatten(0, 1), causal=True).view_as(inner)
        else:
            inner = self.attention.step(inner, cache, layer)
        x = x + self.dropout(inner)
        x = x + self.dropout(self.cross(self.norms[1](x), memory.keys[layer], memory.values[layer], memory.mask))
        return x + self.dropout(self.feedforward(self.norms[2](x)))


def waves(places: Tensor) -> Tensor:
    """Coordinates [...,n] in -1..1 as sines and cosines of growing frequency (Tancik et al. 2020), [...,2*n*BOX_WAVES]."""
    angles = places[..., None] * (math.pi / 2 * 2.0 ** torch.arange(BOX_WAVES, device=places.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class Captioner(nn.Module):
    """Regions [B,R,C] and tokens [B,K,T] to logits [B,K,T,V]."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.region_norm = nn.LayerNorm(config.channels)
        self.region = nn.Linear(config.channels, width)
        self.box = nn.Linear(8 * BOX_WAVES, width)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.memory_norm = nn.LayerNorm(width)
        self.memory_box = nn.Linear(8 * BOX_WAVES, width)
        self.word = nn.Embedding(config.words, width)
        self.position = nn.Embedding(config.max_length + 1, width)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.output_bias = nn.Parameter(torch.zeros(config.words))
        for embedding in (self.word, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.memory_box.weight, std=(4 * BOX_WAVES) ** -0.5)  # as large as the normed content beside it
        for layers, sublayers in ((self.encoder, 2), (self.decoder, 3)):
            for name, weight in layers.named_parameters():  # what is added to the stream begins small (GPT-2's rule)
                if name.endswith(("attention.out.weight", "cross.out.weight", "feedforward.2.weight")):
                    weight.data.mul_((sublayers * len(layers)) ** -0.5)

    def encode(self, regions: Regions) -> Memory:
        """Encode each image once; regions past `counts` are never attended to."""
        features, boxes, counts = regions
        mask = (torch.arange(features.shape[1], device=features.device) < counts[:, None])[:, None, None, :]
        mask = None if features.device.type == "cpu" and bool(mask.all()) else mask  # no such look at a GPU: it waits
        places = waves(boxes)
        x = self.dropout(self.region(self.region_norm(features.float())) + self.box(places))
        for layer in self.encoder:
            x = layer(x, mask)
        x = self.memory_norm(x) + self.memory_box(places)
        keys, values = zip(*(layer.cross.project(x) for layer in self.decoder), strict=True)
        return Memory(keys, values, mask)

    def states(self, tokens: Tensor, memory: Memory, cache: KVCache | None = None) -> Tensor:
        """What the output layer reads after each of `tokens` [B,K,T]: states [B,K,T,D]."""
        start = 0 if cache is None else cache.length
        places = torch.arange(start, start + tokens.shape[2], device=tokens.device)
        x = self.dropout(self.word(tokens) * self.config.width**0.5 + self.position(places))
        for number, layer in enumerate(self.decoder):
            x = layer(x, memory, number, cache)
        if cache is not None:
            cache.length += tokens.shape[2]
        return self.norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """Scores of the words [...,V] by states [...,D]; the output layer shares the word embedding's matrix."""
        return F.linear(states, self.word.weight, self.output_bias)

    def decode(self, tokens: Tensor, memory: Memory, cache: KVCache | None = None) -> Tensor:
        """Score the next word after each of `tokens` [B,K,T]; returns logits [B,K,T,V].

        With a `cache`, `tokens` are only the new ones: any number in the first call, one per caption after it.
        """
        return self.logits(self.states(tokens, memory, cache))

    def forward(self, regions: Regions, tokens: Tensor) -> Tensor:
        """States [B,K,T,D] of whole captions: encode, then decode up to the output layer (training's entry)."""
        return self.states(tokens, self.encode(regions))

    def start(self, memory: Memory, captions: int) -> KVCache:
        """An empty decoding cache for `captions` captions an image of `memory`."""
        images, heads, _, depth = memory.keys[0].shape
        shape = (images, captions, heads, self.config.max_length + 1, depth)
        return KVCache(self.config.decoder_layers, shape, memory.keys[0])
