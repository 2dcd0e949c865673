"""Random samples from a decoder. B images, N samples per image, V words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoders.interface import Decoder, Memory
from models.generation.constraints import NEG_INF, bar
from models.generation.options import Captions, Generation, first_tokens, lengths

GROUP = 8  # texts that share one attention product; its mask grows with their square
DISTINCT = 0.8  # share of distinct texts above which every sample gets a row of its own
DENSE = 0.75  # regroup if the live samples need fewer than this share of the groups
BLOCK = 128  # words per block whose probabilities are summed first


@torch.no_grad()
def sample(
    decoder: Decoder,
    memory: Memory,
    options: Generation,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    prompts: Tensor | None = None,
) -> Captions:
    """Draw num_return_sequences N samples of each image.

    Each word is drawn from softmax(logits / temperature), restricted to the `top_k` most likely
    words (0: all; more if they tie) and then to the most likely words that together reach `top_p`
    (Holtzman et al. 2020). log p is under that distribution, <eos> included, and -inf if the
    constraints leave no word.

    On a CPU, samples with equal words so far share a row of the batch, and rows of ended samples
    are removed. On a GPU all shapes are fixed after the first word.

    uniforms: [B,N,L] float32 in [0,1), one random number per word; None: from `generator`.
    """
    device, eos = memory.device, options.eos_token_id
    on_cpu = device.type == "cpu"
    images, samples = memory.images, options.num_return_sequences
    limit, banned = options.limit(decoder.config.max_length), options.barred
    if uniforms is None:
        uniforms = torch.rand(images, samples, limit, generator=generator, device=device)
    uniforms = uniforms.to(device).flatten(0, 1)
    tokens = torch.full((images * samples, limit), eos, dtype=torch.int64, device=device)
    log_p = torch.zeros(images * samples, device=device)
    first = first_tokens(images, options.bos_token_id, device, prompts)
    rows = Rows(decoder, memory, min(GROUP, samples), first, prompts)
    # of each live sample: its number, its row, whether it has ended (on a CPU it is then dropped)
    live = torch.arange(images * samples, device=device)
    row = live // samples
    ended = torch.zeros_like(live, dtype=torch.bool)
    sharing = on_cpu and samples > GROUP
    for place in range(limit):
        logits = rows.logits() / options.temperature
        bar(logits, options.suppress_tokens)
        one_of_row = live.new_zeros(len(logits)).scatter_(0, row, live)
        banned(logits, tokens[one_of_row, :place])
        stuck = logits.amax(1) == NEG_INF  # no word is allowed: the text ends
        logits[:, eos] = logits[:, eos].masked_fill(stuck, 0)
        scores = nucleus(logits, options.top_k, options.top_p).log_softmax(dim=-1)
        words = inverse_cdf(scores.exp(), uniforms[live, place], row).masked_fill(ended, eos)
        log_p[live] += scores[row, words].masked_fill(stuck[row], NEG_INF).masked_fill(ended, 0)
        tokens[live, place] = words
        ended = ended | (words == eos)
        if on_cpu:
            live, row, words, ended = (part[~ended] for part in (live, row, words, ended))
        if place + 1 == limit or not len(live):
            break
        if sharing:  # samples of the same row that drew the same word have one text
            texts, text = torch.unique(row * logits.shape[1] + words, return_inverse=True)
            sharing = len(texts) < DISTINCT * len(live)
            if sharing:
                row = rows.regroup(texts // logits.shape[1], texts % logits.shape[1])[text]
            else:
                row = rows.regroup(row, words)
        elif place == 0 or (on_cpu and rows.groups_of(row) < DENSE * len(rows.image)):
            row = rows.regroup(row, words)
        else:
            rows.extend(row, words)
    scores = log_p / lengths(tokens, eos) ** options.length_penalty
    return Captions(*(part.unflatten(0, (images, samples)) for part in (tokens, scores, log_p)))


class Rows:
    """The rows of a decoder's batch: texts in groups of `size`, all texts of a group from one
    image.

    The attention of a group is one product. Unused rows of a group are padding.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: Memory,
        size: int,
        first: Tensor,
        prompts: Tensor | None = None,
    ) -> None:
        """first [B,T] int64: the tokens that the texts of each image begin with; all texts of an
        image share one row until `regroup`.
        """
        self.decoder, self.memory, self.size, self.images = decoder, memory, size, memory.images
        self.image = torch.arange(self.images, device=memory.device)  # of each group
        self.cache = decoder.init_cache(memory, size, prompts)
        self.newest = first[:, None]  # [groups, rows, tokens]: what is read next

    def logits(self) -> Tensor:
        """Scores of the next word of each row, [rows,V] float32."""
        logits = self.decoder.decode(self.newest, self.memory, self.cache)[:, :, -1]
        return logits.float().flatten(0, 1)

    def extend(self, row: Tensor, words: Tensor) -> None:
        """Add `words` [M] to the texts in the rows `row` [M]."""
        newest = words.new_zeros(len(self.image) * self.size).scatter_(0, row, words)
        self.newest = newest.view(-1, self.size, 1)

    def groups_of(self, row: Tensor) -> int:
        """Number of groups that the texts in the rows `row` need."""
        image = self.image[row // self.newest.shape[1]]
        return int(self._groups(image.bincount()).sum())

    def _groups(self, texts: Tensor) -> Tensor:
        return (texts + self.size - 1) // self.size

    def regroup(self, parent: Tensor, words: Tensor) -> Tensor:
        """Rearrange the texts: text m of M gets the words of row parent[m], then words[m].

        parent [M] int64, in the order of the images. Returns the new rows of the texts, [M] int64.
        """
        rows_before = self.newest.shape[1]
        image = self.image[parent // rows_before]
        texts = words.new_zeros(self.images).scatter_add_(0, image, torch.ones_like(image))
        groups = self._groups(texts)
        number = torch.arange(len(image), device=image.device) - (texts.cumsum(0) - texts)[image]
        group = (groups.cumsum(0) - groups)[image] + number // self.size
        row = group * self.size + number % self.size
        source = words.new_full((int(groups.sum()) * self.size,), -1).scatter_(0, row, parent)
        source = source.view(-1, self.size)
        source = torch.where(source < 0, source[:, :1], source)  # padding: a copy of the first text
        self.image = self.image[source[:, 0] // rows_before]
        self.memory = self.memory.keep(source[:, 0] // rows_before)
        self.cache.regroup(source // rows_before, source % rows_before)
        self.extend(row, words)
        return row


def inverse_cdf(p: Tensor, uniforms: Tensor, row: Tensor) -> Tensor:
    """Draw words [N] from distributions p [M,V], sample n from row[n], by uniforms [N] in [0,1).

    The drawn word is the first whose cumulative probability is above the uniform; its probability
    is never 0. The block of words is found first and then the word inside it, so that p is read
    once and only short rows are summed in order.
    """
    exact = torch.float32 if p.device.type == "mps" else torch.float64  # mps has no float64
    blocks = F.pad(p, (0, -p.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    block_sums = blocks.sum(2).cumsum(1, dtype=exact)[row]
    point = uniforms[:, None] * block_sums[:, -1:]
    block = first_above(block_sums, point)
    p_in_block = blocks[row, block[:, 0]].to(exact)
    before = F.pad(block_sums, (1, 0)).gather(1, block)
    word = block * BLOCK + first_above(before + p_in_block.cumsum(1), point)
    return word[:, 0].clamp(max=p.shape[1] - 1)


def first_above(sums: Tensor, point: Tensor) -> Tensor:
    """Index [N,1] of the first of the rising sums [N,M] that is above point [N,1].

    A point that rounding put at or above the last sum counts as just below it. NaN rows return an
    arbitrary index; the NaN log-probability reports them.
    """
    last = sums[:, -1:]
    below_last = torch.nextafter(last, torch.zeros_like(last))
    index = torch.searchsorted(sums, torch.minimum(point, below_last), right=True)
    return index.clamp(max=sums.shape[1] - 1)


def nucleus(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [...,V] with -inf for all words except the top_k, and of those the ones that reach
    top_p.

    The most likely word always stays (Holtzman et al. 2020).
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, NEG_INF)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, NEG_INF))
    return logits
