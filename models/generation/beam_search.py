"""Captions from a captioner by beam search, where finished images leave the batch.

Of B images each has K beams, in A arms: the groups of diverse beam search, or one arm for each
    number of forced words that
are there. V words, L words of a caption at most, M words that a beam may go on with, P captions
kept.
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
    """The best captions of each image that its beams come upon.

    At every step each beam's <eos> makes a finished caption; the other words compete for the beams.
    A beam that reaches the limit competes as it stands. An image is done, and its captions stay,
    when no live beam, as long as it is now, scores more than the worst of its best K finished ones
    (early_stopping False, as Hugging Face); when K are finished, each as likely as a beam that went
    on (True); when no live beam can still get there ("never": exact, since log p <= 0). On a CPU
    finished images leave the batch; elsewhere the loop has fixed shapes and never looks at the
    device.
    """
    images, device, eos = memory.images, memory.device, options.eos_token_id
    limit, penalty, groups = (
        options.limit(decoder.config.max_length),
        options.length_penalty,
        options.num_beam_groups,
    )
    forced = PhrasalConstraint(options.forced, device) if options.force_words_ids else None
    arms = forced.total + 1 if forced else groups
    each = options.num_beams // groups  # beams of an arm
    beams, barred = arms * each, options.barred
    pool = BeamHypotheses(
        images, groups, max(each, options.num_return_sequences), limit, eos, device
    )
    where = torch.arange(images, device=device)  # the image in each place of the shrinking batch
    done = torch.zeros(images, dtype=torch.bool, device=device)
    live = torch.full((images, arms, each), NEG_INF, device=device)
    live[:, : 1 if forced else groups, 0] = 0.0  # all beams begin alike: only one counts
    words = torch.full((images, beams, limit), eos, dtype=torch.int64, device=device)
    newest = first_tokens(images, options.bos_token_id, device, prompts)[:, None]
    states = forced.start((images, beams)) if forced else None
    cache = decoder.init_cache(memory, beams, prompts)

    for length in range(1, limit + 1):
        scores, exact = decoder.next_words(newest, memory, cache)
        bar(scores, options.suppress_tokens)
        wanted = None
        if forced and states is not None:
            wanted = forced.next(states)[:, : newest.shape[1]].flatten(0, 1)
        before = words[:, : newest.shape[1], : length - 1].flatten(0, 1)
        found = expand(scores, exact, before, barred, wanted, options.num_beams)
        found = Candidates(*(part.unflatten(0, (len(where), -1)) for part in found))
        ended = (
            (live.flatten(1) + found.ended)
            .masked_fill(done[:, None], NEG_INF)
            .view(len(where), groups, -1)
        )
        if forced:
            ended[:, :, :-each] = NEG_INF

        top = live.view(len(where), beams, 1) + found.log_p
        if forced and states is not None:
            live, origin, newest, states = choose_by_progress(
                top, found.words, states, forced, arms, limit - length
            )
        else:
            live, origin, newest = choose(top, found.words, groups, options.diversity_penalty)
        if (
            options.early_stopping is True
        ):  # an end counts where it is as likely as a beam that goes on
            ended.masked_fill_(ended < live[:, -groups:, -1:], NEG_INF)
        pool.add(where, ended / length**penalty, words)
        words = words.gather(1, origin[:, :, None].expand(-1, -1, limit))
        words[:, :, length - 1] = newest
        newest = newest[:, :, None]
        cache.reorder(origin)
        if length == limit:
            last = live[:, -1:] if forced else live
            last = last.masked_fill(done[:, None, None], NEG_INF)
            pool.add(where, last / length**penalty, words[:, -each * groups :])
            break
        worst, best = (
            pool.scores[where, :, each - 1],
            live.flatten(1).view(len(where), groups, -1).amax(2),
        )
        reach = limit if options.early_stopping == "never" and penalty > 0 else length
        stop = (
            worst >= best / reach**penalty
            if options.early_stopping is not True
            else worst > NEG_INF
        )
        done = done | (stop & (worst > NEG_INF) | (best == NEG_INF)).all(1)
        if device.type == "cpu" and (left := int(done.sum())) * SHARE >= len(where):
            if left == len(where):
                break
            kept = close_up(~done)
            shrunk = len(where) < images  # before, memory is what was given, and stays whole
            where, done, live, words, newest = (
                where[kept],
                done[kept],
                live[kept],
                words[kept],
                newest[kept],
            )
            states = None if states is None else states[kept]
            memory = memory.keep(kept, in_place=shrunk)
            cache.keep(kept)
    return pool.best(options.num_return_sequences, penalty)


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
    """The `count` likeliest words that are not barred, and after them those `wanted` [N,C] (-1:
    none), no word twice.

    scores [N,V] of the word after `words` [N,l]. Log-probabilities exist for some rows at a time,
    never for all. Where scores are rounded to bf16 (a step of 0.03 at 8), the words found are
    compared by `exact` ones, without which one caption in ten of Flickr8k val is another one than
    in fp32, with which one in fifty is.
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
            more = (
                (known.exp() * rounding.expm1()).sum(1, keepdim=True).log1p()
            )  # what that changes of all words' sum
            top, ended = top + rounding[:, :-1] - more, ended + rounding[:, -1] - more[:, 0]
        found.append((ids, top, ended))
    return Candidates(*(torch.cat(part) for part in zip(*found, strict=True)))


