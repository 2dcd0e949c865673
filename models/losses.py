"""Training losses. They return a sum and a count, so that the parts of a step add up to the same
loss.
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
    """Noise on a decoder's inputs during training: the share of each image's `regions` that is left
    out, of `words` that become `unknown`, and of words that become the decoder's own prediction
    (`sampled`).
    """

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
    """The decoder inside DistributedDataParallel or torch.compile."""
    return getattr(module, "module", module)


class OutputLoss(torch.autograd.Function):
    """Output layer and label-smoothed cross-entropy in one, with the gradient written out.

    With logits z = states @ weight.T + bias, target t, smoothing e and V words, a row's loss is

        loss = logsumexp(z) - (1 - e) z[t] - e mean(z)
        d loss / d z = softmax(z) - e/V - (1 - e) onehot(t)

    states [N,D], weight [V,D], bias [V]; targets [M] of the first M rows, the rest is padding;
    row_weights [M] multiply the rows' losses (None: 1). Returns the sum over rows in nats, and
    log p [M] of the targets, which has no gradient.

    Memory: the logits [N,V] exist once, in the precision of the matrix product. Some rows at a time
    are read in float32, and the gradient of those rows overwrites their logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        smoothing: float,
        row_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        device = states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else states.dtype
        rows, matrix = states.to(dtype), weight.to(dtype)
        logits = F.linear(rows, matrix, bias.to(dtype))
        losses, log_p = [], []
        for start in range(0, len(targets), ROWS):
            part = slice(start, min(start + ROWS, len(targets)))
            target = targets[part, None]
            z = logits[part].float()
            z_target = z.gather(1, target)[:, 0]
            mean = z.mean(dim=1) if smoothing else 0
            largest = z.amax(dim=1, keepdim=True)
            exp = z.sub_(largest).exp_()  # in place: z is not used any more
            total = exp.sum(dim=1, keepdim=True)
            logsumexp = total.log()[:, 0] + largest[:, 0]
            loss = logsumexp - (1 - smoothing) * z_target - smoothing * mean
            losses.append(loss if row_weights is None else loss * row_weights[part])
            log_p.append(z_target - logsumexp)
            if any(ctx.needs_input_grad):
                gradient = exp.div_(total).sub_(smoothing / weight.shape[0])
                gradient.scatter_add_(1, target, gradient.new_full(target.shape, smoothing - 1))
                if row_weights is not None:
                    gradient.mul_(row_weights[part, None])
                logits[part].copy_(gradient)
        logits[len(targets) :] = 0
        ctx.save_for_backward(rows, matrix, logits)
        ctx.dtypes = states.dtype, weight.dtype, bias.dtype
        all_log_p = torch.cat(log_p)
        ctx.mark_non_differentiable(all_log_p)
        return torch.cat(losses).sum(), all_log_p

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple:
        rows, matrix, gradient = ctx.saved_tensors  # of the logits [N,V]
        of_states, of_weight = gradient @ matrix, gradient.t() @ rows
        of_bias = gradient.sum(dim=0, dtype=torch.float32)
        parts = zip((of_states, of_weight, of_bias), ctx.dtypes, strict=True)
        return *(part.to(dtype).mul_(scale) for part, dtype in parts), None, None, None
