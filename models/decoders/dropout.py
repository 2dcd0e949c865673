"""Dropout of activations, regions and words, with masks that are cheap on a CPU."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.regions import Regions


class Dropout(nn.Module):
    """Zero each element with probability `p` while training, and scale the rest so that the mean
    stays.

    On a CPU a mask is one random byte an element (SFC64, seeded from torch's generator, so a saved
    generator state is enough to go on exactly), and p is rounded to 1/256: measured 1.7 ms against
    10.7 ms for 1.3 M elements on two cores. Elsewhere it is torch's dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or not x.numel():
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped = min(255, round(256 * self.p))
        generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
        words = generator.integers(
            2**64 - 1, size=-(-x.numel() // 8), dtype=np.uint64, endpoint=True
        )
        drawn = torch.from_numpy(words).view(torch.uint8)[: x.numel()].view(x.shape)
        return x * (drawn >= dropped).to(x.dtype).mul_(256 / (256 - dropped))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def drop_regions(regions: Regions, p: float) -> Regions:
    """Leave out a random share `p` of each image's regions. The others keep their order and
    boxes.
    """
    if p == 0:
        return regions
    features, boxes, counts = regions
    kept = (counts * (1 - p)).round().clamp(min=1).long()
    order = torch.rand(features.shape[:2], device=features.device)
    absent = torch.arange(features.shape[1], device=features.device) >= counts[:, None]
    order = order.masked_fill_(absent, 2).argsort(dim=1)[
        :, : max(1, round(features.shape[1] * (1 - p)))
    ]
    features, boxes = (
        part.gather(1, order[:, :, None].expand(-1, -1, part.shape[2]))
        for part in (features, boxes)
    )
    return Regions(features, boxes, kept)


def replace_words(words: Tensor, replaceable: Tensor, p: float, unknown: int) -> Tensor:
    """Replace a random share `p` of the `replaceable` [N] words [N] by `unknown` (Bowman et al.
    2016).
    """
    if p == 0:
        return words
    drawn = torch.rand(words.shape, device=words.device) < p
    return torch.where(drawn & replaceable, unknown, words)
