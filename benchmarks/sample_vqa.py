"""Visual question answering on the embedded sample, whose true answers are known.

    python -m benchmarks.sample_vqa [--work FOLDER] [--seeds 0,1,2] [--json FILE]

Trains --task vqa once for each seed and scores the held-out scenes (split test): the accuracy over
all questions and of each type. Beside it:

- the accuracy of the same decoder with features shuffled between images,
- the prior: the accuracy of the most frequent train answer to the same question text.

The aims are an accuracy of 0.95, 0.90 for each type, and with shuffled features at most 0.05 above
the prior. A sample and a cache in --work are reused. The options of training were chosen on dev.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.measure import header, report
from benchmarks.sample_runs import sample_command, train_all
from data.datasets.registry import open_source
from pipeline.tasks.vqa import VisualQuestionAnswering

EPOCHS = "8"


@sample_command
def main(work: Path, seeds: str, out: Path | None) -> None:
    """Train visual question answering on the sample, and report the accuracy on held-out scenes."""
    start = time.monotonic()
    options = {f"seed {seed}": ("--epochs", EPOCHS, "--seed", seed) for seed in seeds.split(",")}
    figures = header()
    for name, (job, scores) in train_all(work, "vqa", options).items():
        figures["prior: accuracy"] = prior(job.sample)
        figures |= {f"{name}: {score}": value for score, value in by_name(scores).items()}
        figures[f"{name}: shuffled accuracy"] = scores["shuffled"]["accuracy"]
        figures[f"{name}: seconds"] = scores["seconds"]
    figures["minutes"] = (time.monotonic() - start) / 60
    report(figures, out)


def by_name(scores: dict[str, Any]) -> dict[str, float]:
    """Return the accuracy over all questions and of each question type."""
    return {"accuracy": scores["accuracy"], **scores["by_question_type"]}


def prior(sample: Path) -> float:
    """Return the accuracy on test of the most frequent train answer to the same question text."""
    source, task = open_source("sample", sample), VisualQuestionAnswering()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example in task.examples(source, "train"):
        counts[example.prompt][example.targets[0]] += 1
    best = {text: answers.most_common(1)[0][0] for text, answers in counts.items()}
    examples = task.examples(source, "test")
    return task.score({e.id: best.get(e.prompt, "") for e in examples}, examples)["accuracy"]


if __name__ == "__main__":
    main()
