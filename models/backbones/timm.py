"""Networks of timm, by name."""

from __future__ import annotations

from typing import Any, cast

import timm
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
    if ":" in name:
        raise ModelError(
            f"{name!r} is not a model of timm itself; give the name of its architecture, and "
            "weights from a file"
        )
    check_timm_name(name)
    try:
        network = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except TypeError as error:
        raise ModelError(f"arguments: {name} does not take {arguments}: {error}") from error
    except Exception as error:
        if not pretrained and not arguments:
            raise
        message = f"arguments: {name} cannot be built with {arguments}: {error!r}"
        raise ModelError(hub_error(name, error) if pretrained else message) from error
    config = timm.data.resolve_model_data_config(network)
    classifier = cast(Any, network).pretrained_cfg.get("classifier") or ()
    return network, config, (classifier,) if isinstance(classifier, str) else tuple(classifier)


def check_timm_name(name: str) -> None:
    """Raise ModelError if timm lacks the model, or its tag (the part after the first dot)."""
    model, dot, tag = name.partition(".")
    if not timm.is_model(name):
        known = timm.list_models(include_tags=bool(dot))
        hint = suggest(name.removeprefix("timm/"), known)
        raise ModelError(f"no backbone {name!r} in timm {timm.__version__}{hint}")
    tags = timm.list_models(f"{model}.*", include_tags=True) if dot else [name]
    if name not in tags:
        hint = suggest(name, tags, cutoff=0.0) if tags else f"; it has no tags, write {model}"
        raise ModelError(
            f"backbone {model} has no weights with the tag {tag!r} in timm {timm.__version__}{hint}"
        )
