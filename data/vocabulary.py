"""Vocabulary: built on the scorer's tokens, so that training and scoring use the same words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from data import DataError
from data.segmentation import join_characters

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


class Vocabulary:
    """Words by id; ids 0 to 3 are <pad>, <bos>, <eos> and <unk>.

    segment: what its words are, as `data.segmentation` has it; captions of characters are joined
        without blanks.
    """

    def __init__(self, words: Sequence[str], segment: str = "words") -> None:
        self.words, self.segment = tuple(words), segment
        if self.words[: len(SPECIALS)] != SPECIALS or len(set(self.words)) != len(self.words):
            raise DataError(
                f"no vocabulary: it must begin with {' '.join(SPECIALS)} and name each word once"
            )
        self._ids = {
            word: number for number, word in enumerate(self.words) if number > UNK
        }  # an "<eos>" in a text is an ordinary word

    @classmethod
    def build(
        cls, captions: Iterable[Sequence[str]], min_count: int, segment: str = "words"
    ) -> Vocabulary:
        """Words seen at least `min_count` times in tokenised captions, most frequent first, ties by
        alphabet.
        """
        counts = Counter(word for tokens in captions for word in tokens)
        words = sorted(
            (word for word in counts if counts[word] >= min_count),
            key=lambda word: (-counts[word], word),
        )
        # to CIDEr "1\xa01/2" is two
        words = [word for word in words if word not in SPECIALS and word.split() == [word]]
        if not words:
            seen = (
                f"{len(counts)} different words, none {min_count} times"
                if counts
                else "no words at all"
            )
            raise DataError(
                f"the vocabulary has no words: the train captions hold {seen}; lower --min-count"
            )
        return cls((*SPECIALS, *words), segment)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Sequence[str]) -> list[int]:
        """Ids of tokens, without <bos> and <eos>; unknown words are <unk>."""
        return [self._ids.get(token, UNK) for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """The words up to the first <eos>, joined by spaces."""
        words = []
        for number in ids:
            if number == EOS:
                break
            if number not in (PAD, BOS):
                words.append(self.words[number])
        return self.join(words)

    def join(self, words: Sequence[str]) -> str:
        text = " ".join(words)
        return join_characters(text) if self.segment == "characters" else text
