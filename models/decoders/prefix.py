"""One stack of layers over the regions of an image and then the words of a text: early fusion.

The regions are a prefix of the text, as in ClipCap (Mokady et al. 2021) and in language models that
read images. Regions attend to regions. Words attend to all regions and to the earlier words of
their text, with the same weights. So the keys and values of the regions do not depend on the words:
they are computed once per image, for all its texts.

Letters in shapes: B images, R regions, N rows, Q queries, S keys, D model width, H heads, d = D/H.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoders.attention import KVCache, Layout, Packed, Selected
from models.decoders.layers import (
    RegionInput,
    SelfAttentionLayer,
    StackConfig,
    StackDecoder,
    StackOptions,
    region_mask,
)
from models.decoders.transformer import TransformerMemory
from models.regions import Regions


@dataclass(frozen=True)
class PrefixConfig(StackConfig):
    """The sizes of a prefix decoder. Raises ModelError if they do not fit together."""


class Prefix(StackDecoder):
    """Maps regions [B,R,C] and tokens [B,K,T] to logits [B,K,T,V]."""

    Config, Options = PrefixConfig, StackOptions
    config: PrefixConfig

    def __init__(self, config: PrefixConfig) -> None:
        super().__init__()
        self.config = config
        self.region = RegionInput(
            config.channels, config.width, config.dropout, config.more_channels
        )
        self.build_stack(config)

    def encode(self, regions: Regions) -> TransformerMemory:
        x, (mask, is_empty) = self.region(regions), region_mask(regions)
        layout = StoredKeys(mask)
        *layers, last = cast(Iterable[SelfAttentionLayer], self.layers)
        for layer in layers:
            x = layer(x, layout)
        # of the last layer only the keys and values are used
        layout.extend(0, *last.attention.keys_and_values(last.norms[0](x)))
        if is_empty is not None and mask is not None:  # words do not attend to padding
            mask = mask.masked_fill(is_empty[:, None, None, None], float("-inf"))
        return TransformerMemory(tuple(layout.keys), tuple(layout.values), mask)

    def states(
        self, words: Tensor, positions: Tensor, layout: Packed | KVCache, memory: TransformerMemory
    ) -> Tensor:
        return self.run_stack(self.embed(words, positions), AfterRegions(layout, memory))

    def selected_states(self, words: Tensor, text: Packed, memory: TransformerMemory) -> Tensor:
        assert text.selected is not None
        layout = AfterRegions(text, memory)
        mask = layout.with_regions(text.selected.mask)
        assert mask is not None
        selected = Selected(text.selected.rows, mask)
        return self.run_stack(self.embed(words, text.positions), layout, selected)

    def init_cache(
        self, memory: TransformerMemory, texts: int, prompts: Tensor | None = None
    ) -> KVCache:
        return self.new_cache(memory.keys[0], texts, prompts)


class StoredKeys(Layout):
    """The layout of regions. It stores the keys and values [B,H,R,d] of each layer."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__(mask)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.append(keys)
        self.values.append(values)
        return keys, values


class AfterRegions(Layout):
    """The layout of words that also attend to the regions of their image."""

    def __init__(self, words: Packed | KVCache, memory: TransformerMemory) -> None:
        """words: the layout of the words alone. memory: of the same images."""
        self.words, self.memory = words, memory
        super().__init__(self.with_regions(words.mask))

    def with_regions(self, mask: Tensor | None) -> Tensor | None:
        """Add the regions to the mask [B,1,Q,S] of words: [B,1,Q,R+S]; None: all are visible."""
        regions = self.memory.keys[0].shape[2]
        if self.memory.mask is None:
            return None if mask is None else F.pad(mask, (regions, 0))
        if mask is None:  # one text per image, which attends to all its words
            assert isinstance(self.words, KVCache)
            return F.pad(self.memory.mask, (0, self.words.length))
        of_regions = self.memory.mask.expand(-1, -1, mask.shape[2], -1)
        return torch.cat([of_regions.to(mask.dtype), mask], dim=3)

    def pad(self, rows: Tensor) -> Tensor:
        return self.words.pad(rows)

    def unpad(self, sequences: Tensor) -> Tensor:
        return self.words.unpad(sequences)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.words.extend(layer, keys, values)
        return (
            torch.cat([self.memory.keys[layer], keys], dim=2),
            torch.cat([self.memory.values[layer], values], dim=2),
        )
