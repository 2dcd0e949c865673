"""A Transformer that encodes the regions of an image once and decodes all its texts.

The layers are those of Vaswani et al. 2017, with layer normalisation first (Xiong et al. 2020).

Letters in shapes: B images, R regions, C channels, K texts per image, T tokens, N rows, V words,
D model width, H heads, d = D/H.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ModelError
from models.decoders.attention import (
    CrossAttention,
    KVCache,
    Layout,
    Packed,
    Selected,
    SelfAttention,
    move_to_front,
)
from models.decoders.dropout import Dropout
from models.decoders.interface import MAX_LAYERS, Decoder, size
from models.decoders.layers import (
    BOX_FEATURES,
    BOX_FREQUENCIES,
    FeedForward,
    SecondKind,
    SelfAttentionLayer,
    StackConfig,
    StackOptions,
    fourier_features,
    initialize_weights,
    region_mask,
    scale_residual_branches,
)
from models.regions import Regions

GEOMETRY_WAVES = 8  # waves per relative coordinate, each with a sine and a cosine


@dataclass(frozen=True)
class TransformerOptions(StackOptions):
    """The command-line options of the Transformer."""

    encoder_layers: int = size(3, "encoder layers (regions)", at_least=0, at_most=MAX_LAYERS)
    memory_slots: int = size(
        0, "learnt keys and values per encoder layer (M2 Transformer)", at_least=0
    )
    meshed: bool = field(
        default=False, metadata={"help": "decoder layers read all encoder layers (M2 Transformer)"}
    )
    relative_geometry: bool = field(
        default=False,
        metadata={"help": "encoder attention depends on the relative positions of boxes"},
    )


@dataclass(frozen=True)
class TransformerConfig(TransformerOptions, StackConfig):
    """The sizes of a Transformer decoder. Raises ModelError if they do not fit together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("memory_slots", "meshed", "relative_geometry"):
            if getattr(self, name) and not self.encoder_layers:
                raise ModelError(f"{name} needs encoder layers, but encoder_layers is 0")

    def __str__(self) -> str:
        extras = "".join(
            f", {part}"
            for part, is_on in (
                (f"{self.memory_slots} memory slots", self.memory_slots),
                ("meshed", self.meshed),
                ("relative geometry", self.relative_geometry),
            )
            if is_on
        )
        return (
            f"width {self.width}, {self.encoder_layers}+{self.decoder_layers} layers, "
            f"dropout {self.dropout}{extras}"
        )


