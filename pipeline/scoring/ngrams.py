"""N-gram tables of references, which are counted once. BLEU and CIDEr of captions read the tables.

Every n-gram has an integer id. The ids of the W words are 0..W-1. The id of a longer n-gram is W
plus its index in a sorted table of pairs (id of its first n-1 words, id of its last word). So ids
are unique for a vocabulary of any size, and ids increase with n.

Letters in shapes: I images, K references per image (missing ones are empty), S captions to compare,
N = 4 n-gram lengths, G distinct n-grams of two or more words, E entries, where an entry is one
distinct n-gram of one image.
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
MISSING, MASK = (1 << 63) - 1, (1 << 32) - 1  # larger than all keys; the lower half of a key
BLANK = re.compile(r"[ \t\n\r\f\v]")  # characters that tokens never contain
ENDS = tuple(".!?,;:。！？，、؟।")  # characters at the end of sentences
FORMAT = 2  # version of the file that `save` writes
MAX_CACHE_BYTES = 1 << 30  # for all files in a cache folder
# Names of files in the cache folder, including temporary files.
CACHED_FILE = re.compile(r"\.?references-[0-9a-f]{64}\.npz(\.[0-9a-f]{32}\.tmp)?")
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
    """The words of S captions, concatenated: M words and T tokens in total.

    Words and tokens differ only for tokens that contain a blank: "1\xa01/2 cups" is three words for
    BLEU and CIDEr, and two tokens for ROUGE-L.
    """

    ids: np.ndarray  # [M] int64
    caption: np.ndarray  # [M] index of the caption that contains each word
    remaining: np.ndarray  # [M] number of words up to the end of the caption, including this one
    lengths: np.ndarray  # [S] number of words
    tokens: np.ndarray  # [T] int64
    token_counts: np.ndarray  # [S] number of tokens


class WordIds(dict):
    """Maps words to ids; a new word gets the next id.

    parts: the words of each token that contains blanks, by the id of the token.
    """

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__((word, number) for number, word in enumerate(words))
        self.parts = {
            number: word.split() for number, word in enumerate(words) if word.split() != [word]
        }

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        if (words := word.split()) != [word]:
            self.parts[number] = words
        return number


class Matches(NamedTuple):
    """The comparison of S captions with the references of their images."""

    # [S,N,K] float64: clipped tf-idf cosine with each reference; 0 for missing references
    cosine: np.ndarray
    # [S,N] n-grams that occur in references, with counts clipped to the largest reference count
    correct: np.ndarray
    lengths: np.ndarray  # [S] number of words


class References:
    """N-gram tables of the references of a set of images.

    references: captions by image id. A caption is a string, which is tokenised here, or a list of
        tokens, as in `tokens_of`.
    vocabulary: words that get the ids 0, 1, ... Other words get the following ids.
    frequencies: captions by image id. Document frequencies (the number of images with an n-gram,
        and the number of images) are counted over these captions instead of the references. For
        example, a small set may be scored with the frequencies of a large one.
    segment: how strings are split into tokens, as in `data.segmentation`.

    Raises DataError if there are no references, or for something that is not a caption.
    """

    def __init__(
        self,
        references: Mapping[int, Sequence[str | Sequence[str]]],
        vocabulary: Sequence[str] = (),
        frequencies: Mapping[int, Sequence[str | Sequence[str]]] | None = None,
        segment: str = "words",
    ) -> None:
        for captions in (references, frequencies):
            if captions is not None and not isinstance(captions, Mapping):
                raise DataError(
                    f"references are {type(captions).__name__}; pass a dict: lists of captions by "
                    "image id"
                )
        if not references:
            raise DataError("no references to score against")
        self.rows = {image_id: row for row, image_id in enumerate(references)}
        self.vocabulary, self.segment = WordIds(vocabulary), segment
        if frequencies is not None and not frequencies:
            raise DataError("no captions for document frequencies")
        self._count(
            tokens_by_image(references, segment), tokens_by_image(frequencies or {}, segment)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def row_of(self, image_id: int) -> int:
        """The row of an image in all tables [I,...]. Raises DataError if it has no references."""
        try:
            return self.rows[image_id]
        except KeyError:
            raise DataError(f"image {image_id} has a candidate but no references") from None

    def number_words(self, captions: Sequence[Sequence[str]]) -> Words:
        """Convert tokens of captions to ids. New words get new ids, which changes no score."""
        tokens = np.fromiter(
            map(self.vocabulary.__getitem__, chain.from_iterable(captions)), np.int64
        )
        token_counts = np.fromiter(map(len, captions), np.int64)
        ids, caption = tokens, np.repeat(np.arange(len(token_counts)), token_counts)
        # pycocoevalcap joins tokens and splits them again, except for ROUGE: "1\xa01/2" is then two
        # words.
        if parts := self.vocabulary.parts:
            words_of_tokens = [
                [self.vocabulary[word] for word in parts[token]] if token in parts else [token]
                for token in tokens.tolist()
            ]
            ids = np.array([*chain.from_iterable(words_of_tokens)], np.int64)
            caption = np.repeat(caption, np.array([*map(len, words_of_tokens)], np.int64))
        lengths = np.bincount(caption, minlength=len(token_counts))
        remaining = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(ids))
        return Words(ids, caption, remaining, lengths, tokens, token_counts)

    def compare(self, rows: np.ndarray, words: Words) -> Matches:
        """Compare caption s of `words` with the references of the image in row rows[s]."""
        count, width = len(rows), self.lengths.shape[1]
        keys, tf = _count_equal(self._caption_ngrams(words))
        group, ngram = keys >> 32, keys & MASK  # group: (n - 1) * S + caption
        idf = self.idf.take(ngram, mode="clip")
        weight = tf * idf
        norm = np.bincount(group, weight * weight, ORDERS * count).reshape(ORDERS, count) ** 0.5
        matched, entry = self._find_entries(rows, group % count, ngram)
        group, tf = group[matched], tf[matched]
        idf, weight = idf[matched, None], weight[matched, None]
        clipped = np.minimum(tf, self.largest_counts[entry])
        correct = np.bincount(group, clipped, ORDERS * count).reshape(ORDERS, count)
        reference_weight = self.entry_counts.take(entry, axis=0) * idf
        products = np.minimum(weight, reference_weight) * reference_weight
        index = group[:, None] * width + np.arange(width)
        dot = np.bincount(index.ravel(), products.ravel(), ORDERS * count * width)
        dot = dot.reshape(ORDERS, count, width).transpose(1, 0, 2)
        norm = norm.T[..., None] * self.norms.take(rows, axis=0)
        return Matches(dot / np.where(norm > 0, norm, 1), correct.T, words.lengths)

    def _caption_ngrams(self, words: Words) -> np.ndarray:
        """All n-grams of captions, as keys ((n - 1) * S + caption) << 32 | id.

        N-grams that no reference contains get new ids, after all ids of the tables.
        """
        ids, next_id, count = words.ids.copy(), len(self.idf), len(words.lengths)
        if len(self.vocabulary) > self.words:
            ids[ids >= self.words] += next_id
            next_id += len(self.vocabulary)
        ngram_keys, start = [words.caption << 32 | ids], np.arange(len(ids))
        for n in range(1, ORDERS):
            start = start[words.remaining[start] > n]
            key = ids[start] << 32 | words.ids[start + n]
            index = self.keys.searchsorted(key)
            new_ids = index + self.words
            if len(self.keys):
                unknown = (self.keys.take(index, mode="clip") != key).nonzero()[0]
            else:
                unknown = np.arange(len(key))
            distinct, index = np.unique(key[unknown], return_inverse=True)
            new_ids[unknown] = next_id + index
            next_id += len(distinct)
            ids[start] = new_ids
            ngram_keys.append(words.caption[start] + n * count << 32 | new_ids)
        return np.concatenate(ngram_keys)

    def _find_entries(
        self, rows: np.ndarray, caption: np.ndarray, ngram: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the n-grams of captions that occur in references of the caption's image.

        caption, ngram: the caption and the id of each n-gram. Returns the indices of the n-grams
        that occur, and their indices in `entries`.
        """
        is_first = np.append(True, rows[1:] != rows[:-1])  # captions are mostly sorted by image
        run, images = np.cumsum(is_first) - 1, rows[is_first]
        begin, size = self.ends[images], self.ends[images + 1] - self.ends[images]
        entry = np.arange(size.sum()) + np.repeat(begin - (np.cumsum(size) - size), size)
        # This small table has the order of the captions. It fits the processor's cache, and the
        # queries are nearly sorted.
        table = np.append(
            np.repeat(np.arange(len(images)) << 32, size) | self.entries[entry] & MASK, MISSING
        )
        known = (ngram < len(self.idf) - 1).nonzero()[0]
        query = (run << 32)[caption[known]] | ngram[known]
        index = table.searchsorted(query)
        matched = (table[index] == query).nonzero()[0]
        return known[matched], entry[index[matched]]

    def _count(self, references: list[list[list[str]]], frequencies: list[list[list[str]]]) -> None:
        """Fill the tables from the tokens of the references and of `frequencies`.

        If `frequencies` is empty, document frequencies are counted over the references.

        documents               number of images that document frequencies are counted over
        k [I], lengths [I,K]    number of references of each image; their lengths in words
        tokens, counts          tokens of all references; number of tokens of each reference
        keys      [G] int64     id of the first n-1 words of an n-gram << 32 | id of its last word
        idf       [W+G+1]       log(documents / document frequency) by id; the last value is for
                                unseen n-grams
        entries   [E] int64     image << 32 | id; those of image i are entries[ends[i]:ends[i+1]]
        entry_counts [E,K]      count of the entry's n-gram in each reference of its image
        norms     [I,N,K]       norm of the tf-idf vector of each reference, by n-gram length
        """
        images, width = len(references), max(len(captions) for captions in references)
        self.documents = np.array(len(frequencies) or images)
        k = np.array([len(captions) for captions in chain(references, frequencies)])
        captions = [caption for group in chain(references, frequencies) for caption in group]
        words = self.number_words(captions)
        # The image and the column of each caption. The captions of `frequencies` come last.
        image = np.repeat(np.arange(len(k)), k)
        column = np.arange(len(image)) - np.repeat(np.cumsum(k) - k, k)
        is_reference = image < images
        self.k, self.words = k[:images], len(self.vocabulary)
        self.lengths = np.zeros((images, width), np.int64)
        self.lengths[image[is_reference], column[is_reference]] = words.lengths[is_reference]
        self.counts = words.token_counts[is_reference]
        self.tokens = words.tokens[: self.counts.sum()]
        caption, ngram, first_ids = self._number_ngrams(words)

        # Count equal n-grams of each caption. The result is sorted by image, id and column.
        largest_k = int(k.max())
        keys = (image[caption] << 32 | ngram) * largest_k + column[caption]
        keys, key_counts = _count_equal(keys)
        entry_of_key, column_of_key = np.divmod(keys, largest_k)
        is_new = np.diff(entry_of_key, prepend=-1) > 0
        entries, index = entry_of_key[is_new], np.cumsum(is_new) - 1
        documents = entries[entries >> 32 >= images] if frequencies else entries
        self.idf = self._idf(documents, first_ids[-1] + 1)

        is_reference = entry_of_key < images << 32
        entries = entries[entries < images << 32]
        # The smallest integer type that fits, in practice one byte.
        counts = np.zeros((len(entries), width), np.min_scalar_type(key_counts.max(initial=0)))
        counts[index[is_reference], column_of_key[is_reference]] = key_counts[is_reference]
        self.entries, self.entry_counts = entries, counts
        self.ends = np.searchsorted(entries, np.arange(images + 1) << 32)

        squares = (counts * self.idf[entries & MASK, None]) ** 2
        order = np.searchsorted(first_ids[1:], entries & MASK, side="right")  # n - 1
        group = (entries >> 32) * ORDERS + order
        sums = [np.bincount(group, values, images * ORDERS) for values in squares.T]
        self.norms = (np.stack(sums, axis=1) ** 0.5).reshape(images, ORDERS, width)

    def _number_ngrams(self, words: Words) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Assign ids to all n-grams of the references, and fill `keys`.

        Returns the caption of each n-gram, the id of each n-gram, and the first id of each length
        n. The last entry of this list is the number of ids.
        """
        ids, keys = words.ids.copy(), []
        first_ids = [0, self.words]
        captions, ngrams = [words.caption], [ids.copy()]
        for n in range(1, ORDERS):
            start = np.flatnonzero(words.remaining > n)
            key = ids[start] << 32 | words.ids[start + n]
            distinct, index = np.unique(key, return_inverse=True)
            ids[start] = first_ids[-1] + index
            keys.append(distinct)
            captions.append(words.caption[start])
            ngrams.append(ids[start])
            first_ids.append(first_ids[-1] + len(distinct))
        self.keys = np.concatenate(keys)
        return np.concatenate(captions), np.concatenate(ngrams), first_ids

    def _idf(self, entries: np.ndarray, size: int) -> np.ndarray:
        """log(documents / document frequency) by id; each entry is one document with an n-gram."""
        document_frequency = np.bincount(entries & MASK, minlength=size)
        return np.log(self.documents) - np.log(np.maximum(document_frequency, 1))

    @cached_property
    def largest_counts(self) -> np.ndarray:
        """[E] the largest count of each entry's n-gram in one reference."""
        return reduce(np.maximum, self.entry_counts.T)

    def grouped(self) -> list[list[list[int]]]:
        """The token ids of the references, by image and reference."""
        tokens = split(self.tokens, self.counts)
        return [[next(tokens) for _ in range(k)] for k in self.k.tolist()]

    def save(self, path: Path) -> None:
        """Write the tables atomically to one .npz file."""
        arrays = {name: getattr(self, name) for name in TABLES}
        arrays["format"], arrays["words"] = np.array(FORMAT), np.array(self.words)
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
        """Read tables that `save` wrote.

        Raises DataError if the file is damaged, or was written under another name.
        """
        references = cls.__new__(cls)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            digest = arrays.pop("digest")
            if arrays["format"] != FORMAT or not np.array_equal(digest, _digest(path, arrays)):
                raise ValueError("its format, its name or its content has changed")
            image_ids = arrays["image_ids"].tolist()
            references.rows = {image_id: row for row, image_id in enumerate(image_ids)}
            references.vocabulary = WordIds(json.loads(arrays["vocabulary"].tobytes()))
            references.words = int(arrays["words"])
            references.segment = str(arrays["segment"])
            for name in TABLES:
                setattr(references, name, arrays[name])
        except OSError:
            raise
        except Exception as error:  # for a damaged file, numpy may raise any exception
            raise DataError(
                f"{path} is damaged ({error}); delete it, the next run makes it again"
            ) from error
        return references


