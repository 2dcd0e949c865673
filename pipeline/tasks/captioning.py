"""Captioning: an image, no prompt, and its reference captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from data.examples import Example
from data.sources import Image, Source, check_captioned
from pipeline.scoring.metrics import score
from pipeline.scoring.ngrams import References
from pipeline.tasks.base import Task

FEW_DOCUMENTS = 100  # with fewer images, CIDEr also counts document frequencies in train
SIDES = ("left", "right")  # words that begin so do not hold for a mirrored image

# Articles, prepositions and conjunctions, after which more must come; not those that are adverbs
# too ("a dog looks up").
_ENDINGS = (
    "a an the about against among as at beside between during for from in into like of on onto "
    "per than to toward towards upon "
    "via with within without and although because but if nor or since that though unless until "
    "when where whereas while"
)
UNFINISHED = frozenset(_ENDINGS.split())


def caption_examples(images: Iterable[Image]) -> list[Example]:
    """One example per image, with the image's id, no prompt and its captions."""
    return [Example(image.id, image.id, "", image.captions) for image in images]


class Captioning(Task):
    """Scored as coco-caption does: CIDEr, BLEU-1 to 4, ROUGE-L. An example's id is its image's
    id.
    """

    name = "captioning"
    metric = "CIDEr"
    shown = {"Bleu_4": "BLEU-4"}  # noqa: RUF012
    unit = "captions"
    scored_as_captions = True
    self_critical = True
    _counted: tuple[Sequence[Example], References] | None = None

    def examples(self, source: Source, split: str, limit: int | None = None) -> list[Example]:
        images = source.select(split)[:limit]
        check_captioned(images, split)
        return caption_examples(images)

    def score(self, outputs: Mapping[int | str, str], examples: Sequence[Example],
              train: Sequence[Example] = ()) -> dict[str, float]:  # fmt: skip
        """Score captions as coco-caption does.

        With fewer than FEW_DOCUMENTS images, CIDEr counts document frequencies over train and these
        images together. With a single image alone, all CIDEr scores would be 0.
        """
        if self._counted is None or self._counted[0] is not examples:
            captions = _by_image(examples)
            frequencies = None
            if len(captions) < FEW_DOCUMENTS and train:
                frequencies = _by_image(train) | captions
            self._counted = (
                examples,
                References(captions, frequencies=frequencies, segment=self.segment),
            )
        by_image = cast(Mapping[int, str], outputs)  # an example's id is its image's
        return score(by_image, self._counted[1]).values

    def holds_mirrored(self, words: Sequence[str]) -> bool:
        return not any(word.startswith(SIDES) for word in words)


def _by_image(examples: Sequence[Example]) -> dict[int, tuple[str, ...]]:
    return {e.image_id: e.targets for e in examples if e.image_id is not None}
