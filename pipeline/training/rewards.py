"""What self-critical training rewards, by --reward: a weighted sum of scores of each sample against
its image's references.

    CIDEr                            CIDEr-D, document frequencies of the training captions; a
                                     caption's end counts as a word
    CIDEr:1,BLEU-4:0.5               a weighted sum; BLEU-1 to BLEU-4 are of one caption, its end a
                                     word too
    CIDEr,mine.rewards:brevity:0.1   any callable: `module:name`, or a name in the entry point group
                                     `onceover.rewards`

A callable is given lists with an entry a sample, by these names, and returns a number for each:

    def brevity(captions: list[str], references: list[list[str]], image_ids: list[int]) ->
    list[float]:
        return [-len(caption.split()) for caption in captions]

B images, K samples an image, L words at most.
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
    """Parse --reward into names and weights; UserError for an invalid weight."""
    found = []
    for part in text.split(","):
        name, _, last = part.strip().rpartition(":")
        try:
            weight = float(last)
        except ValueError:  # module:name, or a name alone
            name, weight = part.strip(), 1.0
        if not name or not math.isfinite(weight):
            raise UserError(
                f"--reward {text!r}: {part.strip()!r} is not NAME or NAME:WEIGHT, as "
                "CIDEr:1,BLEU-4:0.5"
            )
        found.append((name, weight))
    return found


def find_callable(name: str) -> Callable[..., Any]:
    """The callable that --reward names: an entry point, or `module:attribute`; UserError if there
    is none.
    """
    installed = {point.name: point for point in metadata.entry_points(group=GROUP)}
    known = ", ".join([*BUILT_IN, *installed])
    if name not in installed and ":" not in name:
        raise UserError(f"--reward: {name!r} is not one of {known}, nor a module:callable")
    try:
        if name in installed:
            found = installed[name].load()
        else:
            module, _, attribute = name.partition(":")
            found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing a user's module may raise any error
        raise UserError(
            f"--reward: {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise UserError(f"--reward: {name!r} is {type(found).__name__}, not a callable")
    try:
        inspect.signature(found).bind(captions=[], references=[], image_ids=[])
    except TypeError as error:
        raise UserError(
            f"--reward: {name!r} must take captions, references and image_ids: {error}"
        ) from error
    except ValueError:  # callables written in C may have no signature
        pass
    return found


class Rewards:
    """Rewards of samples of `train`'s images; references are counted once."""

    def __init__(self, spec: str, train: ImageTexts, vocabulary: Vocabulary) -> None:
        self.parts = parse_rewards(spec)
        if len(train.images) < 2 and any(name == "CIDEr" for name, _ in self.parts):
            raise UserError(
                f"--reward {spec}: CIDEr weighs an n-gram by how few training images have it "
                "in their captions; of one image "
                "all weights are 0. Train on more images, or pass another --reward, as BLEU-4"
            )
        self.callables = {
            name: find_callable(name) for name, _ in self.parts if name not in BUILT_IN
        }
        self.vocabulary = vocabulary
        self.captions = {image.id: list(image.captions) for image in train.images}
        words = {image.id: tokens for image, tokens in zip(train.images, train.tokens, strict=True)}
        self.cider: TokenCider | None = None
        if isinstance(vocabulary, Subwords):
            end = vocabulary.words[EOS]
            self.references = References(
                {i: [(*caption, end) for caption in group] for i, group in words.items()}
            )
        else:
            self.cider = TokenCider(words, vocabulary, eos=True)
            self.references = self.cider.references

    def __call__(self, image_ids: Sequence[int], samples: Tensor) -> Tensor:
        """Rewards [B,K] float32, on the CPU, of `samples` [B,K,L] int64, which end at their <eos>.

        Raises UserError if a callable does not return one number per sample. Numbers that are not
        finite are returned as they are.
        """
        tokens = samples.cpu()
        each = np.repeat(
            [self.references.row_of(image_id) for image_id in image_ids], tokens.shape[1]
        )
        total = np.zeros(len(each))
        built_in = self._built_in(each, tokens) if len(self.callables) < len(self.parts) else {}
        for name, weight in self.parts:
            total += weight * (
                built_in[name] if name in BUILT_IN else self._called(name, image_ids, tokens)
            )
        return torch.from_numpy(total.astype(np.float32)).view(tokens.shape[:2])

    def _built_in(self, each: np.ndarray, tokens: Tensor) -> dict[str, np.ndarray]:
        matches = (
            self.cider.compare(each, tokens.numpy())
            if self.cider is not None
            else self._compare_words(each, tokens)
        )
        found = {"CIDEr": cider_of_matches(each, matches, self.references)}
        if any(name.startswith("BLEU") for name, _ in self.parts):
            scores = bleu(bleu_sums(each, matches, self.references))
            found |= {f"BLEU-{n}": scores[:, n - 1] for n in range(1, 5)}
        return found

    def _compare_words(self, each: np.ndarray, tokens: Tensor) -> Matches:
        """As TokenCider.compare, over whole words instead of subwords."""
        end, known = self.vocabulary.words[EOS], self.references.vocabulary
        captions = [
            [*self._words(row), *([end] if EOS in row else [])]
            for row in tokens.flatten(0, 1).tolist()
        ]
        before = len(known)
        matches = self.references.compare(each, self.references.number_words(captions))
        while len(known) > before:  # subwords form new words that no reference has
            known.popitem()
        return matches

    def _words(self, row: Sequence[int]) -> list[str]:
        text = self.vocabulary.decode(row)
        return (
            segmented(text, "characters")
            if self.vocabulary.segment == "characters"
            else text.split()
        )

    def _called(self, name: str, image_ids: Sequence[int], tokens: Tensor) -> np.ndarray:
        captions = [self.vocabulary.decode(row) for row in tokens.flatten(0, 1).tolist()]
        ids = [image_id for image_id in image_ids for _ in range(tokens.shape[1])]
        found = self.callables[name](
            captions=captions, references=[self.captions[i] for i in ids], image_ids=ids
        )
        try:
            numbers = np.array([float(number) for number in found])
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--reward: {name!r} does not give a number for each of its captions: {error}"
            ) from error
        if len(numbers) != len(captions):
            raise UserError(
                f"--reward: {name!r} gave {len(numbers)} numbers for {len(captions)} captions"
            )
        return numbers
