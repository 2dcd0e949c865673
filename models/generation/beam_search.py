"""Beam search over a decoder.

Each image has K beams, which are divided into banks. A bank is a group of diverse beam search, or
the beams with the same number of forced words.

Letters in shapes: B images in total, b images that are still in the batch, K beams per image,
V words in the vocabulary, L maximum words of a text, M candidate words per beam, G groups,
P finished texts that are kept per group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.decoders.interface import Decoder, ExactLogits, Memory
from models.generation.constraints import NEG_INF, BannedWords, PhrasalConstraint, ban
from models.generation.options import Captions, Generation, first_tokens, lengths

MIN_DONE_SHARE = 1 / 8  # done images are removed once they are this share of the batch
CHUNK_SIZE = 640_000  # log-probabilities computed at a time on a CPU, so that they fit its cache
BLOCK_SIZE = 100  # words per block in `blockwise_topk`


@torch.inference_mode()
def beam_search(
    decoder: Decoder, memory: Memory, options: Generation, prompts: Tensor | None = None
) -> Captions:
    """Search the most likely texts of each image with beam search.

    In each step, <eos> after a beam gives a finished text. All other words compete for the beams.
    At the length limit, all live beams become finished texts. `options.early_stopping` decides when
    an image is done:

    False     no live beam, at its current length, scores higher than the worst of the K best
              finished texts (as in Hugging Face)
    True      there are K finished texts; each was at least as likely as a live beam of its step
    "never"   no live beam can reach the score of these K texts any more (exact, since log p <= 0)

    On a CPU, done images are removed from the batch. On other devices all shapes are fixed and the
    host never waits for the device.

    memory: B encoded images. prompts: [B,P] int64, padded on the left; None: no prompts.
    Returns the `options.num_return_sequences` best texts of each image.
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
    """The live beams and the finished texts of a beam search.

    image [b]: index of each remaining image among the B images.
    done [b]: whether the image is done but still in the batch.
    live [b,banks,beams per bank]: log p of the live beams.
    words [b,K,L]: words of the live beams.
    newest [b,K,1]: last words of the live beams, the next input of the decoder.
    """

    def __init__(
        self, decoder: Decoder, memory: Memory, options: Generation, prompts: Tensor | None
    ) -> None:
        images, device = memory.images, memory.device
        self.decoder, self.memory, self.options, self.device = decoder, memory, options, device
        self.limit = options.limit(decoder.config.max_length)
        self.banned, self.groups = options.banned_words, options.num_beam_groups
        self.forced = PhrasalConstraint(options.forced, device) if options.force_words_ids else None
        self.banks = self.forced.total + 1 if self.forced else self.groups
        self.beams_per_bank = options.num_beams // self.groups
        beams, eos = self.banks * self.beams_per_bank, options.eos_token_id
        size = max(self.beams_per_bank, options.num_return_sequences)
        self.hypotheses = BeamHypotheses(images, self.groups, size, self.limit, eos, device)
        self.image = torch.arange(images, device=device)
        self.done = torch.zeros(images, dtype=torch.bool, device=device)
        self.live = torch.full((images, self.banks, self.beams_per_bank), NEG_INF, device=device)
        # All beams begin with the same text, so only the first beam of a bank is live.
        self.live[:, : 1 if self.forced else self.groups, 0] = 0.0
        self.words = torch.full((images, beams, self.limit), eos, dtype=torch.int64, device=device)
        self.newest = first_tokens(images, options.bos_token_id, device, prompts)[:, None]
        self.states = self.forced.initial_states((images, beams)) if self.forced else None
        self.cache = decoder.init_cache(memory, beams, prompts)

    def next_candidates(self, length: int) -> Candidates:
        """Compute the most likely next words of each beam, [b,K,...]."""
        logits, exact_logits = self.decoder.next_words(self.newest, self.memory, self.cache)
        ban(logits, self.options.suppress_tokens)
        rows = self.newest.shape[1]  # 1 in the first step, in which all beams are equal
        forced_words = None
        if self.forced and self.states is not None:
            forced_words = self.forced.next_words(self.states)[:, :rows].flatten(0, 1)
        prefixes = self.words[:, :rows, : length - 1].flatten(0, 1)
        candidates = expand(
            logits, exact_logits, prefixes, self.banned, forced_words, self.options.num_beams
        )
        return Candidates(*(part.unflatten(0, (len(self.image), -1)) for part in candidates))

    def advance(self, candidates: Candidates, length: int) -> None:
        """Store the texts that end in this step, and select the new live beams."""
        ended = self._ended_log_p(candidates)
        total = self.live.view(len(self.image), -1, 1) + candidates.log_p
        if self.forced and self.states is not None:
            self.live, beam_idx, newest, self.states = choose_by_progress(
                total, candidates.words, self.states, self.forced, self.limit - length
            )
        else:
            self.live, beam_idx, newest = choose(
                total, candidates.words, self.groups, self.options.diversity_penalty
            )
        if self.options.early_stopping is True:
            # Keep only texts that are at least as likely as the worst live beam of their group.
            ended.masked_fill_(ended < self.live[:, -self.groups :, -1:], NEG_INF)
        self.hypotheses.add(self.image, ended / length**self.options.length_penalty, self.words)
        self.words = self.words.gather(1, beam_idx[:, :, None].expand(-1, -1, self.limit))
        self.words[:, :, length - 1] = newest
        self.newest = newest[:, :, None]
        self.cache.reorder(beam_idx)

    def _ended_log_p(self, candidates: Candidates) -> Tensor:
        """log p of each beam followed by <eos>, [b,G,beams]; -inf if that text is not allowed."""
        ended = (self.live.flatten(1) + candidates.ended).masked_fill(self.done[:, None], NEG_INF)
        ended = ended.view(len(self.image), self.groups, -1)
        if self.forced:  # only the last bank has all forced words
            ended[:, :, : -self.beams_per_bank] = NEG_INF
        return ended

    def finish_at_limit(self) -> None:
        """Store the live beams as finished texts, at the length limit."""
        live = self.live[:, -1:] if self.forced else self.live
        live = live.masked_fill(self.done[:, None, None], NEG_INF)
        words = self.words[:, -self.beams_per_bank * self.groups :]
        self.hypotheses.add(self.image, live / self.limit**self.options.length_penalty, words)

    def mark_done(self, length: int) -> None:
        """Mark the images that are done according to `options.early_stopping`."""
        penalty, rule = self.options.length_penalty, self.options.early_stopping
        worst = self.hypotheses.scores[self.image, :, self.beams_per_bank - 1]
        best_live = self.live.flatten(1).view(len(self.image), self.groups, -1).amax(2)
        longest = self.limit if rule == "never" and penalty > 0 else length
        stop = worst > NEG_INF if rule is True else worst >= best_live / longest**penalty
        self.done = self.done | (stop & (worst > NEG_INF) | (best_live == NEG_INF)).all(1)

    def drop_done(self) -> bool:
        """Remove done images if they are at least MIN_DONE_SHARE; return True if all are done."""
        done_count = int(self.done.sum())
        if done_count < MIN_DONE_SHARE * len(self.image):
            return False
        if done_count == len(self.image):
            return True
        remaining = compact_indices(~self.done)
        # The first memory belongs to the caller, so it must not change in place.
        in_place = len(self.image) < len(self.hypotheses.scores)
        self.memory = self.memory.keep(remaining, in_place=in_place)
        self.cache.keep(remaining)
        for name in ("image", "done", "live", "words", "newest"):
            setattr(self, name, getattr(self, name)[remaining])
        if self.states is not None:
            self.states = self.states[remaining]
        return False


