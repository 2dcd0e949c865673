"""Training losses.

Each loss is a sum over tokens, so the parts of a step and the processes of a run can be added up.
One process and two processes give the same result.
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

CHUNK_ROWS = 256  # rows of fp32 logits processed at a time, so that they fit the cache of a CPU


@dataclass(frozen=True)
class Noise:
    """Noise in the inputs of training.

    regions: share of the regions of each image that is removed.
    words: probability that a word is replaced by `unknown`.
    sampled: probability that a word is replaced by the decoder's own prediction.
    unknown: id of <unk>.
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
    """Cross-entropy of the next words of texts, with teacher forcing.

    decoder: a Decoder, or a wrapper of it such as DistributedDataParallel.
    tokens: [B,K,T] int64, preferably on the CPU: their count is read, for which a GPU would have to
        wait. Each text is its prompt, <bos>, its target and <eos>, then `pad`.
    label_smoothing: as in Szegedy et al. 2016.
    prompt_lengths: [B,K] int64, on the device of `tokens`; None: no prompts. The loss covers only
        the words after <bos>.

    Returns the sum over words in nats, and the number of these words. Divide by the number of words
    of the whole step. The layers process tokens only, no padding.
    """
    is_token = tokens[:, :, 1:] != pad
    text, targets = Packed(tokens[:, :, :-1], is_token, prompt_lengths), tokens[:, :, 1:][is_token]
    target_rows = None
    if prompt_lengths is not None:
        is_target = torch.arange(tokens.shape[2] - 1) >= prompt_lengths[:, :, None]
        target_rows = is_target[is_token].nonzero()[:, 0]
        targets = targets[target_rows]
    device = regions.features.device
    regions = drop_regions(regions, noise.regions)
    text.words = replace_words(text.words, text.replaceable, noise.words, noise.unknown)
    states = decoder(regions, text.to(device), noise.sampled)
    if target_rows is not None:
        states = states[target_rows.to(device)]
    weight, bias = unwrapped(decoder).output_layer()
    loss, _ = OutputLoss.apply(
        states, weight, bias, targets.to(device, non_blocking=True), label_smoothing
    )
    return loss, torch.tensor(len(targets))


def class_loss(
    decoder: nn.Module,
    regions: Regions,
    tokens: Tensor,
    labels: Tensor,
    pad: int,
    noise: Noise = Noise(),
    prompt_lengths: Tensor | None = None,
    exclusive_smoothing: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of soft labels, and the number of texts (Teney et al. 2018).

    tokens: [B,K,T] int64 on the CPU, prompts and then <bos>. labels: [N,classes] float32, a row for
    each text that is not padding, in order. Returns (sum over texts and classes in nats, N).

    exclusive_smoothing: a number for classes of which exactly one is true: the loss is then the
        cross-entropy of the softmax with this label smoothing, and a label is the weight of the
        text.
    """
    is_token = tokens != pad
    text = Packed(tokens, is_token, prompt_lengths)
    lengths = is_token.sum(2)
    # the row of each text's <bos>; for a text of padding another row, whose state is not used
    text.select((lengths.flatten().cumsum(0) - 1).clamp(min=0).view(lengths.shape))
    texts = lengths.flatten().nonzero()[:, 0]
    device = regions.features.device
    text.words = replace_words(text.words, text.positions > 0, noise.words, noise.unknown)
    states = decoder(drop_regions(regions, noise.regions), text.to(device)).flatten(0, 1)
    logits = unwrapped(decoder).head(states[texts.to(device)])
    labels = labels.to(device, non_blocking=True)
    if exclusive_smoothing is None:
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
    else:
        weights, classes = labels.max(1)
        losses = F.cross_entropy(
            logits.float(), classes, reduction="none", label_smoothing=exclusive_smoothing
        )
        loss = (weights * losses).sum()
    return loss, torch.tensor(len(texts))


def self_critical_loss(
    decoder: nn.Module, memory: Memory, samples: Tensor, advantages: Tensor, policy: Generation
) -> tuple[Tensor, Tensor]:
    """Sum over samples of -advantage * log p(sample). The gradient is REINFORCE's (Williams 1992).

    samples: [B,K,L] int64 on the CPU, drawn by `sample` with the options `policy`. <eos> fills them
        after their end. A sample that reached the limit has L words and no <eos>.
    advantages: [B,K] float32.
    policy: log p is under softmax(logits / policy.temperature), without policy.suppress_tokens.

    Returns the sum, and log p [B,K] without a gradient.
    """
    eos, device = policy.eos_token_id, memory.device
    word_counts = lengths(samples, eos)
    is_word = torch.arange(samples.shape[2]) < word_counts[:, :, None]
    begin = torch.full_like(samples[:, :, :1], policy.bos_token_id)
    inputs = torch.cat([begin, samples[:, :, :-1]], dim=2)
    sample_of_row = torch.arange(word_counts.numel()).repeat_interleave(word_counts.flatten())
    sample_of_row = sample_of_row.to(device)
    states = decoder(memory, Packed(inputs, is_word).to(device))
    weight, bias = unwrapped(decoder).output_layer()
    suppressed = torch.tensor(policy.suppress_tokens, dtype=torch.int64).to(device)
    states, bias = states / policy.temperature, bias / policy.temperature
    bias = bias.index_fill(0, suppressed, NEG_INF)
    weights = advantages.flatten().to(device)[sample_of_row]
    targets = samples[is_word].to(device)
    loss, log_p = OutputLoss.apply(states, weight, bias, targets, 0.0, weights)
    log_p = log_p.new_zeros(advantages.numel()).index_add_(0, sample_of_row, log_p)
    return loss, log_p.view(advantages.shape)


def unwrapped(module: nn.Module) -> Any:
    """Return the decoder inside a wrapper such as DistributedDataParallel."""
    return getattr(module, "module", module)


class OutputLoss(torch.autograd.Function):
    """Output layer and cross-entropy with label smoothing in one function, with its own gradient.

    With logits z = states @ weight.T + bias, target t, smoothing e and V words, each row has

        loss = logsumexp(z) - (1 - e) z[t] - e mean(z)
        d loss / d z = softmax(z) - e/V - (1 - e) onehot(t)

    states: [N,D]. weight: [V,D]. bias: [V].
    targets: [M] int64, of the first M rows. The other rows are padding.
    row_weights: [M], factors of the losses of the rows; None: 1.

    Returns the sum over rows in nats, and log p [M] of the targets, which has no gradient.

    Memory: the logits [N,V] exist once, in the precision of the matrix product. A chunk of rows at
    a time is converted to float32, and the gradient of the chunk overwrites its logits.
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
        for start in range(0, len(targets), CHUNK_ROWS):
            part = slice(start, min(start + CHUNK_ROWS, len(targets)))
            target = targets[part, None]
            z = logits[part].float()
            z_target = z.gather(1, target)[:, 0]
            mean = z.mean(dim=1) if smoothing else 0
            largest = z.amax(dim=1, keepdim=True)
            exp = z.sub_(largest).exp_()  # in place: z is not used after this line
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
        rows, matrix, gradient = ctx.saved_tensors  # gradient of the logits, [N,V]
        gradients = gradient @ matrix, gradient.t() @ rows, gradient.sum(0, dtype=torch.float32)
        scaled = (
            part.to(dtype).mul_(scale) for part, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None
