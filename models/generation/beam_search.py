"""Beam search over a decoder, where finished images leave the batch.

Of B images each has K beams, in banks: the groups of diverse beam search, or one bank for each
number of forced words of a text. V words, L words of a text at most, M candidate words of a beam, P
finished texts kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.decoders.interface import Decoder, ExactScores, Memory
from models.generation.constraints import NEG_INF, BannedWords, PhrasalConstraint, bar
from models.generation.options import Captions, Generation, first_tokens, lengths

SHARE = 8  # finished images leave once they are one in so many
SCORES = 640_000  # log-probabilities that exist at a time on a CPU: they stay in its cache
BLOCK = 100  # words among which the largest score is found first


@torch.inference_mode()
def beam_search(
    decoder: Decoder, memory: Memory, options: Generation, prompts: Tensor | None = None
) -> Captions:
    """The best texts of each image that its beams find.

    At every step each beam's <eos> makes a finished text; the other words compete for the beams. A
    beam that reaches the length limit is finished as it stands. When an image is done follows from
    options.early_stopping:

    False     no live beam, at its present length, scores more than the worst of the image's best K
              finished texts (as Hugging Face)
    True      K texts are finished, each as likely as a beam that went on
    "never"   no live beam can still reach that score (exact, since log p <= 0)

    On a CPU done images leave the batch. Elsewhere the loop has fixed shapes and never asks the
    device. prompts: [B,P] int64, padded on the left.
    """
    search = BeamSearchState(decoder, memory, options, prompts)
    for length in range(1, search.limit + 1):
        candidates = search.next_candidates(length)
        search.advance(candidates, length)
        if length == search.limit:
            search.finish_at_limit()
            break
        search.mark_done(length)
        if search.device.type == "cpu" and search.drop_done():
            break
    return search.hypotheses.best(options.num_return_sequences, options.length_penalty)


class BeamSearchState:
    """The live beams and the finished texts of the images in a beam search.

    Beams are in banks, [b,banks,beams of a bank]; b images are left of B.

    image [b]: which image each row is. done [b]: whether it is done, but still in the batch.
    live [b,banks,beams]: log p of the live beams. words [b,beams,L]: their words so far.
    newest [b,beams,1]: their last words, which are read next.
    """

    def __init__(
        self, decoder: Decoder, memory: Memory, options: Generation, prompts: Tensor | None
    ) -> None:
        images, device = memory.images, memory.device
        self.decoder, self.memory, self.options, self.device = decoder, memory, options, device
        self.limit = options.limit(decoder.config.max_length)
        self.banned, self.groups = options.barred, options.num_beam_groups
        self.forced = PhrasalConstraint(options.forced, device) if options.force_words_ids else None
        self.banks = self.forced.total + 1 if self.forced else self.groups
        self.beams_of_bank = options.num_beams // self.groups
        beams, eos = self.banks * self.beams_of_bank, options.eos_token_id
        kept = max(self.beams_of_bank, options.num_return_sequences)
        self.hypotheses = BeamHypotheses(images, self.groups, kept, self.limit, eos, device)
        self.image = torch.arange(images, device=device)
        self.done = torch.zeros(images, dtype=torch.bool, device=device)
        self.live = torch.full((images, self.banks, self.beams_of_bank), NEG_INF, device=device)
        self.live[:, : 1 if self.forced else self.groups, 0] = 0.0  # all begin alike: one counts
        self.words = torch.full((images, beams, self.limit), eos, dtype=torch.int64, device=device)
        self.newest = first_tokens(images, options.bos_token_id, device, prompts)[:, None]
        self.progress = self.forced.start((images, beams)) if self.forced else None
        self.cache = decoder.init_cache(memory, beams, prompts)

    def next_candidates(self, length: int) -> Candidates:
        """The likeliest next words of each beam, and what its end would score, [b,K,...]."""
        scores, exact = self.decoder.next_words(self.newest, self.memory, self.cache)
        bar(scores, self.options.suppress_tokens)
        rows = self.newest.shape[1]  # 1 in the first step, where all beams are alike
        wanted = None
        if self.forced and self.progress is not None:
            wanted = self.forced.next(self.progress)[:, :rows].flatten(0, 1)
        before = self.words[:, :rows, : length - 1].flatten(0, 1)
        found = expand(scores, exact, before, self.banned, wanted, self.options.num_beams)
        return Candidates(*(part.unflatten(0, (len(self.image), -1)) for part in found))

    def advance(self, candidates: Candidates, length: int) -> None:
        """Keep the texts that end here, and let the best candidates be the live beams."""
        ended = self._ended(candidates)
        total = self.live.view(len(self.image), -1, 1) + candidates.log_p
        if self.forced and self.progress is not None:
            self.live, beam_idx, newest, self.progress = choose_by_progress(
                total, candidates.words, self.progress, self.forced, self.limit - length
            )
        else:
            self.live, beam_idx, newest = choose(
                total, candidates.words, self.groups, self.options.diversity_penalty
            )
        if self.options.early_stopping is True:  # an end counts if it is as likely as a live beam
            ended.masked_fill_(ended < self.live[:, -self.groups :, -1:], NEG_INF)
        self.hypotheses.add(self.image, ended / length**self.options.length_penalty, self.words)
        self.words = self.words.gather(1, beam_idx[:, :, None].expand(-1, -1, self.limit))
        self.words[:, :, length - 1] = newest
        self.newest = newest[:, :, None]
        self.cache.reorder(beam_idx)

    def _ended(self, candidates: Candidates) -> Tensor:
        """log p of each beam's text if it ends here, [b,groups,n]; -inf where it does not count."""
        ended = (self.live.flatten(1) + candidates.ended).masked_fill(self.done[:, None], NEG_INF)
        ended = ended.view(len(self.image), self.groups, -1)
        if self.forced:  # only the last bank has all forced words
            ended[:, :, : -self.beams_of_bank] = NEG_INF
        return ended

    def finish_at_limit(self) -> None:
        """Live beams at the length limit are finished as they stand."""
        last = self.live[:, -1:] if self.forced else self.live
        last = last.masked_fill(self.done[:, None, None], NEG_INF)
        words = self.words[:, -self.beams_of_bank * self.groups :]
        self.hypotheses.add(self.image, last / self.limit**self.options.length_penalty, words)

    def mark_done(self, length: int) -> None:
        """Mark the images that no live beam can improve, by options.early_stopping."""
        penalty, rule = self.options.length_penalty, self.options.early_stopping
        worst = self.hypotheses.scores[self.image, :, self.beams_of_bank - 1]
        best = self.live.flatten(1).view(len(self.image), self.groups, -1).amax(2)
        longest = self.limit if rule == "never" and penalty > 0 else length
        stop = worst > NEG_INF if rule is True else worst >= best / longest**penalty
        self.done = self.done | (stop & (worst > NEG_INF) | (best == NEG_INF)).all(1)

    def drop_done(self) -> bool:
        """Take done images out of the batch once they are one in SHARE; True where none is left."""
        count = int(self.done.sum())
        if count * SHARE < len(self.image):
            return False
        if count == len(self.image):
            return True
        kept = close_up(~self.done)
        in_place = len(self.image) < len(self.hypotheses.scores)  # not the memory that was given
        self.memory = self.memory.keep(kept, in_place=in_place)
        self.cache.keep(kept)
        for name in ("image", "done", "live", "words", "newest"):
            setattr(self, name, getattr(self, name)[kept])
        if self.progress is not None:
            self.progress = self.progress[kept]
        return False


