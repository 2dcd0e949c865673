"""Classifiers of torchvision up to their last feature map, named `torchvision/NAME`."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn

from models import ModelError
from models.backbones.messages import nearest, no_hub


def build_network(
    name: str, arguments: dict[str, Any], pretrained: bool
) -> tuple[nn.Module, dict, tuple[str, ...]]:
    short = name.removeprefix("torchvision/")
    known = torchvision.models.list_models(module=torchvision.models)
    if short not in known:
        model, dot, _ = short.partition(".")
        near = nearest(model, known, prefix="torchvision/")
        tags = "; torchvision's names have no tags" if dot else ""
        raise ModelError(
            f"no backbone {name!r} in torchvision {torchvision.__version__}{tags}{near}"
        )
    weights = torchvision.models.get_model_weights(short).DEFAULT
    try:
        model = torchvision.models.get_model(
            short, weights=weights if pretrained else None, **arguments
        )
    except TypeError as error:
        raise ModelError(f"arguments: {name} does not take {arguments}: {error}") from error
    except Exception as error:
        if not pretrained:
            raise
        raise ModelError(no_hub(name, error)) from error
    parts, classifier = _before_pooling(model)
    transforms = weights.transforms()
    size = transforms.crop_size[0]
    config = {"input_size": (3, size, size), "mean": transforms.mean, "std": transforms.std,
              "interpolation": transforms.interpolation.value}  # fmt: skip
    return parts, config, classifier


def _before_pooling(model: nn.Module) -> tuple[nn.Sequential, tuple[str, ...]]:
    """The layers before the pooling, under their names in the whole model, and the names of the
    other layers.
    """
    children = dict(model.named_children())
    if "features" in children:
        kept = ["features"]
    else:
        kept = []
        for key in children:
            if key in ("avgpool", "fc", "classifier", "head", "heads"):
                break
            kept.append(key)
    parts = nn.Sequential()
    for key in kept:
        parts.add_module(key, children[key])
    return parts, tuple(key for key in children if key not in kept)
