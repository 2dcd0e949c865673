"""References counted once: the integer n-gram tables that BLEU and CIDEr of any number of captions
are read from.

Words are numbered, W of them, and a word's number is its name. A longer n-gram's name goes on from
there: W + its place in a sorted table of (name of its first n-1 words, last word). So names are
exact for a vocabulary of any size, and sorted by n.

Letters: I images, K references an image (missing ones are empty), S captions to compare, N = 4
n-gram lengths, G n-grams of two words or more, E entries: the different n-grams of each image.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, reduce
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DataError, characters, segmentation, tokens
from data.files import atomic_write
from data.segmentation import segmented

ORDERS = 4
MISSING, MASK = (1 << 63) - 1, (1 << 32) - 1
BLANK = re.compile(r"[ \t\n\r\f\v]")  # what no token holds
ENDS = tuple(".!?,;:。！？，、؟।")  # what sentences end with
FORMAT = 2  # of the file that `save` writes
MOST = 1 << 30  # bytes of references that a cache folder keeps
# its files, those half written too
KEPT = re.compile(r"\.?references-[0-9a-f]{64}\.npz(\.[0-9a-f]{32}\.tmp)?")
TABLES = (
    "documents",
    "k",
    "lengths",
    "tokens",
    "counts",
    "keys",
    "idf",
    "entries",
    "ends",
    "entry_counts",
    "norms",
)


class Words(NamedTuple):
    """All words of some captions in one row, M of them, and their tokens, T.

    They are the same but for tokens with a blank inside: "1\xa01/2 cups" is three words to BLEU and
    CIDEr, two tokens to ROUGE-L.
    """

    numbers: np.ndarray  # [M] int64
    owner: np.ndarray  # [M] the caption each stands in
    left: np.ndarray  # [M] words from here to the caption's end, itself included
    lengths: np.ndarray  # [S] words
    tokens: np.ndarray  # [T] int64
    counts: np.ndarray  # [S] tokens


class Numbers(dict):
    """Words' numbers; a word that has none yet gets the next.

    `pieces` has the words of tokens that are not just one.
    """

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__((word, number) for number, word in enumerate(words))
        self.pieces = {
            number: word.split() for number, word in enumerate(words) if word.split() != [word]
        }

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        if (words := word.split()) != [word]:
            self.pieces[number] = words
        return number


class Matches(NamedTuple):
    """S captions held against the references of one image each."""

    # [S,N,K] float64: clipped tf-idf cosine with each reference, 0 for missing ones
    cosine: np.ndarray
    # [S,N] n-grams found, each at most as often as in the reference that has it most
    correct: np.ndarray
    lengths: np.ndarray  # [S] words


class References:
    """The references of a set of images, counted.

    references: captions by image id, each a string, tokenised here, or a list of tokens, as
        `words_of` reads them.
    vocabulary: words that are to have the numbers 0, 1, ...; all others are numbered after them as
        they come.
    frequencies: captions by image id whose document frequencies (images that have an n-gram, and
        the number of images) are used in place of the references' own, as where a small set is
        scored with those of a large one.
    segment: how strings are cut into tokens, as `data.segmentation` has it.
    """

    def __init__(
        self,
        references: Mapping[int, Sequence[str | Sequence[str]]],
        vocabulary: Sequence[str] = (),
        frequencies: Mapping[int, Sequence[str | Sequence[str]]] | None = None,
        segment: str = "words",
    ) -> None:
        for given in (references, frequencies):
            if given is not None and not isinstance(given, Mapping):
                raise DataError(
                    f"references are {type(given).__name__}; pass a dict: lists of captions by "
                    "image id"
                )
        if not references:
            raise DataError("no references to score against")
        self.rows = {image_id: row for row, image_id in enumerate(references)}
        self.vocabulary, self.segment = Numbers(vocabulary), segment
        if frequencies is not None and not frequencies:
            raise DataError("no captions to take document frequencies from")
        self._count(
            tokens_by_image(references, segment), tokens_by_image(frequencies or {}, segment)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def row_of(self, image_id: int) -> int:
        """The row of an image in all tables [I, ...]; DataError where it has no references."""
        try:
            return self.rows[image_id]
        except KeyError:
            raise DataError(f"image {image_id} has a candidate but no references") from None

    def numbered(self, captions: Sequence[Sequence[str]]) -> Words:
        """Number the words of all captions; new ones are remembered, which changes no score."""
        tokens = np.fromiter(
            map(self.vocabulary.__getitem__, chain.from_iterable(captions)), np.int64
        )
        counts = np.fromiter(map(len, captions), np.int64)
        numbers, owner = tokens, np.repeat(np.arange(len(counts)), counts)
        # pycocoevalcap joins and splits: there "1\xa01/2" is two words, but to ROUGE
        if pieces := self.vocabulary.pieces:
            times = np.array([len(pieces.get(token, " ")) for token in tokens.tolist()], np.int64)
            parts = [
                [self.vocabulary[w] for w in pieces[token]] if token in pieces else [token]
                for token in tokens.tolist()
            ]
            numbers, owner = (
                np.array([*chain.from_iterable(parts)], np.int64),
                np.repeat(owner, times),
            )
        lengths = np.bincount(owner, minlength=len(counts))
        left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(numbers))
        return Words(numbers, owner, left, lengths, tokens, counts)

    def compare(self, rows: np.ndarray, words: Words) -> Matches:
        """Hold caption s of `words` against the references of image rows[s]."""
        count, width = len(rows), self.lengths.shape[1]
        grams, tf = _count_equal(self._name(words))
        group, name = grams >> 32, grams & MASK  # group: n * S + caption
        idf = self.idf.take(name, mode="clip")
        weight = tf * idf
        norm = np.bincount(group, weight * weight, ORDERS * count).reshape(ORDERS, count) ** 0.5
        found, place = self._entries_of(rows, group % count, name)
        group, tf, idf, weight = group[found], tf[found], idf[found, None], weight[found, None]
        correct = np.bincount(group, np.minimum(tf, self.most[place]), ORDERS * count).reshape(
            ORDERS, count
        )
        theirs = self.entry_counts.take(place, axis=0) * idf
        dot = np.minimum(weight, theirs) * theirs
        where = group[:, None] * width + np.arange(width)
        dot = np.bincount(where.ravel(), dot.ravel(), ORDERS * count * width).reshape(
            ORDERS, count, width
        )
        norm = norm.T[..., None] * self.norms.take(rows, axis=0)
        return Matches(
            dot.transpose(1, 0, 2) / np.where(norm > 0, norm, 1), correct.T, words.lengths
        )

    def _name(self, words: Words) -> np.ndarray:
        """The n-grams of all captions, (n * S + caption) << 32 | name; those of no reference get
        names after all others.
        """
        names, unseen, count = words.numbers.copy(), len(self.idf), len(words.lengths)
        if len(self.vocabulary) > self.words:
            names[names >= self.words] += unseen
            unseen += len(self.vocabulary)
        found, start = [words.owner << 32 | names], np.arange(len(names))
        for n in range(1, ORDERS):
            start = start[words.left[start] > n]
            before = names[start]
            key = before << 32 | words.numbers[start + n]
            place = self.keys.searchsorted(key)
            named = place + self.words
            strange = (
                (self.keys.take(place, mode="clip") != key).nonzero()[0]
                if len(self.keys)
                else np.arange(len(key))
            )
            different, place = np.unique(key[strange], return_inverse=True)
            named[strange] = unseen + place
            unseen += len(different)
            names[start] = named
            found.append(words.owner[start] + n * count << 32 | named)
        return np.concatenate(found)

    def _entries_of(
        self, rows: np.ndarray, caption: np.ndarray, name: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which of these n-grams, `name` of `caption`, the caption's image has, and where they
        stand among the entries.
        """
        new = np.append(True, rows[1:] != rows[:-1])  # captions of one image mostly stand together
        turn, images = np.cumsum(new) - 1, rows[new]
        begin, size = self.ends[images], self.ends[images + 1] - self.ends[images]
        at = np.arange(size.sum()) + np.repeat(begin - (np.cumsum(size) - size), size)
        # A small table in the order of the captions: it stays in the processor's cache, and
        # questions come nearly sorted.
        table = np.append(
            np.repeat(np.arange(len(images)) << 32, size) | self.entries[at] & MASK, MISSING
        )
        known = (name < len(self.idf) - 1).nonzero()[0]
        wanted = (turn << 32)[caption[known]] | name[known]
        near = table.searchsorted(wanted)
        found = (table[near] == wanted).nonzero()[0]
        return known[found], at[near[found]]

    def _count(self, own: list[list[list[str]]], frequencies: list[list[list[str]]]) -> None:
        """Fill the tables from the tokens of references and of `frequencies` (empty: the same).

        documents               images that document frequencies are counted over
        k [I], lengths [I,K]    references of an image; their lengths in words
        tokens, counts          as in `Words`
        keys      [G] int64     name of an n-gram's first n-1 words << 32 | its last word
        idf       [W+G+1]       log documents - log document frequency, by name; the last is that of
                                unseen n-grams
        entries   [E] int64     image << 32 | name; those of image i are entries[ends[i]:ends[i+1]]
        entry_counts [E,K]      how often the entry's n-gram stands in each reference of its image
        norms     [I,N,K]       length of each reference's tf-idf vector, by n-gram length
        """
        images, width = len(own), max(len(captions) for captions in own)
        self.documents = np.array(len(frequencies) or images)
        k = np.array([len(captions) for captions in chain(own, frequencies)])
        captions = [caption for captions in chain(own, frequencies) for caption in captions]
        words = self.numbered(captions)
        image = np.repeat(np.arange(len(k)), k)  # of each caption; those of `frequencies` are last
        column = np.arange(len(image)) - np.repeat(np.cumsum(k) - k, k)  # its place in its image
        is_own = image < images
        self.k, self.words = k[:images], len(self.vocabulary)
        self.lengths = np.zeros((images, width), np.int64)
        self.lengths[image[is_own], column[is_own]] = words.lengths[is_own]
        self.counts = words.counts[is_own]
        self.tokens = words.tokens[: self.counts.sum()]
        caption, name, first_names = self._name_references(words)

        # count equal n-grams: first of each reference, then sorted by image and name
        most = int(k.max())
        packed, times = _count_equal((image[caption] << 32 | name) * most + column[caption])
        entry_of, column_of = np.divmod(packed, most)
        is_new = np.diff(entry_of, prepend=-1) > 0
        entries, place = entry_of[is_new], np.cumsum(is_new) - 1
        counted = entries[entries >> 32 >= images] if frequencies else entries
        self.idf = self._idf(counted, first_names[-1] + 1)

        is_own = entry_of < images << 32
        own_entries = entries[entries < images << 32]
        counts = np.zeros((len(own_entries), width), np.min_scalar_type(times.max(initial=0)))
        counts[place[is_own], column_of[is_own]] = times[is_own]  # one byte each, in practice
        self.entries, self.entry_counts = own_entries, counts
        self.ends = np.searchsorted(own_entries, np.arange(images + 1) << 32)

        squares = (counts * self.idf[own_entries & MASK, None]) ** 2
        order = np.searchsorted(first_names[1:], own_entries & MASK, side="right")  # n - 1
        group = (own_entries >> 32) * ORDERS + order
        sums = [np.bincount(group, of_column, images * ORDERS) for of_column in squares.T]
        self.norms = (np.stack(sums, axis=1) ** 0.5).reshape(images, ORDERS, width)

    def _name_references(self, words: Words) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Name all n-grams of the references and fill `keys`.

        Returns the caption and the name of each n-gram, and the first name of each length n (the
        last entry: the number of names).
        """
        names, keys = words.numbers.copy(), []
        first_names = [0, self.words]
        captions, named = [words.owner], [names.copy()]
        for n in range(1, ORDERS):
            start = np.flatnonzero(words.left > n)
            key = names[start] << 32 | words.numbers[start + n]
            different, place = np.unique(key, return_inverse=True)
            names[start] = first_names[-1] + place
            keys.append(different)
            captions.append(words.owner[start])
            named.append(names[start])
            first_names.append(first_names[-1] + len(different))
        self.keys = np.concatenate(keys)
        return np.concatenate(captions), np.concatenate(named), first_names

    def _idf(self, entries: np.ndarray, names: int) -> np.ndarray:
        """log documents - log document frequency of each name; an entry is an image that has it."""
        document_frequency = np.bincount(entries & MASK, minlength=names)
        return np.log(self.documents) - np.log(np.maximum(document_frequency, 1))

    @cached_property
    def most(self) -> np.ndarray:
        return reduce(np.maximum, self.entry_counts.T)

    def grouped(self) -> list[list[list[int]]]:
        """The references' tokens, numbered, by image and reference."""
        tokens = cut(self.tokens, self.counts)
        return [[next(tokens) for _ in range(k)] for k in self.k.tolist()]

    def save(self, path: Path) -> None:
        """Keep the tables in one .npz file, written whole or not at all."""
        arrays = {name: getattr(self, name) for name in TABLES} | {
            "format": np.array(FORMAT),
            "words": np.array(self.words),
        }
        arrays["segment"] = np.array(self.segment)
        arrays["image_ids"] = np.array(list(self.rows), np.int64)
        arrays["vocabulary"] = np.frombuffer(
            json.dumps(list(self.vocabulary)[: self.words]).encode(), np.uint8
        )
        arrays["digest"] = _digest(path, arrays)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> References:
        """The tables that `save` kept; DataError where the file is not what it wrote under this
        name.
        """
        found = cls.__new__(cls)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if arrays["format"] != FORMAT or not np.array_equal(
                arrays.pop("digest"), _digest(path, arrays)
            ):
                raise ValueError(
                    "it has another format, another name or another content than it was "
                    "written with"
                )
            found.rows = {
                image_id: row for row, image_id in enumerate(arrays["image_ids"].tolist())
            }
            found.vocabulary, found.words = (
                Numbers(json.loads(arrays["vocabulary"].tobytes())),
                int(arrays["words"]),
            )
            found.segment = str(arrays["segment"])
            for name in TABLES:
                setattr(found, name, arrays[name])
        except OSError:
            raise
        except Exception as error:  # numpy raises whatever the broken file leads it into
            raise DataError(
                f"{path} is not whole ({error}); delete it, it is made again"
            ) from error
        return found