class Candidates(NamedTuple):
    """Candidate next words of N texts.

    words: [N,M] int64. log_p: [N,M] float32, of each candidate. ended: [N] float32, of <eos>.
    """

    words: Tensor
    log_p: Tensor
    ended: Tensor


def expand(
    logits: Tensor,
    exact_logits: ExactLogits | None,
    prefixes: Tensor,
    banned: BannedWords,
    forced_words: Tensor | None,
    count: int,
) -> Candidates:
    """Select the `count` most likely next words that are not banned, and all forced words.

    logits: [N,V] of the word after each of `prefixes` [N,l].
    exact_logits: computes float32 logits; None: `logits` are exact.
    forced_words: [N,C] int64, -1 for none; they follow the most likely words. No word occurs twice
        with a finite log p.

    Log-probabilities exist for one chunk of rows at a time, never for all rows. bf16 rounds a logit
    of 8 in steps of 0.03, so the selected words are compared by their exact logits. Measured on
    Flickr8k val: one caption in ten differs from fp32 without exact logits, one in fifty with them.
    """
    chunks = []
    rows = max(1, CHUNK_SIZE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        log_p = logits[part].log_softmax(dim=1, dtype=torch.float32)
        banned(log_p, prefixes[part])
        ended = log_p[:, banned.eos].clone()
        log_p[:, banned.eos] = NEG_INF
        if forced_words is None:
            top, ids = blockwise_topk(log_p, count)
        else:
            top, ids = _topk_and_forced(log_p, count, forced_words[part])
        if exact_logits:
            selected_log_p = torch.cat([top, ended[:, None]], 1)
            selected = torch.cat([ids, ids.new_full((len(ids), 1), banned.eos)], 1)
            error = exact_logits(part, selected) - logits[part].gather(1, selected)
            error = error.where(selected_log_p > NEG_INF, 0)
            # The change of log sum exp over all words.
            change = (selected_log_p.exp() * error.expm1()).sum(1, keepdim=True).log1p()
            top, ended = top + error[:, :-1] - change, ended + error[:, -1] - change[:, 0]
        chunks.append((ids, top, ended))
    return Candidates(*(torch.cat(part) for part in zip(*chunks, strict=True)))


def _topk_and_forced(log_p: Tensor, count: int, forced: Tensor) -> tuple[Tensor, Tensor]:
    """The values and ids of the top words of log_p [N,V], followed by the forced words [N,C]."""
    ids_or_0 = forced.clamp(min=0)
    is_duplicate = (forced[:, :, None] == forced[:, None, :]).tril(-1).any(2)
    forced_log_p = log_p.gather(1, ids_or_0).masked_fill((forced < 0) | is_duplicate, NEG_INF)
    top, ids = blockwise_topk(log_p, count + forced.shape[1])
    top = top.masked_fill((ids[:, :, None] == forced[:, None, :]).any(2), NEG_INF)
    return torch.cat([top, forced_log_p], 1), torch.cat([ids, ids_or_0], 1)


def choose(
    total: Tensor, words: Tensor, groups: int, diversity: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the candidates that become live beams.

    total: [b,K,M] log p of the candidates. words: [b,K,M] their new words.

    With several groups, the groups select one after the other. A candidate loses `diversity` for
    each time that a previous group selected its word (Vijayakumar et al. 2016). The returned log p
    do not contain this penalty.

    Returns live [b,G,K/G] log p, beam_idx [b,K] the beams that they continue, new words [b,K].
    """
    beams, count = total.shape[1:]
    beams_per_group = beams // groups
    words = words.expand_as(total)
    live, beam_idx = [], []
    chosen: list[Tensor] = []
    for group in range(groups):
        members = slice(group * beams_per_group, (group + 1) * beams_per_group)
        log_p, ids = total[:, members].flatten(1), words[:, members].flatten(1)
        sort_keys = log_p
        if chosen and diversity:
            uses = (ids[:, :, None] == torch.cat(chosen, 1)[:, None, :]).sum(2)
            sort_keys = log_p - diversity * uses
        index = sort_keys.topk(beams_per_group, dim=1).indices
        live.append(log_p.gather(1, index))
        beam_idx.append(index // count + group * beams_per_group)
        chosen.append(ids.gather(1, index))
    return torch.stack(live, 1), torch.cat(beam_idx, 1), torch.cat(chosen, 1)


def choose_by_progress(
    total: Tensor, words: Tensor, states: Tensor, forced: PhrasalConstraint, remaining: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select the best candidates for each number of forced words (Hokamp and Liu 2017).

    total: [b,K,M] log p of the candidates. words: [b,K,M] their new words. states: [b,K,C] states
    of the constraint before these words. remaining: words that fit after this word.

    Bank n selects candidates with n forced words. A bank stays empty if the missing forced words do
    not fit into the `remaining` words.

    Returns live [b,banks,beams per bank] log p, beam_idx [b,K], new words [b,K], states [b,K,C].
    """
    beams, count = total.shape[1:]
    banks = forced.total + 1
    words = words.expand_as(total)
    new_states = forced.advance(states[:, :, None], words)  # [b,K,M,C]
    bank_of_candidate = forced.progress(new_states).flatten(1)
    flat = total.flatten(1)
    live, indices = [], []
    for bank in range(banks):
        in_bank = bank_of_candidate == bank
        if forced.total - bank > remaining:
            in_bank = torch.zeros_like(in_bank)
        best = flat.masked_fill(~in_bank, NEG_INF).topk(beams // banks, dim=1)
        live.append(best.values)
        indices.append(best.indices)
    index = torch.cat(indices, 1)  # beam * M + candidate
    expanded = index[:, :, None].expand(-1, -1, new_states.shape[3])
    chosen_states = new_states.flatten(1, 2).gather(1, expanded)
    return torch.stack(live, 1), index // count, words.flatten(1).gather(1, index), chosen_states


def compact_indices(remaining: Tensor) -> Tensor:
    """Order the remaining images so that few of them change their index.

    remaining: bool, one entry per image. Returns the indices [b] of the remaining images. Images
    from the end fill the indices that become free; all others keep their index.
    """
    indices = remaining.nonzero()[:, 0]
    count = len(indices)
    order = torch.arange(count, device=remaining.device)
    order[~remaining[:count]] = indices[indices >= count]
    return order


class BeamHypotheses:
    """The best finished texts of each image and group, best first.

    tokens: [B,G,P,L] int64. scores: [B,G,P] float32.
    """

    def __init__(
        self, images: int, groups: int, size: int, limit: int, eos: int, device: torch.device
    ) -> None:
        self.eos = eos
        self.tokens = torch.full(
            (images, groups, size, limit), eos, dtype=torch.int64, device=device
        )
        self.scores = torch.full((images, groups, size), NEG_INF, device=device)

    def add(self, image: Tensor, scores: Tensor, words: Tensor) -> None:
        """Add finished texts of the images `image` [b], and keep the P best of each group.

        scores: [b,G,n]. words: [b,G*n,L].
        """
        words = words.unflatten(1, scores.shape[1:])
        scores = torch.cat([self.scores[image], scores], 2)
        words = torch.cat([self.tokens[image], words], 2)
        best = scores.topk(self.scores.shape[2], dim=2)
        index = best.indices[..., None].expand(-1, -1, -1, words.shape[3])
        self.scores[image] = best.values
        self.tokens[image] = words.gather(2, index)

    def best(self, count: int, penalty: float) -> Captions:
        """Return the `count` best texts of all groups, without duplicates."""
        tokens, scores = self.tokens.flatten(1, 2), self.scores.flatten(1)
        if self.tokens.shape[1] > 1:
            is_duplicate = (tokens[:, :, None] == tokens[:, None, :]).all(3).tril(-1).any(2)
            scores = scores.masked_fill(is_duplicate, NEG_INF)
        scores, order = scores.topk(count, dim=1)
        tokens = tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2]))
        return Captions(tokens, scores, scores * lengths(tokens, self.eos) ** penalty)


def blockwise_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values of each row of `scores` [N,V] and their indices, as topk.

    Both results are [N,count]. torch.topk passes through a row several times. This function first
    computes the maximum of each block of words, at the speed of memory. The `count` largest values
    are in the `count` blocks with the largest maxima, so torch.topk runs only on these blocks.
    """
    rows, words = scores.shape
    blocks = words // BLOCK_SIZE
    if blocks <= count:
        return scores.topk(min(count, words), dim=1)
    even = blocks * BLOCK_SIZE
    by_block = scores[:, :even].unflatten(1, (blocks, BLOCK_SIZE))
    best = by_block.amax(2).topk(count, dim=1).indices[:, :, None]
    selected = by_block.gather(1, best.expand(-1, -1, BLOCK_SIZE)).flatten(1)
    ids = (best * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=scores.device)).flatten(1)
    rest = torch.arange(even, words, device=scores.device).expand(rows, -1)
    top, index = torch.cat([selected, scores[:, even:]], 1).topk(count, dim=1)
    return top, torch.cat([ids, rest], 1).gather(1, index)
