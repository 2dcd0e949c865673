"""Any backbone on a machine: placed, kept with a cache, and run over photographs.

`extract_regions` is the only way pixels become features, so a captioned photograph is seen as the
cache saw it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data.images import Framing
from models.backbones.interface import Backbone
from models.regions import Regions
from pipeline.checkpoints.tensors import save_tensors
from pipeline.runtime import Machine

MAX_PIXELS_HELP = (
    "largest number of pixels of a photograph; larger ones are listed as unreadable. "
    "Decoding takes 9 bytes per pixel in each worker  [89 million]"
)


def framing_of(backbone: Backbone, max_pixels: int | None = None) -> Framing:
    """How photographs become this backbone's input."""
    return Framing(**backbone.framing(), max_pixels=max_pixels)


def keep_backbone(backbone: Backbone, folder: Path) -> None:
    """Keep the weights once as backbone.safetensors, so that the folder needs no other file."""
    target = folder / "backbone.safetensors"
    if not target.exists():
        save_tensors(target, backbone.weights())


def place_backbone(backbone: Backbone, machine: Machine) -> Backbone:
    """Move a backbone to the machine's device in the memory layout that its convolutions run
    fastest in.
    """
    # torch's stubs lack the call with a device and a memory format at once
    return backbone.to(  # type: ignore[call-overload]
        machine.device, memory_format=torch.channels_last
    )


def extract_regions(
    backbone: Backbone, pixels: Tensor, machine: Machine, view_boxes: Tensor | None = None
) -> Regions:
    """Regions of uint8 `pixels` [B,3,H,W] as a cache keeps them: features [B,R,C] float16 on the
    machine's device.

    view_boxes: [B,4] on the host, the part of the photograph that each shows; None: all of it.
    """
    if view_boxes is not None and torch.equal(
        view_boxes, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand_as(view_boxes)
    ):
        view_boxes = None  # no cell is cut or filling, and none needs sorting out
    with torch.inference_mode(), machine.autocast():
        images = pixels.to(machine.device, non_blocking=True).contiguous(
            memory_format=torch.channels_last
        )
        if view_boxes is not None:
            view_boxes = view_boxes.to(machine.device, non_blocking=True)
        regions = backbone(images, view_boxes)
    return regions._replace(features=regions.features.half())
