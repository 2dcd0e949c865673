"""Create backbones by name."""

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
    """Build a backbone by name.

    arguments: those of timm's `create_model`. pretrained: fetch the hub's weights; else random
    weights from `seed`. size: (H, W) of the input; None: that of the weights. grid: pool the
    feature map to (h, w) cells; None: no pooling. resize: one of data.images.RESIZES.

    Raises ModelError for an unknown name (with the nearest one), for an argument that the model
    does not accept, and for an unreachable hub.
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
    """Names and shapes of a backbone's weights, without allocating them; None if the network cannot
    be built that way.
    """
    build = torchvision.build_network if name.startswith("torchvision/") else timm.build_network
    try:
        with torch.device("meta"):
            network, _, _ = build(name, dict(arguments), False)
    except (
        RuntimeError,
        NotImplementedError,
        ModelError,
    ):  # some networks compute while they are built
        return None
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}
