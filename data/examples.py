"""The examples of a task."""

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

    id: unique in its split. Results are stored by this id. Two questions about one image are two
        examples.
    image_id: the image's id in the cache; None for a text without an image.
    prompt: the input text (a question, the previous dialogue); empty for captions.
    targets: the correct texts (captions, answers); empty if unknown.
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
    """Remove the examples whose image the cache lists as unreadable.

    images: all images of the source, by id.

    Returns the remaining examples, their images in order, and the number of omitted images. Raises
    DataError for an image without a row in the cache, and if no example remains.
    """
    ids = dict.fromkeys(example.image_id for example in examples)
    readable, left_out = cache.select([images[i] for i in ids if i is not None])
    readable_ids = {image.id for image in readable}
    remaining = [e for e in examples if e.image_id is None or e.image_id in readable_ids]
    if not remaining:
        raise DataError(
            f"split {split!r} has no image with features in {cache.path}: all are unreadable"
        )
    return remaining, readable, left_out
