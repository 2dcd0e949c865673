"""The interface of backbones, used by extraction, caches and captioning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.regions import Regions

Pixels = Tensor | Sequence[Tensor]


class Backbone(nn.Module, ABC):
    """A frozen network that computes the regions of photographs.

    name: the name for messages.
    from_hub: whether the identity is enough to download the weights again. If not, each cache keeps
        a copy of the weights.
    tables: names of further values of each region that a cache stores, of `scores` and `labels`.
    batch: default number of images per forward pass.
    """

    name: str
    from_hub = False
    tables: tuple[str, ...] = ()
    batch = 32

    @property
    def parts(self) -> tuple[Backbone, ...]:
        """The backbones of the kinds of regions that stand side by side; usually one."""
        return (self,)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(R, C): the maximum number of regions per image, and the number of channels."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The properties that must be equal so that rows can be used together, as JSON values.

        The entry `regions` is the name of the kind of regions in its registry.
        """

    @abstractmethod
    def framing(self) -> dict[str, Any]:
        """The preprocessing of photographs: size (H, W), interpolation, resize and fill (RGB).

        These are the fields of data.images.Framing. With several `parts`, the entry `more` has
        those of the other parts.
        """

    @abstractmethod
    def forward(self, pixels: Pixels, view_boxes: Tensor | None = None) -> Regions:
        """Compute the regions of images; the features are [B,R,C] float32.

        pixels: [B,3,H,W] uint8, RGB, with the size of `framing`. If `framing` keeps the original
            size of photographs: B images [3,H,W], which may differ in size.
        view_boxes: [B,4], the part of the photograph that each image shows, x0 y0 x1 y1; None: the
            whole photograph.
        """

    def with_tables(
        self,
        pixels: Pixels,
        view_boxes: Tensor | None = None,
        image_ids: Sequence[int] | None = None,
    ) -> tuple[Regions, tuple[Tensor, ...]]:
        """Compute the regions, and the values [B,R] of `tables`.

        image_ids: the B ids of the images, for a backbone with given boxes. Other arguments as in
            `forward`.
        """
        return self(pixels, view_boxes), ()

    def weights(self) -> Mapping[str, Tensor]:
        """The weights that are copied into caches."""
        return self.state_dict()
