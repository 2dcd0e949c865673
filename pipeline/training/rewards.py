"""Rewards of self-critical training (--reward): a weighted sum of scores of each sample.

    CIDEr                            CIDEr-D against the references of the image, with the document
                                     frequencies of the training captions
    CIDEr:1,BLEU-4:0.5               a weighted sum; BLEU-1 to BLEU-4 are scores of one caption
    CIDEr,mine.rewards:brevity:0.1   a callable: `module:name`, or a name of the entry point group
                                     `onceover.rewards`

In CIDEr and BLEU the end of a caption counts as a word.

A callable takes three keyword arguments. Each is a list with one entry per sample. The callable
returns one number per sample:

    def brevity(
        captions: list[str], references: list[list[str]], image_ids: list[int]
    ) -> list[float]:
        return [-len(caption.split()) for caption in captions]

B: images. K: samples per image. L: maximum number of words.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batches import ImageTexts
from data.segmentation import segmented
from data.subwords import Subwords
from data.vocabulary import EOS, Vocabulary
from pipeline.cli import UserError
from pipeline.scoring.metrics import bleu, bleu_sums, cider_of_matches
from pipeline.scoring.ngrams import Matches, References
from pipeline.scoring.token_cider import TokenCider

GROUP = "onceover.rewards"
BUILT_IN = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")


def parse_rewards(text: str) -> list[tuple[str, float]]:
    """Parse --reward into pairs (name, weight). Raises UserError for an invalid term."""
    terms = []
    for part in text.split(","):
        name, _, number = part.strip().rpartition(":")
        try:
            weight = float(number)
        except ValueError:  # module:name, or a name alone
            name, weight = part.strip(), 1.0
        if not name or not math.isfinite(weight):
            raise UserError(
                f"--reward {text!r}: {part.strip()!r} is not NAME or NAME:WEIGHT, such as "
                "CIDEr:1,BLEU-4:0.5"
            )
        terms.append((name, weight))
    return terms


def find_callable(name: str) -> Callable[..., Any]:
    """Import the callable of --reward: an entry point, or `module:attribute`.

    Raises UserError if it cannot be imported or does not take the three arguments.
    """
    installed = {point.name: point for point in metadata.entry_points(group=GROUP)}
    known = ", ".join([*BUILT_IN, *installed])
    if name not in installed and ":" not in name:
        raise UserError(f"--reward: {name!r} is not one of {known}, and not module:callable")
    try:
        if name in installed:
            reward = installed[name].load()
        else:
            module, _, attribute = name.partition(":")
            reward = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing a user's module may raise any error
        raise UserError(
            f"--reward: {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(reward):
        raise UserError(f"--reward: {name!r} is {type(reward).__name__}, not a callable")
    try:
        inspect.signature(reward).bind(captions=[], references=[], image_ids=[])
    except TypeError as error:
        raise UserError(
            f"--reward: {name!r} must take captions, references and image_ids: {error}"
        ) from error
    except ValueError:  # callables written in C may have no signature
        pass
    return reward


class Rewards:
    """Computes the rewards of samples of the training images.

    The n-grams of the references are counted once, here. Raises UserError for an invalid --reward.
    """

    def __init__(self, spec: str, train: ImageTexts, vocabulary: Vocabulary) -> None:
        self.parts = parse_rewards(spec)
        if len(train.images) < 2 and any(name == "CIDEr" for name, _ in self.parts):
            raise UserError(
                f"--reward {spec}: CIDEr gives an n-gram a higher weight if fewer training "
                "images have it in their captions; of one image all weights are 0. Train on "
                "more images, or pass another --reward, such as BLEU-4"
            )
        self.callables = {
            name: find_callable(name) for name, _ in self.parts if name not in BUILT_IN
        }
        self.vocabulary = vocabulary
        self.captions = {image.id: list(image.captions) for image in train.images}
        words = {image.id: tokens for image, tokens in zip(train.images, train.tokens, strict=True)}
        self.cider: TokenCider | None = None  # None with subwords
        if isinstance(vocabulary, Subwords):
            eos = vocabulary.words[EOS]
            self.references = References(
                {i: [(*caption, eos) for caption in group] for i, group in words.items()}
            )
        else:
            self.cider = TokenCider(words, vocabulary, eos=True)
            self.references = self.cider.references

    def __call__(self, image_ids: Sequence[int], samples: Tensor) -> Tensor:
        """Compute the rewards of `samples`.

        samples: [B,K,L] int64 token ids. A caption ends at its first <eos>.

        Returns [B,K] float32 on the CPU, which may have values that are not finite. Raises
        UserError if a callable does not return one number per sample.
        """
        tokens = samples.cpu()
        reference_rows = np.repeat(
            [self.references.row_of(image_id) for image_id in image_ids], tokens.shape[1]
        )
        total = np.zeros(len(reference_rows))
        built_in = {}
        if len(self.callables) < len(self.parts):
            built_in = self._built_in_rewards(reference_rows, tokens)
        for name, weight in self.parts:
            if name in BUILT_IN:
                total += weight * built_in[name]
            else:
                total += weight * self._call(name, image_ids, tokens)
        return torch.from_numpy(total.astype(np.float32)).view(tokens.shape[:2])

    def _built_in_rewards(
        self, reference_rows: np.ndarray, tokens: Tensor
    ) -> dict[str, np.ndarray]:
        matches = (
            self.cider.compare(reference_rows, tokens.numpy())
            if self.cider is not None
            else self._compare_words(reference_rows, tokens)
        )
        rewards = {"CIDEr": cider_of_matches(reference_rows, matches, self.references)}
        if any(name.startswith("BLEU") for name, _ in self.parts):
            scores = bleu(bleu_sums(reference_rows, matches, self.references))
            rewards |= {f"BLEU-{n}": scores[:, n - 1] for n in range(1, 5)}
        return rewards

    def _compare_words(self, reference_rows: np.ndarray, tokens: Tensor) -> Matches:
        """Like TokenCider.compare, but over whole words instead of subwords."""
        eos, vocabulary = self.vocabulary.words[EOS], self.references.vocabulary
        captions = [
            [*self._words(row), *([eos] if EOS in row else [])]
            for row in tokens.flatten(0, 1).tolist()
        ]
        size = len(vocabulary)
        matches = self.references.compare(reference_rows, self.references.number_words(captions))
        # Subwords can form words that no reference has. Remove these words again.
        while len(vocabulary) > size:
            vocabulary.popitem()
        return matches

    def _words(self, row: Sequence[int]) -> list[str]:
        text = self.vocabulary.decode(row)
        if self.vocabulary.segment == "characters":
            return segmented(text, "characters")
        return text.split()

    def _call(self, name: str, image_ids: Sequence[int], tokens: Tensor) -> np.ndarray:
        """Call a callable of --reward with the samples [B,K,L], and return [B*K] rewards."""
        captions = [self.vocabulary.decode(row) for row in tokens.flatten(0, 1).tolist()]
        ids = [image_id for image_id in image_ids for _ in range(tokens.shape[1])]
        result = self.callables[name](
            captions=captions, references=[self.captions[i] for i in ids], image_ids=ids
        )
        try:
            rewards = np.array([float(number) for number in result])
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--reward: {name!r} does not return a number for each caption: {error}"
            ) from error
        if len(rewards) != len(captions):
            raise UserError(
                f"--reward: {name!r} returned {len(rewards)} numbers for {len(captions)} captions"
            )
        return rewards
