"""Networks of timm."""

from __future__ import annotations

from typing import Any, cast

import timm
from torch import nn

from models import ModelError
from models.backbones.messages import nearest, no_hub


def build_network(
    name: str, arguments: dict[str, Any], pretrained: bool
) -> tuple[nn.Module, dict, tuple[str, ...]]:
    if ":" in name:
        raise ModelError(
            f"{name!r} is no backbone of timm's own; name its architecture, and weights from a file"
        )
    _check_timm_name(name)
    try:
        network = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except TypeError as error:
        raise ModelError(f"arguments: {name} does not take {arguments}: {error}") from error
    except Exception as error:
        if not pretrained and not arguments:
            raise
        told = (
            no_hub(name, error)
            if pretrained
            else f"arguments: {name} cannot be built with {arguments}: {error!r}"
        )
        raise ModelError(told) from error
    config = timm.data.resolve_model_data_config(network)
    classifier = cast(Any, network).pretrained_cfg.get("classifier") or ()
    return network, config, (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _check_timm_name(name: str) -> None:
    """Raise ModelError for an unknown model or tag (the part after the first dot), with the nearest
    one.
    """
    model, dot, tag = name.partition(".")
    if not timm.is_model(name):
        known = timm.list_models(include_tags=bool(dot))
        near = nearest(name.removeprefix("timm/"), known)
        raise ModelError(f"no backbone {name!r} in timm {timm.__version__}{near}")
    tags = timm.list_models(f"{model}.*", include_tags=True) if dot else [name]
    if name not in tags:
        near = nearest(name, tags, cutoff=0.0) if tags else f"; it has none, write {model}"
        raise ModelError(
            f"backbone {model} has no weights with the tag {tag!r} in timm {timm.__version__}{near}"
        )
