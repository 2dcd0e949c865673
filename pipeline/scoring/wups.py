"""WUPS, a soft accuracy of answers that are words or lists of words (Malinowski and Fritz 2014).

It is the score of DAQUAR. Wu-Palmer similarities of nouns of WordNet replace equality.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

THRESHOLDS = (0.9, 0.0)  # of the published scores WUPS@0.9 and WUPS@0.0
BELOW_THRESHOLD = 0.1  # factor of a similarity below the threshold


class NotInstalled(Exception):
    """WordNet is not installed. The message says how to install it."""


@functools.cache
def open_wordnet() -> Any:
    """Open WordNet. Raises NotInstalled."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise NotInstalled(
            "WUPS needs WordNet: install it with python -m nltk.downloader wordnet"
        ) from error
    return wordnet


@functools.cache
def similarity(word: str, other: str) -> float:
    """The largest Wu-Palmer similarity of any noun senses of two words, in 0..1.

    It is 1 for equal words, and 0 if a word has no noun sense.
    """
    if word == other:
        return 1.0
    wordnet = open_wordnet()
    senses, other_senses = (
        wordnet.synsets(text.replace(" ", "_"), pos=wordnet.NOUN) for text in (word, other)
    )
    pairs = itertools.product(senses, other_senses)
    return max((one.wup_similarity(two) or 0.0 for one, two in pairs), default=0.0)


def wups(answer: str, truth: str) -> dict[str, float]:
    """Compute WUPS@0.9 and WUPS@0.0 of one answer, each in 0..1.

    Answers are lists of words, separated by commas. WUPS is the smaller of two products: over the
    words of the answer, the largest similarity to a word of the truth, and the other way round.
    """
    words, true_words = (
        [word.strip().lower() for word in text.split(",")] for text in (answer, truth)
    )

    def thresholded(word: str, other: str, threshold: float) -> float:
        value = similarity(word, other)
        return value if value >= threshold else value * BELOW_THRESHOLD

    return {
        f"WUPS@{threshold}": min(
            math.prod(max(thresholded(a, b, threshold) for b in there) for a in here)
            for here, there in ((words, true_words), (true_words, words))
        )
        for threshold in THRESHOLDS
    }
