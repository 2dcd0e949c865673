"""VQA accuracy: normalisation and leave-one-out, against a slow version that follows the official
description step by step.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scoring.vqa import CONTRACTIONS, accuracy, normalize, strip_punctuation

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`"]
MARKS += [",", "?", "!"]


def slow_strip(text: str) -> str:
    """One character at a time."""
    out = []
    number = any(
        text[i].isdecimal() and text[i + 1] == "," and text[i + 2].isdecimal()
        for i in range(len(text) - 2)
    )
    for character in text:
        if character not in MARKS:
            out.append(character)
        elif not (number or character + " " in text or " " + character in text):
            out.append(" ")
    text, periods, kept = "".join(out), 0, []
    for place, character in enumerate(text):
        followed = place + 1 < len(text) and text[place + 1].isdecimal()
        if character == "." and not followed and periods < 32:
            periods += 1
        else:
            kept.append(character)
    return "".join(kept)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("A dog.", "dog"),
        ("The  an a", ""),
        ("none", "0"),
        ("Ten", "10"),
        ("1,000", "1000"),
        ("1,000 (approx)", "1000 approx"),
        ("3.5", "3.5"),
        ("3. 5", "3 5"),
        ("3.", "3"),
        (".5", ".5"),
        ("black-and-white", "black and white"),
        ("black - white", "black white"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("cant", "can't"),
        ("can't", "can't"),
        ("Im", "im"),
        ("somebody'd", "somebodyd"),
        ("5:30", "5:30"),
        ("man's", "man's"),
        ("yes\nno\tmaybe", "yes no maybe"),
        ("  YES ", "yes"),
        ("", ""),
        ("?", ""),
        ("garbage_bin", "garbage bin"),
        ("." * 40, "." * 8),
    ],
)
def test_hard_answers_are_normalised_as_officially(answer, normal):
    assert normalize(answer) == normal


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet=" .,;-/?!'\"1a5_tB", max_size=60))
def test_punctuation_goes_as_one_character_at_a_time(text):
    assert strip_punctuation(text) == slow_strip(text)


def people(*answers: str) -> list[dict]:
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
        for number, answer in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("equal", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_equal_answers_of_ten_people_give_the_official_scores(equal, score):
    answers = people(*["red"] * equal, *[f"other {n}" for n in range(10 - equal)])
    assert accuracy("Red.", answers) == pytest.approx(score, abs=1e-12)
    assert accuracy("Red.", answers, "okvqa") == pytest.approx(min(1, equal / 3), abs=1e-12)
    assert accuracy("Red.", answers, "equality") == (equal > 0)


def test_answers_of_people_lose_their_punctuation_only_where_they_differ():
    assert accuracy("t shirt", people(*["t-shirt"] * 10)) == 0  # all equal: left as they are
    assert accuracy("t shirt", people(*["t-shirt"] * 9, "shirt")) == 1
    # digits, articles and contractions of people's answers stay as they are
    assert accuracy("two", people(*["two"] * 9, "2")) == pytest.approx(0.3)
    assert accuracy("the dog", people(*["the dog"] * 9, "cat")) == 0


def test_entries_without_an_id_that_are_equal_are_left_out_together():
    without = [{"answer": "red"} for _ in range(9)] + [{"answer": "blue"}]
    assert accuracy("red", without) == pytest.approx(0.1)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["red", "Red", "red.", "a red", "blue", "2", "two"]),
        min_size=1,
        max_size=10,
    ),
    st.sampled_from(["red", "blue", "two", "2", "a red one"]),
)
def test_accuracy_is_the_mean_over_people_of_the_others_agreement(answers, answer):
    texts = [slow_strip(text) for text in answers] if len(set(answers)) > 1 else answers
    scores = [
        min(1, sum(texts[j] == normalize(answer) for j in range(len(texts)) if j != i) / 3)
        for i in range(len(texts))
    ]
    assert accuracy(answer, people(*answers)) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_the_contractions_are_those_of_the_field():
    assert len(CONTRACTIONS) == 114 and all(
        "'" not in key or value for key, value in CONTRACTIONS.items()
    )
    assert all(
        re.sub("'", "", key) == re.sub("'", "", value) for key, value in CONTRACTIONS.items()
    )
