"""Visual question answering: the reader of questions, and training, evaluation and answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from data import DataError
from data.datasets.registry import open_source
from data.sources import image_id
from tests.test_images import halves

ANSWERS = ["yes"] * 6 + ["no"] * 4


def question(id_: int, image: int, text: str = "Is it red?") -> dict:
    return {"question_id": id_, "image_id": image, "question": text}


def annotation(id_: int, image: int, answers=ANSWERS, **more) -> dict:
    return {
        "question_id": id_,
        "image_id": image,
        "question_type": "is it",
        "answer_type": "yes/no",
        "multiple_choice_answer": answers[0] if answers else "",
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
            for number, answer in enumerate(answers)
        ],
        **more,
    }


def files(
    folder: Path, questions: list[dict], annotations: list[dict] | None, name: str = "one"
) -> tuple[Path, Path]:
    q, a = folder / f"{name}_questions.json", folder / f"{name}_annotations.json"
    q.write_text(json.dumps({"questions": questions}))
    if annotations is not None:
        a.write_text(json.dumps({"annotations": annotations}))
    return q, a


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "val2014").mkdir(parents=True)
    halves().save(folder / "COCO_val2014_000000000007.jpg")
    halves().save(folder / "000000000008.jpg")
    halves().save(folder / "val2014" / "COCO_val2014_000000000009.png")
    halves().save(folder / "readme.jpg")
    return folder


def opened(photographs: Path, pairs, **more):
    return open_source(
        "vqa",
        None,
        [a for _, a in pairs],
        [photographs],
        questions=[q for q, _ in pairs],
        **more,
    )


def test_pairs_of_files_give_questions_with_the_photographs_of_their_coco_ids(
    tmp_path, photographs
):
    one = files(
        tmp_path,
        [question(70, 7), question(71, 7, "What colour?"), question(80, 8)],
        [annotation(71, 7, ["red"]), annotation(70, 7), annotation(80, 8)],
    )
    two = files(tmp_path, [question(90, 9), question(50, 5)],
                [annotation(90, 9), annotation(50, 5)], "two")  # fmt: skip
    source = opened(photographs, [one, two])
    assert [q.id for q in source.questions] == [70, 71, 80, 90, 50]
    assert source.questions[1].text == "What colour?" and source.questions[1].answers == ("red",)
    assert source.questions[0].answers == tuple(ANSWERS) and source.questions[0].keys is None
    assert [(image.id, image.name) for image in source.images] == [
        (7, "COCO_val2014_000000000007.jpg"),
        (8, "000000000008.jpg"),
        (9, "val2014/COCO_val2014_000000000009.png"),
        (5, "000000000005.jpg"),
    ]
    assert [image.id for image in source.missing] == [5]
    assert source.splits == ("all",)


def test_questions_without_annotations_have_no_answers(tmp_path, photographs):
    q, _ = files(tmp_path, [question(70, 7)], None)
    source = open_source("vqa", None, None, photographs, questions=[q])
    assert source.questions[0].answers == ()


def test_official_names_under_a_root_give_the_splits(tmp_path, photographs):
    for split, image in (("train", 7), ("val", 8)):
        q, a = files(tmp_path, [question(image, image)], [annotation(image, image)])
        q.rename(tmp_path / f"v2_OpenEnded_mscoco_{split}2014_questions.json")
        a.rename(tmp_path / f"v2_mscoco_{split}2014_annotations.json")
    source = open_source("vqa", tmp_path, None, photographs)
    assert [(image.id, image.split) for image in source.images] == [(7, "train"), (8, "val")]
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(DataError, match=r"but not v2_mscoco_val2014_annotations.json"):
        open_source("vqa", tmp_path, None, photographs)


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        ([question(1, 7)], [], "question 1 has no annotation in .*one_annotations"),
        ([], [annotation(1, 7)], "annotation of question 1 has no question"),
        ([question(1, 7)] * 2, [annotation(1, 7)], "question 1 has no annotation"),
        ([question(1, 7)], [annotation(1, 7)] * 2, "annotation of question 1 occurs twice"),
        ([question(1, 7)], [annotation(1, 8)], "about image 7, its annotation .* about image 8"),
        ([question(1, 7, " ")], [annotation(1, 7)], "question 1: the question is ' '"),
        ([question(1, 7)], [annotation(1, 7, [])], "question 1 has no answers"),
        ([question(1, 7)], [annotation(1, 7, [3])], "question 1: an answer is"),
        ([question("x", 7)], [annotation(1, 7)], "question x: the image id 'x'"),
    ],
)
def test_mistakes_name_the_file_and_the_question(
    tmp_path, photographs, questions, annotations, message
):
    with pytest.raises(DataError, match=message):
        opened(photographs, [files(tmp_path, questions, annotations)])


def test_a_question_of_two_files_and_unpaired_files_are_refused(tmp_path, photographs):
    one = files(tmp_path, [question(1, 7)], [annotation(1, 7)])
    two = files(tmp_path, [question(1, 7)], [annotation(1, 7)], "two")
    with pytest.raises(DataError, match=r"two_questions.json: question 1 occurs twice"):
        opened(photographs, [one, two])
    with pytest.raises(DataError, match="2 --questions and 1 --annotations"):
        open_source("vqa", None, one[1], photographs, questions=[one[0], two[0]])
    with pytest.raises(DataError, match="needs its --questions"):
        open_source("vqa", None, one[1], photographs)
    with pytest.raises(DataError, match="needs --questions and --annotations"):
        open_source("vqa", None, None, photographs)


def test_a_table_has_questions_by_number_and_photographs_by_name(tmp_path, photographs):
    rows = [("Question", "Answer", "IMAGE"), ("what is it", "a cup, table", "000000000008.jpg")]
    rows += [rows[1], ("how many", "2", "gone.jpg")]
    table = tmp_path / "train.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    source = open_source("vqa", None, table, photographs)
    assert [(q.id, q.text, q.answers) for q in source.questions] == [
        (1, "what is it", ("a cup, table",)),
        (2, "what is it", ("a cup, table",)),
        (3, "how many", ("2",)),
    ]
    assert [image.id for image in source.images] == [
        image_id("000000000008.jpg"), image_id("gone.jpg")]  # fmt: skip
    assert [image.name for image in source.missing] == ["gone.jpg"]
    table.write_text("question,answer\na,b\n")
    with pytest.raises(DataError, match="lacks the column image"):
        open_source("vqa", None, table, photographs)


def test_other_datasets_take_one_file_of_annotations(tmp_path, photographs):
    table = tmp_path / "a.json"
    table.write_text("{}")
    with pytest.raises(DataError, match="coco takes one --annotations; 2 are given"):
        open_source("coco", None, [table, table], photographs)
