"""Training losses. They sum over tokens and return the count, so that parts of a step add up: one
process = two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoders.attention import Packed
from models.decoders.dropout import drop_regions, replace_words
from models.decoders.interface import Memory
from models.generation.constraints import NEG_INF
from models.generation.options import Generation, lengths
from models.regions import Regions

ROWS = 256  # of scores in fp32 at a time: they stay in a CPU's cache


@dataclass(frozen=True)
class Noise:
    """What training does to a captioner's inputs: the share of an image's `regions` that is left
    out, of `words` that become `unknown`, and of words that become the captioner's own guess
    (`sampled`)."""

    regions: float = 0.0
    words: float = 0.0
    sampled: float = 0.0
    unknown: int = 0


def caption_loss(
    decoder: nn.Module,
    regions: Regions,
    tokens: Tensor,
    pad: int,
    label_smoothing: float = 0.0,
    noise: Noise = Noise(),
    prompt_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next word of `tokens` [B,K,T], teacher-forced, and how many words were
    scored.

    Returns (sum over words in nats, number of words); divide by the words of the whole step. Label
    smoothing as in Szegedy et al. 2016. Layers run on tokens only, never on padding. `tokens` are
    best on the CPU: the number of tokens is looked up there, and no device has to wait.

    prompt_lengths: [B,K] int64, on the device of `tokens`; a text is its prompt, <bos>, its target
        and <eos>, and only what follows <bos> is scored. None: no prompts.
    """
    is_token = tokens[:, :, 1:] != pad
    text, targets = Packed(tokens[:, :, :-1], is_token, prompt_lengths), tokens[:, :, 1:][is_token]
    scored = None
    if prompt_lengths is not None:
        scored = (torch.arange(tokens.shape[2] - 1) >= prompt_lengths[:, :, None])[
            is_token
        ].nonzero()[:, 0]
        targets = targets[scored]
    device = regions.features.device
    regions = drop_regions(regions, noise.regions)
    text.words = replace_words(text.words, text.replaceable, noise.words, noise.unknown)
    states = decoder(regions, text.to(device), noise.sampled)
    if scored is not None:
        states = states[scored.to(device)]
    weight, bias = unwrapped(decoder).output_layer()
    loss, _ = OutputLoss.apply(
        states, weight, bias, targets.to(device, non_blocking=True), label_smoothing
    )
    return loss, torch.tensor(len(targets))


def self_critical_loss(
    decoder: nn.Module, memory: Memory, samples: Tensor, advantages: Tensor, policy: Generation
) -> tuple[Tensor, Tensor]:
    """The sum over samples of -advantage * log p(sample): its gradient is REINFORCE's (Williams
    1992).

    samples [B,K,L] int64 on the CPU as `sample` gives them under `policy`: <eos> after their end,
    none where they were cut at the limit, whose log p is that of their L words; advantages [B,K]
    float32. log p is under the distribution that was drawn from: softmax(logits /
    policy.temperature), without policy.suppress_tokens. Returns (sum, log p [B,K] without a
    gradient).
    """
    eos, device = policy.eos_token_id, memory.device
    words = lengths(samples, eos)
    there = torch.arange(samples.shape[2]) < words[:, :, None]
    begun = torch.cat(
        [torch.full_like(samples[:, :, :1], policy.bos_token_id), samples[:, :, :-1]], dim=2
    )
    owner = torch.arange(words.numel()).repeat_interleave(words.flatten()).to(device)
    states = decoder(memory, Packed(begun, there).to(device))
    weight, bias = unwrapped(decoder).output_layer()
    barred = torch.tensor(policy.suppress_tokens, dtype=torch.int64).to(device)
    states, bias = states / policy.temperature, bias / policy.temperature
    bias = bias.index_fill(0, barred, NEG_INF)
    weights = advantages.flatten().to(device)[owner]
    loss, log_p = OutputLoss.apply(states, weight, bias, samples[there].to(device), 0.0, weights)
    return loss, log_p.new_zeros(advantages.numel()).index_add_(0, owner, log_p).view(
        advantages.shape
    )


def unwrapped(module: nn.Module) -> Any:
    """The decoder inside what several processes or a compiler wrapped around it."""
    return getattr(module, "module", module)


class OutputLoss(torch.autograd.Function):
    """Output layer and cross-entropy in one: states [N,D], weight [V,D], bias [V], targets [M] of
    the first M rows to the sum in nats, and the targets' log p [M], which has no gradient.
    row_weights [M]: what each row counts in the sum; None: 1.

    The scores [N,V] exist once, in the precision of the product; their softmax is taken some rows
    at a time, and what the gradient needs, softmax minus target, overwrites them.
    """

    @staticmethod
    def forward(
        ctx,
        states: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        smoothing: float,
        row_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        rows, matrix = states.to(dtype), weight.to(dtype)
        scores = F.linear(rows, matrix, bias.to(dtype))
        words, losses, log_p = weight.shape[0], [], []
        each = [None] * len(targets.split(ROWS)) if row_weights is None else row_weights.split(ROWS)
        for part, target, counts in zip(
            scores[: len(targets)].split(ROWS), targets.split(ROWS), each, strict=True
        ):
            exact = part.float()
            right = exact.gather(1, target[:, None])
            mean = exact.mean(dim=1) if smoothing else 0
            largest = exact.amax(dim=1, keepdim=True)
            total = exact.sub_(largest).exp_().sum(dim=1, keepdim=True)
            whole = total.log()[:, 0] + largest[:, 0]
            loss = whole - (1 - smoothing) * right[:, 0] - smoothing * mean
            losses.append(loss if counts is None else loss * counts)
            log_p.append(right[:, 0] - whole)
            if any(ctx.needs_input_grad):
                exact.div_(total).sub_(smoothing / words)
                exact.scatter_add_(
                    1, target[:, None], exact.new_full((len(target), 1), smoothing - 1)
                )
                part.copy_(exact if counts is None else exact.mul_(counts[:, None]))
        ctx.save_for_backward(rows, matrix, scores)
        ctx.dtypes = states.dtype, weight.dtype, bias.dtype
        scores[len(targets) :] = 0
        all_log_p = torch.cat(log_p)
        ctx.mark_non_differentiable(all_log_p)
        return torch.cat(losses).sum(), all_log_p

    @staticmethod
    def backward(ctx, scale: Tensor, _: Tensor) -> tuple:
        rows, matrix, scores = ctx.saved_tensors
        found = scores @ matrix, scores.t() @ rows, scores.sum(dim=0, dtype=torch.float32)
        return (
            *(part.to(dtype).mul_(scale) for part, dtype in zip(found, ctx.dtypes, strict=True)),
            None,
            None,
            None,
        )
