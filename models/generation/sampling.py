"""Sampling of texts from the probabilities of a decoder.

Letters in shapes: B images, N samples per image, L maximum words of a text, V words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoders.interface import Decoder, Memory
from models.generation.constraints import NEG_INF, ban
from models.generation.options import Captions, Generation, first_tokens, lengths

GROUP_SIZE = 8  # texts that share one attention product; the mask grows with the square of this
MAX_DISTINCT_SHARE = 0.8  # with more distinct texts than this share, each sample gets its own row
MIN_USED_SHARE = 0.75  # rows are regrouped when less than this share of the groups is needed
BLOCK_SIZE = 128  # words per block in `inverse_cdf`


@torch.no_grad()
def sample(
    decoder: Decoder,
    memory: Memory,
    options: Generation,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    prompts: Tensor | None = None,
) -> Captions:
    """Draw N = options.num_return_sequences samples of each image.

    Each word is drawn from softmax(logits / temperature), restricted to the `top_k` most likely
    words (0: all; more in case of ties) and then to the most likely words whose total probability
    reaches `top_p` (nucleus sampling, Holtzman et al. 2020). log p is under this restricted
    distribution and includes <eos>. It is -inf if the constraints allow no word.

    On a CPU, samples with equal prefixes share one row of the decoder's batch, and the rows of
    ended samples are removed. On a GPU all shapes are fixed and the host does not wait.

    memory: B encoded images. prompts: [B,P] int64, padded on the left; None: no prompts.
    uniforms: [B,N,L] float32 in [0,1), the random number of each word; None: drawn from
        `generator`. No other random numbers are used.
    """
    device, eos = memory.device, options.eos_token_id
    on_cpu = device.type == "cpu"
    images, samples = memory.images, options.num_return_sequences
    limit, banned = options.limit(decoder.config.max_length), options.banned_words
    if uniforms is None:
        uniforms = torch.rand(images, samples, limit, generator=generator, device=device)
    uniforms = uniforms.to(device).flatten(0, 1)
    tokens = torch.full((images * samples, limit), eos, dtype=torch.int64, device=device)
    log_p = torch.zeros(images * samples, device=device)
    first = first_tokens(images, options.bos_token_id, device, prompts)
    rows = Rows(decoder, memory, min(GROUP_SIZE, samples), first, prompts)
    # For each live sample: its index, its row, and whether it has ended. On a CPU, ended samples
    # are removed from these tensors.
    live = torch.arange(images * samples, device=device)
    row = live // samples
    ended = torch.zeros_like(live, dtype=torch.bool)
    sharing = on_cpu and samples > GROUP_SIZE
    for position in range(limit):
        logits = rows.logits() / options.temperature
        ban(logits, options.suppress_tokens)
        sample_of_row = live.new_zeros(len(logits)).scatter_(0, row, live)
        banned(logits, tokens[sample_of_row, :position])
        blocked = logits.amax(1) == NEG_INF  # all words are banned: the text ends
        logits[:, eos] = logits[:, eos].masked_fill(blocked, 0)
        word_log_p = nucleus(logits, options.top_k, options.top_p).log_softmax(dim=-1)
        words = inverse_cdf(word_log_p.exp(), uniforms[live, position], row)
        words = words.masked_fill(ended, eos)
        step_log_p = word_log_p[row, words].masked_fill(blocked[row], NEG_INF)
        log_p[live] += step_log_p.masked_fill(ended, 0)
        tokens[live, position] = words
        ended = ended | (words == eos)
        if on_cpu:
            live, row, words, ended = (part[~ended] for part in (live, row, words, ended))
        if position + 1 == limit or not len(live):
            break
        if sharing:  # samples of one row that drew the same word have the same text
            texts, text = torch.unique(row * logits.shape[1] + words, return_inverse=True)
            sharing = len(texts) < MAX_DISTINCT_SHARE * len(live)
            if sharing:
                row = rows.regroup(texts // logits.shape[1], texts % logits.shape[1])[text]
            else:
                row = rows.regroup(row, words)
        elif position == 0 or (
            on_cpu and rows.groups_needed(row) < MIN_USED_SHARE * len(rows.image)
        ):
            row = rows.regroup(row, words)
        else:
            rows.extend(row, words)
    scores = log_p / lengths(tokens, eos) ** options.length_penalty
    return Captions(*(part.unflatten(0, (images, samples)) for part in (tokens, scores, log_p)))


class Rows:
    """The rows of a decoder's batch, one per text, in groups of `size` rows.

    All texts of a group belong to one image, and the attention of a group is one product. Unused
    rows of a group are padding.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: Memory,
        size: int,
        first: Tensor,
        prompts: Tensor | None = None,
    ) -> None:
        """
        size: rows per group.
        first: [B,T] int64, the first tokens of the texts of each image. All texts of an image share
            one row until the first `regroup`.
        """
        self.decoder, self.memory, self.size, self.images = decoder, memory, size, memory.images
        self.image = torch.arange(self.images, device=memory.device)  # [groups]
        self.cache = decoder.init_cache(memory, size, prompts)
        self.newest = first[:, None]  # [groups, rows, tokens], the next input of the decoder

    def logits(self) -> Tensor:
        """Compute the logits of the next word of each row, [rows,V] float32."""
        logits = self.decoder.decode(self.newest, self.memory, self.cache)[:, :, -1]
        return logits.float().flatten(0, 1)

    def extend(self, row: Tensor, words: Tensor) -> None:
        """Append `words` [M] to the texts in the rows `row` [M]."""
        newest = words.new_zeros(len(self.image) * self.size).scatter_(0, row, words)
        self.newest = newest.view(-1, self.size, 1)

    def groups_needed(self, row: Tensor) -> int:
        """The number of groups that the texts in the rows `row` need."""
        image = self.image[row // self.newest.shape[1]]
        return int(self._group_count(image.bincount()).sum())

    def _group_count(self, texts: Tensor) -> Tensor:
        return (texts + self.size - 1) // self.size

    def regroup(self, parent: Tensor, words: Tensor) -> Tensor:
        """Build new groups for M texts: text m is the text of row parent[m] followed by words[m].

        parent: [M] int64, sorted by image. Returns the new row of each text, [M] int64.
        """
        old_size = self.newest.shape[1]
        image = self.image[parent // old_size]
        texts = words.new_zeros(self.images).scatter_add_(0, image, torch.ones_like(image))
        groups = self._group_count(texts)
        first_text = texts.cumsum(0) - texts  # of each image
        index = torch.arange(len(image), device=image.device) - first_text[image]
        group = (groups.cumsum(0) - groups)[image] + index // self.size
        row = group * self.size + index % self.size
        source = words.new_full((int(groups.sum()) * self.size,), -1).scatter_(0, row, parent)
        source = source.view(-1, self.size)
        source = torch.where(source < 0, source[:, :1], source)  # padding copies the first text
        self.image = self.image[source[:, 0] // old_size]
        self.memory = self.memory.keep(source[:, 0] // old_size)
        self.cache.regroup(source // old_size, source % old_size)
        self.extend(row, words)
        return row


def inverse_cdf(p: Tensor, uniforms: Tensor, row: Tensor) -> Tensor:
    """Draw words by inverse transform sampling.

    p: [M,V] distributions. uniforms: [N] in [0,1). row: [N] int64, the distribution of each draw.
    Returns words [N] int64. Each is the first word whose cumulative probability is above the
    uniform number, so its probability is never 0.

    The function first finds the block of words that contains the result, then the word in this
    block. So it reads p once and computes cumulative sums only of short rows.
    """
    dtype = torch.float32 if p.device.type == "mps" else torch.float64  # mps has no float64
    blocks = F.pad(p, (0, -p.shape[1] % BLOCK_SIZE)).unflatten(1, (-1, BLOCK_SIZE))
    block_sums = blocks.sum(2).cumsum(1, dtype=dtype)[row]
    threshold = uniforms[:, None] * block_sums[:, -1:]
    block = first_above(block_sums, threshold)
    p_in_block = blocks[row, block[:, 0]].to(dtype)
    sum_before = F.pad(block_sums, (1, 0)).gather(1, block)
    word = block * BLOCK_SIZE + first_above(sum_before + p_in_block.cumsum(1), threshold)
    return word[:, 0].clamp(max=p.shape[1] - 1)


def first_above(sums: Tensor, threshold: Tensor) -> Tensor:
    """Index [N,1] of the first of the increasing sums [N,M] that is above threshold [N,1].

    Rounding can make a threshold reach the last sum. It is then reduced to just below the last sum.
    NaN rows return an arbitrary index; the NaN log-probability reports them.
    """
    last = sums[:, -1:]
    below_last = torch.nextafter(last, torch.zeros_like(last))
    index = torch.searchsorted(sums, torch.minimum(threshold, below_last), right=True)
    return index.clamp(max=sums.shape[1] - 1)


def nucleus(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits [...,V] of unlikely words to -inf.

    The `top_k` most likely words remain (0: all). Of these, the most likely words remain whose
    total probability reaches `top_p` (Holtzman et al. 2020). At least one word remains.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, NEG_INF)
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
        p = sorted_logits.softmax(dim=-1)
        p_before = p.cumsum(dim=-1) - p
        remaining = sorted_logits.masked_fill(p_before >= top_p, NEG_INF)
        logits = logits.scatter(-1, order, remaining)
    return logits
