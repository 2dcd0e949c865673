"""A Transformer that encodes an image's regions once and decodes its texts over them.

Pre-norm layers (Xiong et al. 2020) of Vaswani et al. 2017. B images, R regions, C channels, K texts
an image, T tokens, N rows, V words, D model width, H heads, d = D/H.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from models import ModelError
from models.decoders.attention import (
    CrossAttention,
    KVCache,
    Layout,
    Packed,
    SelfAttention,
    additive,
    move,
)
from models.decoders.dropout import Dropout
from models.decoders.interface import MOST_LAYERS, Decoder, DecoderConfig, size
from models.regions import Regions

BOX_FREQUENCIES = (
    4  # pi/2 to 4 pi a coordinate: cells of a grid of up to about 16 a side stay apart
)


@dataclass(frozen=True)
class TransformerOptions:
    """Options of the Transformer: its sizes."""

    width: int = size(512, "model width D")
    heads: int = size(8, "attention heads")
    encoder_layers: int = size(3, "encoder layers (regions)", at_least=0, at_most=MOST_LAYERS)
    decoder_layers: int = size(3, "decoder layers (words)", at_most=MOST_LAYERS)
    feedforward: int = size(2048, "inner width of the feed-forward layers")
    dropout: float = field(default=0.1, metadata={"help": "dropout", "at_least": 0, "below": 1})


@dataclass(frozen=True)
class TransformerConfig(TransformerOptions, DecoderConfig):
    """The sizes of a Transformer decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ModelError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout is {self.dropout}, it must be in [0, 1)")

    def __str__(self) -> str:
        return (
            f"width {self.width}, {self.encoder_layers}+{self.decoder_layers} layers, "
            f"dropout {self.dropout}"
        )


class TransformerMemory(NamedTuple):
    """An encoded batch of images: keys and values [B,H,R,d] for each decoder layer; mask [B,1,1,R]
    to add, or None.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None

    @property
    def images(self) -> int:
        return self.keys[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def tensors(self) -> tuple[Tensor, ...]:
        return (
            (*self.keys, *self.values)
            if self.mask is None
            else (*self.keys, *self.values, self.mask)
        )

    def keep(self, images: Tensor, in_place: bool = False) -> TransformerMemory:
        """These images, [b] int64; in_place: moved to the front of this memory, which is not used
        any more.
        """
        mask = None if self.mask is None else self.mask[images]
        regions = self.keys[0].shape[2]
        take = (
            (lambda part: move(part, images, regions))
            if in_place
            else (lambda part: part.index_select(0, images))
        )
        return TransformerMemory(tuple(map(take, self.keys)), tuple(map(take, self.values)), mask)


class FeedForward(nn.Sequential):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class EncoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x [B,R,D] to [B,R,D]."""
        x = x + self.dropout(self.attention(self.norms[0](x), layout))
        return x + self.dropout(self.feedforward(self.norms[1](x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads)
        self.cross = CrossAttention(config.width, config.heads)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, layout: Layout, memory: TransformerMemory, layer: int) -> Tensor:
        """Rows x [N,D] to [N,D]."""
        x = x + self.dropout(self.attention(self.norms[0](x), layout, layer))
        x = x + self.dropout(
            self.cross(
                self.norms[1](x), layout, memory.keys[layer], memory.values[layer], memory.mask
            )
        )
        return x + self.dropout(self.feedforward(self.norms[2](x)))


def fourier_features(boxes: Tensor) -> Tensor:
    """Coordinates [...,n] in -1..1 as sines and cosines of growing frequency (Tancik et al.

    2020), [...,2*n*BOX_FREQUENCIES].
    """
    angles = boxes[..., None] * (
        math.pi / 2 * 2.0 ** torch.arange(BOX_FREQUENCIES, device=boxes.device)
    )
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class Transformer(Decoder):
    """Regions [B,R,C] and tokens [B,K,T] to logits [B,K,T,V]; the output layer shares the word
    embedding's matrix.
    """

    Config, Options = TransformerConfig, TransformerOptions
    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.region_norm = nn.LayerNorm(config.channels)
        self.region = nn.Linear(config.channels, width)
        self.box = nn.Linear(8 * BOX_FREQUENCIES, width)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.memory_norm = nn.LayerNorm(width)
        self.memory_box = nn.Linear(8 * BOX_FREQUENCIES, width)
        self.word = nn.Embedding(config.words, width)
        self.position = nn.Embedding(config.max_prompt + config.max_length + 1, width)
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
        # as large as the normed content beside it
        nn.init.normal_(self.memory_box.weight, std=(4 * BOX_FREQUENCIES) ** -0.5)
        for layers, sublayers in ((self.encoder, 2), (self.decoder, 3)):
            for (
                name,
                weight,
                # what is added to the stream begins small (GPT-2's rule)
            ) in layers.named_parameters():
                if name.endswith(
                    ("attention.out.weight", "cross.out.weight", "feedforward.2.weight")
                ):
                    weight.data.mul_((sublayers * len(layers)) ** -0.5)

    def encode(self, regions: Regions) -> TransformerMemory:
        features, boxes, counts = regions
        is_region = (torch.arange(features.shape[1], device=features.device) < counts[:, None])[
            :, None, None, :
        ]
        on_cpu = features.device.type == "cpu"  # a GPU is not asked: the host would wait for it
        no_padding = on_cpu and bool(is_region.all())
        some_empty = not no_padding and not (on_cpu and bool((counts > 0).all()))
        if some_empty:  # an image without regions sees its padding, whose values are set to 0 below
            is_region = is_region | (counts == 0)[:, None, None, None]
        layout = Layout(None if no_padding else additive(is_region))
        places = fourier_features(boxes)
        x = self.dropout(self.region(self.region_norm(features.float())) + self.box(places))
        for layer in self.encoder:
            x = layer(x, layout)
        x = self.memory_norm(x) + self.memory_box(places)
        layers = cast(Iterable[DecoderLayer], self.decoder)
        keys, values = zip(*(layer.cross.project(x) for layer in layers), strict=True)
        if some_empty:
            has_regions = (counts > 0)[:, None, None, None]
            values = tuple(value * has_regions for value in values)
        return TransformerMemory(keys, values, layout.mask)

    def states(
        self, words: Tensor, positions: Tensor, layout: Packed | KVCache, memory: TransformerMemory
    ) -> Tensor:
        x = self.dropout(self.word(words) * self.config.width**0.5 + self.position(positions))
        for number, layer in enumerate(self.decoder):
            x = layer(x, layout, memory, number)
        return self.norm(x)

    def output_layer(self) -> tuple[Tensor, Tensor]:
        return self.word.weight, self.output_bias

    def init_cache(
        self, memory: TransformerMemory, texts: int, prompts: Tensor | None = None
    ) -> KVCache:
        return KVCache(
            self.config.decoder_layers, texts, self.config.max_length + 1, memory.keys[0], prompts
        )
