"""The image-text sentiment task: an image and a text, and one of several labels.

The labels may be any classes, not only sentiments.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from data.datasets.mvsa import LabelledText
from data.examples import Example
from data.sources import Source, check_id, read_text
from pipeline.cli import UserError, setting
from pipeline.scoring.bootstrap import Statistic
from pipeline.scoring.classification import calibration_error, confusion, f_scores, label_counts
from pipeline.tasks.base import Generated, Task

MOST_CLASSES = 10_000
SCORES = ("accuracy", "macro_f1", "weighted_f1")
Probabilities = Mapping[str, float]  # by label, the most probable first


@dataclass(frozen=True)
class SentimentOptions:
    """Options of --task sentiment."""

    use: str = setting("both", "what the decoder reads", choices=("both", "text", "image"))
    class_weights: str = setting(
        "none",
        "weights of the labels in the loss; balanced: inversely proportional to their frequency",
        choices=("none", "balanced"),
    )


class Sentiment(Task):
    """Classification of an image with a text. Macro F1 chooses the best epoch."""

    name = "sentiment"
    metric = "macro_f1"
    shown = {"accuracy": "accuracy"}  # noqa: RUF012
    unit = "texts"
    why_unscored = "the texts have no labels; add the column label to the metadata"
    output = "classes"
    exclusive = True
    outputs_name = "predictions"
    Options = SentimentOptions

    def __init__(self, options: Any = None, segment: str = "words") -> None:
        super().__init__(options, segment)
        self.uses_images = self.options.use != "text"
        self.reads_texts = self.options.use != "image"
        self._labels: dict[int | str, str] = {}  # by example id
        self._names: dict[int | str, str] = {}  # file names, by example id
        self._weights: dict[str, float] = {}
        self._rule = ""

    def examples(self, source: Source, split: str, limit: int | None = None) -> list[Example]:
        texts: Sequence[LabelledText] | None = getattr(source, "texts", None)
        if not texts:
            raise DataError(
                f"--task sentiment needs labels; dataset {source.dataset} at {source.root} has "
                "none (in a folder: the column label of metadata.jsonl or metadata.csv)"
            )
        self._rule = getattr(source, "label_rule", "")
        images = {image.id: image for image in source.select(split)[:limit]}
        by_image: dict[int, list[LabelledText]] = defaultdict(list)
        for text in texts:
            if text.image_id in images:
                by_image[text.image_id].append(text)
        examples = []
        for image_id, group in by_image.items():
            for text in group:
                if text.label is not None:
                    self._labels[text.id] = text.label
                self._names[text.id] = images[image_id].name
                prompt = text.text if self.reads_texts else ""
                targets = () if text.label is None else (text.label,)
                examples.append(Example(text.id, image_id, prompt, targets))
        if not examples:
            raise DataError(f"split {split!r} of {source.root} has no labelled texts")
        return examples

    def prepare(self, train: Sequence[Example], dev: Sequence[Example]) -> str:
        """Make a class of each label of train, in alphabetical order.

        Raises UserError if there are fewer than 2 or more than MOST_CLASSES labels.
        """
        counts = Counter(self._labels[example.id] for example in train if example.targets)
        if not 2 <= len(counts) <= MOST_CLASSES:
            raise UserError(
                f"train has {len(counts):,} different labels; --task sentiment needs 2 to "
                f"{MOST_CLASSES:,}"
            )
        self.answers = tuple(sorted(counts))
        total = sum(counts.values())
        self._weights = dict.fromkeys(self.answers, 1.0)
        if self.options.class_weights == "balanced":
            self._weights = {
                label: total / (len(counts) * count) for label, count in counts.items()
            }
        once = [label for label in self.answers if counts[label] == 1]
        warning = f"; warning: {len(once):,} labels occur once, such as {once[0]}" if once else ""
        listed = ", ".join(f"{label} {counts[label]:,}" for label in self.answers[:10])
        rule = f"; labels by the rule of {self._rule}" if self._rule else ""
        return f"{len(counts):,} labels: {listed}{rule}{warning}"

    def labels(self, example: Example) -> list[tuple[int, float]]:
        if example.id not in self._labels:
            raise UserError(f"text {example.id} has no label, so it cannot be trained on")
        label = self._labels[example.id]
        if label not in self._weights:
            raise UserError(
                f"text {example.id} of dev has the label {label!r}, which no text of train has; "
                "add texts with this label to train, or leave this one out"
            )
        return [(self.answers.index(label), self._weights[label])]

    def output_of(self, candidates: Sequence[Generated]) -> Probabilities:
        return {each.text: each.score for each in candidates}

    def score(self, outputs: Mapping[int | str, Any], examples: Sequence[Example],
              train: Sequence[Example] = ()) -> dict[str, Any]:  # fmt: skip
        """Compute the scores of predicted labels.

        outputs: the probability of each label by example id, the most probable first.

        Returns accuracy, macro_f1, weighted_f1, calibration_error, precision and recall by label,
        and the confusion matrix by true and predicted label.
        """
        truth, predicted = self._predictions(outputs, examples)
        labels = sorted({*truth, *predicted})
        counts = label_counts(truth, predicted, labels).sum(0)
        scores: dict[str, Any] = dict(zip(SCORES, f_scores(counts[None])[0].tolist(), strict=True))
        confidence = [next(iter(outputs[example.id].values())) for example in examples]
        right = [a == b for a, b in zip(truth, predicted, strict=True)]
        scores["calibration_error"] = calibration_error(confidence, right)
        for name, column in (("precision", 1), ("recall", 2)):
            scores[name] = {
                label: float(row[0] / row[column]) if row[column] else 0.0
                for label, row in zip(labels, counts, strict=True)
            }
        scores["confusion"] = confusion(truth, predicted)
        return scores

    def _predictions(
        self, outputs: Mapping[int | str, Any], examples: Sequence[Example]
    ) -> tuple[list[str], list[str]]:
        """The true and the predicted label of each example."""
        truth = [self._labels[example.id] for example in examples]
        return truth, [next(iter(outputs[example.id])) for example in examples]

    def scorable(self, examples: Sequence[Example]) -> list[Example]:
        """The texts with a label."""
        return [example for example in examples if example.targets]

    def example_scores(
        self, outputs: Mapping[int | str, Any], examples: Sequence[Example]
    ) -> list[dict[str, float]]:
        truth, predicted = self._predictions(outputs, examples)
        return [{"accuracy": float(a == b)} for a, b in zip(truth, predicted, strict=True)]

    def statistics(
        self, outputs: Mapping[int | str, Any], scores: Sequence[Mapping[str, float]],
        examples: Sequence[Example],
    ) -> list[Statistic]:  # fmt: skip
        truth, predicted = self._predictions(outputs, examples)
        labels = sorted({*truth, *predicted})
        counts = label_counts(truth, predicted, labels).reshape(len(examples), -1)
        rows = {image: row for row, image in enumerate(dict.fromkeys(e.image_id for e in examples))}
        sums = np.zeros((len(rows), counts.shape[1]))
        np.add.at(sums, [rows[example.image_id] for example in examples], counts)
        shape = (-1, len(labels), 3)
        return [Statistic(SCORES, sums, lambda sums: f_scores(sums.reshape(shape)))]

    def describe(self, examples: Sequence[Example]) -> dict[str, str]:
        return {"use": self.options.use, **({"labels": self._rule} if self._rule else {})}

    def read_outputs(self, file: Path) -> dict[int | str, Any]:
        """Read a predictions.jsonl: an id, a label and the probabilities in each line.

        Raises DataError if the file is invalid.
        """
        outputs: dict[int | str, Any] = {}
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}") from error
            values = entry.get("probabilities") if isinstance(entry, dict) else None
            if (
                not isinstance(values, dict)
                or not values
                or not all(type(v) in (int, float) and 0 <= v <= 1 for v in values.values())
            ):
                raise DataError(
                    f'{where}: not a line of predictions, with "id" and "probabilities" in 0..1'
                )
            id_ = check_id(entry.get("id"), where, "text")
            if id_ in outputs:
                raise DataError(f"{where}: text {id_} occurs twice")
            outputs[id_] = dict(sorted(values.items(), key=lambda item: -item[1]))
        return outputs

    def output_entry(self, example: Example, output: Any) -> dict[str, Any]:
        return {
            "id": example.id,
            "file_name": self._names[example.id],
            "label": next(iter(output)),
            "probabilities": output,
            **({"true_label": example.targets[0]} if example.targets else {}),
        }
