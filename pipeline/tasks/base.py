"""What every task is. Training, validation and evaluation use nothing else.

A task turns a dataset into examples, and the texts that a decoder gives for them into scores. It is
one file under pipeline/tasks/ and one line in pipeline/tasks/registry.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from data.examples import Example
from data.sources import Source

__all__ = ["Example", "Task"]


class Task(ABC):
    """A task, with its options.

    name: its name in the registry.
    metric: the score that chooses the best epoch, of those that `score` gives; higher is better.
    shown: further scores that training prints for each validation, with the names to print them by.
    unit: what its texts are called, in the plural.
    Options: a frozen dataclass of the task's own options, fields with `setting`; None: it has none.
    scored_as_captions: `score` is that of captions, and pipeline.evaluate gives it with all that
        captions have (intervals, METEOR, comparison with another file).
    output: "words": the decoder generates text; "classes": it chooses one of `answers`.
    self_critical: whether --scst can train it: rewards are scores of a text against its image's
        references.
    """

    name: str
    metric: str
    shown: Mapping[str, str] = {}
    unit: str = "texts"
    Options: type | None = None
    scored_as_captions = False
    self_critical = False
    output: str = "words"
    answers: tuple[str, ...] = ()

    def __init__(self, options: Any = None, segment: str = "words") -> None:
        """options: an instance of Options; segment: what a word is, as data.segmentation has it."""
        self.options: Any = (
            options if options is not None else self.Options() if self.Options else None
        )
        self.segment = segment

    @abstractmethod
    def examples(self, source: Source, split: str, limit: int | None = None) -> list[Example]:
        """The examples of a split, those of one image side by side; limit: of the first images
        only.

        Raises DataError for a split that does not exist, and for one that lacks what the task
        needs.
        """

    @abstractmethod
    def score(self, outputs: Mapping[int | str, str], examples: Sequence[Example],
              train: Sequence[Example] = ()) -> dict[str, Any]:  # fmt: skip
        """Scores by name, `metric` among them, of the text in `outputs` (by example id) for each
        example.

        train: the training examples, which a score may take its statistics from.
        """

    def choose_answers(self, train: Sequence[Example]) -> str:
        """With output "classes": set `answers` from the training examples. Returns a line to
        print.
        """
        return ""

    def labels(self, example: Example) -> list[tuple[int, float]]:
        """With output "classes": the classes that are right, with weights in 0..1."""
        return []

    def holds_mirrored(self, words: Sequence[str]) -> bool:
        """Whether a text with these words (prompt and target) also holds of the mirrored image."""
        return True
