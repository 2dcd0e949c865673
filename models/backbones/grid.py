"""Frozen CNN backbones that map uint8 photographs [B,3,H,W] to regions [B,R,C].

The name selects any timm model with a spatial feature map; `torchvision/NAME` selects a classifier
of torchvision. Size, mean, std and interpolation come from timm's data config or torchvision's
weight transforms. Channels, grid and layout are measured on one dummy image, because timm's
`feature_info` is wrong for some models (320 instead of 1280 channels for mobilenetv2_100).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from models import ModelError
from models.backbones.interface import Backbone
from models.regions import Regions, grid_regions

# The first convolutions always run in fp32. They subtract nearly equal neighbouring pixels, for
# which bf16 has too few bits. For mobilenetv2_100, the smallest cosine similarity between a row and
# its fp32 value rises from 0.990 to 0.999.
FP32_CONVOLUTIONS = 2
COUNTER = "num_batches_tracked"  # a buffer of batch normalisation that inference does not use
BF16 = f"bf16, first {FP32_CONVOLUTIONS} convolutions fp32"  # recorded in caches


class GridBackbone(Backbone):
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
        super().__init__()
        self.name = name
        self.network = network
        self.classifier = classifier
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
        convolutions: list[nn.Module] = []  # in the order of the forward pass
        hooks = [
            module.register_forward_pre_hook(lambda module, _: convolutions.append(module))
            for module in network.modules()
            if isinstance(module, nn.Conv2d)
        ]
        self.layout, self.channels, map_size = self._measure()
        for hook in hooks:
            hook.remove()
        for module in list(dict.fromkeys(convolutions))[:FP32_CONVOLUTIONS]:
            module.forward = functools.partial(_in_fp32, module.forward)
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

    def weights(self) -> Mapping[str, Tensor]:
        return self.network.state_dict()

    def forward(self, pixels: Tensor, view_boxes: Tensor | None = None) -> Regions:
        feature_map = self._map(pixels * self.scale - self.shift)
        if self.pooled:
            feature_map = nn.functional.adaptive_avg_pool2d(feature_map.float(), self.grid)
        regions = grid_regions(feature_map, view_boxes)
        return regions._replace(features=regions.features.float())

    def without_prefix(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
        """Remove the prefix that a wrapper or a larger model added to the keys of the weights.

        Wrappers add a prefix to all keys: `_orig_mod.` (torch.compile), `module.` (DataParallel),
        `model.` (Lightning). Of the prefixes that all keys share, this removes the one that gives
        most keys of the backbone. If the keys share no prefix, the backbone may be a part of a
        larger model; then this selects the tensors of that part.

        Returns the tensors with the backbone's keys, and the prefix ("" if there is none).
        Raises ModelError if several parts have all keys of the backbone.
        """
        # n_averaged is the counter of torch's AveragedModel.
        tensors = {key: value for key, value in tensors.items() if key != "n_averaged"}
        names = [key for key in tensors if not self._is_classifier(key)]
        first, last = min(names, default="").split("."), max(names, default="").split(".")
        pairs = zip(first[:-1], last[:-1], strict=False)
        shared = [part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if not shared and (prefix := self._prefix_in_larger_model(tensors)):
            part = {key: value for key, value in tensors.items() if key.startswith(prefix)}
            return {key.removeprefix(prefix): value for key, value in part.items()}, prefix
        prefixes = ["".join(f"{part}." for part in shared[:n]) for n in range(len(shared) + 1)]
        expected = self.network.state_dict()
        best = max(
            prefixes,
            key=lambda prefix: sum(name.removeprefix(prefix) in expected for name in names),
        )
        return {key.removeprefix(best): value for key, value in tensors.items()}, best

    def _prefix_in_larger_model(self, tensors: Mapping[str, Tensor]) -> str:
        """The prefix under which a larger model has all weights of the backbone; "" if none."""
        keys = [key for key in self.network.state_dict() if not key.endswith(COUNTER)]
        if not keys or all(key in tensors for key in keys):
            return ""
        prefixes = {key[: -len(keys[0])] for key in tensors if key.endswith(f".{keys[0]}")}
        complete = sorted(p for p in prefixes if all(p + key in tensors for key in keys))
        if len(complete) > 1:
            raise ModelError(
                f"the backbone's weights occur under several prefixes ({', '.join(complete)}); "
                "save one of them alone"
            )
        return complete[0] if complete else ""

    def _is_classifier(self, key: str) -> bool:
        return key.startswith(tuple(f"{name}." for name in self.classifier))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], origin: str) -> list[str]:
        """Load weights strictly, except for tensors of the classifier.

        origin: the source of the weights, for the error message.
        Returns the names of the classifier's tensors, which are ignored.
        Raises ModelError if names or shapes do not fit.
        """
        ignored = sorted(filter(self._is_classifier, tensors))
        expected = self.network.state_dict()
        weights = {key: value for key, value in tensors.items() if key not in ignored}
        for key in expected:  # older files lack this counter, and a frozen network does not use it
            if key.endswith(COUNTER):
                weights.setdefault(key, expected[key])
        if problems := _differences(weights, expected):
            raise ModelError(f"{origin} does not fit backbone {self.name}: {problems}")
        self.network.load_state_dict(weights)
        return ignored

    def digest(self) -> str:
        """SHA-256 over names, shapes and values of the weights, first 16 hex digits.

        It does not depend on the source of the weights, such as a file or the hub.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self.network.state_dict().items()):
            if not key.endswith(COUNTER):
                digest.update(f"{key} {list(value.shape)} ".encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

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


def _differences(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Describe how names and shapes of weights differ from the expected ones; "" if they fit."""
    missing = [key for key in expected if key not in weights]
    unknown = [key for key in weights if key not in expected]
    problems = [f"it lacks {key}" for key in missing]
    problems += [f"it has {key}, which the backbone does not have" for key in unknown]
    problems += [
        f"{key} is {list(weights[key].shape)}, the backbone's is {list(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    text = "; ".join(problems[:3])
    if len(problems) > 3:
        text += f" (and {len(problems) - 3} more)"
    if not (missing and unknown):
        return text
    for key in unknown:
        if same := next((name for name in missing if key.endswith(f".{name}")), None):
            return f"{text}; its key {key} is the backbone's {same} under another name"
    return f"{text}; its keys are like {unknown[0]}, the backbone's like {missing[0]}"


def _in_fp32(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        return forward(images.float())
