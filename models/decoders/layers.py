"""Layers that several decoders use.

Letters in shapes: B images, R regions, N rows, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import ModelError
from models.decoders.attention import KVCache, Layout, Selected, SelfAttention, additive_mask
from models.decoders.dropout import Dropout
from models.decoders.interface import MAX_LAYERS, Decoder, DecoderConfig, size
from models.regions import Regions

# Frequencies pi/2 to 4 pi per coordinate. They separate the cells of grids up to about 16 x 16.
BOX_FREQUENCIES = 4
BOX_FEATURES = 8 * BOX_FREQUENCIES  # Fourier features of the four coordinates of a box


@dataclass(frozen=True)
class StackOptions:
    """The command-line options of decoders with a stack of attention layers over the words."""

    width: int = size(512, "model width D")
    heads: int = size(8, "attention heads")
    decoder_layers: int = size(3, "decoder layers (words)", at_most=MAX_LAYERS)
    feedforward: int = size(2048, "inner width of the feed-forward layers")
    dropout: float = field(default=0.1, metadata={"help": "dropout", "at_least": 0, "below": 1})


@dataclass(frozen=True)
class StackConfig(StackOptions, DecoderConfig):
    """The sizes of such a decoder. Raises ModelError if they do not fit together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ModelError(f"width {self.width} is not a multiple of heads {self.heads}")
        check_dropout(self.dropout)

    def __str__(self) -> str:
        return f"width {self.width}, {self.decoder_layers} layers, dropout {self.dropout}"


def check_dropout(dropout: float) -> None:
    """Raise ModelError unless a dropout probability is in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ModelError(f"dropout is {dropout}, it must be in [0, 1)")


def fourier_features(boxes: Tensor) -> Tensor:
    """Fourier features of coordinates: their sines and cosines at several frequencies.

    boxes: [...,n] coordinates in 0..1. Returns [...,2*n*BOX_FREQUENCIES].
    Reference: Tancik et al. 2020.
    """
    frequencies = math.pi / 2 * 2.0 ** torch.arange(BOX_FREQUENCIES, device=boxes.device)
    angles = boxes[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class SecondKind(nn.Module):
    """The projection of a second kind of regions, and a learned embedding of the kind."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.feature = nn.Linear(channels, width)
        self.kind = nn.Embedding(2, width)

    def forward(self, first: Tensor, regions: Regions) -> Tensor:
        """Replace the rows of the second kind in `first` [B,R,D], and add the embeddings.

        first: the projected features, as if all regions were of the first kind.
        """
        features, _, counts = regions
        is_second = torch.arange(first.shape[1], device=first.device) >= counts[:, :1]
        second = self.feature(self.norm(features[..., : self.norm.normalized_shape[0]].float()))
        x = torch.where(is_second[..., None], second.to(first.dtype), first)
        return x + self.kind(is_second.long())


class RegionInput(nn.Module):
    """The first layer over regions: features and boxes, mapped to the model width.

    more_channels: channels of the second kind of regions; 0: there is one kind.
    """

    def __init__(self, channels: int, width: int, dropout: float, more_channels: int = 0) -> None:
        super().__init__()
        self.channels = channels
        self.norm = nn.LayerNorm(channels)
        self.feature = nn.Linear(channels, width)
        self.box = nn.Linear(BOX_FEATURES, width)
        self.dropout = Dropout(dropout)
        if more_channels:
            self.second = SecondKind(more_channels, width)

    def forward(self, regions: Regions) -> Tensor:
        """Map the features [B,R,C] and boxes [B,R,4] to [B,R,D]."""
        features = self.feature(self.norm(regions.features[..., : self.channels].float()))
        if hasattr(self, "second"):
            features = self.second(features, regions)
        return self.dropout(features + self.box(fourier_features(regions.boxes)))


class RegionMask(NamedTuple):
    """Which regions are padding.

    mask: [B,1,1,R], 0 for regions and -inf for padding, to add to attention scores; None: no
        padding. An image without regions attends to its padding, because a row of -inf alone would
        give NaN.
    is_empty: [B] bool, images without regions; None: there are none.
    """

    mask: Tensor | None
    is_empty: Tensor | None


def region_mask(regions: Regions) -> RegionMask:
    """Compute the mask of the padding after `regions.counts`."""
    features, counts = regions.features, regions.totals
    visible = torch.arange(features.shape[1], device=features.device) < counts[:, None]
    # Only a CPU checks the counts: on a GPU the host would have to wait, and a graph has no host.
    on_cpu = features.device.type == "cpu" and not torch.compiler.is_exporting()
    if on_cpu and bool(visible.all()):
        return RegionMask(None, None)
    is_empty = None if on_cpu and bool((counts > 0).all()) else counts == 0
    if is_empty is not None:
        visible = visible | is_empty[:, None]
    return RegionMask(additive_mask(visible)[:, None, None], is_empty)


class FeedForward(nn.Sequential):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class SelfAttentionLayer(nn.Module):
    """Self-attention and a feed-forward layer, normalised first (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.feedforward = FeedForward(width, feedforward)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, layout: Layout, layer: int = 0, selected: Selected | None = None
    ) -> Tensor:
        """Map rows x [...,D] to [...,D], or to [B,Q',D] if only some tokens are `selected`.

        layer: index of the layer, to select its keys and values in a KVCache.
        """
        attended = self.dropout(self.attention(self.norms[0](x), layout, layer, selected))
        if selected is not None:
            x = x[selected.rows]
        x = x + attended
        return x + self.dropout(self.feedforward(self.norms[1](x)))


class StackDecoder(Decoder):
    """The common parts of decoders with one stack of self-attention layers over the words.

    The output layer and the word embedding share one matrix.
    """

    config: StackConfig

    def build_stack(self, config: StackConfig) -> None:
        """Create the parts. A subclass calls this last, since it sets the weights of all parts."""
        width = config.width
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

    def embed(self, words: Tensor, positions: Tensor) -> Tensor:
        """Embed tokens [N] at their positions [N]: [N,D], without dropout."""
        return self.word(words) * self.config.width**0.5 + self.position(positions)

    def run_stack(self, x: Tensor, layout: Layout, selected: Selected | None = None) -> Tensor:
        """The final states of embedded tokens x [N,D], or only of those `selected` [B,Q',D]."""
        x = self.dropout(x)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer(x, layout, number, selected if number == last else None)
        return self.norm(x)

    def output_layer(self) -> tuple[Tensor, Tensor]:
        return self.word.weight, self.output_bias

    def new_cache(self, like: Tensor, texts: int, prompts: Tensor | None) -> KVCache:
        """like, texts, prompts: as in KVCache."""
        layers, length = self.config.decoder_layers, self.config.max_length + 1
        return KVCache(layers, texts, length, like, prompts)


@torch.no_grad()
def initialize_weights(decoder: nn.Module) -> None:
    """Set the weights of linear layers as in Glorot and Bengio 2010, and embeddings as in GPT-2."""
    for module in decoder.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def scale_residual_branches(layers: nn.ModuleList, branches: int) -> None:
    """Scale down the output weights of all residual branches, as GPT-2 does.

    branches: residual branches per layer.
    """
    outputs = ("attention.out.weight", "cross.out.weight", "feedforward.2.weight")
    for name, weight in layers.named_parameters():
        if name.endswith(outputs):
            weight.mul_((branches * len(layers)) ** -0.5)
