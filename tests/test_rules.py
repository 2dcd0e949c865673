"""Rules of decoding against plain Python."""

from __future__ import annotations

import itertools

import pytest
import torch

from models.generation.constraints import NEG_INF, BannedWords, PhrasalConstraint

WORDS, EOS = 9, 2


def repeats(words: list[int], n: int) -> bool:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) < len(grams)


def holds(words: list[int], phrase: tuple[int, ...]) -> bool:
    return any(
        tuple(words[i : i + len(phrase)]) == phrase for i in range(len(words) - len(phrase) + 1)
    )


@pytest.mark.parametrize("ngram", [0, 1, 2, 3])
def test_a_word_is_barred_exactly_where_it_would_break_a_rule(ngram):
    phrases, least = ((5,), (3, 4), (4, 4, 6)), 3
    barred = BannedWords(EOS, least, ngram, phrases)
    generator = torch.Generator().manual_seed(ngram)
    for length in range(7):
        words = torch.randint(3, WORDS, (40, length), generator=generator)
        scores = torch.zeros(40, WORDS)
        barred(scores, words)
        for row, before in zip(scores.tolist(), words.tolist(), strict=True):
            clean = not (ngram and repeats(before, ngram)) and not any(
                holds(before, phrase) for phrase in phrases
            )
            if not clean:
                continue
            for word in range(WORDS):
                after = [*before, word]
                wrong = any(holds(after, phrase) for phrase in phrases)
                wrong |= bool(ngram) and repeats(after, ngram)
                wrong |= word == EOS and length < least
                assert (row[word] == NEG_INF) == wrong, (before, word)


@pytest.mark.parametrize(
    "phrases", [((4,),), ((4, 5), (6,)), ((4, 4, 5),), ((4, 5, 4, 6), (5, 4)), ((3, 4, 5), (4, 6))]
)
def test_states_of_forced_phrases_are_what_the_caption_ends_with(phrases):
    forced = PhrasalConstraint(phrases, torch.device("cpu"))
    assert forced.total == sum(map(len, phrases))
    captions = list(itertools.product((3, 4, 5, 6), repeat=5))
    states = forced.initial_states((len(captions),))
    for end in range(1, 6):
        added = torch.tensor([[words[end - 1]] for words in captions])
        states = forced.advance(states[:, None], added)[:, 0]
        for words, found in zip(captions, states.tolist(), strict=True):
            so_far = list(words[:end])
            for phrase, state in zip(phrases, found, strict=True):
                if holds(so_far, phrase):
                    assert state == len(phrase)
                else:
                    begun = [
                        n
                        for n in range(len(phrase))
                        if tuple(so_far[len(so_far) - n :]) == phrase[:n]
                    ]
                    assert state == max(begun)


def test_progress_leaves_as_many_words_as_can_bring_in_the_rest():
    """Two phrases begun at once: only the longer one goes on, the other one begins again."""
    forced = PhrasalConstraint(((3, 4, 5), (4, 6)), torch.device("cpu"))
    assert forced.progress(torch.tensor([2, 1])).item() == 2
    assert forced.progress(torch.tensor([3, 1])).item() == 4
    assert forced.next_words(torch.tensor([2, 1])).tolist() == [5, 6] and forced.next_words(
        torch.tensor([3, 2])
    ).tolist() == [-1, -1]
