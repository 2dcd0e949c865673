"""Training losses. They sum over tokens and return the count, so that parts of a step add up: one process = two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Packed
from models.captioner import Captioner
from models.dropout import drop_regions, replace_words
from models.grid import Regions

ROWS = 256  # of scores in fp32 at a time: they stay in a CPU's cache


@dataclass(frozen=True)
class Noise:
    """What training does to a captioner's inputs: the share of an image's `regions` that is left out, of `words` that become
    `unknown`, and of words that become the captioner's own guess (`sampled`)."""

    regions: float = 0.0
    words: float = 0.0
    sampled: float = 0.0
    unknown: int = 0


def caption_loss(
    captioner: Captioner,
    regions: Regions,
    tokens: Tensor,
    pad: int,
    label_smoothing: float = 0.0,
    noise: Noise = Noise(),
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next word of `tokens` [B,K,T], teacher-forced, and how many words were scored.

    Returns (sum over words in nats, number of words); divide by the words of the whole step. Label smoothing as in
    Szegedy et al. 2016. Every layer runs on the words that are there, never on padding; `tokens` best lie on the CPU, where
    finding those words keeps no device waiting.
    """
    there = tokens[:, :, 1:] != pad
    text, targets = Packed(tokens[:, :, :-1], there), tokens[:, :, 1:][there]
    device = regions.features.device
    if noise.regions:
        regions = drop_regions(regions, noise.regions)
    if noise.words:
        text.words = replace_words(text.words, text.positions, noise.words, noise.unknown)
    states = captioner(regions, text.to(device), noise.sampled)
    output = getattr(captioner, "module", captioner)  # several processes and compilers wrap it
    weight, bias = output.word.weight, output.output_bias
    loss = OutputLoss.apply(states, weight, bias, targets.to(device, non_blocking=True), label_smoothing)
    return loss, torch.tensor(len(targets))


class OutputLoss(torch.autograd.Function):
    """Output layer and cross-entropy in one: states [N,D], weight [V,D], bias [V], targets [N] to the sum in nats.

    The scores [N,V] exist once, in the precision of the product; their softmax is taken some rows at a time, and what the
    gradient needs, softmax minus target, overwrites them.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        rows, matrix = states.to(dtype), weight.to(dtype)
        scores = F.linear(rows, matrix, bias.to(dtype))
        words, losses = weight.shape[0], []
        for part, target in zip(scores.split(ROWS), targets.split(ROWS), strict=True):
            exact = part.float()
            right = exact.gather(1, target[:, None])
            mean = exact.mean(dim=1) if smoothing else 0
            largest = exact.amax(dim=1, keepdim=True)
            total = exact.sub_(largest).exp_().sum(dim=1, keepdim=True)
            losses.append(total.log()[:, 0] + largest[:, 0] - (1 - smoothing) * right[:, 0] - smoothing * mean)
            if any(ctx.needs_input_grad):
                exact.div_(total).sub_(smoothing / words)
                exact.scatter_add_(1, target[:, None], exact.new_full((len(target), 1), smoothing - 1))
                part.copy_(exact)
        ctx.save_for_backward(rows, matrix, scores)
        ctx.dtypes = states.dtype, weight.dtype, bias.dtype
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple:
        rows, matrix, scores = ctx.saved_tensors
        found = scores @ matrix, scores.t() @ rows, scores.sum(dim=0, dtype=torch.float32)
        return *(part.to(dtype).mul_(scale) for part, dtype in zip(found, ctx.dtypes, strict=True)), None, None
