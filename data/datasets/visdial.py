"""Dialogues about photographs, in the official VisDial format (Das et al. 2017), 0.9 and 1.0.

    {"split": "val2018", "data": {"questions": [text], "answers": [text], "dialogs": [
        {"image_id": 1, "caption": text, "dialog": [
            {"question": 0, "answer": 0, "answer_options": [100 numbers], "gt_index": 3}, ...]}]}}

The numbers of a round are positions in the lists `questions` and `answers` of the same file. A
round may lack `answer`, `answer_options` and `gt_index`: the last round of the test split has no
answer, and other files have no options. Dense annotations (`--dense`) give the relevance of each
option of one round of a dialogue:

    [{"image_id": 1, "round_id": 1, "gt_relevance": [100 numbers in 0..1]}, ...]

`round_id` counts from 1. The files of train call the list `relevance`.

Files that name a split train and another one keep their splits. All other dialogues are in the
split `all`. A photograph is found under the `--images` folders by its COCO id: `COCO_*_%012d.jpg`,
`VisualDialog_*_%012d.jpg` or `%012d.jpg`, also one folder down. Without a file, its name is
`%012d.jpg`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import DataError
from data.datasets.coco import photographs_by_id
from data.sources import SPLITS, Image, Source, check_caption, check_id, parse_json


@dataclass(frozen=True)
class Options:
    """Options of --dataset visdial."""

    dialogs: tuple[Path, ...] = field(
        default=(), metadata={"help": "dialogues in VisDial format; may be repeated"}
    )
    dense: Path | None = field(
        default=None, metadata={"help": "dense annotations of the dialogues, for NDCG"}
    )
    text_only: bool = field(
        default=False,
        metadata={"help": "use dialogues whose image has no features, without regions"},
    )


class Round(NamedTuple):
    """One question of a dialogue and its answer.

    answer: None if it is unknown. options: positions in `texts`, of the answers to rank; empty if
    there are none. gt_index: position of the answer in `options`; None if it is unknown.
    relevance: of each option, in 0..1; None without dense annotations.
    texts: the answers of the file.
    """

    question: str
    answer: str | None
    options: Sequence[int] | np.ndarray
    gt_index: int | None
    texts: Sequence[str]
    relevance: tuple[float, ...] | None = None

    @property
    def candidates(self) -> list[str]:
        """The texts of the options."""
        return [self.texts[number] for number in self.options]


class Dialog(NamedTuple):
    """A dialogue about an image."""

    image_id: int
    caption: str
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class DialogSource(Source):
    """Photographs with dialogues, in the order of their files."""

    dialogs: Mapping[int, Dialog] = field(default_factory=dict, repr=False)  # by image id


def read(
    dataset: str,
    root: Path | None,
    annotations: Sequence[Path],
    images: Sequence[Path],
    dialogs: Sequence[Path] = (),
    dense: Path | None = None,
    text_only: bool = False,
) -> DialogSource:
    """Read dialogues.

    text_only: the photographs need no files.

    Raises DataError for an invalid file, two dialogues about one image, and dense annotations of a
    round that has no options.
    """
    if not dialogs or annotations:
        raise DataError(
            f"{dataset} needs --dialogs, the file of the dialogues, and --images or --root, the "
            "folder of the photographs; it takes no --annotations"
        )
    found: dict[int, Dialog] = {}
    splits: dict[int, str] = {}
    for file in dialogs:
        split = ""
        for dialog, split in _read_file(file):
            if dialog.image_id in found:
                raise DataError(f"{file}: image {dialog.image_id} has two dialogues")
            found[dialog.image_id], splits[dialog.image_id] = dialog, split
    if not {"train"} < {*splits.values()}:
        splits = dict.fromkeys(splits, "all")
    if dense:
        _add_relevance(found, dense)
    folders = [*images] or ([root] if root else [])
    listed = photographs_by_id(folders)
    place = folders[0] if folders else dialogs[0].parent
    present, missing = [], []
    for id_, split in splits.items():
        name, path = listed.get(id_, (f"{id_:012d}.jpg", place / f"{id_:012d}.jpg"))
        present.append(Image(id_, name, path, split, ()))
        if id_ not in listed and not text_only:
            missing.append(present[-1])
    return DialogSource(dataset, place, tuple(present), tuple(missing), dialogs[0], dialogs=found)


def _read_file(file: Path) -> Iterator[tuple[Dialog, str]]:
    """Yield the dialogues of a file with their split."""
    content = parse_json(file, _compact)
    data = content.get("data") if isinstance(content, dict) else None
    questions, answers, dialogs = (
        data.get(key) if isinstance(data, dict) else None
        for key in ("questions", "answers", "dialogs")
    )
    if not (
        isinstance(content, dict)
        and isinstance(questions, list)
        and isinstance(answers, list)
        and isinstance(dialogs, list)
    ):
        raise DataError(
            f'{file} has no "data" with the lists "questions", "answers" and "dialogs"; it is not '
            "a VisDial file, for --dialogs"
        )
    for what, texts in (("question", questions), ("answer", answers)):
        for number, text in enumerate(texts):
            check_caption(text, f"{file}: {what} {number}", what)
    split = SPLITS.get(str(content.get("split", "")).lower().rstrip("0123456789"), "all")
    for number, entry in enumerate(dialogs):
        if not isinstance(entry, dict):
            raise DataError(f"{file}: dialogue number {number} is no object")
        id_ = check_id(entry.get("image_id"), f"{file}: dialogue number {number}")
        where = f"{file}: dialogue about image {id_}"
        rounds = entry.get("dialog")
        if not isinstance(rounds, list) or not rounds:
            raise DataError(f'{where} has no list "dialog" of rounds')
        caption = check_caption(entry.get("caption", ""), where)
        yield (
            Dialog(
                id_,
                caption,
                tuple(
                    _read_round(each, f"{where}, round {index}", questions, answers)
                    for index, each in enumerate(rounds, start=1)
                ),
            ),
            split,
        )


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """Store the options of a round as an array: the official file has 123 million numbers."""
    options = entry.get("answer_options")
    if isinstance(options, list) and all(type(number) is int for number in options):
        with contextlib.suppress(OverflowError):
            entry["answer_options"] = np.array(options, np.int32)
    return entry


def _read_round(entry: Any, where: str, questions: Sequence[str], answers: Sequence[str]) -> Round:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is no object")
    question = _text_at(entry.get("question"), questions, where, "question")
    answer = None
    if entry.get("answer") is not None:
        answer = _text_at(entry["answer"], answers, where, "answer")
    options: Any = entry.get("answer_options")
    gt_index = entry.get("gt_index")
    if options is None:
        options = ()
    if not isinstance(options, tuple | np.ndarray) or len(options):
        is_array = isinstance(options, np.ndarray)
        if not is_array or options.min() < 0 or options.max() >= len(answers):
            raise DataError(
                f'{where}: "answer_options" must be positions in the {len(answers):,} answers'
            )
    if gt_index is not None:
        if type(gt_index) is not int or not 0 <= gt_index < len(options):
            raise DataError(f"{where}: gt_index {gt_index!r} is not one of {len(options)} options")
        if answer is not None and answers[options[gt_index]] != answer:
            raise DataError(
                f"{where}: the answer is {answer[:60]!r}, but the option at gt_index {gt_index} is "
                f"{answers[options[gt_index]][:60]!r}"
            )
    elif answer is not None and len(options):
        matches = [i for i, number in enumerate(options) if answers[number] == answer]
        gt_index = matches[0] if matches else None
    return Round(question, answer, options, gt_index, answers)


def _text_at(number: Any, texts: Sequence[str], where: str, what: str) -> str:
    if type(number) is not int or not 0 <= number < len(texts):
        raise DataError(
            f"{where}: the {what} is {number!r}, not a position in the {len(texts):,} {what}s"
        )
    return texts[number]


def _add_relevance(dialogs: dict[int, Dialog], file: Path) -> None:
    """Add the dense annotations of a file to the rounds of the dialogues, in place."""
    entries = parse_json(file)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(
            f"{file} is not a file of dense annotations, for --dense: a list of objects"
        )
    if not entries:
        raise DataError(f"{file} contains no dense annotations")
    seen: set[tuple[int, Any]] = set()
    for number, entry in enumerate(entries):
        id_ = check_id(entry.get("image_id"), f"{file}: entry {number}")
        where = f"{file}: image {id_}, round {entry.get('round_id')}"
        if id_ not in dialogs:
            raise DataError(f"{where}: no dialogue about this image is in --dialogs")
        if (id_, entry.get("round_id")) in seen:
            raise DataError(f"{where}: this round occurs twice")
        seen.add((id_, entry.get("round_id")))
        rounds = [*dialogs[id_].rounds]
        index = entry.get("round_id")
        if type(index) is not int or not 1 <= index <= len(rounds):
            raise DataError(f"{where}: the dialogue has the rounds 1 to {len(rounds)}")
        values = entry.get("gt_relevance", entry.get("relevance"))
        options = len(rounds[index - 1].options)
        if not isinstance(values, list) or len(values) != options or not options:
            count = len(values) if isinstance(values, list) else 0
            raise DataError(f"{where}: {count} relevances for {options} options")
        if not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
            raise DataError(f"{where}: a relevance must be a number in 0..1")
        rounds[index - 1] = rounds[index - 1]._replace(relevance=tuple(map(float, values)))
        dialogs[id_] = dialogs[id_]._replace(rounds=tuple(rounds))
