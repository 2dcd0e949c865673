"""Backbones by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from models import ModelError
from models.backbones import timm, torchvision
from models.backbones.grid import GridBackbone


def create_backbone(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    resize: str = "stretch",
) -> GridBackbone:
    """Build a backbone by name; `arguments` go to timm's `create_model`; `pretrained` fetches the
    hub's weights.

    Without `pretrained` the weights are drawn from `seed`. ModelError for an unknown name (with the
    nearest one), an argument that the model does not take, or a hub that cannot be reached.

    size: (H, W) of the input in place of the weights' own.
    grid: cells (h, w) that the feature map is pooled to; None: as it comes.
    resize: how a photograph becomes the input, one of data.images.RESIZES.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("torchvision/"):
            network, config, classifier = torchvision.build_network(
                name, dict(arguments or {}), pretrained
            )
        else:
            network, config, classifier = timm.build_network(
                name, dict(arguments or {}), pretrained
            )
        if size is not None:
            config = {**config, "input_size": (3, *size)}
        return GridBackbone(name, network, config, classifier, grid, arguments, resize)


def shapes_of_network(name: str, arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of a backbone's weights, without the memory for them; None where it cannot
    be built that way.
    """
    build = torchvision.build_network if name.startswith("torchvision/") else timm.build_network
    try:
        with torch.device("meta"):
            network, _, _ = build(name, dict(arguments), False)
    except (RuntimeError, NotImplementedError, ModelError):  # some compute while they are built
        return None
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}
