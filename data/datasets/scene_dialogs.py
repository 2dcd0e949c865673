"""Dialogues about the embedded sample's scenes, with answers that are known to be true.

A dialogue asks about one thing, and then about others. Its later questions can only be understood
with the earlier ones: "is there anything red?", "what shape is it?", "and the blue one?" (also its
shape), "what else is there?" or "what is left of it?" (of the blue one). Each round has 100
different candidate answers, at least 20 of which could answer the question.

Things are first named by their colour. If they were named by their shape, a decoder would not learn
within minutes which one is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.datasets.sample import COLOURS, SHAPES, SIZES, Scene, Thing, clear_relation, holds
from data.datasets.visdial import Dialog, Round

CANDIDATES = 100
SAME_TYPE = 30  # at most so many candidates are of the type of the true answer, if others suffice
RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
QUESTIONS = {"shape": "what shape is it?", "size": "is it small or large?"}
NUMBERS = {2: "two", 3: "three"}


def phrase(thing: Thing) -> str:
    """The answer that names a thing, such as "the small red star"."""
    return f"the {' '.join(thing.words)}"


# the possible answers by type
ANSWERS: Mapping[str, Sequence[str]] = {
    "thing": [
        f"the {size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES
    ],
    "shape": [
        f"{start}a {shape}"
        for start in ("", "it is ", "probably ", "it looks like ")
        for shape in SHAPES
    ],
    "size": [
        f"{degree}{size}"
        for degree in ("", "very ", "quite ", "rather ", "fairly ")
        for size in ("small", "large", "tiny", "huge")
    ],
    "presence": [
        f"{answer}{rest}"
        for answer in ("yes", "no")
        for rest in (
            "", ", i think", ", i believe", ", it seems", ", of course", ", maybe", ", probably",
            ", certainly", ", as far as i see", ", but only part of it",
        )
    ],
}  # fmt: skip


class SceneRound(NamedTuple):
    """A question about a scene, its answer, and the type of the answer (a key of ANSWERS)."""

    question: str
    answer: str
    type: str


def talk(scene: Scene, rng: np.random.Generator) -> list[SceneRound]:
    """A dialogue of three to six rounds; empty if no thing of the scene has its own colour."""
    things = scene.things
    colours = [thing.colour for thing in things]
    alone = [thing for thing in things if colours.count(thing.colour) == 1]
    if not alone:
        return []
    rounds = []
    if rng.random() < 0.25:
        absent = [colour for colour in COLOURS if colour not in colours]
        colour = absent[int(rng.integers(len(absent)))]
        rounds.append(SceneRound(f"is there anything {colour}?", "no", "presence"))
    thing = alone[int(rng.integers(len(alone)))]
    rounds.append(SceneRound(f"is there anything {thing.colour}?", "yes", "presence"))
    attributes = ["shape", "size"] if rng.random() < 0.5 else ["size", "shape"]
    rounds += [_attribute_round(thing, attribute, QUESTIONS[attribute]) for attribute in attributes]
    others = [other for other in alone if other is not thing]
    if others:  # asks for the same attribute as the question before; "it" is this thing from now on
        thing = others[int(rng.integers(len(others)))]
        rounds.append(_attribute_round(thing, attributes[-1], f"and the {thing.colour} one?"))
    if len(things) == 2:
        other = things[1 - things.index(thing)]
        rounds.append(SceneRound("what else is there?", phrase(other), "thing"))
    elif step := _beside(things, thing, rng):
        relation, other = step
        rounds.append(SceneRound(f"what is {RELATIONS[relation]} it?", phrase(other), "thing"))
    return rounds


def _attribute_round(thing: Thing, attribute: str, question: str) -> SceneRound:
    answer = f"a {thing.shape}" if attribute == "shape" else thing.size
    return SceneRound(question, answer, attribute)


def _beside(
    things: Sequence[Thing], thing: Thing, rng: np.random.Generator
) -> tuple[str, Thing] | None:
    """A relation in which only one other thing is to a thing, and that other thing."""
    steps = []
    for other in things:
        relation = clear_relation(other, thing) if other is not thing else None
        if relation and sum(holds(each, relation, thing) for each in things) == 1:
            steps.append((relation, other))
    return steps[int(rng.integers(len(steps)))] if steps else None


def dialogs_about(scenes: Mapping[int, Scene], seed: int = 0) -> dict[int, Dialog]:
    """One dialogue about each scene, by image id."""
    texts = [text for group in ANSWERS.values() for text in group]
    number_of = {text: number for number, text in enumerate(texts)}
    dialogs = {}
    for image_id, scene in scenes.items():
        rng = np.random.default_rng([seed, image_id])
        rounds = []
        for each in talk(scene, rng):
            # the other things of the scene come first: else the true answer would be the only
            # candidate that is in the scene, and the question would not matter
            scene_phrases = [
                phrase(thing) for thing in scene.things if phrase(thing) != each.answer
            ]
            near = [number_of[text] for text in scene_phrases if text in ANSWERS[each.type]]
            far = [number_of[text] for text in ANSWERS[each.type] if text != each.answer]
            same = [*near, *(n for n in rng.permutation(far).tolist() if n not in near)]
            others = [n for n in range(len(texts)) if texts[n] not in ANSWERS[each.type]]
            first, later = same[: SAME_TYPE - 1], same[SAME_TYPE - 1 :]
            chosen = [number_of[each.answer], *first, *rng.permutation(others), *later][:CANDIDATES]
            options = rng.permutation(chosen).astype(np.int32)
            gt_index = options.tolist().index(number_of[each.answer])
            rounds.append(Round(each.question, each.answer, options, gt_index, texts))
        if rounds:
            caption = f"{NUMBERS[len(scene.things)]} things"
            dialogs[image_id] = Dialog(image_id, caption, tuple(rounds))
    return dialogs
