"""Regions of images: the output of every backbone and the input of every decoder.

The regions of a grid backbone are the cells of its feature map, row by row.
Letters in shapes: B images, R regions per image, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Regions(NamedTuple):
    """The regions of a batch of images.

    features: [B,R,C]. Rows after `counts` are padding with zeros.
    boxes: [B,R,4], x0 y0 x1 y1 in 0..1, relative to the whole upright photograph.
    counts: [B] int64, number of regions of each image. With two kinds of regions side by side:
        [B,2], the number of each kind. The regions of the first kind come first, and the features
        of the kind with fewer channels end in zeros.
    """

    features: Tensor
    boxes: Tensor
    counts: Tensor

    @property
    def totals(self) -> Tensor:
        """Number of regions of each image, of all kinds: [B] int64."""
        return self.counts if self.counts.ndim == 1 else self.counts.sum(1)


def side_by_side(kinds: Sequence[Regions]) -> Regions:
    """Join the regions of two kinds of the same images, as `Regions` describes."""
    if len(kinds) == 1:
        return kinds[0]
    first, second = kinds
    channels = max(first.features.shape[2], second.features.shape[2])
    features = torch.cat(
        [
            torch.nn.functional.pad(each.features, (0, channels - each.features.shape[2]))
            for each in kinds
        ],
        dim=1,
    )
    boxes = torch.cat([first.boxes, second.boxes], dim=1)
    slots = torch.arange(features.shape[1], device=features.device).expand(len(features), -1)
    size = first.features.shape[1]
    is_region = torch.where(
        slots < size, slots < first.counts[:, None], slots - size < second.counts[:, None]
    )
    order = (slots + features.shape[1] * ~is_region).argsort(dim=1)[..., None]  # padding last
    features, boxes = (part.gather(1, order.expand_as(part)) for part in (features, boxes))
    return Regions(features, boxes, torch.stack([first.counts, second.counts], dim=1))


def grid_boxes(height: int, width: int) -> Tensor:
    """Boxes of the cells of a height x width grid over the whole photograph, row by row.

    Returns [height*width,4] float32, x0 y0 x1 y1 in 0..1.
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x0, y0 = x.flatten() / width, y.flatten() / height
    return torch.stack([x0, y0, x0 + 1 / width, y0 + 1 / height], dim=1).float()


def grid_regions(feature_map: Tensor, view_boxes: Tensor | None = None) -> Regions:
    """Convert a feature map [B,C,h,w] to regions, R = h*w.

    view_boxes: [B,4], x0 y0 x1 y1, the part of the photograph that the map shows. Coordinates
        outside 0..1 are fill around the photograph. None: the map shows the whole photograph.

    Cells that show only fill are removed: the other cells move to the front, then zeros follow.
    """
    batch, _, height, width = feature_map.shape
    features = feature_map.flatten(2).transpose(1, 2)
    boxes = grid_boxes(height, width).to(feature_map.device).expand(batch, -1, -1)
    counts = torch.full((batch,), height * width, dtype=torch.int64, device=feature_map.device)
    if view_boxes is None:
        return Regions(features, boxes, counts)
    start, size = view_boxes[:, None, :2], view_boxes[:, None, 2:] - view_boxes[:, None, :2]
    boxes = torch.cat([start + boxes[..., :2] * size, start + boxes[..., 2:] * size], dim=2)
    boxes = boxes.clamp(0, 1)
    # A side of at most 1e-4 is a rounding error: the cell shows only fill.
    shows_photo = (boxes[..., 2:] - boxes[..., :2] > 1e-4).all(2)
    # cells that show the photograph first, in their order; the keys are unique, so that no stable
    # sort is needed, which ONNX lacks
    cells = torch.arange(height * width, device=feature_map.device)
    order = (cells + height * width * ~shows_photo).argsort(dim=1)
    is_region = shows_photo.gather(1, order)[..., None]
    features, boxes = (
        part.gather(1, order[..., None].expand_as(part)) * is_region for part in (features, boxes)
    )
    return Regions(features, boxes, is_region.sum((1, 2)))
