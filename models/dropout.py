"""Dropout whose masks are cheap on a CPU, where torch's own draw costs more than the products beside it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Zero each element with probability `p` while training, and scale the rest so that the mean stays.

    On a CPU a mask is one random byte an element (SFC64, seeded from torch's generator, so a saved generator state is
    enough to go on exactly), and p is rounded to 1/256: measured 1.7 ms against 10.7 ms for 1.3 M elements on two
    cores. Elsewhere it is torch's dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped = round(256 * self.p)
        generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
        words = generator.integers(2**64 - 1, size=-(-x.numel() // 8), dtype=np.uint64, endpoint=True)
        drawn = torch.from_numpy(words).view(torch.uint8)[: x.numel()].view(x.shape)
        return x * (drawn >= dropped).to(x.dtype).mul_(256 / (256 - dropped))

    def extra_repr(self) -> str:
        return f"p={self.p}"
