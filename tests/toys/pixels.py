"""A kind of regions: random projections of the pixels of equal columns of a photograph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.backbones.interface import Backbone
from models.regions import Regions, grid_boxes
from pipeline.extraction.registry import RegionsKind

SIDE, CHANNELS = 24, 16


@dataclass(frozen=True)
class PixelOptions:
    columns: int = field(
        default=4, metadata={"help": "columns of a photograph", "at_least": 1, "at_most": SIDE}
    )


class PixelProjections(Backbone):
    name = "random projections of pixels"

    def __init__(self, columns: int, seed: int) -> None:
        super().__init__()
        self.columns, self.seed = columns, seed
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("matrix", torch.randn(3 * SIDE, CHANNELS, generator=generator) / SIDE)

    @property
    def shape(self) -> tuple[int, int]:
        return self.columns, CHANNELS

    def identity(self) -> dict[str, Any]:
        return {"regions": "pixels", "columns": self.columns, "seed": self.seed}

    def framing(self) -> dict[str, Any]:
        return {"size": (SIDE, SIDE), "interpolation": "bilinear"}

    def forward(self, pixels: Tensor, view_boxes: Tensor | None = None) -> Regions:
        columns = torch.nn.functional.adaptive_avg_pool2d(
            pixels.float() / 255, (SIDE, self.columns)
        )  # [B,3,SIDE,columns]
        features = columns.permute(0, 3, 1, 2).flatten(2) @ self.matrix
        boxes = grid_boxes(1, self.columns).to(pixels.device).expand(len(pixels), -1, -1)
        return Regions(
            features, boxes, torch.full((len(pixels),), self.columns, device=pixels.device)
        )


def open_pixels(options: PixelOptions, dataset: str, seed: int) -> PixelProjections:
    return PixelProjections(options.columns, seed)


def restore_pixels(folder: Path, identity: Mapping[str, Any]) -> PixelProjections:
    found = PixelProjections(identity["columns"], identity["seed"])
    found.load_state_dict(load_file(folder / "backbone.safetensors"))
    return found


PIXELS = RegionsKind(open_pixels, restore_pixels, PixelOptions)
