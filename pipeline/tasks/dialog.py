"""The visual dialog task: an image, its caption and the dialogue so far, and the next answer.

The decoder generates the answer. Rounds with answer options are scored by the rank of the true
answer, where the options are ordered by their probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from data.datasets.visdial import Dialog, Round
from data.examples import Example
from data.results import Fields, read_ranks
from data.segmentation import ANSWER, CAPTION, QUESTION, without_marks
from data.sources import Source
from pipeline.cli import setting
from pipeline.scoring.bootstrap import Statistic, mean_of_groups
from pipeline.scoring.visdial import ndcg, retrieval_scores
from pipeline.tasks.base import Task

DRAWN = 99  # answers of other dialogues against which dev ranks, where it has no options
SCORES = ("R@1", "R@5", "R@10", "mean_rank", "MRR", "NDCG")


@dataclass(frozen=True)
class DialogOptions:
    """Options of --task dialog."""

    history: bool = setting(True, "read the caption and the earlier rounds before the question")
    rank: str = setting(
        "mean",
        "score that ranks answer options; mean: log-probability per word; sum: of the whole answer",
        choices=("mean", "sum"),
    )


def dialog_prompt(caption: str, rounds: Iterable[tuple[str, str]], question: str) -> str:
    """The text that the decoder reads before an answer, the newest round last.

    rounds: the earlier questions and their answers. An empty caption is left out.
    """
    parts = [f"{CAPTION} {without_marks(caption)}"] if caption.strip() else []
    for earlier, answer in rounds:
        parts.append(f"{QUESTION} {without_marks(earlier)} {ANSWER} {without_marks(answer)}")
    return " ".join([*parts, f"{QUESTION} {without_marks(question)}"])


class VisualDialog(Task):
    """Visual dialog. The scores are those of the official evaluation: R@k, mean rank, MRR, NDCG."""

    name = "dialog"
    metric = "MRR"
    unit = "rounds"
    why_unscored = (
        "no round has answer options of which the true one or the relevance is known; pass "
        "dialogues with answer_options, or --dense"
    )
    result_fields = Fields("round", "ranks")
    may_lack_targets = True
    dev_images = 500
    Options = DialogOptions
    evaluate_options = ("rank", "server")

    def __init__(self, options: Any = None, segment: str = "words") -> None:
        super().__init__(options, segment)
        self.ranks_by_mean = self.options.rank == "mean"
        self._rounds: dict[int | str, Round] = {}  # by example id
        # by example id: drawn candidates of dev, and the position of the true answer
        self._drawn: dict[int | str, tuple[list[str], int]] = {}

    def examples(self, source: Source, split: str, limit: int | None = None) -> list[Example]:
        dialogs: Mapping[int, Dialog] | None = getattr(source, "dialogs", None)
        if dialogs is None:
            raise DataError(f"--task dialog needs dialogues; dataset {source.dataset} has none")
        examples = []
        for image in source.select(split)[:limit]:
            dialog = dialogs.get(image.id)
            if dialog is None:
                continue
            earlier: list[tuple[str, str]] = []
            for number, each in enumerate(dialog.rounds, start=1):
                example_id = f"{image.id}-{number}"
                self._rounds[example_id] = each
                prompt = (
                    dialog_prompt(dialog.caption, earlier, each.question)
                    if self.options.history
                    else dialog_prompt("", (), each.question)
                )
                targets = () if each.answer is None else (each.answer,)
                examples.append(Example(example_id, image.id, prompt, targets))
                earlier.append((each.question, each.answer or ""))
        if not examples:
            raise DataError(f"split {split!r} of {source.dataset} has no dialogues")
        return examples

    def prepare(self, train: Sequence[Example], dev: Sequence[Example]) -> str:
        """Draw answers against which dev ranks, if its rounds have no options.

        Each round gets DRAWN different answers of other train dialogues, always the same ones. The
        metric is then called dev_MRR_drawn.
        """
        if not dev or any(self._rounds[example.id].gt_index is not None for example in dev):
            return ""
        self.metric = "dev_MRR_drawn"
        texts = sorted({target for example in train for target in example.targets})
        generator = np.random.default_rng(0)
        for example in dev:
            if example.targets:
                order = generator.permutation(len(texts))[: DRAWN + 1].tolist()
                others = [texts[n] for n in order if texts[n] != example.targets[0]][:DRAWN]
                position = int(generator.integers(len(others) + 1))
                others.insert(position, example.targets[0])
                self._drawn[example.id] = others, position
        return (
            f"dev has no answer options: each round is ranked against {min(DRAWN, len(texts))} "
            "answers of train dialogues (dev_MRR_drawn)"
        )

    def set_options(self, values: Mapping[str, Any]) -> None:
        """Choose the score that ranks (None: unchanged)."""
        if values["rank"]:
            self.options = replace(self.options, rank=values["rank"])
            self.ranks_by_mean = self.options.rank == "mean"

    def prompt(self, question: str) -> str:
        return dialog_prompt("", (), question)

    def candidates(self, example: Example) -> Sequence[str]:
        if example.id in self._drawn:
            return self._drawn[example.id][0]
        return self._rounds[example.id].candidates

    def scorable(self, examples: Sequence[Example]) -> list[Example]:
        """The rounds with options, of which the true one or the relevance is known."""
        return [
            example
            for example in examples
            if example.id in self._drawn
            or self._rounds[example.id].gt_index is not None
            or self._rounds[example.id].relevance is not None
        ]

    def score(self, outputs: Mapping[int | str, Any], examples: Sequence[Example],
              train: Sequence[Example] = ()) -> dict[str, Any]:  # fmt: skip
        """Compute the mean scores over rounds."""
        each = self.example_scores(outputs, examples)
        scores = {}
        for name in (*SCORES, "dev_MRR_drawn"):
            if values := [score[name] for score in each if name in score]:
                scores[name] = sum(values) / len(values)
        return scores

    def example_scores(
        self, outputs: Mapping[int | str, Any], examples: Sequence[Example]
    ) -> list[dict[str, float]]:
        all_scores = []
        for example in examples:
            ranks, round_ = outputs[example.id], self._rounds[example.id]
            scores: dict[str, float] = {}
            if example.id in self._drawn:
                scores["dev_MRR_drawn"] = 1 / ranks[self._drawn[example.id][1]]
            elif round_.gt_index is not None:
                scores |= retrieval_scores(ranks[round_.gt_index])
            if round_.relevance is not None and example.id not in self._drawn:
                value = ndcg(ranks, round_.relevance)
                scores |= {} if math.isnan(value) else {"NDCG": value}
            all_scores.append(scores)
        return all_scores

    def statistics(
        self, outputs: Mapping[int | str, Any], scores: Sequence[Mapping[str, float]],
        examples: Sequence[Example],
    ) -> list[Statistic]:  # fmt: skip
        groups = [example.image_id for example in examples]
        names = [name for name in SCORES if any(name in score for score in scores)]
        return [
            mean_of_groups(name, np.array([score.get(name, np.nan) for score in scores]), groups)
            for name in names
        ]

    def read_outputs(self, file: Path) -> dict[int | str, Any]:
        """Read a file of ranks: [{"image_id": 1, "round_id": 1, "ranks": [3, 1, 2, ...]}].

        Raises DataError if the ranks of a round are not the numbers 1 to n, for its n options.
        """
        outputs: dict[int | str, Any] = {}
        for (image_id, number), ranks in read_ranks(file).items():
            example_id = f"{image_id}-{number}"
            if round_ := self._rounds.get(example_id):
                options = len(round_.options)
                if not options:
                    raise DataError(
                        f"{file}: image {image_id}, round {number} has no options in the "
                        "dialogues; leave it out"
                    )
                if sorted(ranks) != list(range(1, options + 1)):
                    raise DataError(
                        f"{file}: image {image_id}, round {number}: the ranks are not the numbers "
                        f"1 to {options}, each once, one for each option"
                    )
            outputs[example_id] = ranks
        return outputs

    def results(
        self, outputs: Mapping[int | str, Any], examples: Sequence[Example]
    ) -> list[dict[str, Any]]:
        """The entries of EvalAI's file of ranks, for the rounds with options."""
        return [
            {
                "image_id": example.image_id,
                "round_id": int(str(example.id).rpartition("-")[2]),
                "ranks": outputs[example.id],
            }
            for example in examples
            if self.candidates(example)
        ]

    def describe(self, examples: Sequence[Example]) -> dict[str, str]:
        relevant = sum(any(self._rounds[example.id].relevance or ()) for example in examples)
        return {"rank": self.options.rank, "dense": str(relevant)}
