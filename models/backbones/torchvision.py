"""Classifiers of torchvision up to their last feature map, by the names `torchvision/NAME`."""

from __future__ import annotations

import itertools
from typing import Any

import torchvision
from torch import nn

from models import ModelError
from models.backbones.messages import hub_error, suggest


def build_network(
    name: str, arguments: dict[str, Any], pretrained: bool
) -> tuple[nn.Module, dict, tuple[str, ...]]:
    """Build a network without its classifier.

    Returns the network, its data config (input_size, mean, std, interpolation), and the names of
    the layers of the classifier. Raises ModelError as `create_backbone`.
    """
    model_name = name.removeprefix("torchvision/")
    known = torchvision.models.list_models(module=torchvision.models)
    if model_name not in known:
        base_name, dot, _ = model_name.partition(".")
        tag_hint = "; torchvision's names have no tags" if dot else ""
        hint = tag_hint + suggest(base_name, known, prefix="torchvision/")
        raise ModelError(f"no backbone {name!r} in torchvision {torchvision.__version__}{hint}")
    weights = torchvision.models.get_model_weights(model_name).DEFAULT
    try:
        model = torchvision.models.get_model(
            model_name, weights=weights if pretrained else None, **arguments
        )
    except TypeError as error:
        raise ModelError(f"arguments: {name} does not take {arguments}: {error}") from error
    except Exception as error:
        if not pretrained:
            raise
        raise ModelError(hub_error(name, error)) from error
    network, classifier = _before_pooling(model)
    transforms = weights.transforms()
    size = transforms.crop_size[0]
    config = {
        "input_size": (3, size, size),
        "mean": transforms.mean,
        "std": transforms.std,
        "interpolation": transforms.interpolation.value,
    }
    return network, config, classifier


def _before_pooling(model: nn.Module) -> tuple[nn.Sequential, tuple[str, ...]]:
    """Return the layers before the pooling as one network, and the names of the other layers.

    The weights of the network keep the names that they have in the whole model.
    """
    children = dict(model.named_children())
    if "features" in children:
        names = ["features"]
    else:
        after = {"avgpool", "fc", "classifier", "head", "heads"}
        names = list(itertools.takewhile(lambda name: name not in after, children))
    network = nn.Sequential()
    for name in names:
        network.add_module(name, children[name])
    return network, tuple(name for name in children if name not in names)
