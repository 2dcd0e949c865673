"""Frozen CNN backbones that map uint8 photographs [B,3,H,W] to regions [B,R,C].

The name selects any timm model with a spatial feature map; `torchvision/NAME` selects a classifier
of torchvision. Size, mean, std and interpolation come from timm's data config or torchvision's
weight transforms. Channels, grid and layout are measured on one dummy image, because timm's
`feature_info` is wrong for some models (320 instead of 1280 channels for mobilenetv2_100).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from models import ModelError
from models.backbones.interface import Pixels
from models.backbones.network import NetworkBackbone, first_convolutions_in_fp32
from models.regions import Regions, grid_regions


class GridBackbone(NetworkBackbone):
    """A frozen network up to its last feature map; each cell of the map is a region.

    Its input is preprocessed as its weights require.

    name: name of the backbone.
    network: the network without its classifier.
    config: `input_size`, `mean`, `std` and `interpolation` of the preprocessing.
    classifier: names of the layers that weight files contain and the network does not.
    grid: (h, w), pool the feature map to this size (adaptive average pooling); None: no pooling.
    arguments: arguments of timm's create_model that the network was built with.
    resize: one of data.images.RESIZES.

    Attributes: `size` (H, W) of the input, `mean` and `std` for pixels in 0..1, `interpolation` of
    the resize, `grid` (h, w) and `channels` of the feature map.

    Raises ModelError if the network gives no feature map, or the grid is larger than the map.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        name: str,
        network: nn.Module,
        config: Mapping[str, Any],
        classifier: tuple[str, ...],
        grid: tuple[int, int] | None = None,
        arguments: Mapping[str, Any] | None = None,
        resize: str = "stretch",
    ) -> None:
        super().__init__(name, network, classifier)
        self.arguments, self.resize = dict(arguments or {}), resize
        self.size: tuple[int, int] = tuple(config["input_size"][-2:])
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.interpolation = str(config["interpolation"])
        self.register_buffer(
            "scale", 1 / (255 * torch.tensor(self.std).view(3, 1, 1)), persistent=False
        )
        self.register_buffer(
            "shift",
            (torch.tensor(self.mean) / torch.tensor(self.std)).view(3, 1, 1),
            persistent=False,
        )
        self.requires_grad_(False).eval()
        self.layout = "NCHW"
        with first_convolutions_in_fp32(network):
            self.layout, self.channels, map_size = self._measure()
        self.grid = grid or map_size
        if any(cells > largest for cells, largest in zip(self.grid, map_size, strict=True)):
            given, largest = ("x".join(map(str, cells)) for cells in (self.grid, map_size))
            raise ModelError(
                f"grid {given}: {name} gives {largest} cells for size {self.size}; choose at most "
                f"{largest}, or a larger size"
            )
        self.pooled = self.grid != map_size

    @property
    def shape(self) -> tuple[int, int]:
        return self.grid[0] * self.grid[1], self.channels

    def identity(self) -> dict[str, Any]:
        return {
            "backbone": self.name,
            "arguments": self.arguments,
            "weights": self.digest(),
            "size": list(self.size),
            "resize": self.resize,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "regions": "grid",
            "grid": list(self.grid),
            "channels": self.channels,
        }

    def framing(self) -> dict[str, Any]:
        """Fill around a photograph has the mean colour of the weights' training images."""
        fill = tuple(round(255 * mean) for mean in self.mean)
        return {
            "size": self.size,
            "interpolation": self.interpolation,
            "resize": self.resize,
            "fill": fill,
        }

    def forward(self, pixels: Pixels, view_boxes: Tensor | None = None) -> Regions:
        assert isinstance(pixels, Tensor)
        feature_map = self._map(pixels * self.scale - self.shift)
        if self.pooled:
            feature_map = nn.functional.adaptive_avg_pool2d(feature_map.float(), self.grid)
        regions = grid_regions(feature_map, view_boxes)
        return regions._replace(features=regions.features.float())

    def _map(self, images: Tensor) -> Tensor:
        """Compute the feature map [B,C,h,w] of normalised `images` [B,3,H,W]."""
        if self.layout == "tokens":
            return cast(Any, self.network).forward_intermediates(
                images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )[-1]
        forward = getattr(self.network, "forward_features", self.network)
        out = forward(images)
        return out.permute(0, 3, 1, 2) if self.layout == "NHWC" else out

    @torch.no_grad()
    def _measure(self) -> tuple[str, int, tuple[int, int]]:
        """Return layout, channels and (h, w) of the feature map, measured on a dummy image."""
        try:
            out = self._map(torch.zeros(1, 3, *self.size))
            is_sequence = isinstance(out, Tensor) and out.ndim == 3
            if is_sequence and hasattr(self.network, "forward_intermediates"):
                self.layout = "tokens"
                out = self._map(torch.zeros(1, 3, *self.size))
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
            hint = "; set the size of a vision transformer with the argument img_size=N"
            raise ModelError(
                f"backbone {self.name} gives no feature map for size {self.size}: {error}"
                f"{hint if 'size' in str(error).lower() else ''}"
            ) from error
        if not isinstance(out, Tensor) or out.ndim != 4:
            shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ModelError(
                f"backbone {self.name} gives {shape}, not a feature map [B,C,h,w]; choose a CNN"
            )
        channels_last = out.shape[3] == getattr(self.network, "num_features", -1) != out.shape[1]
        if self.layout == "NCHW" and channels_last:
            self.layout, out = "NHWC", out.permute(0, 3, 1, 2)
        return self.layout, out.shape[1], (out.shape[2], out.shape[3])
