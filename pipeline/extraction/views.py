"""Views of a photograph that a cache keeps beside it: mirrored, cropped, with other colours.

`--views flip,crop:2,color:1` keeps the views flip, crop1, crop2 and color1. A crop and a change of
colours follow from the image's id and the view's name, so a row that is made again is the same.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from pipeline.cli import UserError

MOST_VIEWS = 64
CROP_AREA = 0.5, 1.0  # share of the photograph's area that a crop shows
CROP_ASPECT = 3 / 4, 4 / 3  # its width by its height, of the photograph's own
COLOR_FACTOR = 0.6, 1.4  # of brightness, contrast and saturation; no other hues: captions name them


def parse_views(text: str) -> tuple[str, ...]:
    """Parse `--views` into the names of the views; UserError for an unknown view."""
    names: list[str] = []
    for part in () if text == "none" else text.split(","):
        match = re.fullmatch(r"(flip)|(crop|color):(\d{1,4})", part.strip())
        if not match:
            raise UserError(f"--views: {part!r} is not one of flip, crop:N, color:N")
        flip, kind, number = match.groups()
        names += [flip] if flip else [f"{kind}{n + 1}" for n in range(int(number))]
    if len(set(names)) < len(names):
        raise UserError(f"--views {text}: a kind of view is named twice")
    if len(names) > MOST_VIEWS:
        raise UserError(f"--views {text}: {len(names)} views, at most {MOST_VIEWS} are kept")
    return tuple(names)


def view_of(
    view: str, pixels: Tensor, view_boxes: Tensor, image_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Pixels [B,3,H,W] uint8 and view_boxes [B,4] of a view of photographs. The view "" is the
    unchanged photograph.

    view_boxes: the part of the photograph that the pixels show, x0 y0 x1 y1 in 0..1.
    """
    if not view or not len(pixels):
        return pixels, view_boxes
    if view == "flip":
        left, top, right, bottom = view_boxes.unbind(1)
        return pixels.flip(3), torch.stack([1 - right, top, 1 - left, bottom], dim=1)
    draws = [np.random.default_rng((zlib.crc32(view.encode()), abs(id_))) for id_ in image_ids]
    if view.startswith("color"):
        return torch.stack([_recolored(*pair) for pair in zip(pixels, draws, strict=True)]), (
            view_boxes
        )
    boxes = torch.tensor(np.stack([_crop_box(draw) for draw in draws]), dtype=torch.float32)
    cropped = torch.stack([_cropped(*pair) for pair in zip(pixels, boxes, strict=True)])
    start, size = view_boxes[:, :2], view_boxes[:, 2:] - view_boxes[:, :2]
    return cropped, torch.cat([start + boxes[:, :2] * size, start + boxes[:, 2:] * size], dim=1)


def _crop_box(draw: np.random.Generator) -> np.ndarray:
    """x0 y0 x1 y1 in 0..1."""
    area = draw.uniform(*CROP_AREA)
    aspect = np.exp(draw.uniform(*np.log(CROP_ASPECT)))
    size = np.minimum([np.sqrt(area * aspect), np.sqrt(area / aspect)], 1)
    start = draw.uniform(size=2) * (1 - size)
    return np.concatenate([start, start + size])


def _cropped(pixels: Tensor, box: Tensor) -> Tensor:
    """The part `box` of pixels [3,H,W], at the same size."""
    height, width = pixels.shape[1:]
    left, top, right, bottom = (box * torch.tensor([width, height] * 2)).round().int().tolist()
    return transforms.resized_crop(
        pixels, top, left, max(bottom - top, 1), max(right - left, 1), [height, width]
    )


def _recolored(pixels: Tensor, draw: np.random.Generator) -> Tensor:
    brightness, contrast, saturation = draw.uniform(*COLOR_FACTOR, size=3)
    pixels = transforms.adjust_brightness(pixels, brightness)
    pixels = transforms.adjust_contrast(pixels, contrast)
    return transforms.adjust_saturation(pixels, saturation)
