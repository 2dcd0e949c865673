"""From photographs to rows: a backbone with its weights, opened, kept, restored and run.

`extract_regions` is the only way pixels become features, so a captioned photograph is seen as the cache saw it.
"""

from __future__ import annotations

import pickle
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.images import RESIZES, Framing
from models.backbones.grid import Backbone
from models.backbones.registry import create_backbone, shapes_of_network
from models.regions import Regions
from pipeline.checkpoints.tensors import load_tensors, save_tensors, shapes_of
from pipeline.cli import UserError
from pipeline.runtime import Machine
from pipeline.terminal import say

# arguments of timm's create_model that open files or name other weights
FOREIGN = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
MAX_PIXELS_HELP = "photographs of more are unreadable; 9 bytes of memory a pixel in each worker  [89 million]"
LARGEST = 2048  # of a side of a backbone's input
# names that training programs give the state dict of a model; of several in one file the first here is read
STATE_DICTS = ("state_dict", "model_state_dict", "model_state", "model", "state_dict_ema", "model_ema", "ema")
SCENES_BACKBONE, SCENES_WEIGHTS = "test_resnet", "test_resnet_scenes.safetensors"


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors or .pth (read without unpickling code); UserError where it is not one.

    Of a checkpoint with more around it, as of Lightning or timm: its one state dict, or the first of STATE_DICTS.
    """
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file; or pass 'pretrained' (the hub) or 'random'")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Unsupported" not in str(error):
            raise UserError(f"--weights {path} is neither safetensors nor a state dict of torch.save") from error
        raise UserError(
            f"--weights {path} is no plain state dict: it holds Python objects beside tensors, which are not loaded since they "
            "can run code; save the weights by themselves: torch.save(model.state_dict(), FILE), or safetensors"
        ) from error
    except Exception as error:  # torch.load raises whatever the broken file leads it into
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"--weights {path} is neither safetensors nor a state dict of torch.save: {reason}") from error
    found = dict(state_dicts(checkpoint))
    if not found:
        raise UserError(f"--weights {path} holds no state dict (tensors by name); re-save model.state_dict()")
    if len(found) == 1:
        return next(iter(found.values()))
    several = f"holds several state dicts ({', '.join(found)})"
    for name in STATE_DICTS:
        if name in found:
            say(f"{path.name} {several}: {name} is read")
            return found[name]
    raise UserError(f"--weights {path} {several}; save the one to use in a file by itself")


def state_dicts(value: Any, name: str = "", depth: int = 4) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Where in a checkpoint tensors stand by name, without those of optimisers: ("model.state_dict", tensors), ..."""
    if not isinstance(value, dict) or not value or not all(isinstance(key, str) for key in value) or not depth:
        return
    if all(isinstance(each, Tensor) for each in value.values()):
        yield name, dict(value)
        return
    if not any(isinstance(each, dict) for each in value.values()):
        tensors = {key: each for key, each in value.items() if isinstance(each, Tensor)}
        if sum("." in key for key in tensors) > 1:  # names of weights, not one loss beside other numbers
            others = [key for key in value if key not in tensors]
            say(f"left out of {name or 'the weights'}, no tensors: {', '.join(others[:3])} ({len(others)} in all)")
            yield name, tensors
        return
    for key, each in value.items():
        if "optim" not in key:
            yield from state_dicts(each, f"{name}.{key}" if name else key, depth - 1)


def scenes_weights() -> Path:
    """The package's own small backbone weights, made by `models/weights/pretrain.py`."""
    return Path(str(resources.files("models") / "weights" / SCENES_WEIGHTS))


def open_backbone(
    name: str,
    weights: str,
    arguments: Mapping[str, Any],
    seed: int = 0,
    size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
) -> Backbone:
    """Build a backbone with `weights`: "pretrained" (the hub), "random", "scenes" (the package's own) or a file.

    size, grid: as `create_backbone` takes them.
    """
    if weights == "pretrained":
        do_not_wait_for_an_absent_hub()
    backbone = create_backbone(name, arguments, weights == "pretrained", seed, size, grid)
    if weights not in ("pretrained", "random"):
        path = scenes_weights() if weights == "scenes" else Path(weights)
        read = read_weights(path)
        tensors, prefix = backbone.without_prefix(read)
        if others := [key for key in read if not key.startswith(prefix) and key != "n_averaged" and key not in tensors]:
            say(f"left out of {path.name}, not under {prefix!r}: {', '.join(others[:3])} ({len(others)} in all)")
        if prefix:
            say(f"{path.name}: the prefix {prefix!r} was taken off its keys")
        left_out = backbone.load(tensors, f"--weights {path}")
        if left_out:
            say(f"left out of {path.name}, the classifier: {', '.join(left_out)}")
    return backbone


