"""Visual question answering on the embedded sample, whose true answers are known.

    python -m benchmarks.sample_vqa [--work FOLDER] [--seeds 0,1,2] [--json FILE]

Trains --task vqa once for each seed and scores the held-out scenes (split test): the accuracy over
all questions and of each type. Beside it:

- the accuracy of the same decoder with features shuffled between images,
- the prior: the accuracy of the most frequent train answer to the same question text.

The aims are an accuracy of 0.95, 0.90 for each type, and with shuffled features at most 0.05 above
the prior. A sample and a cache in --work are reused. The options of training were chosen on dev.
The seeds are trained at the same time, each in a process of one thread: this takes less time than
one after the other with all cores.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import header, report
from benchmarks.sample_runs import sample_command
from data.datasets.registry import open_source
from pipeline import extract
from pipeline.demo import run_command, set_aside, shuffled_scores, train_task
from pipeline.tasks.vqa import VisualQuestionAnswering

EPOCHS = "10"


@sample_command
def main(work: Path, seeds: str, out: Path | None) -> None:
    """Train visual question answering on the sample, and report the accuracy on held-out scenes."""
    start = time.monotonic()
    sample, cache = work / "datasets/sample", work / "cache/sample"
    run_command(extract.main, "--dataset", "sample", "--root", str(sample), "--out", str(cache))
    figures = header() | {"extraction: seconds": time.monotonic() - start}
    figures["prior: accuracy"] = prior(sample)
    names = seeds.split(",")
    with multiprocessing.get_context("spawn").Pool(len(names), torch.set_num_threads, (1,)) as pool:
        for one_seed in pool.starmap(measure, [(work, seed) for seed in names]):
            figures |= one_seed
    figures["minutes"] = (time.monotonic() - start) / 60
    report(figures, out)


def measure(work: Path, seed: str) -> dict[str, float]:
    """Train and score one seed, and return its figures by name."""
    start = time.monotonic()
    sample, cache, run = (
        work / name for name in ("datasets/sample", "cache/sample", f"runs/sample-vqa-{seed}")
    )
    set_aside(run)
    train_task("vqa", sample, cache, run, "--epochs", EPOCHS, "--seed", seed)
    scores = json.loads((run / "scores-test.json").read_text())["scores"]
    return {
        **{f"seed {seed}: {name}": value for name, value in by_name(scores).items()},
        f"seed {seed}: shuffled accuracy": shuffled_scores(sample, cache, run)["accuracy"],
        f"seed {seed}: seconds": time.monotonic() - start,
    }


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