def _digest(path: Path, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 of the name of a file, and of the names and values of its arrays."""
    digest = hashlib.sha256(path.name.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def tokens_by_image(
    references: Mapping[int, Sequence[str | Sequence[str]]], segment: str = "words"
) -> list[list[list[str]]]:
    """The tokens of each caption, by image. Arguments as in `References`.

    Raises DataError for an image without captions, and for something that is not a caption.
    """
    groups = []
    for image_id, captions in references.items():
        if isinstance(captions, str):
            raise DataError(
                f"image {image_id}: the references are one string; pass a list of captions"
            )
        if isinstance(captions, bytes | Mapping) or not isinstance(captions, Iterable):
            raise DataError(
                f"image {image_id}: the references are {_short(captions)}; pass a list of captions"
            )
        groups.append([tokens_of(image_id, caption, segment) for caption in captions])
        if not groups[-1]:
            raise DataError(f"image {image_id} has no references")
    return groups


def tokens_of(image_id: int, caption: str | Sequence[str], segment: str = "words") -> list[str]:
    """The tokens of one caption, which is a string or a list of tokens.

    Some programs store a caption as a list with one string. So a list with one string that cannot
    be a token ("A dog runs.", "Running.") is read as that string. Tokens may contain U+00A0, but no
    character of BLANK.

    Raises DataError for anything else. image_id: for the error message.
    """
    if isinstance(caption, np.ndarray):
        caption = caption.tolist()
    if isinstance(caption, str):
        return segmented(caption, segment)
    if not isinstance(caption, list | tuple) or not all(isinstance(word, str) for word in caption):
        raise DataError(
            f"image {image_id}: a caption is {_short(caption)}, not a string or a list of tokens"
        )
    has_blank = BLANK.search("".join(caption)) is not None
    if len(caption) == 1:
        text = caption[0]
        if has_blank or text != text.lower() or text.endswith(ENDS):
            return segmented(text, segment)
    if has_blank:
        raise DataError(
            f"image {image_id}: {len(caption)} sentences instead of one caption, "
            f"{_short(caption)}; pass one string, or the list of its tokens"
        )
    return list(caption)


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def split(flat: np.ndarray, counts: np.ndarray) -> Iterator[list[int]]:
    """Split a flat array into consecutive lists with `counts` numbers each."""
    numbers, ends = flat.tolist(), np.cumsum(counts)
    return (
        numbers[start:end]
        for start, end in zip((ends - counts).tolist(), ends.tolist(), strict=True)
    )


def cached_path(folder: Path, *parts: bytes) -> Path:
    """The path of cached n-gram tables in a cache folder.

    The name is a digest of `parts`, the data that the tables depend on, and of the tokenizer's
    source code. So changed data or a changed tokenizer leads to a new file.
    """
    digest = hashlib.sha256(str(FORMAT).encode())
    rules = (
        Path(str(module.__file__)).read_bytes() for module in (characters, segmentation, tokens)
    )
    for part in (*rules, *parts):
        digest.update(hashlib.sha256(part).digest())
    return folder / f"references-{digest.hexdigest()}.npz"


def load_cached(path: Path) -> References | None:
    """Load cached n-gram tables; None if the file is missing or damaged."""
    with contextlib.suppress(DataError, OSError):
        if path.is_file():
            references = References.load(path)
            with contextlib.suppress(OSError):
                os.utime(path)  # save_cached removes the least recently used files first
            return references
    return None


def save_cached(references: References, path: Path) -> None:
    """Save n-gram tables in a cache folder, up to MAX_CACHE_BYTES for all files.

    The least recently used files are removed. Errors of the file system are ignored: without the
    cache, the next run only needs about a second more.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        references.save(path)
        stats = {
            file: file.stat()
            for file in path.parent.iterdir()
            if CACHED_FILE.fullmatch(file.name) and file != path
        }
        free_bytes = MAX_CACHE_BYTES - path.stat().st_size
        for file in sorted(stats, key=lambda file: stats[file].st_mtime, reverse=True):
            free_bytes -= stats[file].st_size
            if free_bytes < 0:
                file.unlink(missing_ok=True)


def _count_equal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Same as np.unique with counts, but several times as fast for nearly sorted values."""
    values = np.sort(values, kind="stable")
    first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    first = first.nonzero()[0]
    return values[first], np.append(first[1:], len(values)) - first
