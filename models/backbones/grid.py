"""Frozen CNN backbones: uint8 photographs [B,3,H,W] in, regions [B,R,C] out.

Any timm model with a spatial map by its name, `torchvision/NAME` for torchvision's classifiers.
timm's data config (torchvision's weight transforms) gives size, mean, std and interpolation.
Channels, grid and layout are measured on one dummy image: `feature_info` lies for some models (320
instead of 1280 channels for mobilenetv2_100).
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

# The first convolutions run in fp32 whatever the rest does: they take differences of neighbours
# that are nearly equal, for which bf16 has too few bits. For mobilenetv2_100 the least cosine of a
# row with fp32's rises from 0.990 to 0.999.
EDGES = 2
BF16 = f"bf16, first {EDGES} convolutions fp32"  # recorded in the provenance


class GridBackbone(Backbone):
    """A frozen network up to its last feature map, with the preprocessing of its weights. Regions
    are the cells of the map.

    Attributes: `name`; `size` (H, W) of the input; `mean` and `std` for pixels in 0..1;
    `interpolation` of the resize; `grid` (h, w) and `channels` of the feature map.

    grid: pool the map to this many cells (adaptive average pooling); None: no pooling. arguments:
    those of timm's create_model. resize: one of data.images.RESIZES.
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
        called: list[nn.Module] = []
        hooks = [conv.register_forward_pre_hook(lambda module, _: called.append(module))
                 for conv in network.modules() if isinstance(conv, nn.Conv2d)]  # fmt: skip
        self.layout, self.channels, natural = self._measure()
        for hook in hooks:
            hook.remove()
        for conv in list(dict.fromkeys(called))[:EDGES]:
            conv.forward = functools.partial(_in_fp32, conv.forward)
        self.grid = grid or natural
        if any(cells > most for cells, most in zip(self.grid, natural, strict=True)):
            wanted, most = ("x".join(map(str, cells)) for cells in (self.grid, natural))
            raise ModelError(
                f"grid {wanted}: {name} gives {most} cells for {self.size}; ask for no more, "
                "or a larger size"
            )
        self.pooled = self.grid != natural

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
        """Padding around a photograph has the mean colour of the weights."""
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
        """Rename weights to the backbone's own names. Returns the weights and the removed prefix
        ("" for none).

        Wrappers put a prefix before all keys: `_orig_mod.` (torch.compile), `module.`
        (DataParallel), `model.` (Lightning). The prefix whose removal gives most of the backbone's
        keys is removed.
        """
        own = {
            key: value for key, value in tensors.items() if key != "n_averaged"
        }  # the counter of AveragedModel
        names = [key for key in own if not self._of_classifier(key)]
        first, last = min(names, default="").split("."), max(names, default="").split(".")
        shared = list(
            itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(first[:-1], last[:-1], strict=False)
            )
        )
        prefixes = [
            "".join(f"{part}." for part, _ in shared[:count]) for count in range(len(shared) + 1)
        ]
        wanted = self.network.state_dict()
        if not shared:  # the file may hold other tensors too
            needed = [key for key in wanted if not key.endswith("num_batches_tracked")]
            ends = (
                {key[: -len(needed[0])] for key in own if key.endswith(f".{needed[0]}")}
                if needed
                else set()
            )
            whole = sorted(prefix for prefix in ends if all(prefix + key in own for key in needed))
            if len(whole) > 1 and not all(key in own for key in needed):
                raise ModelError(
                    f"its weights stand under several prefixes ({', '.join(whole)}); save one alone"
                )
            if len(whole) == 1 and not all(key in own for key in needed):
                prefix = whole[0]
                return {
                    key.removeprefix(prefix): own[key] for key in own if key.startswith(prefix)
                }, prefix
        best = max(
            prefixes, key=lambda prefix: sum(name.removeprefix(prefix) in wanted for name in names)
        )
        return {key.removeprefix(best): value for key, value in own.items()}, best

    def _of_classifier(self, key: str) -> bool:
        return key.startswith(tuple(f"{name}." for name in self.classifier))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], origin: str) -> list[str]:
        """Load weights strictly, except for the classifier's tensors, whose names are returned;
        ModelError on a mismatch.
        """
        left_out = sorted(filter(self._of_classifier, tensors))
        wanted = self.network.state_dict()
        found = {key: value for key, value in tensors.items() if key not in left_out}
        for (
            key
        ) in wanted:  # batch norm's counter: absent from older files, unused by a frozen network
            if key.endswith("num_batches_tracked"):
                found.setdefault(key, wanted[key])
        problems = [f"lacks {key}" for key in wanted if key not in found]
        problems += [f"has {key}, which the backbone has not" for key in found if key not in wanted]
        problems += [
            f"{key} is {list(found[key].shape)}, the backbone's is {list(wanted[key].shape)}"
            for key in wanted
            if key in found and found[key].shape != wanted[key].shape
        ]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            missing, unknown = (
                [key for key in wanted if key not in found],
                [key for key in found if key not in wanted],
            )
            names = (
                f"; its keys are like {unknown[0]}, the backbone's like {missing[0]}"
                if missing and unknown
                else ""
            )
            for theirs in unknown if missing else ():
                if same := next((key for key in missing if theirs.endswith(f".{key}")), None):
                    names = f"; its key {theirs} is the backbone's {same} under another name"
                    break
            raise ModelError(
                f"{origin} does not fit backbone {self.name}: "
                f"{'; '.join(problems[:3])}{more}{names}"
            )
        self.network.load_state_dict(found)
        return left_out

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over names, shapes and values of the weights. Equal
        for a file and the hub.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self.network.state_dict().items()):
            if not key.endswith("num_batches_tracked"):
                digest.update(f"{key} {list(value.shape)} ".encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _map(self, images: Tensor) -> Tensor:
        """The feature map [B,C,h,w] of normalised `images` [B,3,H,W]."""
        if self.layout == "tokens":
            return cast(Any, self.network).forward_intermediates(
                images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )[-1]
        run = getattr(self.network, "forward_features", self.network)
        out = run(images)
        return out.permute(0, 3, 1, 2) if self.layout == "NHWC" else out

    @torch.no_grad()
    def _measure(self) -> tuple[str, int, tuple[int, int]]:
        try:
            out = self._map(torch.zeros(1, 3, *self.size))
            if (
                isinstance(out, Tensor)
                and out.ndim == 3
                and hasattr(self.network, "forward_intermediates")
            ):
                self.layout = "tokens"
                out = self._map(torch.zeros(1, 3, *self.size))
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
            mend = (
                "; a transformer's size goes with the argument img_size=N"
                if "size" in str(error).lower()
                else ""
            )
            raise ModelError(
                f"backbone {self.name} gives no feature map for {self.size}: {error}{mend}"
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


def _in_fp32(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        return forward(images.float())
