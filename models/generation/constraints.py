"""Constraints on generated texts: words that are banned, and phrases that must occur.

Letters in shapes: N texts that grow in parallel, V words in the vocabulary, C phrases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

NEG_INF = float("-inf")


def ban(scores: Tensor, words: Iterable[int]) -> None:
    """Set the scores [N,V] of `words` to -inf, in place.

    A loop over Python integers needs no index tensor on the host, for which a GPU would wait.
    """
    for word in words:
        scores[:, word] = NEG_INF


class BannedWords:
    """Sets the scores of banned next words to -inf.

    It bans an <eos> that comes too early, repeated n-grams, and given phrases.
    """

    def __init__(
        self, eos: int, min_length: int = 0, ngram: int = 0, phrases: Sequence[Sequence[int]] = ()
    ) -> None:
        """
        eos: id of <eos>.
        min_length: minimum number of words before <eos>.
        ngram: length of the n-grams that must not repeat; 0: no limit.
        phrases: sequences of ids that must not occur.
        """
        self.eos, self.min_length, self.ngram = eos, min_length, ngram
        self.words = [phrase[0] for phrase in phrases if len(phrase) == 1]
        self.phrases = [list(phrase) for phrase in phrases if len(phrase) > 1]

    def __call__(self, scores: Tensor, prefixes: Tensor) -> None:
        """Change `scores` [N,V] of the word after `prefixes` [N,l] in place."""
        length = prefixes.shape[1]
        ban(scores, self.words)
        if length < self.min_length:
            scores[:, self.eos] = NEG_INF
        for phrase in self.phrases:
            start = length - (len(phrase) - 1)
            if start >= 0:
                matches = torch.ones(len(prefixes), dtype=torch.bool, device=prefixes.device)
                for offset, word in enumerate(phrase[:-1]):
                    matches &= prefixes[:, start + offset] == word
                scores[:, phrase[-1]].masked_fill_(matches, NEG_INF)
        if self.ngram and length >= self.ngram:
            last_words = prefixes[:, self.ngram - 1 :]  # the last word of each n-gram
            repeated = torch.ones_like(last_words, dtype=torch.bool)
            # Compare the first n-1 words of each n-gram with the last n-1 words of the text.
            for offset in range(self.ngram - 1):
                ngram_words = prefixes[:, offset : offset + last_words.shape[1]]
                repeated &= ngram_words == prefixes[:, length - self.ngram + 1 + offset, None]
            penalties = torch.zeros_like(last_words, dtype=scores.dtype)
            scores.scatter_add_(1, last_words, penalties.masked_fill_(repeated, NEG_INF))


class PhrasalConstraint:
    """Phrases that each text must contain.

    The state of a phrase is the number of its words that the text ends with. A phrase that the text
    contains stays complete: its state stays at its length (Knuth, Morris and Pratt 1977).

    total: number of words of all phrases. One phrase may begin with the end of another phrase. The
    search may use such an overlap, but `total` does not assume it.
    """

    def __init__(self, phrases: Sequence[Sequence[int]], device: torch.device) -> None:
        self.lengths = [len(phrase) for phrase in phrases]
        self.total = sum(self.lengths)
        longest = max(self.lengths)
        # words[c, state]: next word of phrase c; -1 if it is complete.
        self.words = torch.full((len(phrases), longest + 1), -1, device=device)
        # transitions[c, state, p]: state of phrase c after word p of the phrase.
        shape = len(phrases), longest + 1, longest
        self.transitions = torch.zeros(shape, dtype=torch.int64, device=device)
        for number, phrase in enumerate(phrases):
            self.words[number, : len(phrase)] = torch.tensor(phrase)
            for state in range(len(phrase)):
                for index, word in enumerate(phrase):
                    # The new state is the longest prefix of the phrase that the text ends with.
                    text = [*phrase[:state], word]
                    matches = (
                        n
                        for n in range(min(len(text), len(phrase)), 0, -1)
                        if text[-n:] == list(phrase[:n])
                    )
                    self.transitions[number, state, index] = next(matches, 0)
            self.transitions[number, len(phrase)] = len(phrase)
        self.complete = torch.tensor(self.lengths, device=device)

    def initial_states(self, shape: Sequence[int]) -> Tensor:
        """The states of empty texts: zeros [*shape,C] int64."""
        return torch.zeros(*shape, len(self.lengths), dtype=torch.int64, device=self.words.device)

    def next_words(self, states: Tensor) -> Tensor:
        """The next word of each phrase, -1 if it is complete: states [...,C] to ids [...,C]."""
        return self.words[torch.arange(len(self.lengths), device=states.device), states]

    def advance(self, states: Tensor, words: Tensor) -> Tensor:
        """The states [...,M,C] after `words` [...,M] are added to texts with `states` [...,1,C]."""
        phrase = torch.arange(len(self.lengths), device=states.device)
        matches = words[..., None, None] == self.words[:, :-1]  # [...,M,C, words of a phrase]
        new_states = (self.transitions[phrase, states] * matches).amax(-1)
        return torch.where(states == self.complete, states, new_states)

    def progress(self, states: Tensor) -> Tensor:
        """Number of forced words in each text: states [...,C] to [...].

        Complete phrases count, and the longest phrase that the text ends with. `total - progress`
        further words are enough to complete all phrases.
        """
        complete = states == self.complete
        return (states * complete).sum(-1) + (states * ~complete).amax(-1)
