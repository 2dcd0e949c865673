"""A Transformer that encodes the regions of an image once and decodes all its texts.

The layers are those of Vaswani et al. 2017, with layer normalisation first (Xiong et al. 2020).

Letters in shapes: B images, R regions, C channels, K texts per image, T tokens, N rows, V words,
D model width, H heads, d = D/H.
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
    Selected,
    SelfAttention,
    additive_mask,
    move_to_front,
)
from models.decoders.dropout import Dropout
from models.decoders.interface import MAX_LAYERS, Decoder, DecoderConfig, size
from models.regions import Regions

# Frequencies pi/2 to 4 pi per coordinate. They separate the cells of grids up to about 16 x 16.
BOX_FREQUENCIES = 4


@dataclass(frozen=True)
class TransformerOptions:
    """The command-line options of the Transformer."""

    width: int = size(512, "model width D")
    heads: int = size(8, "attention heads")
    encoder_layers: int = size(3, "encoder layers (regions)", at_least=0, at_most=MAX_LAYERS)
    decoder_layers: int = size(3, "decoder layers (words)", at_most=MAX_LAYERS)
    feedforward: int = size(2048, "inner width of the feed-forward layers")
    dropout: float = field(default=0.1, metadata={"help": "dropout", "at_least": 0, "below": 1})


@dataclass(frozen=True)
class TransformerConfig(TransformerOptions, DecoderConfig):
    """The sizes of a Transformer decoder. Raises ModelError if they do not fit together."""

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
    """An encoded batch of images.

    keys, values: one tensor [B,H,R,d] for each decoder layer.
    mask: [B,1,1,R], added to the attention scores: -inf for padding; None: no padding.
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
        mask = () if self.mask is None else (self.mask,)
        return *self.keys, *self.values, *mask

    def keep(self, images: Tensor, in_place: bool = False) -> TransformerMemory:
        """Select `images` [b] int64; an index may occur several times.

        in_place: move the images to the front of this memory's storage. The caller must not use
            this memory afterwards.
        """
        mask = None if self.mask is None else self.mask[images]
        regions = self.keys[0].shape[2]

        def select(part: Tensor) -> Tensor:
            if in_place:
                return move_to_front(part, images, regions)
            return part.index_select(0, images)

        keys, values = tuple(map(select, self.keys)), tuple(map(select, self.values))
        return TransformerMemory(keys, values, mask)


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
        """Map x [B,R,D] to [B,R,D]."""
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

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        memory: TransformerMemory,
        layer: int,
        selected: Selected | None = None,
    ) -> Tensor:
        """Map rows x [N,D] to [N,D], or to [B,Q',D] if only some tokens are `selected`."""
        keys, values = memory.keys[layer], memory.values[layer]
        attended = self.dropout(self.attention(self.norms[0](x), layout, layer, selected))
        if selected is not None:
            x, layout = x[selected.rows], selected
        x = x + attended
        x = x + self.dropout(self.cross(self.norms[1](x), layout, keys, values, memory.mask))
        return x + self.dropout(self.feedforward(self.norms[2](x)))


def fourier_features(boxes: Tensor) -> Tensor:
    """Fourier features of coordinates: their sines and cosines at several frequencies.

    boxes: [...,n] coordinates in 0..1. Returns [...,2*n*BOX_FREQUENCIES].
    Reference: Tancik et al. 2020.
    """
    frequencies = math.pi / 2 * 2.0 ** torch.arange(BOX_FREQUENCIES, device=boxes.device)
    angles = boxes[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class Transformer(Decoder):
    """Maps regions [B,R,C] and tokens [B,K,T] to logits [B,K,T,V].

    The output layer and the word embedding share one matrix.
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
        # Scale the box features like the layer-normalised states that they are added to.
        nn.init.normal_(self.memory_box.weight, std=(4 * BOX_FREQUENCIES) ** -0.5)
        # Scale down the output weights of all residual branches, as GPT-2 does.
        outputs = ("attention.out.weight", "cross.out.weight", "feedforward.2.weight")
        for layers, sublayers in ((self.encoder, 2), (self.decoder, 3)):
            for name, weight in layers.named_parameters():
                if name.endswith(outputs):
                    weight.data.mul_((sublayers * len(layers)) ** -0.5)

    def encode(self, regions: Regions) -> TransformerMemory:
        features, boxes, counts = regions
        indices = torch.arange(features.shape[1], device=features.device)
        visible = (indices < counts[:, None])[:, None, None, :]
        # Only a CPU checks the counts: on a GPU the host would have to wait for the result.
        on_cpu = features.device.type == "cpu"
        no_padding = on_cpu and bool(visible.all())
        may_be_empty = not no_padding and not (on_cpu and bool((counts > 0).all()))
        if may_be_empty:
            # An image without regions attends to its padding, whose values are set to 0 below.
            visible = visible | (counts == 0)[:, None, None, None]
        layout = Layout(None if no_padding else additive_mask(visible))
        box_features = fourier_features(boxes)
        x = self.dropout(self.region(self.region_norm(features.float())) + self.box(box_features))
        for layer in self.encoder:
            x = layer(x, layout)
        x = self.memory_norm(x) + self.memory_box(box_features)
        layers = cast(Iterable[DecoderLayer], self.decoder)
        keys, values = zip(*(layer.cross.project(x) for layer in layers), strict=True)
        if may_be_empty:
            has_regions = (counts > 0)[:, None, None, None]
            values = tuple(value * has_regions for value in values)
        return TransformerMemory(keys, values, layout.mask)

    def states(
        self, words: Tensor, positions: Tensor, layout: Packed | KVCache, memory: TransformerMemory
    ) -> Tensor:
        return self._states(words, positions, layout, memory)

    def selected_states(self, words: Tensor, text: Packed, memory: TransformerMemory) -> Tensor:
        return self._states(words, text.positions, text, memory, text.selected)

    def _states(
        self,
        words: Tensor,
        positions: Tensor,
        layout: Packed | KVCache,
        memory: TransformerMemory,
        selected: Selected | None = None,
    ) -> Tensor:
        x = self.dropout(self.word(words) * self.config.width**0.5 + self.position(positions))
        last = len(self.decoder) - 1
        for number, layer in enumerate(self.decoder):
            x = layer(x, layout, memory, number, selected if number == last else None)
        return self.norm(x)

    def output_layer(self) -> tuple[Tensor, Tensor]:
        return self.word.weight, self.output_bias

    def init_cache(
        self, memory: TransformerMemory, texts: int, prompts: Tensor | None = None
    ) -> KVCache:
        return KVCache(
            self.config.decoder_layers, texts, self.config.max_length + 1, memory.keys[0], prompts
        )
