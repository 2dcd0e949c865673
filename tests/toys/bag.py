"""A decoder: the mean of an image's regions and the mean of the words so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.decoders.attention import KVCache, Layout, SelfAttention
from models.decoders.interface import Decoder, DecoderConfig
from models.regions import Regions


@dataclass(frozen=True)
class BagOptions:
    bag_width: int = field(default=32, metadata={"help": "width of the bag", "at_least": 1})


@dataclass(frozen=True)
class BagConfig(BagOptions, DecoderConfig):
    pass


class BagMemory(NamedTuple):
    mean: Tensor  # [B,D]

    @property
    def images(self) -> int:
        return len(self.mean)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.mean,)

    def keep(self, images: Tensor, in_place: bool = False) -> BagMemory:
        return BagMemory(self.mean[images])


class BagOfRegions(Decoder):
    Config, Options = BagConfig, BagOptions

    def __init__(self, config: BagConfig) -> None:
        super().__init__()
        self.config, width = config, config.bag_width
        self.region = nn.Linear(config.channels, width)
        self.word = nn.Embedding(config.words, width)
        self.position = nn.Embedding(config.max_prompt + config.max_length + 1, width)
        self.mix = SelfAttention(width, 1)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.words)

    def encode(self, regions: Regions) -> BagMemory:
        is_region = (
            torch.arange(regions.features.shape[1], device=regions.features.device)
            < regions.counts[:, None]
        )
        total = (self.region(regions.features.float()) * is_region[..., None]).sum(1)
        return BagMemory(total / regions.counts.clamp(min=1)[:, None])

    def states(self, words: Tensor, positions: Tensor, layout: Layout, memory: BagMemory) -> Tensor:
        x = self.word(words) + self.position(positions) + memory.mean[layout.image]
        return self.norm(x + self.mix(x, layout))

    def output_layer(self) -> tuple[Tensor, Tensor]:
        return self.out.weight, self.out.bias

    def init_cache(self, memory: BagMemory, texts: int, prompts: Tensor | None = None) -> KVCache:
        like = memory.mean[:, None, None]
        return KVCache(1, texts, self.config.max_length + 1, like, prompts)
