"""Questions about the embedded sample's scenes, with answers that are known to be true.

Questions are balanced as in VQA v2 (Goyal et al. 2017): each comes with another scene of the same
split for which the same text has another answer. So the text alone says nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.datasets import karpathy
from data.datasets.mvsa import LabelledText
from data.datasets.sample import (
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    clear_relation,
    holds,
    load_scenes,
)
from data.datasets.scene_dialogs import dialogs_about
from data.datasets.scene_sentiment import texts_about
from data.datasets.visdial import Dialog
from data.datasets.vqa import Question
from data.sources import Source

PER_TYPE = 9  # questions of each type for ten scenes
RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


class SceneQuestion(NamedTuple):
    """A question about a scene, its answer, and its type.

    The types are colour, shape, size, count, presence (yes or no), relation (yes or no) and
    position (the colour of the thing on one side of another thing).
    """

    text: str
    answer: str
    type: str


def questions_about(scene: Scene) -> Iterator[SceneQuestion]:
    """All questions about a scene whose answer is clear."""
    things = scene.things
    for thing in things:
        if _only(things, size=thing.size, shape=thing.shape):
            text = f"what colour is the {thing.size} {thing.shape}"
            yield SceneQuestion(text, thing.colour, "colour")
        if _only(things, size=thing.size, colour=thing.colour):
            text = f"what shape is the {thing.size} {thing.colour} thing"
            yield SceneQuestion(text, thing.shape, "shape")
        if _only(things, colour=thing.colour, shape=thing.shape):
            text = f"what size is the {thing.colour} {thing.shape}"
            yield SceneQuestion(text, thing.size, "size")
    for shape in SHAPES:
        count = sum(thing.shape == shape for thing in things)
        yield SceneQuestion(f"how many {shape} shapes are there", str(count), "count")
    for colour in COLOURS:
        count = sum(thing.colour == colour for thing in things)
        yield SceneQuestion(f"how many {colour} things are there", str(count), "count")
        for shape in SHAPES:
            there = any((thing.colour, thing.shape) == (colour, shape) for thing in things)
            text = f"is there a {colour} {shape}"
            yield SceneQuestion(text, "yes" if there else "no", "presence")
    for landmark in things:
        if _only(things, shape=landmark.shape):
            yield from _questions_about_place(things, landmark)


def _questions_about_place(things: Sequence[Thing], landmark: Thing) -> Iterator[SceneQuestion]:
    """The questions about where things are, relative to the only thing of a shape.

    A question names one thing by its colour and the other by its shape. If it named both by colour,
    a decoder would not learn within minutes which of them is on which side.
    """
    for thing in things:
        relation = clear_relation(thing, landmark) if thing is not landmark else None
        if relation is None:
            continue
        if _only(things, colour=thing.colour):
            for asked, answer in ((relation, "yes"), (OPPOSITE[relation], "no")):
                text = f"is the {thing.colour} thing {RELATIONS[asked]} the {landmark.shape}"
                yield SceneQuestion(text, answer, "relation")
        if sum(holds(other, relation, landmark) for other in things) == 1:
            text = f"what colour is the thing {RELATIONS[relation]} the {landmark.shape}"
            yield SceneQuestion(text, thing.colour, "position")


def _only(things: Sequence[Thing], **attributes: str) -> bool:
    """Whether exactly one thing has these attributes."""
    return sum(all(getattr(t, k) == v for k, v in attributes.items()) for t in things) == 1


def balanced_questions(
    scenes: Mapping[int, Scene], per_type: int, seed: int = 0
) -> list[tuple[int, SceneQuestion]]:
    """At most `per_type` questions of each type, with the ids of their scenes, in pairs.

    The two questions of a pair have the same text, different answers and different scenes.
    """
    rng = np.random.default_rng(seed)
    by_text: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for id_, scene in scenes.items():
        for question in set(questions_about(scene)):
            by_text[question.type, question.text][question.answer].append(id_)
    pairs: dict[str, list[list[tuple[int, SceneQuestion]]]] = defaultdict(list)
    for (kind, text), answers in sorted(by_text.items()):
        ids = {answer: rng.permutation(sorted(group)).tolist() for answer, group in answers.items()}
        while len(ids) > 1:
            most = sorted(ids, key=lambda answer: (-len(ids[answer]), answer))[:2]
            pair = [(ids[answer].pop(), SceneQuestion(text, answer, kind)) for answer in most]
            pairs[kind].append(pair)
            ids = {answer: group for answer, group in ids.items() if group}
    chosen = []
    for kind in sorted(pairs):
        for number in rng.permutation(len(pairs[kind]))[: per_type // 2]:
            chosen += pairs[kind][number]
    return chosen


@dataclass(frozen=True)
class SampleSource(Source):
    """The embedded sample, whose scenes have questions and dialogues too."""

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """At most PER_TYPE questions of each type for each ten scenes of a split, at least 4."""
        scenes = load_scenes(self.root)
        questions: list[Question] = []
        for split in self.splits:
            chosen = {image.id: scenes[image.id] for image in self.images if image.split == split}
            per_type = max(4, PER_TYPE * len(chosen) // 10)
            for image_id, question in sorted(balanced_questions(chosen, per_type)):
                questions.append(
                    Question(
                        len(questions) + 1,
                        image_id,
                        f"{question.text}?",
                        (question.answer,),
                        question.answer,
                        question.type,
                        question.type,
                    )
                )
        return tuple(questions)

    @cached_property
    def texts(self) -> list[LabelledText]:
        """Texts about each scene with a sentiment."""
        return texts_about(load_scenes(self.root))

    @cached_property
    def dialogs(self) -> dict[int, Dialog]:
        """A dialogue about each scene, by image id."""
        return dialogs_about(load_scenes(self.root))


def read(
    dataset: str, root: Path | None, annotations: Path | None, images: Path | None
) -> SampleSource:
    """Read the embedded sample: captions as `karpathy` does, questions and dialogues of scenes."""
    source = karpathy.read(dataset, root, annotations, images)
    return SampleSource(**{item.name: getattr(source, item.name) for item in fields(source)})
