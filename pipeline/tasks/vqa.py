"""The visual question answering task: an image and a question, and the answers of people.

With --output classes (default), a linear head chooses one of the answers that are frequent in
train. It is trained with soft labels (Teney et al. 2018). With --output words, the decoder
generates the answer.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import DataError
from data.datasets.vqa import Question
from data.examples import Example
from data.results import ANSWERS, read_text_list
from data.sources import Source
from pipeline.cli import UserError, setting
from pipeline.scoring.vqa import VARIANTS, Variant, accuracy, normalize
from pipeline.scoring.wups import NotInstalled, open_wordnet, wups
from pipeline.tasks.base import Task

# default of --min-answer-count for large and for small data sets
LARGE_DATA_SET = 100_000  # questions
MIN_COUNT_LARGE, MIN_COUNT_SMALL = 9, 2
# official score of an answer that 0, 1, 2, 3, and at least 4 of ten people gave
SOFT_LABELS = (0.0, 0.3, 0.6, 0.9, 1.0)


@dataclass(frozen=True)
class VqaOptions:
    """Options of --task vqa."""

    output: str = setting(
        "classes",
        "classes: choose one of the frequent answers; words: generate the answer",
        choices=("classes", "words"),
    )
    min_answer_count: int | None = setting(
        None,
        "an answer becomes a class if at least this many questions have it  [9 for 100,000 "
        "questions or more, else 2]",
        at_least=1,
    )
    answers_vocabulary: Path | None = setting(
        None,
        "file with the answers that become classes, instead of counting: JSON, or one per line",
    )
    accuracy: str | None = setting(
        None,
        "accuracy if n people gave the answer; vqa: mean of min(n / 3, 1) with each person left "
        "out; okvqa: min(n / 3, 1). For questions with one answer the accuracy is equality  "
        "[okvqa for OK-VQA and A-OKVQA, else vqa]",
        choices=VARIANTS,
    )

    def __post_init__(self) -> None:
        if self.output == "words" and (self.answers_vocabulary or self.min_answer_count):
            flag = "--answers-vocabulary" if self.answers_vocabulary else "--min-answer-count"
            raise UserError(f"{flag} chooses classes; --output words has none")


class VisualQuestionAnswering(Task):
    """Visual question answering. The score is the accuracy of the official evaluation."""

    name = "vqa"
    metric = "accuracy"
    unit = "questions"
    why_unscored = (
        "the questions have no answers; add them (--annotations, or the column answer of the "
        "metadata of a folder)"
    )
    result_fields = ANSWERS
    wups = False  # whether WUPS is also computed
    Options = VqaOptions
    evaluate_options = ("accuracy", "wups", "answers_out", "server")

    def __init__(self, options: Any = None, segment: str = "words") -> None:
        super().__init__(options, segment)
        self.output = self.options.output
        self._questions: dict[int | str, Question] = {}  # by example id
        self._class_of: dict[str, int] = {}  # class of each answer

    def examples(self, source: Source, split: str, limit: int | None = None) -> list[Example]:
        questions: Sequence[Question] | None = getattr(source, "questions", None)
        if questions is None:
            raise DataError(f"--task vqa needs questions; dataset {source.dataset} has none")
        image_ids = {image.id for image in source.select(split)[:limit]}
        by_image: dict[int, list[Question]] = defaultdict(list)
        for question in questions:
            if question.image_id in image_ids:
                by_image[question.image_id].append(question)
        examples = []
        for question in itertools.chain.from_iterable(by_image.values()):
            self._questions[question.id] = question
            targets = (question.best,) if question.answers else ()
            examples.append(Example(question.id, question.image_id, question.text, targets))
        return examples

    def prepare(self, train: Sequence[Example], dev: Sequence[Example]) -> str:
        """Choose the answers that become classes, in the order of their frequency in train.

        Answers that are equal after normalization are one class, with the most frequent spelling.
        Answers of which normalization leaves nothing, such as "a", are no class.

        Raises UserError if there are no classes, or no train question has an answer of
        --answers-vocabulary.
        """
        if self.output == "words":
            return ""
        spellings = Counter(example.targets[0] for example in train if example.targets)
        counts: Counter[str] = Counter()
        spelling: dict[str, str] = {}  # by normalized answer
        for text, count in spellings.most_common():
            counts[normalize(text)] += count
            spelling.setdefault(normalize(text), text)
        if not counts:
            raise UserError(
                "the train questions have no answers; pass the file of the answers as "
                "--annotations, or add the column answer to the metadata of the folder"
            )
        min_count = self.options.min_answer_count
        if min_count is None:
            min_count = MIN_COUNT_LARGE if len(train) >= LARGE_DATA_SET else MIN_COUNT_SMALL
        if self.options.answers_vocabulary:
            listed: dict[str, str] = {}
            for text in read_text_list(self.options.answers_vocabulary):
                listed.setdefault(normalize(text), text)
            listed.pop("", None)
            if not listed:
                raise UserError(f"{self.options.answers_vocabulary} has no answers")
            self.answers = tuple(listed.values())
        else:
            frequent = [answer for answer, count in counts.items() if answer and count >= min_count]
            frequent.sort(key=lambda answer: (-counts[answer], answer))
            self.answers = tuple(spelling[answer] for answer in frequent)
        if not self.answers:
            raise UserError(
                f"--output classes: no answer occurs in {min_count} train questions; lower "
                "--min-answer-count, or pass --output words"
            )
        self._class_of = {normalize(answer): n for n, answer in enumerate(self.answers)}
        covered = sum(counts[answer] for answer in self._class_of)
        if not covered:
            raise UserError(
                f"{self.options.answers_vocabulary} has no answer of the train questions, such as "
                f"{self.answers[0]!r}; pass the list of this dataset"
            )
        return (
            f"{len(self.answers):,} answers; {covered / max(1, counts.total()):.1%} of the train "
            "questions have one of them"
        )

    def labels(self, example: Example) -> list[tuple[int, float]]:
        question = self._questions[example.id]
        if not question.answers:
            raise UserError(f"question {question.id} has no answer, so it cannot be trained on")
        counts = Counter(map(normalize, question.answers))
        has_several = len(question.answers) > 1
        return [
            (self._class_of[answer], SOFT_LABELS[min(count, 4)] if has_several else 1.0)
            for answer, count in counts.items()
            if answer in self._class_of
        ]

    def set_options(self, values: Mapping[str, Any]) -> None:
        """Choose the variant of the accuracy (None: unchanged) and whether to compute WUPS."""
        if values["accuracy"]:
            self.options = replace(self.options, accuracy=values["accuracy"])
        self.wups = values["wups"]
        if self.wups:
            try:
                open_wordnet()
            except NotInstalled as error:
                raise UserError(f"--wups: {error}") from error

    def variant(self, question: Question) -> Variant:
        """The variant of the accuracy for a question."""
        if len(question.answers) == 1:
            return "equality"
        return self.options.accuracy or question.accuracy

    def score(self, outputs: Mapping[int | str, str], examples: Sequence[Example],
              train: Sequence[Example] = ()) -> dict[str, Any]:  # fmt: skip
        """Compute the mean accuracy over questions, 0 to 1.

        outputs: the answer to each question, by question id.

        Returns also the mean accuracies by answer type and by question type, if the questions have
        types, and by the variant of the accuracy, if there are several. Raises UserError if a
        question has no answers.
        """
        per_example = self.example_scores(outputs, examples)
        scores: dict[str, Any] = {
            name: _mean([score[name] for score in per_example]) for name in per_example[0]
        }
        questions = [self._questions[example.id] for example in examples]
        groupings: dict[str, list[str]] = {
            "by_answer_type": [question.answer_type for question in questions],
            "by_question_type": [question.question_type for question in questions],
            "by_variant": [self.variant(question) for question in questions],
        }
        for name, keys in groupings.items():
            groups: dict[str, list[float]] = defaultdict(list)
            for key, score in zip(keys, per_example, strict=True):
                groups[key].append(score["accuracy"])
            means = {key: _mean(group) for key, group in sorted(groups.items()) if key}
            if means and (name != "by_variant" or len(means) > 1):
                scores[name] = means
        return scores

    def example_scores(
        self, outputs: Mapping[int | str, str], examples: Sequence[Example]
    ) -> list[dict[str, float]]:
        scores: list[dict[str, float]] = []
        for example in examples:
            question = self._questions[example.id]
            if not question.answers:
                raise UserError(
                    f"question {question.id} cannot be scored, because it has no answers"
                )
            scores.append({"accuracy": self.accuracy_of(outputs[example.id], question)})
            if self.wups:
                scores[-1] |= wups(outputs[example.id], question.answers[0])
        return scores

    def describe(self, examples: Sequence[Example]) -> dict[str, str]:
        counts = Counter(self.variant(self._questions[example.id]) for example in examples)
        return {"accuracy": "+".join(f"{name}.{count}" for name, count in sorted(counts.items()))}

    def accuracy_of(self, answer: str, question: Question) -> float:
        """Compute the accuracy of an answer to one question, 0 to 1."""
        keys = question.keys or range(len(question.answers))
        entries = [
            {"answer": text, "key": key} for text, key in zip(question.answers, keys, strict=True)
        ]
        return accuracy(answer, entries, self.variant(question))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
