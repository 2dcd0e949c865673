"""The interface of tasks, which training, validation and evaluation use.

A task creates examples from a dataset, and scores the texts that a decoder generates for them. A
new task is one file in pipeline/tasks/ and one line in pipeline/tasks/registry.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.examples import Example
from data.results import Fields, read_results
from data.sources import Source
from pipeline.scoring.bootstrap import Statistic, mean_of_groups

__all__ = ["Example", "Task"]

# A text with a word that starts with one of these is not true of the mirrored image.
SIDES = ("left", "right")


class Generated(Protocol):
    """A generated text, or a class, with its score."""

    @property
    def text(self) -> str: ...

    @property
    def score(self) -> float: ...


class Task(ABC):
    """Base class of tasks.

    name: name of the task in the registry.
    metric: the score that chooses the best epoch, a key of the result of `score`; higher is better.
    shown: further scores that training prints at each validation: {key: printed name}.
    unit: name of the texts in messages, in the plural.
    Options: a frozen dataclass of options whose fields are made by `setting`; None: no options.
    scored_as_captions: whether the scores are those of captions. Then pipeline.evaluate also
        computes confidence intervals, METEOR, and comparisons with other files.
    self_critical: whether --scst can train the task. The rewards compare a text with the references
        of its image.
    output: "words": the decoder generates text; "classes": the decoder chooses one of `answers`.
    answers: with output "classes", the text of each class.
    result_fields: the fields of the entries of a results file: the example id and the text.
    exclusive: with output "classes", whether exactly one class is true. The loss is then the
        cross-entropy of the softmax, else the binary cross-entropy of each class.
    uses_images: whether the decoder reads the features of images. reads_texts: whether it reads the
        prompts.
    outputs_name: the part of the name of the file of outputs beside scores.json that stands for
        "scores"; "": SCORES-outputs.jsonl.
    ranks_by_mean: whether candidates are ranked by their mean log-probability per word; else by the
        sum.
    why_unscored: what is said if no example can be scored.
    may_lack_targets: whether examples without targets are left out of training. Otherwise they are
        an error.
    dev_images: the largest number of dev images that training scores.
    evaluate_options: names of the options of pipeline.evaluate that only this task has. The command
        passes them to `set_options`.
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
    result_fields = Fields("id", "output")
    exclusive = False
    uses_images = True
    reads_texts = True
    outputs_name = ""
    ranks_by_mean = True
    why_unscored = "the examples have no targets"
    may_lack_targets = False
    dev_images = 5000
    evaluate_options: tuple[str, ...] = ()

    def __init__(self, options: Any = None, segment: str = "words") -> None:
        """Create the task.

        options: an instance of Options; None: the default options.
        segment: unit of the texts, one of data.segmentation.SEGMENTS.
        """
        self.options: Any = (
            options if options is not None else self.Options() if self.Options else None
        )
        self.segment = segment

    @abstractmethod
    def examples(self, source: Source, split: str, limit: int | None = None) -> list[Example]:
        """Create the examples of a split. Examples of one image are adjacent.

        limit: use only the first `limit` images.

        Raises DataError if the split does not exist or lacks data for the task.
        """

    @abstractmethod
    def score(self, outputs: Mapping[int | str, str], examples: Sequence[Example],
              train: Sequence[Example] = ()) -> dict[str, Any]:  # fmt: skip
        """Compute scores of outputs.

        outputs: by example id the generated text, or for an example with `candidates` their ranks
            (1 is the best).
        examples: the examples with their references.
        train: the training examples, for scores that need statistics of the training texts.

        Returns the scores by name, including `metric`.
        """

    def example_scores(
        self, outputs: Mapping[int | str, str], examples: Sequence[Example]
    ) -> list[dict[str, float]]:
        """Compute the scores of each example by name; an empty list if examples have no scores."""
        return []

    def statistics(
        self, outputs: Mapping[int | str, Any], scores: Sequence[Mapping[str, float]],
        examples: Sequence[Example],
    ) -> list[Statistic]:  # fmt: skip
        """Compute sums over images, from which the bootstrap computes intervals of scores.

        outputs: as in `score`. scores: the result of `example_scores`. By default each of these is
            a mean.
        """
        groups = [e.id if e.image_id is None else e.image_id for e in examples]
        return [
            mean_of_groups(name, np.array([score[name] for score in scores]), groups)
            for name in (scores[0] if scores else ())
        ]

    def describe(self, examples: Sequence[Example]) -> dict[str, str]:
        """Return properties of the scores for the signature, such as the variant of a score."""
        return {}

    def prepare(self, train: Sequence[Example], dev: Sequence[Example]) -> str:
        """Prepare for training. With output "classes", this sets `answers`.

        train: the examples that are trained on. dev: those that choose the best epoch; empty with
            --train-on-dev.

        Returns a message for the user, or "".
        """
        return ""

    def set_options(self, values: Mapping[str, Any]) -> None:
        """Set the options of pipeline.evaluate that `evaluate_options` names.

        Raises UserError if they cannot be used.
        """
        return None

    def output_of(self, candidates: Sequence[Generated]) -> Any:
        """Return the output of an example: by default the text of the best candidate.

        candidates: the generated texts, or the classes, the best first. For an exclusive task these
            are all classes, and their scores are probabilities.
        """
        return candidates[0].text

    def output_entry(self, example: Example, output: Any) -> dict[str, Any]:
        """Return the entry of an example in the file of the outputs."""
        return {
            "id": example.id,
            "image_id": example.image_id,
            "prompt": example.prompt,
            "output": output,
            **({"targets": example.targets} if example.targets else {}),
        }

    def read_outputs(self, file: Path) -> dict[int | str, Any]:
        """Read the outputs of another model from a results file, by example id.

        Raises DataError if the file is invalid.
        """
        return dict(read_results(file, self.result_fields).items())

    def results(
        self, outputs: Mapping[int | str, Any], examples: Sequence[Example]
    ) -> list[dict[str, Any]]:
        """Return the entries of a results file, such as an evaluation server accepts."""
        id_, text = self.result_fields
        return [{id_: example.id, text: outputs[example.id]} for example in examples]

    def prompt(self, question: str) -> str:
        """Return the prompt of a question about a photograph, without earlier ones."""
        return question

    def candidates(self, example: Example) -> Sequence[str]:
        """Return the texts to rank for an example; empty: a text is generated instead."""
        return ()

    def scorable(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples that can be scored. By default all, if any has targets."""
        return [*examples] if any(example.targets for example in examples) else []

    def labels(self, example: Example) -> list[tuple[int, float]]:
        """With output "classes": return the correct classes of an example, with weights in
        0..1.
        """
        return []

    def holds_mirrored(self, words: Sequence[str]) -> bool:
        """Return whether a text is also true of the mirrored image.

        words: the words of its prompt and its target. By default a text is not if a word starts
            with one of SIDES.
        """
        return not any(word.startswith(SIDES) for word in words)
