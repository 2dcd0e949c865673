"""benchmarks.real_questions: the files of questions that are trained and scored."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks.real_questions import SOURCES, prepare_coco, prepare_daquar, read_pair, text_of
from tests.test_vqa import annotation, question


def entries(file: str, key: str) -> list[dict]:
    return json.loads(Path(file).read_text())[key]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Five sources of questions about 200 train and 10 val photographs, with repeated texts."""
    folder = tmp_path / "tasks" / "vqa_coco"
    (folder / "images").mkdir(parents=True)
    for offset, source in enumerate(SOURCES):
        for split, ids in (("train", range(1, 201)), ("val", range(500, 510))):
            texts = {i: f"Is it number {(i + offset) % 57}?" for i in ids}
            numbers = {i: 1000 * (offset + 1) + i for i in ids}
            questions = [question(numbers[i], i, texts[i]) for i in ids]
            annotations = [annotation(numbers[i], i, ["yes"]) for i in ids]
            if (source, split) == ("yesno", "train"):  # a question that vqax has too
                questions[0]["question"] = "is it number 1? "
            (folder / f"v2_OpenEnded_{source}_{split}_questions.json").write_text(
                json.dumps({"questions": questions})
            )
            (folder / f"v2_{source}_{split}_annotations.json").write_text(
                json.dumps({"annotations": annotations})
            )
    return folder.parent


@pytest.mark.parametrize("dev", [False, True])
def test_no_balanced_question_of_the_fitted_part_occurs_in_dev_or_val(tasks, tmp_path, dev):
    work = tmp_path / "work"
    work.mkdir()
    train_files, scored = prepare_coco(tasks, work, dev)
    train = entries(train_files[1], "questions")
    val_texts = {text_of(q) for s in SOURCES for q in read_pair(tasks / "vqa_coco", s, "val")[0]}
    balanced = [q for q in train if q["question_id"] // 1000 - 1 in (0, 1, 4)]
    others = [q for q in train if q["question_id"] // 1000 - 1 not in (0, 1, 4)]
    assert balanced and len(others) > len(balanced)
    assert not val_texts & {text_of(q) for q in balanced}
    pairs = [(q["image_id"], text_of(q)) for q in train]
    assert len(set(pairs)) == len(pairs)
    dev_ids = {q["image_id"] for f, _ in scored.values() for q in entries(f[1], "questions")}
    for files, shuffled_files in scored.values():
        questions, shuffled = (entries(f[1], "questions") for f in (files, shuffled_files))
        assert [q["question_id"] for q in questions] == [q["question_id"] for q in shuffled]
        assert all(a["image_id"] != b["image_id"] for a, b in zip(questions, shuffled, strict=True))
        if dev:
            fitted = {text_of(q) for q in balanced if q["image_id"] not in dev_ids}
            assert not fitted & {text_of(q) for q in questions if q in balanced}
            assert {q["image_id"] for q in questions} <= set(range(1, 201))
        else:
            assert {q["image_id"] for q in questions} <= set(range(500, 510))


def test_daquar_asks_each_question_about_another_photograph(tmp_path):
    folder = tmp_path / "daquar"
    (folder / "images").mkdir(parents=True)
    for split in ("train", "test"):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            rows = [("what", "cup", f"{split}{n}.jpg") for n in range(30)]
            csv.writer(file).writerows([("question", "answer", "image"), *rows])
    for dev in (False, True):
        _, scored = prepare_daquar(tmp_path, tmp_path, dev)
        files, shuffled_files = scored["daquar"]
        right, shuffled = (
            list(csv.DictReader(Path(f[1]).read_text().splitlines()))
            for f in (files, shuffled_files)
        )
        assert len(right) == len(shuffled) > 0
        assert all(a["image"] != b["image"] for a, b in zip(right, shuffled, strict=True))
        assert {a["image"] for a in right} == {b["image"] for b in shuffled}
        assert all(a["image"].startswith("train" if dev else "test") for a in right)
