"""Training losses. They sum over tokens and return the count, so that parts of a step add up: one process = two."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from models.captioner import Captioner
from models.grid import Regions


def caption_loss(
    captioner: Captioner, regions: Regions, tokens: Tensor, pad: int, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next word of `tokens` [B,K,T], teacher-forced, and how many words were scored.

    Returns (sum over words in nats, number of words); divide by the words of the whole step. Label smoothing as in
    Szegedy et al. 2016. The output layer runs on the words that are there, never on padding.
    """
    states = captioner(regions, tokens[:, :, :-1])
    targets = tokens[:, :, 1:]
    there = targets != pad
    logits = captioner.logits(states[there]).float()
    return F.cross_entropy(logits, targets[there], reduction="sum", label_smoothing=label_smoothing), there.sum()
