"""BLEU, ROUGE-L and CIDEr of captions against their references, as pycocoevalcap computes them.

BLEU      Papineni et al. 2002: corpus sums, closest reference length
ROUGE_L   Lin 2004: F of the longest common subsequence, beta 1.2, best precision and best recall over the references
CIDEr     Vedantam et al. 2015, its CIDEr-D: clipped tf-idf cosine, length penalty exp(-d^2 / 2 sigma^2) with sigma 6,
          times 10; document frequencies from the references given

References are counted once, n-gram by n-gram, into sorted integer tables; a caption is then scored by look-ups in them.
Letters: I images, K references an image (missing ones are empty), S captions to score, N = 4 n-gram lengths, E entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from data import DataError
from data.tokens import tokenize_all

ORDERS = 4
SIGMA = 6.0
BETA = 1.2
MISSING, MASK = (1 << 63) - 1, (1 << 32) - 1
TINY, SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against 0/0; they show in the scores of very short captions


@dataclass(frozen=True)
class Scores:
    """Corpus `values` by name and, by the same names, `per_image` [I] float64 in the order of `image_ids` [I]."""

    values: dict[str, float]
    per_image: dict[str, np.ndarray]
    image_ids: np.ndarray


class Grams(NamedTuple):
    """The references' n-grams of one length. A sorted table ends in MISSING, where every look-up that fails arrives."""

    keys: np.ndarray  # [G+1] int64: name of the first n-1 words << 32 | last word; an n-gram's name is its place here
    idf: np.ndarray  # [G+1] float64: log I - log document frequency
    entries: np.ndarray  # [E+1] int64: image << 32 | name, for each n-gram of each image
    counts: np.ndarray  # [E+1,K] how often it stands in each reference of that image
    norms: np.ndarray  # [I,K] float64: length of each reference's tf-idf vector


class Words(NamedTuple):
    """All words of some captions in one row, M of them."""

    numbers: np.ndarray  # [M] int64
    owner: np.ndarray  # [M] the caption each stands in
    left: np.ndarray  # [M] words from here to the caption's end, itself included
    lengths: np.ndarray  # [S]
    new: dict[str, int]  # words that had no number yet