def _digest(path: Path, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 of arrays by name, and of the name of the file that they are kept in."""
    digest = hashlib.sha256(path.name.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def tokens_by_image(
    references: Mapping[int, Sequence[str | Sequence[str]]], segment: str = "words"
) -> list[list[list[str]]]:
    """The words of each caption by image; DataError for an image without captions and for what is
    no caption.
    """
    found = []
    for image_id, captions in references.items():
        if isinstance(captions, str):
            raise DataError(
                f"image {image_id}: the references are one string; pass a list of captions"
            )
        if isinstance(captions, bytes | Mapping) or not isinstance(captions, Iterable):
            raise DataError(
                f"image {image_id}: the references are {_shown(captions)}; pass a list of captions"
            )
        found.append([words_of(image_id, caption, segment) for caption in captions])
        if not found[-1]:
            raise DataError(f"image {image_id} has no references")
    return found


def words_of(image_id: int, caption: str | Sequence[str], segment: str = "words") -> list[str]:
    """The words of one caption: of a string, or of the list of its tokens; DataError for anything
    else.

    A list with one string that is no token ("A dog runs.", "Running.") is that caption: other
    programs keep captions so. Tokens may hold U+00A0, but none of BLANK.
    """
    if isinstance(caption, np.ndarray):
        caption = caption.tolist()
    if isinstance(caption, str):
        return segmented(caption, segment)
    if not isinstance(caption, list | tuple) or not all(isinstance(word, str) for word in caption):
        raise DataError(
            f"image {image_id}: a caption is {_shown(caption)}, not a string or a list of tokens"
        )
    blank = BLANK.search("".join(caption))
    if len(caption) == 1 and (
        blank or caption[0] != caption[0].lower() or caption[0].endswith(ENDS)
    ):
        return segmented(caption[0], segment)
    if blank:
        raise DataError(
            f"image {image_id}: {len(caption)} sentences where one caption belongs, "
            f"{_shown(caption)}; pass one string, or the "
            "list of its tokens"
        )
    return list(caption)


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def cut(flat: np.ndarray, counts: np.ndarray) -> Iterator[list[int]]:
    """The lists of `counts` numbers each that stand in one row."""
    numbers, ends = flat.tolist(), np.cumsum(counts)
    return (
        numbers[start:end]
        for start, end in zip((ends - counts).tolist(), ends.tolist(), strict=True)
    )


def user_cache() -> Path | None:
    """$XDG_CACHE_HOME/onceover, else ~/.cache/onceover; None for a user without a home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # the XDG standard: such a path is ignored
        try:
            folder = Path.home() / ".cache"
        except RuntimeError:
            return None
    return folder / "onceover"


def kept_path(folder: Path, *parts: bytes) -> Path:
    """Where the counted references of a caption file are kept in a cache folder.

    The name is the digest of `parts`, all that the counts come from, and of the tokenizer, so that
    what has changed is counted again.
    """
    digest = hashlib.sha256(str(FORMAT).encode())
    rules = (
        Path(str(module.__file__)).read_bytes() for module in (characters, segmentation, tokens)
    )
    for part in (*rules, *parts):
        digest.update(hashlib.sha256(part).digest())
    return folder / f"references-{digest.hexdigest()}.npz"


def load_kept(path: Path) -> References | None:
    """The counted references at a path; None where they are not there, or not as `keep` left
    them.
    """
    with contextlib.suppress(DataError, OSError):
        if path.is_file():
            references = References.load(path)
            with contextlib.suppress(OSError):
                os.utime(path)  # those used last stay longest
            return references
    return None


def keep(references: References, path: Path) -> None:
    """Save where that can be: a full or read-only disk costs only the next run's second. Of earlier
    ones in the folder those used last stay, up to MOST bytes in all."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        references.save(path)
        kept = {
            file: file.stat()
            for file in path.parent.iterdir()
            if KEPT.fullmatch(file.name) and file != path
        }
        room = MOST - path.stat().st_size
        for file in sorted(kept, key=lambda file: kept[file].st_mtime, reverse=True):
            room -= kept[file].st_size
            if room < 0:
                file.unlink(missing_ok=True)


def _count_equal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique with counts, several times as fast on values that are nearly sorted."""
    values = np.sort(values, kind="stable")
    first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    first = first.nonzero()[0]
    return values[first], np.append(first[1:], len(values)) - first
