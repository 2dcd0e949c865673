"""Texts about the embedded sample's scenes with a sentiment that needs text and image.

"i love the red ones" is positive about a scene with a red thing, and negative about a scene without
one. Each scene has as many positive texts as negative ones, and each text has both labels equally
often. So the text alone says nothing, and the image alone says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data.datasets.mvsa import LabelledText
from data.datasets.sample import COLOURS, SHAPES, Scene

FORMS = ("i love the {} ones", "the {} ones are my favourites", "i only came for the {} ones")


def texts_about(scenes: Mapping[int, Scene], seed: int = 0) -> list[LabelledText]:
    """Four texts about each scene: about a colour and a shape that it has and that it has not."""
    texts: list[LabelledText] = []
    for image_id, scene in scenes.items():
        rng = np.random.default_rng([seed, 1, image_id])
        for kind, values in (("colour", (*COLOURS,)), ("shape", (*SHAPES,))):
            present = {getattr(thing, kind) for thing in scene.things}
            for is_there in (True, False):
                choices = [value for value in values if (value in present) == is_there]
                word = choices[int(rng.integers(len(choices)))]
                text = FORMS[int(rng.integers(len(FORMS)))].format(word)
                label = "positive" if is_there else "negative"
                texts.append(LabelledText(len(texts) + 1, image_id, text, label))
    return texts