class Candidates(NamedTuple):
    """How N captions may go on: M words each, words [N,M] int64 and their log p [N,M] float32;
    ended [N], log p of the end.
    """

    words: Tensor
    log_p: Tensor
    ended: Tensor


def expand(
    scores: Tensor,
    exact: ExactScores | None,
    words: Tensor,
    barred: BannedWords,
    wanted: Tensor | None,
    count: int,
) -> Candidates:
    """The `count` most likely words that are not banned, followed by the `wanted` words [N,C] (-1:
    none), without duplicates.

    scores [N,V] of the word after `words` [N,l]. Log-probabilities are computed for some rows at a
    time. If scores are rounded to bf16 (a step of 0.03 at 8), the best words are compared by
    `exact` scores: without them one caption in ten of Flickr8k val differs from fp32, with them one
    in fifty.
    """
    found = []
    rows = max(1, SCORES // scores.shape[1]) if scores.device.type == "cpu" else len(scores)
    for start in range(0, len(scores), rows):
        part = slice(start, start + rows)
        log_p = scores[part].log_softmax(dim=1, dtype=torch.float32)
        barred(log_p, words[part])
        ended = log_p[:, barred.eos].clone()
        log_p[:, barred.eos] = NEG_INF
        if wanted is None:
            top, ids = blockwise_topk(log_p, count)
        else:
            asked = wanted[part]
            twice = (asked[:, :, None] == asked[:, None, :]).tril(-1).any(2)
            of_asked = log_p.gather(1, asked.clamp(min=0)).masked_fill((asked < 0) | twice, NEG_INF)
            top, ids = blockwise_topk(log_p, count + asked.shape[1])
            top = top.masked_fill((ids[:, :, None] == asked[:, None, :]).any(2), NEG_INF)
            top, ids = torch.cat([top, of_asked], 1), torch.cat([ids, asked.clamp(min=0)], 1)
        if exact:
            known = torch.cat([top, ended[:, None]], 1)
            looked_at = torch.cat([ids, ids.new_full((len(ids), 1), barred.eos)], 1)
            rounding = (exact(part, looked_at) - scores[part].gather(1, looked_at)).where(
                known > NEG_INF, 0
            )
            # what that changes of all words' sum
            more = (known.exp() * rounding.expm1()).sum(1, keepdim=True).log1p()
            top, ended = top + rounding[:, :-1] - more, ended + rounding[:, -1] - more[:, 0]
        found.append((ids, top, ended))
    return Candidates(*(torch.cat(part) for part in zip(*found, strict=True)))


def choose(
    top: Tensor, words: Tensor, groups: int, diversity: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the live beams from the candidates' scores top [b,K,M]. Returns live [b,A,K/A],
    beam_idx [b,K] and words [b,K].

    With several groups, each group chooses after the previous ones; a word that they chose costs it
    `diversity` each time. Scores stay log p (Vijayakumar et al. 2016).
    """
    beams, count = top.shape[1:]
    each = beams // groups
    words = words.expand_as(top)
    live, origin = [], []
    chosen: list[Tensor] = []
    for group in range(groups):
        mine = slice(group * each, (group + 1) * each)
        scores, ids = top[:, mine].flatten(1), words[:, mine].flatten(1)
        order = scores
        if chosen and diversity:
            order = scores - diversity * (ids[:, :, None] == torch.cat(chosen, 1)[:, None, :]).sum(
                2
            )
        place = order.topk(each, dim=1).indices
        live.append(scores.gather(1, place))
        origin.append(place // count + group * each)
        chosen.append(ids.gather(1, place))
    return torch.stack(live, 1), torch.cat(origin, 1), torch.cat(chosen, 1)


def choose_by_progress(
    total: Tensor, words: Tensor, progress: Tensor, forced: PhrasalConstraint, left: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best candidates for each number of forced words that they have (Hokamp & Liu 2017).

    total [b,K,M] log p of the candidates, words [b,K,M] their new words, progress [b,K,C] the
    constraint's states before them. Bank n takes those with n forced words; a bank from which the
    rest would not fit into the `left` words after this one takes none.

    Returns live [b,banks,beams of a bank], beam_idx [b,K], new words [b,K] and states [b,K,C].
    """
    beams, count = total.shape[1:]
    banks = forced.total + 1
    words = words.expand_as(total)
    after = forced.after(progress[:, :, None], words)  # [b,K,M,C]
    bank_of = forced.progress(after).flatten(1)
    flat = total.flatten(1)
    live, places = [], []
    for bank in range(banks):
        fits = bank_of == bank
        if forced.total - bank > left:
            fits = torch.zeros_like(fits)
        best = flat.masked_fill(~fits, NEG_INF).topk(beams // banks, dim=1)
        live.append(best.values)
        places.append(best.indices)
    place = torch.cat(places, 1)  # of beam * M + candidate
    chosen = after.flatten(1, 2).gather(1, place[:, :, None].expand(-1, -1, after.shape[3]))
    return torch.stack(live, 1), place // count, words.flatten(1).gather(1, place), chosen


def close_up(going: Tensor) -> Tensor:
    """New order [b] of the images that stay: images from the end fill the free places, so that few
    move.
    """
    places = going.nonzero()[:, 0]
    count = len(places)
    order = torch.arange(count, device=going.device)
    order[~going[:count]] = places[places >= count]
    return order


class BeamHypotheses:
    """The best finished texts of each image and group: tokens [B,G,P,L], scores [B,G,P], best
    first.
    """

    def __init__(
        self, images: int, groups: int, size: int, limit: int, eos: int, device: torch.device
    ) -> None:
        self.eos = eos
        self.tokens = torch.full(
            (images, groups, size, limit), eos, dtype=torch.int64, device=device
        )
        self.scores = torch.full((images, groups, size), NEG_INF, device=device)

    def add(self, where: Tensor, scores: Tensor, words: Tensor) -> None:
        """Add texts of the images `where` [b]: scores [b,G,n], words [b,G*n,L]. The best ones are
        kept.
        """
        words = words.unflatten(1, scores.shape[1:])
        scores = torch.cat([self.scores[where], scores], 2)
        words = torch.cat([self.tokens[where], words], 2)
        best = scores.topk(self.scores.shape[2], dim=2)
        self.scores[where] = best.values
        self.tokens[where] = words.gather(
            2, best.indices[..., None].expand(-1, -1, -1, words.shape[3])
        )

    def best(self, count: int, penalty: float) -> Captions:
        """The `count` best texts over all groups, without duplicates."""
        tokens, scores = self.tokens.flatten(1, 2), self.scores.flatten(1)
        if self.tokens.shape[1] > 1:
            same = (tokens[:, :, None] == tokens[:, None, :]).all(3).tril(-1).any(2)
            scores = scores.masked_fill(same, NEG_INF)
        scores, order = scores.topk(count, dim=1)
        tokens = tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2]))
        return Captions(tokens, scores, scores * lengths(tokens, self.eos) ** penalty)


def blockwise_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row of scores [N,V] and their indices, as torch.topk:
    [N,count] both.

    The maximum of each block is computed first, at memory speed. The result lies in the `count`
    best blocks, which are sorted. torch.topk reads each row several times.
    """
    rows, words = scores.shape
    blocks = words // BLOCK
    if blocks <= count:
        return scores.topk(min(count, words), dim=1)
    even = blocks * BLOCK
    parts = scores[:, :even].unflatten(1, (blocks, BLOCK))
    best = parts.amax(2).topk(count, dim=1).indices
    found = parts.gather(1, best[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    ids = (best[:, :, None] * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    rest = torch.arange(even, words, device=scores.device).expand(rows, -1)
    top, place = torch.cat([found, scores[:, even:]], 1).topk(count, dim=1)
    return top, torch.cat([ids, rest], 1).gather(1, place)
