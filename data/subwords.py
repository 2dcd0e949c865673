"""Subword vocabularies: byte-pair encoding (Sennrich et al. 2016) with the `tokenizers` package.

The subwords are learned on the tokens of the scorer and are joined to words again, so that training
and scoring agree. The first subword of a word begins with START, SentencePiece's word marker. (With
the package's own end-of-word marker, learning is not deterministic.) Learning and encoding need the
package (the extra `bpe`); decoding does not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from data import DataError
from data.segmentation import join_characters
from data.vocabulary import SPECIALS, UNK, Vocabulary

START = "▁"


class Subwords(Vocabulary):
    """The subwords by id. Ids 0 to 3 are <pad>, <bos>, <eos> and <unk>.

    words: all subwords, in the order of their ids.
    tokenizer: the content of tokenizer.json.
    segment: with "characters", subwords are learned on text without spaces, so that a subword may
        be a word of several characters.
    """

    unit = "subwords"

    def __init__(self, words: Sequence[str], tokenizer: str, segment: str = "words") -> None:
        super().__init__(words, segment)
        self.tokenizer = tokenizer

    @classmethod
    def build(
        cls, captions: Iterable[Sequence[str]], size: int, segment: str = "words"
    ) -> Subwords:
        """Learn at most `size` subwords, including the four special ones, on tokenized captions.

        Raises DataError if `size` is too small or the package is not installed.
        """
        if size <= len(SPECIALS):
            raise DataError(f"a vocabulary of {size} has no room for subwords; raise --vocab-size")
        tokenizers = _tokenizers()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIALS[3]))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(START, "always")
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIALS),
            limit_alphabet=size - len(SPECIALS),
            show_progress=False,
        )
        texts = (" ".join(words) for words in captions)
        tokenizer.train_from_iterator(
            map(join_characters, texts) if segment == "characters" else texts, trainer
        )
        ids = tokenizer.get_vocab()
        return cls(sorted(ids, key=ids.__getitem__), tokenizer.to_str(), segment)

    def encode(self, tokens: Sequence[str]) -> list[int]:
        """Return the subword ids of tokens, without <bos> and <eos>; new letters are <unk>."""
        if self.segment == "characters":
            tokens = join_characters(" ".join(tokens)).split()
        return [subword_id for token in tokens for subword_id in self._subword_ids(token)]

    @functools.cached_property
    def _subword_ids(self) -> Any:
        """A cached function from a token to its subword ids."""
        try:
            loaded = _tokenizers().Tokenizer.from_str(self.tokenizer)
        except DataError:
            raise
        except Exception as error:  # the package raises plain Exception
            raise DataError(
                f"tokenizer.json is not a valid file of the tokenizers package: {error}"
            ) from error
        if loaded.get_vocab() != {subword: index for index, subword in enumerate(self.words)}:
            raise DataError(
                "tokenizer.json has other subwords than vocab.json; copy both files again, or "
                "train again"
            )
        loaded.no_padding()
        loaded.no_truncation()

        @functools.lru_cache(None)
        def subword_ids(token: str) -> tuple[int, ...]:
            ids = loaded.encode(token, add_special_tokens=False).ids
            return tuple(max(subword_id, UNK) for subword_id in ids)

        return subword_ids

    def join(self, words: Sequence[str]) -> str:
        """Join subwords to a text."""
        return super().join("".join(words).replace(START, " ").split())


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "a vocabulary of subwords needs the tokenizers package: pip install 'onceover[bpe]'"
        ) from error
    return tokenizers
