"""The captioning task: an image without a prompt, and its reference captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from data.examples import Example
from data.sources import Image, Source, check_captioned
from pipeline.scoring.metrics import score
from pipeline.scoring.ngrams import References
from pipeline.tasks.base import Task

FEW_DOCUMENTS = 100  # with fewer images, CIDEr also counts document frequencies in train

# Articles, prepositions and conjunctions. A caption that ends with one of them is unfinished. Words
# that can also be adverbs are not in the list ("a dog looks up").
_ENDINGS = (
    "a an the about against among as at beside between during for from in into like of on onto "
    "per than to toward towards upon "
    "via with within without and although because but if nor or since that though unless until "
    "when where whereas while"
)
UNFINISHED = frozenset(_ENDINGS.split())


def caption_examples(images: Iterable[Image]) -> list[Example]:
    """Create one example per image. Its id is the image id; it has no prompt."""
    return [Example(image.id, image.id, "", image.captions) for image in images]


class Captioning(Task):
    """Captioning. The scores are those of coco-caption: CIDEr, BLEU-1 to BLEU-4 and ROUGE-L."""

    name = "captioning"
    metric = "CIDEr"
    shown = {"Bleu_4": "BLEU-4"}  # noqa: RUF012
    unit = "captions"
    scored_as_captions = True
    self_critical = True
    evaluate_options = (
        "df", "meteor", "spice", "train_captions", "examples", "segment", "cache_dir", "server",
    )  # fmt: skip
    # examples of the last call of `score`, and their counted references
    _cached: tuple[Sequence[Example], References] | None = None

    def examples(self, source: Source, split: str, limit: int | None = None) -> list[Example]:
        images = source.select(split)[:limit]
        check_captioned(images, split)
        return caption_examples(images)

    def score(self, outputs: Mapping[int | str, str], examples: Sequence[Example],
              train: Sequence[Example] = ()) -> dict[str, float]:  # fmt: skip
        """Compute the scores of coco-caption.

        With fewer than FEW_DOCUMENTS images, the document frequencies of CIDEr are counted over
        train and these images. Without train, all CIDEr scores of a single image would be 0.
        """
        if self._cached is None or self._cached[0] is not examples:
            references = _by_image(examples)
            frequencies = None
            if len(references) < FEW_DOCUMENTS and train:
                frequencies = _by_image(train) | references
            counted = References(references, frequencies=frequencies, segment=self.segment)
            self._cached = examples, counted
        captions = cast(Mapping[int, str], outputs)  # the id of an example is its image id
        return score(captions, self._cached[1]).values


def _by_image(examples: Sequence[Example]) -> dict[int, tuple[str, ...]]:
    """References by image id."""
    return {
        example.image_id: example.targets for example in examples if example.image_id is not None
    }
