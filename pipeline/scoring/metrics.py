"""BLEU, ROUGE-L and CIDEr of captions against their references, as pycocoevalcap computes them.

BLEU      Papineni et al. 2002: corpus sums, closest reference length
ROUGE_L   Lin 2004: F of the longest common subsequence, beta 1.2, best precision and best recall
          over the references
CIDEr     Vedantam et al. 2015, its CIDEr-D: clipped tf-idf cosine, length penalty exp(-d^2 / 2
          sigma^2) with sigma 6, times 10; document frequencies from the references given

References are counted once (`pipeline.scoring.ngrams`); captions are then scored by look-ups in
their tables. Letters: I images, K references an image, S captions to score, N = 4 n-gram lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data import DataError
from pipeline.scoring.ngrams import MASK, MISSING, ORDERS, Matches, References, Words, cut, words_of

SIGMA = 6.0
BETA = 1.2
TINY, SMALL = (
    1e-15,
    1e-9,
)  # pycocoevalcap's guards against 0/0; they show in the scores of very short captions
ONE_DOCUMENT = (
    "it weighs an n-gram by how few images have it in their references, and of one image all "
    "weights are 0; count over more "
    "images: --df FILE (in Python: References(references, frequencies=captions_by_image))"
)
BLEU = tuple(f"Bleu_{n}" for n in range(1, ORDERS + 1))


@dataclass(frozen=True)
class Scores:
    """Corpus `values` by name and, by the same names, `per_image` [I] float64 in the order of
    `image_ids` [I].

    not_computed: the reason, by name, of a score that is not among them: CIDEr where document
        frequencies are of one image.
    bleu_sums: [I,2N+2] what BLEU is made of once summed over images: clipped matches and n-grams by
        length, words, words of the closest reference.
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

    candidates: by image id a caption as written, or the list of its tokens; ["A dog runs."] is that
        caption.
    references: by image id a list of such captions; References where they are counted once for
        several calls.
    Over one image CIDEr is not computed. Raises DataError for an image that is missing on one side,
    and for what is not a caption.
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
    words = references.numbered(
        [words_of(image_id, candidates[image_id], segment) for image_id in references.rows]
    )
    rows = np.arange(len(references))
    matches = references.compare(rows, words)
    sums = bleu_sums(rows, matches, references)
    per_image = dict(zip(BLEU, bleu(sums).T, strict=True))
    per_image["ROUGE_L"] = _rouge(words, references)
    if computed := references.documents > 1:
        per_image["CIDEr"] = cider_of_matches(rows, matches, references)
    values = dict(zip(BLEU, bleu(sums.sum(0)).tolist(), strict=True))
    values |= {name: float(per_image[name].mean()) for name in per_image if name not in values}
    not_computed = {} if computed else {"CIDEr": ONE_DOCUMENT}
    return Scores(values, per_image, np.array(list(references.rows)), sums, not_computed)


