"""Constraints on generated texts: banned words and required phrases.

N growing texts, L words, V words in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

NEG_INF = float("-inf")


def bar(scores: Tensor, words: Iterable[int]) -> None:
    """Set the scores [N,V] of some words to -inf in place, without an index tensor that a GPU would
    wait for.
    """
    for word in words:
        scores[:, word] = NEG_INF


class BannedWords:
    """Sets the scores of banned next words to -inf: an early end, repeated n-grams, forbidden
    phrases.
    """

    def __init__(
        self, eos: int, min_length: int = 0, ngram: int = 0, phrases: Sequence[Sequence[int]] = ()
    ) -> None:
        """min_length: words before the end; ngram: words in a row that come once, 0: no such rule;
        phrases: ids in a row that never come."""
        self.eos, self.min_length, self.ngram = eos, min_length, ngram
        self.always = [phrase[0] for phrase in phrases if len(phrase) == 1]
        self.phrases = [list(phrase) for phrase in phrases if len(phrase) > 1]

    def __call__(self, scores: Tensor, words: Tensor) -> None:
        """scores [N,V] of the word after `words` [N,l], l words that are there; in place."""
        length = words.shape[1]
        bar(scores, self.always)
        if length < self.min_length:
            scores[:, self.eos] = NEG_INF
        for phrase in self.phrases:
            begun = len(phrase) - 1
            if length >= begun:
                here = torch.ones(len(words), dtype=torch.bool, device=words.device)
                for place, word in enumerate(phrase[:-1]):
                    here &= words[:, length - begun + place] == word
                scores[:, phrase[-1]].masked_fill_(here, NEG_INF)
        if self.ngram and length >= self.ngram:
            followers = words[:, self.ngram - 1 :]
            repeated = torch.ones_like(followers, dtype=torch.bool)
            # words 0, 1, ... of each n-gram against those that end the caption
            for place in range(self.ngram - 1):
                here = words[:, place : place + followers.shape[1]]
                repeated &= here == words[:, length - self.ngram + 1 + place, None]
            bans = torch.zeros_like(followers, dtype=scores.dtype).masked_fill_(repeated, NEG_INF)
            scores.scatter_add_(1, followers, bans)


class PhrasalConstraint:
    """Phrases that each caption must hold: how far it has come with each, as one number a phrase.

    A state is the number of a phrase's words that the caption ends with, and stays at the whole
    once it was there (Knuth, Morris & Pratt 1977). `total` is the number of words of all phrases;
    that one's end may be another's beginning is used where it comes, but never counted on.
    """

    def __init__(self, phrases: Sequence[Sequence[int]], device: torch.device) -> None:
        self.lengths = [len(phrase) for phrase in phrases]
        self.total = sum(self.lengths)
        most = max(self.lengths)
        # the next word in each state; whole: none
        self.words = torch.full((len(phrases), most + 1), -1, device=device)
        self.back = torch.zeros(len(phrases), most + 1, most, dtype=torch.int64, device=device)
        for number, phrase in enumerate(phrases):
            self.words[number, : len(phrase)] = torch.tensor(phrase)
            for state in range(len(phrase)):
                # after a word of the phrase, the longest beginning that ends there
                for place, word in enumerate(phrase):
                    text = [*phrase[:state], word]
                    fits = (
                        n
                        for n in range(min(len(text), len(phrase)), 0, -1)
                        if text[-n:] == list(phrase[:n])
                    )
                    self.back[number, state, place] = next(fits, 0)
            self.back[number, len(phrase)] = len(phrase)
        self.whole = torch.tensor(self.lengths, device=device)

    def start(self, shape: Sequence[int]) -> Tensor:
        """The states of empty texts: zeros [*shape,C] for C phrases."""
        return torch.zeros(*shape, len(self.lengths), dtype=torch.int64, device=self.words.device)

    def next(self, states: Tensor) -> Tensor:
        """The word that continues each phrase, -1 if the phrase is complete: states [...,C] to ids
        [...,C].
        """
        return self.words[torch.arange(len(self.lengths), device=states.device), states]

    def after(self, states: Tensor, words: Tensor) -> Tensor:
        """The states [...,M,C] after adding words [...,M] to states [...,1,C]."""
        phrase = torch.arange(len(self.lengths), device=states.device)
        is_there = words[..., None, None] == self.words[:, :-1]  # [...,M,C,P]
        found = (self.back[phrase, states] * is_there).amax(-1)
        return torch.where(states == self.whole, states, found)

    def progress(self, states: Tensor) -> Tensor:
        """Number of words of complete phrases plus those of the longest started phrase, [...]."""
        whole = states == self.whole
        return (states * whole).sum(-1) + (states * ~whole).amax(-1)
