"""Regions of an image: the output of every backbone.

B images, R regions per image, C channels. The regions of a grid are the cells of the feature map,
row by row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Regions(NamedTuple):
    """features [B,R,C], zero after counts; boxes [B,R,4] x0 y0 x1 y1 in 0..1 of the whole upright
    photograph; counts [B].
    """

    features: Tensor
    boxes: Tensor
    counts: Tensor


def grid_boxes(height: int, width: int) -> Tensor:
    """The boxes of the cells of a height x width grid, row by row: [height*width,4] float32 in
    0..1.
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x0, y0 = x.flatten() / width, y.flatten() / height
    return torch.stack([x0, y0, x0 + 1 / width, y0 + 1 / height], dim=1).float()


def grid_regions(feature_map: Tensor, view_boxes: Tensor | None = None) -> Regions:
    """Turn a feature map [B,C,h,w] into regions, R = h*w.

    view_boxes: [B,4] the part of the photograph that the map shows, x0 y0 x1 y1, outside of 0..1
    where there is padding; None: the whole photograph. Cells that show only padding are removed:
    the other cells come first, followed by zeros.
    """
    batch, _, height, width = feature_map.shape
    features = feature_map.flatten(2).transpose(1, 2)
    boxes = grid_boxes(height, width).to(feature_map.device).expand(batch, -1, -1)
    counts = torch.full((batch,), height * width, dtype=torch.int64, device=feature_map.device)
    if view_boxes is None:
        return Regions(features, boxes, counts)
    start, size = view_boxes[:, None, :2], view_boxes[:, None, 2:] - view_boxes[:, None, :2]
    boxes = torch.cat([start + boxes[..., :2] * size, start + boxes[..., 2:] * size], dim=2).clamp(
        0, 1
    )
    there = (boxes[..., 2:] - boxes[..., :2] > 1e-4).all(2)  # smaller boxes are rounding errors
    order = (~there).int().argsort(dim=1, stable=True)
    there = there.gather(1, order)[..., None]
    features, boxes = (
        part.gather(1, order[..., None].expand_as(part)) * there for part in (features, boxes)
    )
    return Regions(features, boxes, there.sum((1, 2)))
