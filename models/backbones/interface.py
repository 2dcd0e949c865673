"""The interface of backbones. Extraction, caches and captioning use nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.regions import Regions


class Backbone(nn.Module, ABC):
    """A frozen network that computes the regions of photographs.

    name: the name in messages. from_hub: whether the hub has the weights; if not, caches store a
    copy.
    """

    name: str
    from_hub = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Largest number of regions R of an image, and number of channels C."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """A JSON record that must be equal for rows to be used together. `regions` is the name of
        the kind in its registry.
        """

    @abstractmethod
    def framing(self) -> dict[str, Any]:
        """How a photograph becomes the input: size (H, W), interpolation, resize, fill (RGB), as in
        data.images.Framing.
        """

    @abstractmethod
    def forward(self, pixels: Tensor, view_boxes: Tensor | None = None) -> Regions:
        """Regions of photographs, features [B,R,C] float32.

        pixels: [B,3,H,W] uint8 RGB of the framing's size. view_boxes: [B,4] the part of the
        photograph that the pixels show; None: the whole photograph.
        """

    def weights(self) -> Mapping[str, Tensor]:
        """The weights, of which a cache stores a copy."""
        return self.state_dict()
