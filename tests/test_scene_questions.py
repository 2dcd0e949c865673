"""Questions about drawn scenes: true answers, in balanced pairs, the same at every call."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from data.datasets.registry import open_source
from data.datasets.sample import Scene, Thing, draw_sample, load_scenes, make_scene, scene_rng
from data.datasets.scene_questions import balanced_questions, questions_about

SCENE = Scene(
    (
        Thing("small", "red", "circle", 60.0, 60.0, 15.0),
        Thing("large", "blue", "square", 180.0, 80.0, 28.0),
        Thing("small", "green", "star", 70.0, 150.0, 15.0),
    )
)


def test_answers_about_a_scene_are_true_and_unclear_questions_are_left_out():
    answers = {question.text: question.answer for question in questions_about(SCENE)}
    assert answers["what colour is the large square"] == "blue"
    assert answers["what shape is the small red thing"] == "circle"
    assert answers["what size is the green star"] == "small"
    assert answers["how many star shapes are there"] == "1"
    assert answers["how many black things are there"] == "0"
    assert answers["is there a red circle"] == "yes"
    assert answers["is there a red square"] == "no"
    assert answers["is the red thing to the left of the square"] == "yes"
    assert answers["is the red thing to the right of the square"] == "no"
    assert answers["is the green thing below the circle"] == "yes"
    assert "is the red thing above the square" not in answers  # they are side by side
    assert answers["what colour is the thing to the right of the star"] == "blue"
    assert "what colour is the thing below the circle" not in answers  # two things are
    two_red = Scene((*SCENE.things[:2], Thing("large", "red", "circle", 70.0, 150.0, 25.0)))
    answers = {question.text: question.answer for question in questions_about(two_red)}
    assert "what size is the red circle" not in answers
    assert not any(text.startswith("is the red thing") for text in answers)
    assert answers["how many circle shapes are there"] == "2"


@pytest.fixture(scope="module")
def scenes() -> dict[int, Scene]:
    return {index: make_scene(scene_rng(5, index)) for index in range(300)}


def test_questions_come_in_pairs_so_that_the_text_alone_says_nothing(scenes):
    chosen = balanced_questions(scenes, 60)
    assert set(Counter(question.type for _, question in chosen).values()) == {60}
    answers: dict[str, Counter] = defaultdict(Counter)
    for (one, a), (two, b) in zip(chosen[::2], chosen[1::2], strict=True):
        assert a.text == b.text and a.answer != b.answer and one != two
        assert a in set(questions_about(scenes[one])) and b in set(questions_about(scenes[two]))
        answers[a.text].update([a.answer, b.answer])
    # the most frequent answer to a text is never right for more than half of its questions
    assert all(max(counts.values()) <= counts.total() / 2 for counts in answers.values())
    assert len(set(chosen)) == len(chosen)
    assert chosen == balanced_questions(scenes, 60) != balanced_questions(scenes, 60, seed=1)


def test_each_split_has_its_own_scenes_and_pairs(tmp_path: Path):
    draw_sample(tmp_path / "sample", count=200, seed=3)
    source, scenes = open_source("sample", tmp_path / "sample"), load_scenes(tmp_path / "sample")
    split_of = {image.id: image.split for image in source.images}
    answers: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for question in source.questions:
        about = questions_about(scenes[question.image_id])
        assert (question.text[:-1], question.best) in {(q.text, q.answer) for q in about}
        answers[split_of[question.image_id], question.text][question.best] += 1
    assert {split for split, _ in answers} == {"train", "val", "test"}
    assert all(max(counts.values()) <= counts.total() / 2 for counts in answers.values())
    train = {scene.things for id_, scene in scenes.items() if split_of[id_] == "train"}
    assert not [id_ for id_ in scenes if split_of[id_] == "test" and scenes[id_].things in train]
