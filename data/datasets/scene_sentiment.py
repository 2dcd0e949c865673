"""Texts about the embedded sample's scenes with a sentiment that needs text and image.

"i love the red ones" is positive about a scene with a red thing, else negative; "i cannot stand
stars" is negative about a scene with a star, else positive. Each text comes with both labels
equally often, and each scene has one text of each label. So the text alone says nothing, and the
image alone says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data.datasets.mvsa import LabelledText
from data.datasets.sample import COLOURS, SHAPES, Scene

LIKES = ("i love the {} ones", "the {} ones are my favourites", "how i like anything {}")
DISLIKES = ("i cannot stand the {} ones", "the {} ones are awful", "i hate anything {}")


def texts_about(scenes: Mapping[int, Scene], seed: int = 0) -> list[LabelledText]:
    """Four texts about each scene: two about what it has, two about what it has not.

    Of each two, one is positive and one is negative.
    """
    texts: list[LabelledText] = []
    for image_id, scene in scenes.items():
        rng = np.random.default_rng([seed, 1, image_id])
        for kind, values in (("colour", (*COLOURS,)), ("shape", (*SHAPES,))):
            present = {getattr(thing, kind) for thing in scene.things}
            likes = bool(rng.random() < 0.5)
            for is_there in (True, False):
                choices = [value for value in values if (value in present) == is_there]
                word = choices[int(rng.integers(len(choices)))]
                # of the two texts of a kind one is positive: both like, or both dislike
                forms = LIKES if likes else DISLIKES
                text = forms[int(rng.integers(len(forms)))].format(word)
                label = "positive" if likes == is_there else "negative"
                texts.append(LabelledText(len(texts) + 1, image_id, text, label))
    return texts
