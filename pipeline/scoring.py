"""BLEU, ROUGE-L and CIDEr of captions against their references, as pycocoevalcap computes them.

BLEU      Papineni et al. 2002: corpus sums, closest reference length
ROUGE_L   Lin 2004: F of the longest common subsequence, beta 1.2, best precision and best recall over the references
CIDEr     Vedantam et al. 2015, its CIDEr-D: clipped tf-idf cosine, length penalty exp(-d^2 / 2 sigma^2) with sigma 6,
          times 10; document frequencies from the references given

References are counted once (`pipeline.references`); captions are then scored by look-ups in their tables.
Letters: I images, K references an image, S captions to score, N = 4 n-gram lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data import DataError
from pipeline.references import MASK, MISSING, ORDERS, Matches, References, cut, words_of

SIGMA = 6.0
BETA = 1.2
TINY, SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against 0/0; they show in the scores of very short captions
BLEU = tuple(f"Bleu_{n}" for n in range(1, ORDERS + 1))


@dataclass(frozen=True)
class Scores:
    """Corpus `values` by name and, by the same names, `per_image` [I] float64 in the order of `image_ids` [I].

    bleu_sums: [I,2N+2] what BLEU is made of once summed over images: clipped matches and n-grams by length, words,
        words of the closest reference.
    """

    values: dict[str, float]
    per_image: dict[str, np.ndarray]
    image_ids: np.ndarray
    bleu_sums: np.ndarray


def score(candidates: Mapping[int, str], references: References | Mapping[int, Sequence[str]]) -> Scores:
    """Score one caption for every image of the references: captions as written, by image id."""
    if not isinstance(references, References):
        references = References(references)
    for image_id in candidates:
        references.row_of(image_id)
    missing = [image_id for image_id in references.rows if image_id not in candidates]
    if missing:
        raise DataError(f"image {missing[0]} has references but no candidate ({len(missing)} such images)")
    words = references.numbered([words_of(image_id, candidates[image_id]) for image_id in references.rows])
    matches = references.compare(np.arange(len(references)), words)
    sums = _bleu_sums(matches, references)
    rouge = [_rouge(*pair) for pair in zip(cut(words.tokens, words.counts), references.grouped(), strict=True)]
    per_image = dict(zip(BLEU, bleu(sums).T, strict=True))
    per_image |= {"ROUGE_L": np.array(rouge), "CIDEr": cider_of_matches(np.arange(len(references)), matches, references)}
    values = dict(zip(BLEU, bleu(sums.sum(0)).tolist(), strict=True))
    values |= {name: float(per_image[name].mean()) for name in ("ROUGE_L", "CIDEr")}
    return Scores(values, per_image, np.array(list(references.rows)), sums)


def cider(references: References, image_ids: Iterable[int], captions: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr [S] of each of S `captions` (their tokens) against its image's references; an image may come often."""
    rows = np.array([references.row_of(int(image_id)) for image_id in image_ids], np.int64)
    if len(rows) != len(captions):
        raise DataError(f"{len(captions)} captions for {len(rows)} image ids")
    return cider_of_matches(rows, references.compare(rows, references.numbered(captions)), references)


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-1..N [...,N] from sums [...,2N+2] as in `Scores.bleu_sums`, of an image, of a corpus, of a resample."""
    correct, guess = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    ratio = (sums[..., -2] + TINY) / (sums[..., -1] + SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    precision = (correct + TINY) / (guess + SMALL)
    return np.cumprod(precision, axis=-1) ** (1 / np.arange(1, ORDERS + 1)) * brevity[..., None]


def _bleu_sums(matches: Matches, references: References) -> np.ndarray:
    lengths = matches.lengths[:, None]
    absent = np.arange(references.lengths.shape[1]) >= references.k[:, None]
    apart = np.where(absent, MISSING >> 32, np.abs(references.lengths - lengths))
    closest = np.min(apart << 32 | references.lengths, axis=1) & MASK  # the shorter of two that are equally close
    return np.hstack([matches.correct, np.maximum(lengths - np.arange(ORDERS), 0), lengths, closest[:, None]])


def cider_of_matches(rows: np.ndarray, matches: Matches, references: References) -> np.ndarray:
    # pycocoevalcap's length is the number of word pairs
    apart = np.maximum(matches.lengths - 1, 0)[:, None] - np.maximum(references.lengths[rows] - 1, 0)
    similar = matches.cosine.sum(axis=1) / ORDERS * np.exp(-(apart**2) / (2 * SIGMA**2))
    return similar.sum(axis=1) / references.k[rows] * 10


def _rouge(candidate: list[int], references: list[list[int]]) -> float:
    """ROUGE-L of one caption's tokens against its references'."""
    candidate = candidate or [-1]  # pycocoevalcap splits at each blank, so nothing is one empty word
    precision = recall = 0.0
    for reference in references:
        common = _common(candidate, reference or [-1])
        precision, recall = max(precision, common / len(candidate)), max(recall, common / max(len(reference), 1))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence, one whole row of the table a step (Hyyro 2004: bits of an integer)."""
    where: dict[int, int] = {}
    for place, word in enumerate(b):
        where[word] = where.get(word, 0) | 1 << place
    full = row = (1 << len(b)) - 1
    for word in a:
        met = row & where.get(word, 0)
        row = row + met | row - met
    return (~row & full).bit_count()
