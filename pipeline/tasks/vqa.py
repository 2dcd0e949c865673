"""Visual question answering: an image and a question, an answer.

With `--output classes` (default) a linear head chooses among the answers that are frequent in
train, with soft labels (Teney et al. 2018). With `--output words` the answer is generated.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import DataError
from data.datasets.vqa import Question
from data.examples import Example
from data.results import read_text_list
from data.sources import Source
from pipeline.cli import UserError, setting
from pipeline.scoring.vqa import Variant, accuracy, normalize
from pipeline.tasks.base import Task

MANY_QUESTIONS, OFTEN, SELDOM = 100_000, 9, 2  # default of --min-answer-count
OFFICIAL = (0.0, 0.3, 0.6, 0.9, 1.0)  # score of an answer that 0, 1, 2, ... of ten people gave


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
        "smallest number of questions with an answer that becomes a class  [9 from 100,000 "
        "questions on, else 2]",
        at_least=1,
    )
    answers_vocabulary: Path | None = setting(
        None, "file with the list of answers, in place of counting: JSON, or one per line"
    )
    accuracy: str = setting(
        "vqa",
        "vqa: leave-one-out over ten people; okvqa: min(n / 3, 1). Questions with one answer are "
        "scored by equality",
        choices=("vqa", "okvqa"),
    )


class VisualQuestionAnswering(Task):
    """Scores: accuracy, as the official evaluation computes it."""

    name = "vqa"
    metric = "accuracy"
    unit = "questions"
    Options = VqaOptions

    def __init__(self, options: Any = None, segment: str = "words") -> None:
        super().__init__(options, segment)
        self.output = self.options.output
        self._questions: dict[int | str, Question] = {}
        self._class_of: dict[str, int] = {}

    def examples(self, source: Source, split: str, limit: int | None = None) -> list[Example]:
        questions: Sequence[Question] | None = getattr(source, "questions", None)
        if questions is None:
            raise DataError(f"--task vqa needs questions; dataset {source.dataset} has none")
        images = {image.id for image in source.select(split)[:limit]}
        by_image: dict[int, list[Question]] = defaultdict(list)
        for question in questions:
            if question.image_id in images:
                by_image[question.image_id].append(question)
        examples = []
        for question in (question for group in by_image.values() for question in group):
            self._questions[question.id] = question
            targets = (question.best,) if question.answers else ()
            examples.append(Example(question.id, question.image_id, question.text, targets))
        return examples

    def choose_answers(self, train: Sequence[Example]) -> str:
        counts = Counter(
            normalize(self._questions[example.id].best) for example in train if example.targets
        )
        least = self.options.min_answer_count
        if least is None:
            least = OFTEN if len(train) >= MANY_QUESTIONS else SELDOM
        if self.options.answers_vocabulary:
            self.answers = tuple(read_text_list(self.options.answers_vocabulary))
        else:
            frequent = [answer for answer, count in counts.items() if count >= least]
            self.answers = tuple(sorted(frequent, key=lambda answer: (-counts[answer], answer)))
        if not self.answers:
            raise UserError(
                f"no answer is given to {least} questions; lower --min-answer-count, or pass "
                "--output words"
            )
        self._class_of = {answer: number for number, answer in enumerate(self.answers)}
        known = sum(counts[answer] for answer in self._class_of)
        return (
            f"{len(self.answers):,} answers; {known / max(1, counts.total()):.1%} of the train "
            "questions have one of them"
        )

    def labels(self, example: Example) -> list[tuple[int, float]]:
        question = self._questions[example.id]
        counts = Counter(map(normalize, question.answers))
        several = len(question.answers) > 1
        return [
            (self._class_of[answer], OFFICIAL[min(count, 4)] if several else 1.0)
            for answer, count in counts.items()
            if answer in self._class_of
        ]

    def variant(self, question: Question) -> Variant:
        return self.options.accuracy if len(question.answers) > 1 else "equality"

    def score(self, outputs: Mapping[int | str, str], examples: Sequence[Example],
              train: Sequence[Example] = ()) -> dict[str, Any]:  # fmt: skip
        """Accuracy in 0..1: the mean over questions, and by answer type and question type."""
        groups: dict[str, dict[str, list[float]]] = {
            "by_answer_type": defaultdict(list),
            "by_question_type": defaultdict(list),
        }
        values = []
        for example in examples:
            question = self._questions[example.id]
            if not question.answers:
                raise UserError(f"question {question.id} has no answers to score against")
            values.append(self.accuracy_of(outputs[example.id], question))
            groups["by_answer_type"][question.answer_type].append(values[-1])
            groups["by_question_type"][question.question_type].append(values[-1])
        means = {
            name: {kind: sum(of) / len(of) for kind, of in sorted(group.items()) if kind}
            for name, group in groups.items()
        }
        return {"accuracy": sum(values) / len(values), **{k: v for k, v in means.items() if v}}

    def accuracy_of(self, answer: str, question: Question) -> float:
        """The accuracy of an answer to one question, in 0..1."""
        keys = question.keys or range(len(question.answers))
        entries = [
            {"answer": text, "key": key} for text, key in zip(question.answers, keys, strict=True)
        ]
        return accuracy(answer, entries, self.variant(question))
