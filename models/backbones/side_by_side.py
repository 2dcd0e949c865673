"""Two kinds of regions of the same photographs, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from models.backbones.interface import Backbone, Pixels
from models.regions import Regions


class SideBySide(Backbone):
    """Several backbones, each with its own input and its own regions.

    Extraction and captioning run each of `parts`, and join their regions with
    models.regions.side_by_side.

    kinds: the name of the kind of regions of each part.
    """

    def __init__(self, kinds: Sequence[str], parts: Sequence[Backbone]) -> None:
        super().__init__()
        self.name = " + ".join(part.name for part in parts)
        self.kinds = tuple(kinds)
        for kind, part in zip(kinds, parts, strict=True):
            self.add_module(kind, part)
        self.from_hub = all(part.from_hub for part in parts)
        self.batch = min(part.batch for part in parts)

    @property
    def parts(self) -> tuple[Backbone, ...]:
        return tuple(getattr(self, kind) for kind in self.kinds)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C) of the joined regions: all regions, and the largest number of channels."""
        shapes = [part.shape for part in self.parts]
        return sum(regions for regions, _ in shapes), max(channels for _, channels in shapes)

    def identity(self) -> dict[str, Any]:
        kinds = [part.identity() for part in self.parts]
        return {"regions": "+".join(self.kinds), "kinds": kinds}

    def framing(self) -> dict[str, Any]:
        first, *more = (part.framing() for part in self.parts)
        return first | {"more": more}

    def weights(self) -> Mapping[str, Tensor]:
        """The weights that no hub has; a key begins with the kind of regions."""
        return {
            f"{kind}.{key}": value
            for kind, part in zip(self.kinds, self.parts, strict=True)
            if not part.from_hub
            for key, value in part.weights().items()
        }

    def forward(self, pixels: Pixels, view_boxes: Tensor | None = None) -> Regions:
        raise NotImplementedError("each part has its own input; use `parts`")