class References:
    """The references of a set of images, counted once and scored against any number of times."""

    def __init__(self, references: Mapping[int, Sequence[str]]) -> None:
        if not references:
            raise DataError("no references to score against")
        for image_id, captions in references.items():
            if isinstance(captions, str):
                raise DataError(f"image {image_id}: the references are one string; pass a list of captions")
            if not len(captions):
                raise DataError(f"image {image_id} has no references")
            for caption in captions:
                _check_string(image_id, caption)
        self.rows = {image_id: row for row, image_id in enumerate(references)}
        self.tokens = [tokenize_all(captions) for captions in references.values()]
        self._count()

    def score(self, candidates: Mapping[int, str]) -> Scores:
        """Score one caption for every image of the references."""
        for image_id, caption in candidates.items():
            if image_id not in self.rows:
                raise DataError(f"image {image_id} has a candidate but no references")
            _check_string(image_id, caption)
        missing = [image_id for image_id in self.rows if image_id not in candidates]
        if missing:
            raise DataError(f"image {missing[0]} has references but no candidate ({len(missing)} such images)")
        tokens = tokenize_all(candidates[image_id] for image_id in self.rows)
        cider, correct, lengths = self._compare(np.arange(len(tokens)), tokens)
        bleu, bleu_per_image = _bleu(correct, lengths, self._closest(lengths))
        names = [f"Bleu_{n}" for n in range(1, ORDERS + 1)]
        per_image = dict(zip(names, bleu_per_image.T, strict=True))
        per_image["ROUGE_L"] = np.array([_rouge(*pair) for pair in zip(tokens, self.tokens, strict=True)])
        per_image["CIDEr"] = cider
        values = dict(zip(names, bleu.tolist(), strict=True))
        values |= {name: float(per_image[name].mean()) for name in ("ROUGE_L", "CIDEr")}
        return Scores(values, per_image, np.array(list(self.rows)))

    def cider(self, image_ids: Iterable[int], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """CIDEr [S] of each of S `captions` (their tokens) against its image's references; an image may come often."""
        try:
            rows = np.array([self.rows[int(image_id)] for image_id in image_ids], np.int64)
        except KeyError as error:
            raise DataError(f"image {error.args[0]} has a candidate but no references") from None
        if len(rows) != len(captions):
            raise DataError(f"{len(captions)} captions for {len(rows)} image ids")
        return self._compare(rows, captions)[0]

    def _count(self) -> None:
        """Fill `k` [I], `lengths` [I,K] in words, and `grams`, one table for each n."""
        self.k = np.array([len(captions) for captions in self.tokens])
        images, width = len(self.k), int(self.k.max())
        words = _number(list(chain.from_iterable(self.tokens)), {})
        self.vocabulary = words.new
        image = np.repeat(np.arange(images), self.k)
        column = np.arange(len(image)) - np.repeat(np.cumsum(self.k) - self.k, self.k)
        self.lengths = np.zeros((images, width), np.int64)
        self.lengths[image, column] = words.lengths
        self.grams: list[Grams] = []
        names = np.zeros(len(words.numbers), np.int64)
        for n in range(ORDERS):
            start, key = _extend(words, names, n)
            keys, names[start] = np.unique(key, return_inverse=True)
            owner = words.owner[start]
            entries, place = np.unique(image[owner] << 32 | names[start], return_inverse=True)
            counts = np.bincount(place * width + column[owner], minlength=(len(entries) + 1) * width)
            counts = counts.reshape(-1, width)
            name = entries & MASK
            frequency = np.bincount(name, minlength=len(keys) + 1)
            idf = np.log(images) - np.log(np.maximum(frequency, 1))
            squares = (counts[:-1] * idf[name, None]) ** 2
            norms = np.stack([np.bincount(entries >> 32, of, images) for of in squares.T], axis=1) ** 0.5
            counts = counts.astype(np.min_scalar_type(counts.max(initial=0)))  # one byte in practice: COCO fits memory
            self.grams.append(Grams(np.append(keys, MISSING), idf, np.append(entries, MISSING), counts, norms))

    def _compare(self, rows: np.ndarray, captions: Sequence[Sequence[str]]) -> tuple[np.ndarray, ...]:
        """Hold caption s against the references of image rows[s]: CIDEr [S], clipped matches [S,N], lengths [S]."""
        words = _number(captions, self.vocabulary)
        count, width = len(rows), self.lengths.shape[1]
        cosine, correct = np.zeros((count, width)), np.zeros((count, ORDERS))
        names = np.zeros(len(words.numbers), np.int64)
        for n, grams in enumerate(self.grams):
            start, key = _extend(words, names, n)
            names[start] = _look_up(grams.keys, key)
            mine, tf = np.unique(words.owner[start] << 32 | names[start], return_counts=True)
            sample, name = mine >> 32, mine & MASK
            wanted = rows[sample] << 32 | name
            place = np.searchsorted(grams.entries, wanted)
            place[grams.entries[place] != wanted] = len(grams.entries) - 1
            counts = grams.counts[place]
            correct[:, n] = np.bincount(sample, np.minimum(tf, counts.max(axis=1)), count)
            idf = grams.idf[np.minimum(name, len(grams.idf) - 1)]
            weight, theirs = tf * idf, counts * idf[:, None]
            dot = np.minimum(weight[:, None], theirs) * theirs
            dot = np.stack([np.bincount(sample, of, count) for of in dot.T], axis=1)
            norm = np.bincount(sample, weight**2, count)[:, None] ** 0.5 * grams.norms[rows]
            cosine += dot / np.where(norm > 0, norm, 1)
        # pycocoevalcap's length is the number of word pairs
        apart = np.maximum(words.lengths - 1, 0)[:, None] - np.maximum(self.lengths[rows] - 1, 0)
        cosine *= np.exp(-(apart**2) / (2 * SIGMA**2))
        return cosine.sum(axis=1) / ORDERS / self.k[rows] * 10, correct, words.lengths

    def _closest(self, lengths: np.ndarray) -> np.ndarray:
        """Of each image's references, the length closest to `lengths` [I], the shorter of two: [I]."""
        absent = np.arange(self.lengths.shape[1]) >= self.k[:, None]
        apart = np.where(absent, MISSING >> 32, np.abs(self.lengths - lengths[:, None]))
        return np.min(apart << 32 | self.lengths, axis=1) & MASK


def score(candidates: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> Scores:
    """Score one caption an image against the image's references: captions as written, by image id."""
    return References(references).score(candidates)


def _check_string(image_id: int, caption: object) -> None:
    if not isinstance(caption, str):
        raise DataError(f"image {image_id}: a caption is {type(caption).__name__} {caption!r}, not a string")


def _number(captions: Sequence[Sequence[str]], vocabulary: Mapping[str, int]) -> Words:
    """Number the words of all captions; words outside `vocabulary` go on after it."""
    # Joined and split because pycocoevalcap does: a token such as "1\xa01/2" is two of its words.
    split = [" ".join(caption).split() for caption in captions]
    new: dict[str, int] = {}
    size = len(vocabulary)
    flat = chain.from_iterable(split)
    numbers = [vocabulary[word] if word in vocabulary else new.setdefault(word, size + len(new)) for word in flat]
    lengths = np.array([len(words) for words in split], np.int64)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(numbers))
    return Words(np.array(numbers, np.int64), owner, left, lengths, new)


def _extend(words: Words, names: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where n+1 words stand in a row, and the key of them: the name of the n first << 32 | the last."""
    start = np.flatnonzero(words.left > n)
    return start, names[start] << 32 | words.numbers[start + n]


def _look_up(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Name each of `wanted` by its place in `keys`; others, equal ones alike, go on after it."""
    place = np.searchsorted(keys, wanted)
    unseen = keys[place] != wanted
    place[unseen] = len(keys) + np.unique(wanted[unseen], return_inverse=True)[1]
    return place


def _bleu(correct: np.ndarray, lengths: np.ndarray, closest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """BLEU-1..N of the corpus [N] and of each image [I,N], from clipped matches [I,N] and lengths [I]."""

    def bleu(correct: np.ndarray, guess: np.ndarray, length: np.ndarray, reference: np.ndarray) -> np.ndarray:
        precision = (correct + TINY) / (guess + SMALL)
        ratio = (length + TINY) / (reference + SMALL)
        brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
        return np.cumprod(precision, axis=-1) ** (1 / np.arange(1, ORDERS + 1)) * brevity[..., None]

    guess = np.maximum(lengths[:, None] - np.arange(ORDERS), 0)
    return bleu(correct.sum(0), guess.sum(0), lengths.sum(), closest.sum()), bleu(correct, guess, lengths, closest)


def _rouge(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L of one caption against its references."""
    candidate = candidate or [""]  # pycocoevalcap splits at each blank, so nothing is one empty word
    precision = recall = 0.0
    for reference in references:
        common = _common(candidate, reference or [""])
        precision, recall = max(precision, common / len(candidate)), max(recall, common / max(len(reference), 1))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one whole row of the table a step (Hyyro 2004: bits of an integer)."""
    where: dict[str, int] = {}
    for place, word in enumerate(b):
        where[word] = where.get(word, 0) | 1 << place
    full = row = (1 << len(b)) - 1
    for word in a:
        met = row & where.get(word, 0)
        row = row + met | row - met
    return (~row & full).bit_count()
