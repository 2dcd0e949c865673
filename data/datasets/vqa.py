"""Questions about photographs.

The official VQA files, one pair or several (`--questions`, `--annotations`, in pairs):

    {"questions": [{"question_id", "image_id", "question"}]}
    {"annotations": [{"question_id", "image_id", "question_type", "answer_type",
        "multiple_choice_answer", "answers": [{"answer", "answer_confidence", "answer_id"}]}]}

A pair names no split. Under `--root` the official names give the splits train and val (test
questions have no annotations). A photograph is found under the `--images` folders by its COCO id:
`COCO_*_%012d.jpg` or `%012d.jpg`, also one folder down.

In place of the pairs, `--annotations FILE.csv` with the columns question, answer and image (the
form of DAQUAR): the id of a question is its number from 1, counted over all files, and the id of a
photograph is `image_id` of its file name below `--images`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from sys import intern
from typing import Literal, NamedTuple

from data import DataError
from data.datasets.coco import photographs_by_id
from data.sources import (
    Image,
    Listing,
    Source,
    check_caption,
    check_id,
    check_name,
    csv_rows,
    image_id,
    on_disk,
    read_json,
    read_text,
)

OFFICIAL = {
    "train": (
        "v2_OpenEnded_mscoco_train2014_questions.json",
        "v2_mscoco_train2014_annotations.json",
    ),
    "val": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
    "test": ("v2_OpenEnded_mscoco_test2015_questions.json", None),
}
OKVQA = re.compile("ok-?vqa", re.IGNORECASE)
COLUMNS = ("question", "answer", "image")
# what the files are called in messages
QUESTIONS = "a VQA questions file, for --questions"
ANNOTATIONS = "a VQA annotations file, for --annotations"


@dataclass(frozen=True)
class Options:
    """Options of --dataset vqa."""

    questions: tuple[Path, ...] = field(
        default=(), metadata={"help": "VQA questions file; may be repeated, with --annotations"}
    )


class Question(NamedTuple):
    """A question about an image.

    answers: people's answers as written; empty if they are unknown. keys: for each answer the other
    fields of its entry, if two entries are equal in all of them; None: all entries differ.
    best: the answer that most people gave (`multiple_choice_answer`).
    accuracy: variant of the accuracy for questions with several answers, "okvqa" if the name or the
        description of the annotations file contains okvqa, else "vqa".
    """

    id: int
    image_id: int
    text: str
    answers: tuple[str, ...] = ()
    best: str = ""
    question_type: str = ""
    answer_type: str = ""
    keys: tuple[str, ...] | None = None
    accuracy: Literal["vqa", "okvqa"] = "vqa"


@dataclass(frozen=True)
class QuestionSource(Source):
    """Photographs with questions, in the order of their files."""

    questions: tuple[Question, ...] = field(default=(), repr=False)

    def reported(self) -> str:
        """The default split to score, as for other sources, but val if test has no answers."""
        answered = {self.by_id[q.image_id].split for q in self.questions if q.answers}
        split = super().reported()
        return "val" if split not in answered and "val" in answered else split


class _Pair(NamedTuple):
    split: str
    questions: Path
    annotations: Path | None


def read(
    dataset: str,
    root: Path | None,
    annotations: Sequence[Path],
    images: Sequence[Path],
    questions: Sequence[Path] = (),
) -> QuestionSource:
    """Read questions and, if there are any, their annotations.

    Raises DataError for a question without an annotation or an annotation without a question, a
    question or answer that is empty, and an id that occurs twice.
    """
    tables = [file for file in annotations if file.suffix.lower() == ".csv"]
    if tables:
        if questions or len(tables) < len(annotations):
            raise DataError(
                f"{dataset}: --annotations {tables[0].name} holds questions and answers; it goes "
                "with neither --questions nor annotations in JSON"
            )
        return _read_tables(dataset, tables, [*images] or [root or tables[0].parent])
    pairs = _pairs(dataset, root, annotations, questions)
    folders = [*images] or [root or pairs[0].questions.parent]
    found: dict[int, Question] = {}
    splits: dict[int, str] = {}
    for pair in pairs:
        for question in _read_pair(pair):
            if question.id in found:
                raise DataError(f"{pair.questions}: question {question.id} occurs twice")
            found[question.id] = question
            if splits.setdefault(question.image_id, pair.split) != pair.split:
                raise DataError(
                    f"{pair.questions}: image {question.image_id} has questions in the splits "
                    f"{splits[question.image_id]} and {pair.split}"
                )
    listed = photographs_by_id(folders)
    present, missing = [], []
    for id_, split in splits.items():
        name, path = listed.get(id_, (f"{id_:012d}.jpg", folders[0] / f"{id_:012d}.jpg"))
        present.append(Image(id_, name, path, split, ()))
        if id_ not in listed:
            missing.append(present[-1])
    return QuestionSource(
        dataset,
        folders[0],
        tuple(present),
        tuple(missing),
        pairs[0].questions,
        questions=tuple(found.values()),
    )


def _pairs(
    dataset: str, root: Path | None, annotations: Sequence[Path], questions: Sequence[Path]
) -> list[_Pair]:
    if questions:
        if annotations and len(annotations) != len(questions):
            raise DataError(
                f"{dataset}: {len(questions)} --questions and {len(annotations)} --annotations; "
                "pass one --annotations for each --questions, in the same order, or none at all"
            )
        others: Sequence[Path | None] = annotations or [None] * len(questions)
        return [_Pair("all", file, other) for file, other in zip(questions, others, strict=True)]
    if annotations:
        raise DataError(f"{dataset}: --annotations {annotations[0]} needs its --questions file")
    pairs = []
    for split, (file, other) in OFFICIAL.items():
        if root and (root / file).exists():
            if other and not (root / other).exists():
                raise DataError(f"{root} has {file} but not {other}; put both there")
            pairs.append(_Pair(split, root / file, root / other if other else None))
    if not pairs:
        names = ", ".join(file for file, _ in OFFICIAL.values())
        raise DataError(
            f"{dataset} needs --questions and --annotations, --annotations FILE.csv, or a --root "
            f"with the official files ({names})"
        )
    return pairs


def _read_pair(pair: _Pair) -> Iterator[Question]:
    annotated = _annotations(pair.annotations) if pair.annotations else None
    seen: set[int] = set()
    for number, entry in enumerate(read_json(pair.questions, "questions", QUESTIONS)["questions"]):
        where = f"{pair.questions}: question {entry.get('question_id', f'number {number}')}"
        id_, image = (
            check_id(entry.get("question_id"), where, "question"),
            check_id(entry.get("image_id"), where),
        )
        text = _text(entry.get("question"), where, "question")
        if id_ in seen:
            raise DataError(f"{where} occurs twice")
        seen.add(id_)
        if annotated is None:
            yield Question(id_, image, text)
            continue
        if id_ not in annotated:
            raise DataError(f"{where} has no annotation in {pair.annotations}")
        question = annotated.pop(id_)
        if question.image_id != image:
            raise DataError(
                f"{where} is about image {image}, its annotation in {pair.annotations} about image "
                f"{question.image_id}"
            )
        yield question._replace(text=text)
    for id_ in annotated or ():
        raise DataError(f"{pair.annotations}: annotation of question {id_} has no question")


def _annotations(file: Path) -> dict[int, Question]:
    """The annotated questions by id, without their texts."""
    found: dict[int, Question] = {}
    content = read_json(file, "annotations", ANNOTATIONS)
    accuracy: Literal["vqa", "okvqa"] = (
        "okvqa" if OKVQA.search(f"{file.name} {content.get('info')}") else "vqa"
    )
    for number, entry in enumerate(content["annotations"]):
        where = f"{file}: annotation of question {entry.get('question_id', f'number {number}')}"
        id_, image = (
            check_id(entry.get("question_id"), where, "question"),
            check_id(entry.get("image_id"), where),
        )
        if id_ in found:
            raise DataError(f"{where} occurs twice")
        answers = entry.get("answers")
        if answers is None or answers == []:
            raise DataError(f"{where} has no answers")
        if not isinstance(answers, list):
            raise DataError(
                f'{where}: the answers are {str(answers)[:60]!r}, not a list of {{"answer": "..."}}'
            )
        texts = []
        for answer in answers:
            if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
                raise DataError(
                    f'{where}: an answer is {str(answer)[:60]!r}, not {{"answer": "..."}}'
                )
            texts.append(intern(check_caption(answer["answer"], where, "answer")))
        best = entry.get("multiple_choice_answer")
        if not isinstance(best, str) or not best:
            best = max(texts, key=texts.count)
        best = check_caption(best, where, "multiple_choice_answer")
        found[id_] = Question(
            id_,
            image,
            "",
            tuple(texts),
            intern(best),
            intern(str(entry.get("question_type", ""))),
            intern(str(entry.get("answer_type", ""))),
            _keys(answers),
            accuracy,
        )
    return found


def _keys(answers: Sequence[Mapping[str, object]]) -> tuple[str, ...] | None:
    """`Question.keys` of the answers of an annotation."""
    if len({str(answer.get("answer_id")) for answer in answers}) == len(answers):
        return None
    keys = [
        str({key: answer[key] for key in sorted(answer) if key != "answer"}) for answer in answers
    ]
    return None if len(set(keys)) == len(keys) else tuple(keys)


def _text(value: object, where: str, what: str) -> str:
    """Return a text. Raises DataError unless it is a string with a visible character."""
    text = check_caption(value, where, what)
    if not text.strip():
        raise DataError(f"{where}: the {what} is {text!r}; write its text")
    return text


def _check_columns(file: Path, columns: Sequence[str]) -> None:
    if lacking := [column for column in COLUMNS if column not in columns]:
        hint = "; separate the columns by commas" if len(columns) == 1 else ""
        raise DataError(
            f"{file} lacks the column {lacking[0]}; its columns are {', '.join(columns)}{hint}"
        )


def _read_tables(dataset: str, files: Sequence[Path], folders: Sequence[Path]) -> QuestionSource:
    questions: list[Question] = []
    names: dict[int, str] = {}
    for number, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:number]]:
            raise DataError(f"--annotations {file} is passed twice; pass each file once")
        lines = io.StringIO(read_text(file), newline="")
        for where, row in csv_rows(file, lines, partial(_check_columns, file)):
            if not (row["image"] or "").strip():
                raise DataError(f"{where}: the column image is empty; write the file name")
            name = check_name(row["image"], where)
            id_ = image_id(name)
            names[id_] = name
            answer = _text(row["answer"] or "", where, "answer")
            text = _text(row["question"] or "", where, "question")
            questions.append(
                Question(len(questions) + 1, id_, text, (intern(answer),), intern(answer))
            )
    listings = [
        (folder, on_disk([[name] for name in names.values()], Listing(folder)))
        for folder in folders
    ]
    images, missing = [], []
    for number, (id_, name) in enumerate(names.items()):
        places = ((folder, found[number]) for folder, found in listings)
        folder, there = next((place for place in places if place[1]), (folders[0], None))
        images.append(Image(id_, there or name, folder / (there or name), "all", ()))
        if there is None:
            missing.append(images[-1])
    return QuestionSource(
        dataset, folders[0], tuple(images), tuple(missing), files[0], questions=tuple(questions)
    )
