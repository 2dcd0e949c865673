"""What tasks are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data import DataError
from data.sources import Image

if TYPE_CHECKING:
    from data.cache.no_features import NoFeatures
    from data.cache.reader import FeatureCache


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a task.

    id: unique in its split; results are stored by it (two questions on one image are two examples).
    image_id: the image's id in the cache; None for a text without an image. prompt: the input text
    (a question, a dialogue so far); empty for captions. targets: the correct texts (captions,
    answers); empty if they are unknown.
    """

    id: int | str
    image_id: int | None
    prompt: str
    targets: tuple[str, ...]


def with_rows(
    examples: Sequence[Example],
    images: Mapping[int, Image],
    cache: FeatureCache | NoFeatures,
    split: str,
) -> tuple[list[Example], list[Image], int]:
    """The examples without those whose image the cache lists as unreadable.

    images: by id, of the whole source. Returns the examples, their images in order, and how many
    images are left out. Raises DataError for an image without a row, and where no example is left.
    """
    ids = dict.fromkeys(example.image_id for example in examples)
    kept, left_out = cache.select([images[i] for i in ids if i is not None])
    rows = {image.id for image in kept}
    found = [e for e in examples if e.image_id is None or e.image_id in rows]
    if not found:
        raise DataError(
            f"split {split!r} has no image with features in {cache.path}: all are unreadable"
        )
    return found, kept, left_out
