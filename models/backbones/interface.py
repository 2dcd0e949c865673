"""What every backbone offers. Extraction, caches and captioning use nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.regions import Regions


class Backbone(nn.Module, ABC):
    """A frozen network that gives the regions of photographs.

    name: as messages call it.
    from_hub: whether its weights can be fetched again by its identity; if not, caches keep a copy.
    """

    name: str
    from_hub = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Regions R of an image at most, and channels C."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be equal for rows to be used together, as JSON has it; `regions` is the kind's
        name in its registry.
        """

    @abstractmethod
    def framing(self) -> dict[str, Any]:
        """How a photograph becomes its input: size (H, W), interpolation, resize, fill (RGB), as
        data.images.Framing has them.
        """

    @abstractmethod
    def forward(self, pixels: Tensor, view_boxes: Tensor | None = None) -> Regions:
        """Regions of uint8 `pixels` [B,3,H,W], RGB, of the framing's size; features [B,R,C]
        float32.

        view_boxes: [B,4] the part of the photograph that each shows; None: the whole photograph.
        """

    def weights(self) -> Mapping[str, Tensor]:
        """The weights that a cache keeps a copy of."""
        return self.state_dict()