def choose(
    top: Tensor, words: Tensor, groups: int, diversity: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The beams to go on with, by candidates' scores top [b,K,M]: live [b,A,K/A], origin [b,K],
    words [b,K].

    With several groups each chooses after the ones before it, a word of theirs costing it
    `diversity` each time; scores stay log p (Vijayakumar et al. 2016).
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
    top: Tensor, words: Tensor, states: Tensor, forced: PhrasalConstraint, arms: int, left: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `choose`, the best for each number of forced words that are there (Hokamp & Liu 2017), and
    their states [b,K,C].

    Captions that could not bring in the rest within the `left` words after this one are left
    behind.
    """
    beams, count = top.shape[1:]
    each = beams // arms
    words = words.expand_as(top)
    after = forced.after(states[:, :, None], words)
    progress = forced.progress(after).flatten(1)
    live, places = [], []
    for arm in range(arms):
        fits = (
            (progress == arm)
            if forced.total - arm <= left
            else torch.zeros_like(progress, dtype=torch.bool)
        )
        best = top.flatten(1).masked_fill(~fits, NEG_INF).topk(each, dim=1)
        live.append(best.values)
        places.append(best.indices)
    place = torch.cat(places, 1)
    after = after.flatten(1, 2).gather(1, place[:, :, None].expand(-1, -1, after.shape[3]))
    return torch.stack(live, 1), place // count, words.flatten(1).gather(1, place), after


def close_up(going: Tensor) -> Tensor:
    """Places [b] of the images that go on: those from the end in the places of those that leave, so
    that few move.
    """
    places = going.nonzero()[:, 0]
    count = len(places)
    order = torch.arange(count, device=going.device)
    order[~going[:count]] = places[places >= count]
    return order


class BeamHypotheses:
    """The best finished captions of each image and group: tokens [B,G,P,L], scores [B,G,P], best
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
        """Captions of the images `where` [b]: scores [b,G,n], words [b,G*n,L]; those stay that are
        among the best.
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
        """The `count` best of all groups, no caption twice."""
        tokens, scores = self.tokens.flatten(1, 2), self.scores.flatten(1)
        if self.tokens.shape[1] > 1:
            same = (tokens[:, :, None] == tokens[:, None, :]).all(3).tril(-1).any(2)
            scores = scores.masked_fill(same, NEG_INF)
        scores, order = scores.topk(count, dim=1)
        tokens = tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2]))
        return Captions(tokens, scores, scores * lengths(tokens, self.eos) ** penalty)


def blockwise_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of scores [N,V] and where they stand, as topk: [N,count]
    both.

    The largest of each block of words come first, by a pass that is as fast as memory; the answers
    stand in the `count` best blocks. topk itself goes through a row several times.
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
