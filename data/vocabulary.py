"""The vocabulary. Its words are the tokens of the scorer, so that training and scoring agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from data import DataError
from data.segmentation import join_characters

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


class Vocabulary:
    """The words by id. Ids 0 to 3 are <pad>, <bos>, <eos> and <unk>.

    words: all words, in the order of their ids.
    segment: one of `data.segmentation.SEGMENTS`. With "characters", captions are joined without
        spaces between characters.

    Raises DataError if the special words are missing or a word occurs twice.
    """

    unit = "words"

    def __init__(self, words: Sequence[str], segment: str = "words") -> None:
        self.words, self.segment = tuple(words), segment
        if self.words[: len(SPECIALS)] != SPECIALS or len(set(self.words)) != len(self.words):
            raise DataError(
                f"not a vocabulary: it must begin with {' '.join(SPECIALS)} and contain each word "
                "once"
            )
        # Special words are excluded: an "<eos>" in a text is an unknown word.
        self._ids = {word: index for index, word in enumerate(self.words) if index > UNK}

    @classmethod
    def build(
        cls, captions: Iterable[Sequence[str]], min_count: int, segment: str = "words"
    ) -> Vocabulary:
        """Build a vocabulary of the words that occur at least `min_count` times.

        captions: the tokens of each caption. The most frequent words come first; ties are sorted
            alphabetically.

        Raises DataError if no word is frequent enough.
        """
        counts = Counter(word for tokens in captions for word in tokens)
        words = sorted(
            (word for word in counts if counts[word] >= min_count),
            key=lambda word: (-counts[word], word),
        )
        # CIDEr splits a token such as "1\xa01/2" into two words.
        words = [word for word in words if word not in SPECIALS and word.split() == [word]]
        if not words:
            content = (
                f"{len(counts)} different words, none of them {min_count} times"
                if counts
                else "no words at all"
            )
            raise DataError(
                f"the vocabulary has no words: the train captions contain {content}; "
                "lower --min-count"
            )
        return cls((*SPECIALS, *words), segment)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of tokens, without <bos> and <eos>. The id of unknown words is <unk>."""
        return [self._ids.get(token, UNK) for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids up to the first <eos>, without <pad> and <bos>."""
        words = []
        for token_id in ids:
            if token_id == EOS:
                break
            if token_id not in (PAD, BOS):
                words.append(self.words[token_id])
        return self.join(words)

    def join(self, words: Sequence[str]) -> str:
        """Join words to a text."""
        text = " ".join(words)
        return join_characters(text) if self.segment == "characters" else text
