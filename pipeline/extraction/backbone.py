"""Run a backbone on a device, and store its weights with a cache.

Extraction and captioning both call `extract_regions`, so they compute the same features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.cache.reader import shard_paths
from data.images import Framing, Photo, Pixels, stack_inputs
from models.backbones.interface import Backbone
from models.regions import Regions, side_by_side
from pipeline.checkpoints.tensors import load_tensors, save_tensors
from pipeline.cli import UserError
from pipeline.runtime import Machine

MAX_PIXELS_HELP = (
    "maximum number of pixels of a photograph; larger ones are listed as unreadable. "
    "Decoding needs 9 bytes of memory per pixel in each worker  [89 million]"
)


def framing_of(backbone: Backbone, max_pixels: int | None = None) -> Framing:
    """Return how photographs are resized and cropped to this backbone's input."""
    fields = backbone.framing()
    more = tuple(Framing(**each) for each in fields.pop("more", ()))
    return Framing(**fields, max_pixels=max_pixels, more=more)


def keep_backbone(backbone: Backbone, folder: Path) -> None:
    """Save the weights as backbone.safetensors in `folder`, unless they are from a hub.

    An extraction with other options, which was stopped before its first shard, may have left a file
    of other weights. It is replaced, or removed if the weights are from a hub.
    """
    target = folder / "backbone.safetensors"
    if backbone.from_hub:
        if not shard_paths(folder):
            target.unlink(missing_ok=True)
    elif not _has_weights(target, backbone.weights()):
        save_tensors(target, backbone.weights())


def _has_weights(file: Path, weights: Mapping[str, Tensor]) -> bool:
    """Return whether a file exists, is whole and has exactly these weights."""
    if not file.exists():
        return False
    try:
        stored, _ = load_tensors(file)
    except UserError:
        return False
    return stored.keys() == weights.keys() and all(
        stored[key].dtype == value.dtype and torch.equal(stored[key], value.cpu())
        for key, value in weights.items()
    )


def place_backbone(backbone: Backbone, machine: Machine) -> Backbone:
    """Move a backbone to the machine's device, in the fastest memory layout for convolutions."""
    # torch's stubs lack the call with a device and a memory format at once
    return backbone.to(  # type: ignore[call-overload]
        machine.device, memory_format=torch.channels_last
    )


def extract_regions(
    backbone: Backbone, pixels: Pixels, machine: Machine, view_boxes: Tensor | None = None
) -> Regions:
    """Compute the regions of photographs; arguments as in `extract_with_tables`."""
    return extract_with_tables(backbone, pixels, machine, view_boxes)[0]


def regions_of_photos(backbone: Backbone, photos: Sequence[Photo], machine: Machine) -> Regions:
    """Compute the regions of photographs with the inputs of `framing_of`."""
    inputs = stack_inputs(photos)
    return side_by_side(
        [
            extract_regions(part, pixels, machine, view_boxes)
            for part, (pixels, view_boxes) in zip(backbone.parts, inputs, strict=True)
        ]
    )


def extract_with_tables(
    backbone: Backbone,
    pixels: Pixels,
    machine: Machine,
    view_boxes: Tensor | None = None,
    image_ids: Sequence[int] | None = None,
) -> tuple[Regions, tuple[Tensor, ...]]:
    """Compute the regions of photographs, and the values [B,R] of the backbone's `tables`.

    pixels: [B,3,H,W] uint8, or B images [3,H,W] of different sizes.
    view_boxes: [B,4] on the CPU, the part of each photograph that the pixels show, x0 y0 x1 y1 in
        0..1; None: the whole photograph.
    image_ids: as in Backbone.with_tables.

    Returns regions on the machine's device with features [B,R,C] float16, as a cache stores them.
    """
    if view_boxes is not None and torch.equal(
        view_boxes, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand_as(view_boxes)
    ):
        view_boxes = None  # the pixels show whole photographs, so no cell has to be clipped
    with torch.inference_mode(), machine.autocast():
        images: Pixels
        if isinstance(pixels, Tensor):
            images = pixels.to(machine.device, non_blocking=True).contiguous(
                memory_format=torch.channels_last
            )
        else:
            images = [image.to(machine.device, non_blocking=True) for image in pixels]
        if view_boxes is not None:
            view_boxes = view_boxes.to(machine.device, non_blocking=True)
        regions, tables = backbone.with_tables(images, view_boxes, image_ids)
    return regions._replace(features=regions.features.half()), tables
