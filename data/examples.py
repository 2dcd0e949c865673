"""What tasks are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn or to answer.

    id: unique in its split; results are kept by it (two questions on one image are two examples).
    image_id: the image's id in the cache; None for a text without an image.
    prompt: the text that is read (a question, a dialogue so far); empty for captions.
    targets: the texts that are right (captions, answers); empty where nobody knows them.
    """

    id: int | str
    image_id: int | None
    prompt: str
    targets: tuple[str, ...]