class TransformerMemory(NamedTuple):
    """An encoded batch of images.

    keys, values: one tensor [B,H,R,d] for each decoder layer. Of a meshed decoder, one for each
        decoder layer and encoder layer: those of the first decoder layer come first.
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


class DecoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads)
        self.cross = CrossAttention(config.width, config.heads)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = Dropout(config.dropout)
        if config.meshed:
            self.gates = nn.ModuleList(
                nn.Linear(2 * config.width, config.width) for _ in range(config.encoder_layers)
            )

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        memory: TransformerMemory,
        layer: int,
        selected: Selected | None = None,
    ) -> Tensor:
        """Map rows x [N,D] to [N,D], or to [B,Q',D] if only some tokens are `selected`."""
        attended = self.dropout(self.attention(self.norms[0](x), layout, layer, selected))
        if selected is not None:
            x, layout = x[selected.rows], selected
        x = x + attended
        x = x + self.dropout(self._read_regions(self.norms[1](x), layout, memory, layer))
        return x + self.dropout(self.feedforward(self.norms[2](x)))

    def _read_regions(
        self, x: Tensor, layout: Layout, memory: TransformerMemory, layer: int
    ) -> Tensor:
        if not hasattr(self, "gates"):
            return self.cross(x, layout, memory.keys[layer], memory.values[layer], memory.mask)
        read = torch.zeros_like(x)
        for number, gate in enumerate(self.gates, start=layer * len(self.gates)):
            keys, values = memory.keys[number], memory.values[number]
            part = self.cross(x, layout, keys, values, memory.mask)
            read = read + gate(torch.cat([x, part], dim=-1)).sigmoid() * part
        return read * len(self.gates) ** -0.5


class EncoderLayout(Layout):
    """The layout of regions that also attend to learnt memory slots (Cornia et al. 2020)."""

    def __init__(self, mask: Tensor | None, keys: Tensor, values: Tensor) -> None:
        """mask: of the regions, as in `Layout`. keys, values: [H,slots,d]."""
        super().__init__(None if mask is None else F.pad(mask, (0, keys.shape[1])))
        self.keys, self.values = keys, values

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return (
            torch.cat([keys, self.keys.to(keys.dtype).expand(keys.shape[0], -1, -1, -1)], dim=2),
            torch.cat(
                [values, self.values.to(keys.dtype).expand(keys.shape[0], -1, -1, -1)], dim=2
            ),
        )


class RelativeGeometry(nn.Module):
    """Terms of attention scores that depend on the relative positions of two boxes.

    The term of a pair is log(max(0, w . e)), where e is from `box_relations` and each head learns
    its w (Herdade et al. 2019).
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Linear(8 * GEOMETRY_WAVES, heads)

    def forward(self, relations: Tensor) -> Tensor:
        """Map relations [B,R,R,8*GEOMETRY_WAVES] to terms [B,H,R,R]."""
        terms = self.weight(relations).float()
        return terms.clamp(min=1e-6).log().permute(0, 3, 1, 2)


def box_relations(boxes: Tensor) -> Tensor:
    """Sines and cosines of the logs of the distances of boxes and of the ratios of their sizes.

    boxes: [B,R,4]. Returns [B,R,R,8*GEOMETRY_WAVES]; B is 1 if all images have the same boxes.
    """
    on_cpu = boxes.device.type == "cpu" and not torch.compiler.is_exporting()
    if on_cpu and len(boxes) and bool((boxes == boxes[:1]).all()):
        boxes = boxes[:1]  # the cells of a grid
    low, high = boxes[..., :2], boxes[..., 2:]
    centres, sizes = (low + high) / 2, (high - low).clamp(min=1e-3)
    distances = (centres[:, :, None] - centres[:, None]).abs().clamp(min=1e-3)
    relative = torch.cat([distances / sizes[:, :, None], sizes[:, None] / sizes[:, :, None]], dim=3)
    waves = 1000.0 ** -(torch.arange(GEOMETRY_WAVES, device=boxes.device) / GEOMETRY_WAVES)
    angles = (100 * relative.log()[..., None] * waves).flatten(3)
    return torch.cat([angles.sin(), angles.cos()], dim=3)


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
        self.box = nn.Linear(BOX_FEATURES, width)
        if config.more_channels:
            self.second = SecondKind(config.more_channels, width)
        self.encoder = nn.ModuleList(
            SelfAttentionLayer(width, config.heads, config.feedforward, config.dropout)
            for _ in range(config.encoder_layers)
        )
        self.memory_norm = nn.LayerNorm(width)
        self.memory_box = nn.Linear(BOX_FEATURES, width)
        self.word = nn.Embedding(config.words, width)
        self.position = nn.Embedding(config.max_prompt + config.max_length + 1, width)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.output_bias = nn.Parameter(torch.zeros(config.words))
        if config.relative_geometry:
            self.geometry = nn.ModuleList(RelativeGeometry(config.heads) for _ in self.encoder)
        if config.memory_slots:
            slots = config.encoder_layers, config.heads, config.memory_slots, width // config.heads
            self.slot_keys, self.slot_values = (nn.Parameter(torch.empty(slots)) for _ in range(2))
            nn.init.normal_(self.slot_keys, std=slots[3] ** -0.5)
            nn.init.normal_(self.slot_values, std=slots[2] ** -0.5)
        initialize_weights(self)
        if config.relative_geometry:  # from a bias of 0, half of the terms would begin at -14
            for geometry in cast(Iterable[RelativeGeometry], self.geometry):
                nn.init.ones_(geometry.weight.bias)
        # Scale the box features like the layer-normalised states that they are added to.
        nn.init.normal_(self.memory_box.weight, std=(4 * BOX_FREQUENCIES) ** -0.5)
        scale_residual_branches(self.encoder, 2)
        scale_residual_branches(self.decoder, 3)

    def encode(self, regions: Regions) -> TransformerMemory:
        features, boxes, _ = regions
        mask, is_empty = region_mask(regions)
        box_features = fourier_features(boxes)
        x = self.region(self.region_norm(features[..., : self.config.channels].float()))
        if hasattr(self, "second"):
            x = self.second(x, regions)
        x = self.dropout(x + self.box(box_features))
        relations = box_relations(boxes) if self.config.relative_geometry else None
        outputs = []
        for number, layer in enumerate(self.encoder):
            x = layer(x, self._encoder_layout(mask, relations, number))
            outputs.append(x)
        if not self.config.meshed:
            outputs = [x]
        box = self.memory_box(box_features)
        outputs = [self.memory_norm(output) + box for output in outputs]
        layers = cast(Iterable[DecoderLayer], self.decoder)
        keys, values = zip(
            *(layer.cross.project(output) for layer in layers for output in outputs), strict=True
        )
        if is_empty is not None:
            values = tuple(value * ~is_empty[:, None, None, None] for value in values)
        return TransformerMemory(keys, values, mask)

    def _encoder_layout(self, mask: Tensor | None, relations: Tensor | None, layer: int) -> Layout:
        if relations is not None:
            terms = self.geometry[layer](relations)
            mask = terms if mask is None else terms + mask
        if self.config.memory_slots:
            return EncoderLayout(mask, self.slot_keys[layer], self.slot_values[layer])
        return Layout(mask)

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