def do_not_wait_for_an_absent_hub() -> None:
    """Where the hub's host does not answer, use its local cache or fail at once: its client retries for a minute."""
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if urllib.request.getproxies():
        return  # a proxy answers for the hub
    try:
        port = host.port or (443 if host.scheme == "https" else 80)
        socket.create_connection((host.hostname, port), timeout=5).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def framing_of(backbone: Backbone, resize: str, max_pixels: int | None = None) -> Framing:
    """How photographs become this backbone's input; what is filled around them has its weights' mean colour."""
    red, green, blue = (round(255 * mean) for mean in backbone.mean)
    return Framing(backbone.size, backbone.interpolation, resize, (red, green, blue), max_pixels)


def backbone_identity(backbone: Backbone, arguments: Mapping[str, Any], resize: str = "stretch") -> dict[str, Any]:
    """What must be equal for rows to be used together."""
    return {
        "backbone": backbone.name,
        "arguments": dict(arguments),
        "weights": backbone.digest(),
        "size": list(backbone.size),
        "resize": resize,
        "interpolation": backbone.interpolation,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "regions": "grid",
        "grid": list(backbone.grid),
        "channels": backbone.channels,
    }


def check_identity(origin: str, identity: Mapping[str, Any]) -> None:
    """UserError where an identity that came with a checkpoint is not one that `backbone_identity` gives, or would have more
    done than build a network of timm's or torchvision's: open files of this machine, fetch weights by a hub's name."""

    def pair(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(type(each) is int and 0 < each <= LARGEST for each in value)

    def three(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 3 and all(type(each) in (int, float) for each in value)

    def plain(value: Any) -> bool:
        scalars = value if isinstance(value, list) else [value]
        return all(each is None or type(each) in (bool, int, float, str) for each in scalars)

    name, arguments = identity.get("backbone"), identity.get("arguments")
    fits = {
        "backbone": isinstance(name, str) and re.fullmatch(r"(torchvision/)?[\w.-]+", name) is not None,
        "arguments": isinstance(arguments, dict) and not FOREIGN & arguments.keys() and all(map(plain, arguments.values())),
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
        raise UserError(f"{origin}: features: {', '.join(wrong)} cannot be what an extraction recorded")


def keep_backbone(backbone: Backbone, folder: Path) -> None:
    """Keep the weights once as backbone.safetensors, so that the folder needs no other file."""
    target = folder / "backbone.safetensors"
    if not target.exists():
        save_tensors(target, backbone.network.state_dict())


def restore_backbone(folder: Path, identity: Mapping[str, Any]) -> Backbone:
    """The backbone that made a cache: its kept weights, else the hub's, checked against the identity's digest."""
    kept = folder / "backbone.safetensors"
    if not kept.exists():
        do_not_wait_for_an_absent_hub()
    else:
        wanted, found = shapes_of_network(identity["backbone"], identity["arguments"]), shapes_of(kept)
        if wanted and any(found.get(key) != shape for key, shape in wanted.items() if not key.endswith("num_batches_tracked")):
            raise UserError(f"{kept} does not fit {identity['backbone']} with {identity['arguments']}; copy it again")
    size, grid = tuple(identity["size"]), tuple(identity["grid"])
    backbone = create_backbone(identity["backbone"], identity["arguments"], not kept.exists(), 0, size, grid)
    if kept.exists():
        backbone.load(load_tensors(kept)[0], str(kept))
    if backbone.digest() != identity["weights"]:
        origin = kept if kept.exists() else "the hub"
        raise UserError(
            f"the weights of {identity['backbone']} from {origin} are {backbone.digest()}, {folder} was trained on "
            f"{identity['weights']}; put the right weights into {kept}"
        )
    return backbone


def place_backbone(backbone: Backbone, machine: Machine) -> Backbone:
    """Move a backbone to the machine's device in the memory layout that its convolutions run fastest in."""
    return backbone.to(machine.device, memory_format=torch.channels_last)


def extract_regions(backbone: Backbone, pixels: Tensor, machine: Machine, frames: Tensor | None = None) -> Regions:
    """Regions of uint8 `pixels` [B,3,H,W] as a cache keeps them: features [B,R,C] float16 on the machine's device.

    frames: [B,4] on the host, the part of the photograph that each shows; None: all of it.
    """
    if frames is not None and torch.equal(frames, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand_as(frames)):
        frames = None  # no cell is cut or filling, and none needs sorting out
    with torch.inference_mode(), machine.autocast():
        images = pixels.to(machine.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        if frames is not None:
            frames = frames.to(machine.device, non_blocking=True)
        regions = backbone(images, frames)
    return regions._replace(features=regions.features.half())
