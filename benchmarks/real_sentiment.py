"""Image-text sentiment on real tweets, beside naive Bayes on their words.

    python -m benchmarks.real_sentiment --features CACHE --work FOLDER [--folds 5] [--seeds 0,1,2]

Options of pipeline.train follow after `--`. Trains --use both, text and image on train and scores
val. Naive Bayes (multinomial, add-one smoothing, over the words that the decoder reads) is trained
on the same tweets. Differences are tested by the paired bootstrap over photographs.

--folds N scores train by cross-validation instead: each tweet is predicted by a model (--use both)
that was trained without its fold. Tweets with equal photographs or equal words are in one fold.

--dev scores the dev part of train, to choose options.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from benchmarks.commands import command, train
from benchmarks.measure import header, real_option
from data.datasets.folder import FolderSource
from data.datasets.registry import open_source
from data.examples import Example
from data.tokens import tokenize
from pipeline.scoring.bootstrap import interval, paired_difference, resample
from pipeline.tasks.sentiment import SCORES, Sentiment

USES = ("both", "text", "image")
RESAMPLES = 1000
Outputs = dict[int | str, dict[str, float]]  # probabilities by label, by example id


@click.command(context_settings={"show_default": True})
@real_option("folder of real photographs and tweets")
@click.option("--features", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for the runs")
@click.option("--folds", default=0, help="cross-validation on train with this number of folds")
@click.option("--dev", is_flag=True, help="score the dev part of train")
@click.option("--seeds", default="0", help="seeds of each model; several form an ensemble")
@click.argument("more", nargs=-1)
def main(
    real: Path, features: Path, work: Path, folds: int, dev: bool, seeds: str, more: tuple[str, ...]
) -> None:
    """Train on real tweets, and compare with naive Bayes on their words."""
    root = real / "tasks" / "sentiment"
    source = open_source("folder", root)
    assert isinstance(source, FolderSource)
    task = Sentiment()
    work.mkdir(parents=True, exist_ok=True)
    given = Given(root, features, seeds.split(","), more)
    if folds:
        examples = task.examples(source, "train") + task.examples(source, "dev")
        outputs = cross_validate(source, task, examples, given, work, folds)
    else:
        train_examples = task.examples(source, "train")
        examples = task.examples(source, "dev" if dev else "val")
        if not dev:
            train_examples += task.examples(source, "dev")
        outputs = {"naive Bayes": naive_bayes(train_examples, examples)}
        for use in USES:
            split = "dev" if dev else "val"
            outputs[use] = predictions(task, work / use, given, split, use)
    click.echo(json.dumps(header()))
    click.echo(f"{len(examples):,} tweets; differences are minus naive Bayes, and minus text")
    for line in table(task, examples, outputs):
        click.echo(line)


def table(
    task: Sentiment, examples: Sequence[Example], outputs: dict[str, Outputs]
) -> Iterable[str]:
    """Yield the lines of a table of the scores with their intervals and differences."""
    scores = {name: task.score(each, examples) for name, each in outputs.items()}
    drawn = {
        name: resample(task.statistics(each, [], examples), RESAMPLES, 0)
        for name, each in outputs.items()
    }
    yield f"| model | {' | '.join(f'{s} | minus naive Bayes | minus text' for s in SCORES[:2])} |"
    yield "|---|" + "---|" * 6
    for name in outputs:
        cells = []
        for score in SCORES[:2]:
            value = scores[name][score]
            cells.append(f"{value:.3f} ({formatted(interval(drawn[name][score]))})")
            for other in ("naive Bayes", "text"):
                if other == name or other not in outputs:
                    cells.append("")
                    continue
                difference = paired_difference(
                    value, scores[other][score], drawn[name][score], drawn[other][score]
                )
                low_high = formatted(difference["interval"], "+")
                cells.append(f"{difference['value']:+.3f} ({low_high})")
        yield f"| {name} | {' | '.join(cells)} |"


def formatted(bounds: Sequence[float], sign: str = "") -> str:
    low, high = bounds
    return f"{low:{sign}.3f} to {high:{sign}.3f}"


class Given(NamedTuple):
    """What all runs share: the folder of tweets, the cache, the seeds and options of train."""

    root: Path
    features: Path
    seeds: list[str]
    more: Sequence[str]


def predictions(
    task: Sentiment, work: Path, given: Given, split: str, use: str,
    scored: Sequence[str] = (), trained: Sequence[str] = (),
) -> Outputs:  # fmt: skip
    """Train one run for each seed, and return the predictions of their ensemble.

    scored, trained: further options of evaluate and of train.
    """
    dataset = ["--dataset", "folder", "--root", str(given.root), "--features", str(given.features)]
    checkpoints: list[str] = []
    for seed in given.seeds:
        run = work / f"seed{seed}"
        checkpoints += ["--checkpoint", str(run)]
        train(run, "--task", "sentiment", *dataset, "--use", use, "--seed", seed, *trained,
              *given.more)  # fmt: skip
    out = work / split / "scores.json"
    command("evaluate", *checkpoints, *dataset, "--split", split, "--out", str(out), *scored)
    return {**task.read_outputs(out.with_name("predictions.jsonl"))}


# --------------------------------------------------------------------------------- cross-validation


def cross_validate(
    source: FolderSource, task: Sentiment, examples: Sequence[Example], given: Given, work: Path,
    folds: int,
) -> dict[str, Outputs]:  # fmt: skip
    """Return the out-of-fold predictions of the decoder and of naive Bayes."""
    fold_of = make_folds(source, examples, folds)
    outputs: dict[str, Outputs] = {"naive Bayes": {}, "both": {}}
    for fold in range(folds):
        inside = [example for example in examples if fold_of[example.id] == fold]
        outside = [example for example in examples if fold_of[example.id] != fold]
        ids = work / f"fold{fold}.txt"
        ids.write_text("\n".join(str(example.image_id) for example in inside))
        outputs["naive Bayes"] |= naive_bayes(outside, inside)
        outputs["both"] |= predictions(
            task, work / f"fold{fold}", given, "all", "both", ["--ids", str(ids)],
            ["--exclude-ids", str(ids)],
        )  # fmt: skip
    return outputs


def make_folds(
    source: FolderSource, examples: Sequence[Example], folds: int
) -> dict[int | str, int]:
    """Return the fold of each example. Equal photographs and equal words are in one fold."""
    group: dict[int | str, int] = {}
    first: dict[object, int | str] = {}
    for number, example in enumerate(examples):
        assert example.image_id is not None
        photograph = hashlib.md5(source.by_id[example.image_id].path.read_bytes()).digest()
        keys = (photograph, tuple(tokenize(example.prompt)))
        known = {group[first[key]] for key in keys if key in first}
        group[example.id] = min(known, default=number)
        for other in [id_ for id_, each in group.items() if each in known]:
            group[other] = group[example.id]
        for key in keys:
            first.setdefault(key, example.id)
    sizes = Counter(group.values())
    order = np.random.default_rng(0).permutation(sorted(sizes))
    fold_of_group = {int(each): number % folds for number, each in enumerate(order)}
    return {example_id: fold_of_group[each] for example_id, each in group.items()}


def naive_bayes(train: Sequence[Example], examples: Sequence[Example]) -> Outputs:
    """Return the probability of each label of examples, by multinomial naive Bayes."""
    words: dict[str, Counter[str]] = defaultdict(Counter)
    labels = Counter(example.targets[0] for example in train)
    for example in train:
        words[example.targets[0]].update(tokenize(example.prompt))
    known = {word for counts in words.values() for word in counts}
    outputs: Outputs = {}
    for example in examples:
        log_p = {}
        for label, count in labels.items():
            total = words[label].total() + len(known)
            log_p[label] = np.log(count) + sum(
                np.log((words[label][word] + 1) / total)
                for word in tokenize(example.prompt)
                if word in known
            )
        p = np.exp(np.array(list(log_p.values())) - max(log_p.values()))
        by_label: dict[str, Any] = dict(zip(log_p, (p / p.sum()).tolist(), strict=True))
        outputs[example.id] = dict(sorted(by_label.items(), key=lambda item: -item[1]))
    return outputs


if __name__ == "__main__":
    main()
