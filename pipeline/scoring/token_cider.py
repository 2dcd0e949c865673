"""CIDEr of sampled token ids: the reward of self-critical training.

It gives the same values as `pipeline.scoring.metrics.cider` (CIDEr-D, as in pycocoevalcap).

Letters in shapes: B images, K samples per image, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data.vocabulary import EOS, PAD, Vocabulary
from pipeline.scoring.metrics import cider_of_matches
from pipeline.scoring.ngrams import Matches, References, Words


class TokenCider:
    """Computes CIDEr of samples that consist of ids of a vocabulary.

    references: lists of tokenised captions by image id. Words outside the vocabulary get further
        ids. If they were mapped to <unk>, they would match a sampled <unk> and change the document
        frequencies.
    vocabulary: the vocabulary of the samples.
    eos: whether <eos> counts as a word, in references and in samples that end. Without it, samples
        that end too early can get high scores.
    frequencies: tokenised captions by image id, for the document frequencies; None: the references.
    """

    def __init__(
        self,
        references: Mapping[int, Sequence[Sequence[str]]],
        vocabulary: Vocabulary,
        eos: bool = False,
        frequencies: Mapping[int, Sequence[Sequence[str]]] | None = None,
    ) -> None:
        end = (vocabulary.words[EOS],) if eos else ()

        def add_end(groups: Mapping[int, Sequence[Sequence[str]]]) -> dict[int, list]:
            return {
                image_id: [(*words, *end) for words in captions]
                for image_id, captions in groups.items()
            }

        self.references = References(
            add_end(references),
            vocabulary.words,
            None if frequencies is None else add_end(frequencies),
        )
        self.eos = eos

    def rows(self, image_ids: Sequence[int]) -> np.ndarray:
        """The rows [B] int64 of images in the tables.

        Raises DataError for an image without references.
        """
        return np.array([self.references.row_of(image_id) for image_id in image_ids], np.int64)

    def __call__(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Compute CIDEr [B,K] float32 of samples.

        rows: [B] int64, from the method `rows`.
        tokens: [B,K,T] int64 ids of the vocabulary, without <bos>. Each sample is read up to its
            first <eos> or <pad>.
        """
        sample_rows = np.repeat(rows, tokens.shape[1])
        matches = self.compare(sample_rows, tokens)
        scores = cider_of_matches(sample_rows, matches, self.references)
        return scores.astype(np.float32).reshape(tokens.shape[:2])

    def compare(self, rows: np.ndarray, tokens: np.ndarray) -> Matches:
        """Compare samples [B,K,T] with the references of the images in rows [B*K]."""
        ids = tokens.reshape(-1, tokens.shape[2])
        is_end = (ids == EOS) | (ids == PAD)
        lengths = np.where(is_end.any(1), is_end.argmax(1), ids.shape[1])
        if self.eos:
            lengths += ids[np.arange(len(ids)), np.minimum(lengths, ids.shape[1] - 1)] == EOS
        word_ids = ids[np.arange(ids.shape[1]) < lengths[:, None]]
        caption = np.repeat(np.arange(len(lengths)), lengths)
        remaining = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(word_ids))
        words = Words(word_ids, caption, remaining, lengths, word_ids, lengths)
        return self.references.compare(rows, words)
