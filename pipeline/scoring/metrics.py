"""BLEU, ROUGE-L and CIDEr of captions, with the same results as pycocoevalcap.

BLEU      Papineni et al. 2002: sums over the corpus, closest reference length
ROUGE_L   Lin 2004: F-measure of the longest common subsequence with beta 1.2, from the best
          precision and the best recall over the references
CIDEr     Vedantam et al. 2015, the variant CIDEr-D: clipped tf-idf cosine times the length penalty
          exp(-d^2 / (2 sigma^2)) with sigma 6, times 10; document frequencies are those of the
          given references

References are counted once (`pipeline.scoring.ngrams`). Scoring then looks up n-grams in tables.

Letters in shapes: I images, K references per image, S captions to score, N = 4 n-gram lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data import DataError
from pipeline.scoring.ngrams import (
    MASK,
    MISSING,
    ORDERS,
    Matches,
    References,
    Words,
    split,
    tokens_of,
)

SIGMA = 6.0
BETA = 1.2
# pycocoevalcap's constants against division by 0. They influence the scores of very short captions.
TINY, SMALL = 1e-15, 1e-9
ONE_DOCUMENT = (
    "it weights an n-gram by the number of images whose references contain it, and with one image "
    "all weights are 0; take document frequencies from more images with --df FILE "
    "(in Python: References(references, frequencies=captions_by_image))"
)
BLEU = tuple(f"Bleu_{n}" for n in range(1, ORDERS + 1))


@dataclass(frozen=True)
class Scores:
    """The scores of one caption per image.

    values: scores of the corpus, by name.
    per_image: [I] float64 scores by name, in the order of `image_ids`.
    image_ids: [I] ids of the images.
    bleu_sums: [I,2N+2] counts whose sum over images gives BLEU: N clipped matches, N numbers of
        n-grams, number of words, number of words of the closest reference.
    not_computed: reasons for scores that are not computed, by name. CIDEr is not computed if the
        document frequencies are those of one image.
    """

    values: dict[str, float]
    per_image: dict[str, np.ndarray]
    image_ids: np.ndarray
    bleu_sums: np.ndarray
    not_computed: dict[str, str] = field(default_factory=dict)


def score(
    candidates: Mapping[int, str | Sequence[str]],
    references: References | Mapping[int, Sequence[str]],
) -> Scores:
    """Score one caption for every image of the references.

    candidates: one caption by image id, as a string or a list of tokens. ["A dog runs."] is read as
        the string "A dog runs.".
    references: lists of such captions by image id. Pass `References` to count them once for several
        calls.

    CIDEr is not computed for one image. Raises DataError if an image is missing in candidates or
    references, and for something that is not a caption.
    """
    if not isinstance(candidates, Mapping):
        raise DataError(
            f"candidates are {type(candidates).__name__}; pass a dict: a caption by image id"
        )
    if not isinstance(references, References):
        references = References(references)
    for image_id in candidates:
        references.row_of(image_id)
    missing = [image_id for image_id in references.rows if image_id not in candidates]
    if missing:
        raise DataError(
            f"image {missing[0]} has references but no candidate ({len(missing)} such images)"
        )
    segment = references.segment
    words = references.number_words(
        [tokens_of(image_id, candidates[image_id], segment) for image_id in references.rows]
    )
    rows = np.arange(len(references))
    matches = references.compare(rows, words)
    sums = bleu_sums(rows, matches, references)
    per_image = dict(zip(BLEU, bleu(sums).T, strict=True))
    per_image["ROUGE_L"] = _rouge(words, references)
    has_cider = references.documents > 1
    if has_cider:
        per_image["CIDEr"] = cider_of_matches(rows, matches, references)
    values = dict(zip(BLEU, bleu(sums.sum(0)).tolist(), strict=True))
    values |= {name: float(per_image[name].mean()) for name in per_image if name not in values}
    not_computed = {} if has_cider else {"CIDEr": ONE_DOCUMENT}
    return Scores(values, per_image, np.array(list(references.rows)), sums, not_computed)


def cider(
    references: References, image_ids: Iterable[int], captions: Sequence[Sequence[str]]
) -> np.ndarray:
    """CIDEr [S] float64 of S captions.

    image_ids: S ids; an id may occur several times. captions: S strings or lists of tokens.
    Raises DataError for an image without references, and for document frequencies of one image.
    """
    ids = list(image_ids)
    rows = np.array([references.row_of(int(image_id)) for image_id in ids], np.int64)
    if len(rows) != len(captions):
        raise DataError(f"{len(captions)} captions for {len(rows)} image ids")
    if references.documents < 2:
        raise DataError(f"CIDEr is not computed: {ONE_DOCUMENT}")
    words = references.number_words([tokens_of(*pair) for pair in zip(ids, captions, strict=True)])
    return cider_of_matches(rows, references.compare(rows, words), references)


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-1..N [...,N] from sums [...,2N+2], as in `Scores.bleu_sums`.

    The sums may be those of an image, of a corpus or of a resample.
    """
    correct, total = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    ratio = (sums[..., -2] + TINY) / (sums[..., -1] + SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    precision = (correct + TINY) / (total + SMALL)
    return np.cumprod(precision, axis=-1) ** (1 / np.arange(1, ORDERS + 1)) * brevity[..., None]


def bleu_sums(rows: np.ndarray, matches: Matches, references: References) -> np.ndarray:
    """The sums [S,2N+2] of BLEU, as in `Scores.bleu_sums`, of captions of the images in `rows`."""
    lengths, reference_lengths = matches.lengths[:, None], references.lengths[rows]
    is_missing = np.arange(reference_lengths.shape[1]) >= references.k[rows, None]
    distance = np.where(is_missing, MISSING >> 32, np.abs(reference_lengths - lengths))
    # If two references are equally close, this selects the shorter one.
    closest = np.min(distance << 32 | reference_lengths, axis=1) & MASK
    ngram_counts = np.maximum(lengths - np.arange(ORDERS), 0)
    return np.hstack([matches.correct, ngram_counts, lengths, closest[:, None]])


def cider_of_matches(rows: np.ndarray, matches: Matches, references: References) -> np.ndarray:
    """CIDEr [S] of captions of the images in `rows` [S], from their `matches`."""
    # In pycocoevalcap the length of a caption is its number of bigrams.
    lengths = np.maximum(matches.lengths - 1, 0)[:, None]
    difference = lengths - np.maximum(references.lengths[rows] - 1, 0)
    similarity = matches.cosine.sum(axis=1) / ORDERS * np.exp(-(difference**2) / (2 * SIGMA**2))
    return similarity.sum(axis=1) / references.k[rows] * 10


def _rouge(words: Words, references: References) -> np.ndarray:
    """ROUGE-L [I] of one caption per image."""
    image = np.repeat(np.arange(len(references)), references.k)
    counts, reference_counts = words.token_counts[image], references.counts
    common = _common_lengths(
        words.tokens, words.token_counts, image, references.tokens, reference_counts
    )
    # pycocoevalcap splits at each blank. So a caption without tokens has one empty word, which is
    # common to two such captions.
    common[(counts == 0) & (reference_counts == 0)] = 1
    first = np.cumsum(references.k) - references.k
    precision = np.maximum.reduceat(common / np.maximum(counts, 1), first)
    recall = np.maximum.reduceat(common / np.maximum(reference_counts, 1), first)
    denominator = np.where(precision > 0, recall + BETA**2 * precision, 1)
    return (1 + BETA**2) * precision * recall / denominator


def _common_lengths(
    a: np.ndarray, a_counts: np.ndarray, a_index: np.ndarray, b: np.ndarray, b_counts: np.ndarray
) -> np.ndarray:
    """Length of the longest common subsequence of caption a_index[p] of `a` and caption p of `b`.

    a, b: concatenated token ids of captions. a_counts, b_counts: tokens of each caption.

    The bits of an integer store one row of the dynamic programming table (Hyyro 2004). If both
    captions have at most 64 tokens, a 64-bit integer is enough, and numpy computes all p at once.
    """
    common = np.zeros(len(a_index), np.int64)
    is_short = (a_counts[a_index] <= 64) & (b_counts <= 64)
    if not is_short.all():
        all_a, all_b = list(split(a, a_counts)), list(split(b, b_counts))
        long_pairs = np.flatnonzero(~is_short)
        common[~is_short] = [_common_length(all_a[a_index[p]], all_b[p]) for p in long_pairs]
    pairs = np.flatnonzero(is_short & (b_counts > 0))
    if not len(pairs):
        return common
    b, counts = b[np.repeat(is_short, b_counts)], b_counts[pairs]
    begin = np.cumsum(counts) - counts
    bit = np.uint64(1) << (np.arange(len(b)) - np.repeat(begin, counts)).astype(np.uint64)
    row, padded = np.full(len(pairs), np.uint64(2**64 - 1)), np.append(a, -1)
    start = (np.cumsum(a_counts) - a_counts)[a_index[pairs]]
    length = a_counts[a_index[pairs]]
    for step in range(length.max()):
        word = np.where(step < length, padded[np.minimum(start + step, len(a))], -1)
        matches = row & np.add.reduceat(bit * (np.repeat(word, counts) == b), begin)
        row = row + matches | row - matches
    valid_bits = np.uint64(2**64 - 1) >> (64 - counts).astype(np.uint64)
    bits = np.unpackbits((~row & valid_bits).view(np.uint8))
    common[pairs] = bits.reshape(len(pairs), 64).sum(1)
    return common


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence of two captions of any length."""
    positions: dict[int, int] = {}
    for position, word in enumerate(b):
        positions[word] = positions.get(word, 0) | 1 << position
    valid_bits = row = (1 << len(b)) - 1
    for word in a:
        matches = row & positions.get(word, 0)
        row = row + matches | row - matches
    return (~row & valid_bits).bit_count()
