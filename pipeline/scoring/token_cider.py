"""CIDEr of sampled token ids: the reward of self-critical training.

The same number as `pipeline.scoring.metrics.cider` (pycocoevalcap's CIDEr, that is CIDEr-D), over
the same tables. B images, K samples an image, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data.vocabulary import EOS, PAD, Vocabulary
from pipeline.scoring.metrics import cider_of_matches
from pipeline.scoring.ngrams import Matches, References, Words


class TokenCider:
    """References counted once for samples made of a vocabulary's ids.

    references: tokens of the captions by image id. Words outside `vocabulary` keep ids of their
        own, after its: as <unk> they would match a sampled <unk>, and change the document
            frequencies.
    eos: the end counts as a word, of references and of samples that end; it keeps samples from
        stopping short.
    frequencies: tokens by image id that document frequencies are taken from; None: the references
        themselves.
    """

    def __init__(
        self,
        references: Mapping[int, Sequence[Sequence[str]]],
        vocabulary: Vocabulary,
        eos: bool = False,
        frequencies: Mapping[int, Sequence[Sequence[str]]] | None = None,
    ) -> None:
        end = (vocabulary.words[EOS],) if eos else ()
        groups = [
            {
                image_id: [(*words, *end) for words in captions]
                for image_id, captions in (given or {}).items()
            }
            for given in (references, frequencies)
        ]
        self.references = References(
            groups[0], vocabulary.words, groups[1] if frequencies is not None else None
        )
        self.eos = eos

    def rows(self, image_ids: Sequence[int]) -> np.ndarray:
        """Where images stand in the tables: [B] int64; DataError for an image without
        references.
        """
        return np.array([self.references.row_of(image_id) for image_id in image_ids], np.int64)

    def __call__(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """CIDEr [B,K] float32 of `tokens` [B,K,T] int64, each read up to its first <eos> or <pad>.

        rows: [B] from `rows`. Samples hold the vocabulary's ids without a leading <bos>.
        """
        each = np.repeat(rows, tokens.shape[1])
        found = cider_of_matches(each, self.compare(each, tokens), self.references)
        return found.astype(np.float32).reshape(tokens.shape[:2])

    def compare(self, each: np.ndarray, tokens: np.ndarray) -> Matches:
        """Compare samples [B,K,T] with the references of the images at rows `each` [B*K]."""
        ids = tokens.reshape(-1, tokens.shape[2])
        ended = (ids == EOS) | (ids == PAD)
        lengths = np.where(ended.any(1), ended.argmax(1), ids.shape[1])
        if self.eos:
            lengths += ids[np.arange(len(ids)), np.minimum(lengths, ids.shape[1] - 1)] == EOS
        numbers = ids[np.arange(ids.shape[1]) < lengths[:, None]]
        left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(numbers))
        words = Words(
            numbers, np.repeat(np.arange(len(lengths)), lengths), left, lengths, numbers, lengths
        )
        return self.references.compare(each, words)
