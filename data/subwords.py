"""Pieces of words in place of words: byte-pair encoding (Sennrich et al. 2016) by the `tokenizers`
package.

Learnt on the scorer's tokens and joined to words again, so what is trained is what is scored. A
word's first piece begins with START, SentencePiece's sign (the package's own mark of a word's end
is learnt in another order each time). Only learning and encoding need the package (the extra
`bpe`); captions are read off the pieces alone.
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
    """Pieces by id; ids 0 to 3 are <pad>, <bos>, <eos> and <unk>. `tokenizer` is the text of a
    tokenizer.json.

    With segment "characters" pieces are learnt on the joined text: a piece may be a word of several
    characters.
    """

    def __init__(self, words: Sequence[str], tokenizer: str, segment: str = "words") -> None:
        super().__init__(words, segment)
        self.tokenizer = tokenizer

    @classmethod
    def build(
        cls, captions: Iterable[Sequence[str]], size: int, segment: str = "words"
    ) -> Subwords:
        """Learn at most `size` pieces, the four special ones included, on tokenised captions."""
        if size <= len(SPECIALS):
            raise DataError(
                f"a vocabulary of {size} pieces has no room for one; raise --vocab-size"
            )
        tokenizers = _tokenizers()
        learnt = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIALS[3]))
        learnt.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(START, "always")
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIALS),
            limit_alphabet=size - len(SPECIALS),
            show_progress=False,
        )
        texts = (" ".join(words) for words in captions)
        learnt.train_from_iterator(
            map(join_characters, texts) if segment == "characters" else texts, trainer
        )
        pieces = sorted((number, piece) for piece, number in learnt.get_vocab().items())
        return cls([piece for _, piece in pieces], learnt.to_str(), segment)

    def encode(self, tokens: Sequence[str]) -> list[int]:
        """Ids of the pieces of tokens, without <bos> and <eos>; letters never seen are <unk>."""
        if self.segment == "characters":
            tokens = join_characters(" ".join(tokens)).split()
        return [number for token in tokens for number in self._pieces(token)]

    @functools.cached_property
    def _pieces(self) -> Any:
        try:
            loaded = _tokenizers().Tokenizer.from_str(self.tokenizer)
        except DataError:
            raise
        except Exception as error:  # the package raises bare Exceptions
            raise DataError(
                f"tokenizer.json is not what the tokenizers package wrote: {error}"
            ) from error
        if loaded.get_vocab() != {piece: number for number, piece in enumerate(self.words)}:
            raise DataError(
                "tokenizer.json has other pieces than vocab.json; copy both again, or make "
                "them again"
            )
        loaded.no_padding()
        loaded.no_truncation()

        @functools.lru_cache(None)
        def pieces(token: str) -> tuple[int, ...]:
            return tuple(
                max(number, UNK) for number in loaded.encode(token, add_special_tokens=False).ids
            )

        return pieces

    def join(self, words: Sequence[str]) -> str:
        """Words from their pieces."""
        return super().join("".join(words).replace(START, " ").split())


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "a vocabulary of pieces needs the tokenizers package: pip install 'onceover[bpe]'"
        ) from error
    return tokenizers