def cider(
    references: References, image_ids: Iterable[int], captions: Sequence[Sequence[str]]
) -> np.ndarray:
    """CIDEr [S] of each of S `captions` (strings or tokens) against the references of its image. An
    image may occur several times.
    """
    ids = list(image_ids)
    rows = np.array([references.row_of(int(image_id)) for image_id in ids], np.int64)
    if len(rows) != len(captions):
        raise DataError(f"{len(captions)} captions for {len(rows)} image ids")
    if references.documents < 2:
        raise DataError(f"CIDEr is not computed: {ONE_DOCUMENT}")
    words = references.numbered([words_of(*pair) for pair in zip(ids, captions, strict=True)])
    return cider_of_matches(rows, references.compare(rows, words), references)


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-1..N [...,N] from sums [...,2N+2] as in `Scores.bleu_sums`, of an image, of a corpus, of
    a resample.
    """
    correct, guess = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    ratio = (sums[..., -2] + TINY) / (sums[..., -1] + SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    precision = (correct + TINY) / (guess + SMALL)
    return np.cumprod(precision, axis=-1) ** (1 / np.arange(1, ORDERS + 1)) * brevity[..., None]


def bleu_sums(rows: np.ndarray, matches: Matches, references: References) -> np.ndarray:
    """[S,2N+2], as `Scores.bleu_sums`, of captions compared with the references of image
    rows[s].
    """
    lengths, theirs = matches.lengths[:, None], references.lengths[rows]
    absent = np.arange(theirs.shape[1]) >= references.k[rows, None]
    apart = np.where(absent, MISSING >> 32, np.abs(theirs - lengths))
    # the shorter of two that are equally close
    closest = np.min(apart << 32 | theirs, axis=1) & MASK
    return np.hstack(
        [matches.correct, np.maximum(lengths - np.arange(ORDERS), 0), lengths, closest[:, None]]
    )


def cider_of_matches(rows: np.ndarray, matches: Matches, references: References) -> np.ndarray:
    """CIDEr [S] of captions compared with the references of image rows[s]."""
    # pycocoevalcap's length is the number of word pairs
    apart = np.maximum(matches.lengths - 1, 0)[:, None] - np.maximum(
        references.lengths[rows] - 1, 0
    )
    similar = matches.cosine.sum(axis=1) / ORDERS * np.exp(-(apart**2) / (2 * SIGMA**2))
    return similar.sum(axis=1) / references.k[rows] * 10


def _rouge(words: Words, references: References) -> np.ndarray:
    """ROUGE-L [I] of one caption's tokens an image against its references'."""
    image = np.repeat(np.arange(len(references)), references.k)
    # pycocoevalcap splits at each blank, so a caption without tokens is one empty word, which
    # another such caption shares.
    mine, theirs = np.maximum(words.counts[image], 1), np.maximum(references.counts, 1)
    common = _common(words.tokens, words.counts, image, references.tokens, references.counts)
    common[(words.counts[image] == 0) & (references.counts == 0)] = 1
    first = np.cumsum(references.k) - references.k
    precision, recall = (np.maximum.reduceat(common / length, first) for length in (mine, theirs))
    return (
        (1 + BETA**2)
        * precision
        * recall
        / np.where(precision > 0, recall + BETA**2 * precision, 1)
    )


def _common(
    a: np.ndarray, a_counts: np.ndarray, of: np.ndarray, b: np.ndarray, b_counts: np.ndarray
) -> np.ndarray:
    """Length of the longest common subsequence of caption of[p] in `a` and caption p in `b`, for
    all p.

    One whole row of each table a step, as the bits of an integer (Hyyro 2004): of 64 bits, where
    both captions are so short, for all p together.
    """
    common = np.zeros(len(of), np.int64)
    short = (a_counts[of] <= 64) & (b_counts <= 64)
    if not short.all():
        ours, all_theirs = list(cut(a, a_counts)), list(cut(b, b_counts))
        common[~short] = [
            _common_of_two(ours[of[p]], all_theirs[p]) for p in np.flatnonzero(~short)
        ]
    pairs = np.flatnonzero(short & (b_counts > 0))
    if not len(pairs):
        return common
    b, counts = b[np.repeat(short, b_counts)], b_counts[pairs]
    begin = np.cumsum(counts) - counts
    bit = np.uint64(1) << (np.arange(len(b)) - np.repeat(begin, counts)).astype(np.uint64)
    row, padded = np.full(len(pairs), np.uint64(2**64 - 1)), np.append(a, -1)
    start, length = (np.cumsum(a_counts) - a_counts)[of[pairs]], a_counts[of[pairs]]
    for step in range(length.max()):
        word = np.where(step < length, padded[np.minimum(start + step, len(a))], -1)
        met = row & np.add.reduceat(bit * (np.repeat(word, counts) == b), begin)
        row = row + met | row - met
    full = np.uint64(2**64 - 1) >> (64 - counts).astype(np.uint64)
    common[pairs] = np.unpackbits((~row & full).view(np.uint8)).reshape(len(pairs), 64).sum(1)
    return common


def _common_of_two(a: Sequence[int], b: Sequence[int]) -> int:
    """The same for two captions of any length."""
    where: dict[int, int] = {}
    for place, word in enumerate(b):
        where[word] = where.get(word, 0) | 1 << place
    full = row = (1 << len(b)) - 1
    for word in a:
        met = row & where.get(word, 0)
        row = row + met | row - met
    return (~row & full).bit_count()
