"""Augmented views of photographs for a cache: mirrored, cropped, with changed colours.

`--views flip,crop:2,color:1` adds the views flip, crop1, crop2 and color1. Crops and colour changes
depend only on the image id and the name of the view, so a repeated extraction gives the same rows.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from data.images import Pixels
from pipeline.cli import UserError

MAX_VIEWS = 64
CROP_AREA = 0.5, 1.0  # range of the area of a crop, relative to the photograph
CROP_ASPECT = 3 / 4, 4 / 3  # range of the aspect ratio of a crop, relative to the photograph
# Range of the factors of brightness, contrast and saturation. The hue is not changed, because
# captions name colours.
COLOR_FACTOR = 0.6, 1.4


def parse_views(text: str) -> tuple[str, ...]:
    """Parse --views into the names of the views. Raises UserError for an invalid value."""
    names: list[str] = []
    for part in () if text == "none" else text.split(","):
        match = re.fullmatch(r"(flip)|(crop|color):(\d{1,4})", part.strip())
        if not match:
            raise UserError(f"--views: {part!r} is not one of flip, crop:N, color:N")
        flip, kind, number = match.groups()
        names += [flip] if flip else [f"{kind}{n + 1}" for n in range(int(number))]
    if len(set(names)) < len(names):
        raise UserError(f"--views {text}: it names a type of view twice")
    if len(names) > MAX_VIEWS:
        raise UserError(f"--views {text}: {len(names)} views; the maximum is {MAX_VIEWS}")
    return tuple(names)


def view_of(
    view: str, pixels: Pixels, view_boxes: Tensor, image_ids: Sequence[int]
) -> tuple[Pixels, Tensor]:
    """Create a view of photographs.

    view: a name from `parse_views`, or "" for the unchanged photographs.
    pixels: [B,3,H,W] uint8, or B images [3,H,W] of different sizes.
    view_boxes: [B,4], the part of each photograph that the pixels show, x0 y0 x1 y1 in 0..1.

    Returns the pixels and the view_boxes of the view.
    """
    if not view or not len(pixels):
        return pixels, view_boxes
    if view == "flip":
        left, top, right, bottom = view_boxes.unbind(1)
        mirrored = torch.stack([1 - right, top, 1 - left, bottom], dim=1)
        if isinstance(pixels, Tensor):
            return pixels.flip(3), mirrored
        return [image.flip(2) for image in pixels], mirrored
    view_seed = zlib.crc32(view.encode())
    rngs = [np.random.default_rng((view_seed, abs(image_id))) for image_id in image_ids]
    if view.startswith("color"):
        recolored = [_recolored(*pair) for pair in zip(pixels, rngs, strict=True)]
        return _like(pixels, recolored), view_boxes
    boxes = torch.tensor(np.stack([_random_box(rng) for rng in rngs]), dtype=torch.float32)
    cropped = _like(pixels, [_cropped(*pair) for pair in zip(pixels, boxes, strict=True)])
    start, size = view_boxes[:, :2], view_boxes[:, 2:] - view_boxes[:, :2]
    return cropped, torch.cat([start + boxes[:, :2] * size, start + boxes[:, 2:] * size], dim=1)


def _like(pixels: Pixels, images: list[Tensor]) -> Pixels:
    """Images as one tensor if `pixels` is one."""
    return torch.stack(images) if isinstance(pixels, Tensor) else images


def _random_box(rng: np.random.Generator) -> np.ndarray:
    """Draw a crop, x0 y0 x1 y1 in 0..1."""
    area = rng.uniform(*CROP_AREA)
    aspect = np.exp(rng.uniform(*np.log(CROP_ASPECT)))
    size = np.minimum([np.sqrt(area * aspect), np.sqrt(area / aspect)], 1)
    start = rng.uniform(size=2) * (1 - size)
    return np.concatenate([start, start + size])


def _cropped(pixels: Tensor, box: Tensor) -> Tensor:
    """Crop pixels [3,H,W] to `box`, and resize the crop to [3,H,W]."""
    height, width = pixels.shape[1:]
    left, top, right, bottom = (box * torch.tensor([width, height] * 2)).round().int().tolist()
    return transforms.resized_crop(
        pixels, top, left, max(bottom - top, 1), max(right - left, 1), [height, width]
    )


def _recolored(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    brightness, contrast, saturation = rng.uniform(*COLOR_FACTOR, size=3)
    pixels = transforms.adjust_brightness(pixels, brightness)
    pixels = transforms.adjust_contrast(pixels, contrast)
    return transforms.adjust_saturation(pixels, saturation)
