"""The registry of grid backbones, by name."""

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

    name: a model of timm, or `torchvision/NAME`.
    arguments: arguments of the library's model constructor.
    pretrained: download the pretrained weights. Otherwise the weights are random.
    seed: seed of the random weights.
    size: (H, W) of the input; None: the size that belongs to the weights.
    grid: (h, w), pool the feature map to this size; None: no pooling.
    resize: how a photograph is resized, one of data.images.RESIZES.

    Raises ModelError for an unknown name, for arguments that the model does not accept, and if the
    weights cannot be downloaded.
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
    """Names and shapes of the weights of a backbone, without memory for the weights.

    Returns None if the backbone cannot be built on torch's meta device.
    """
    build = torchvision.build_network if name.startswith("torchvision/") else timm.build_network
    try:
        with torch.device("meta"):
            network, _, _ = build(name, dict(arguments), False)
    except (RuntimeError, NotImplementedError, ModelError):  # some constructors compute values
        return None
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}
