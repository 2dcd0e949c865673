"""All commands on the embedded sample, in a few minutes: draw, extract, train, evaluate, caption,
and with the same cache three other tasks: questions, dialogues and sentiments.

The output ends with a table of the scores on held-out scenes. Beside each stands the score with
the features of another image: a decoder that looks at the image must lose it. Captions are scored
by the share of scene-true ones. A caption is scene-true if it names two objects, each with its
colour, size and shape, and a relation between them, and all of this is true in the drawn scene.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from data.cache.reader import FeatureCache
from data.datasets.registry import open_source
from data.datasets.sample import is_true, load_scenes
from data.datasets.scene_questions import SampleSource
from pipeline import ask, caption, evaluate, extract, train
from pipeline.checkpoints.checkpoint import load_checkpoint
from pipeline.decoding.captioner import make_generator
from pipeline.decoding.outputs import task_outputs
from pipeline.runtime import open_machine

SHOWN = 5  # held-out scenes that are captioned
ASKED = ("colour", "count", "relation")  # types of the questions about held-out scenes
# minutes of training of the other tasks
LENGTH = {"vqa": "0.7", "dialog": "1", "sentiment": "0.45"}
SCORE = {"vqa": "accuracy", "dialog": "R@1", "sentiment": "accuracy"}  # in the table
# options of the training of the other tasks, chosen on dev (docs/log.md)
OPTIONS = ("--batch", "16", "--dropout", "0")
RATE = {"vqa": "1e-3", "dialog": "1e-3", "sentiment": "5e-4"}


@click.command(context_settings={"show_default": True})
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("."),
    help="folder for the sample, the cache, the run and the captions",
)
def main(work: Path) -> None:
    """Run all commands on the embedded sample: draw it, extract features, train a decoder, evaluate
    it, and caption a few held-out scenes. Then train three other tasks with the same cache.
    """
    start = time.monotonic()
    sample, cache, run = work / "datasets/sample", work / "cache/sample", work / "runs/sample"
    runs = {task: run.with_name(f"sample-{task}") for task in LENGTH}
    for folder in (run, *runs.values()):  # a sample and a cache are reused, decoders are trained
        set_aside(folder)
    dataset = ["--dataset", "sample", "--root", str(sample)]
    run_command(extract.main, *dataset, "--out", str(cache))
    dataset += ["--features", str(cache)]
    run_command(train.main, *dataset, "--out", str(run))
    run_command(evaluate.main, *dataset, "--checkpoint", str(run))
    photographs = [str(image.path) for image in open_source("sample", sample).select("test")]
    captions = work / "captions.json"
    options = ["--checkpoint", str(run), "--out", str(captions)]
    run_command(caption.main, *photographs[:SHOWN], *options)
    for task, folder in runs.items():
        train_task(task, sample, cache, folder, "--minutes", LENGTH[task])
    ask_questions(sample, runs["vqa"])
    report(sample, cache, run, runs, start)


def set_aside(folder: Path) -> None:
    """Rename a folder if it exists, so that a new run can be written to its path."""
    if folder.exists():
        backup = folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(backup)
        click.echo(f"{folder} already existed and was renamed to {backup}")


def run_command(command: click.Command, *arguments: str) -> None:
    """Print a command and run it as from the command line."""
    click.secho(f"\n$ python -m {command.name} {shlex.join(arguments)}", bold=True)
    command.main(list(arguments), standalone_mode=False)


def report(sample: Path, cache: Path, run: Path, runs: Mapping[str, Path], start: float) -> None:
    """Print where the results are, and the table of the scores of all tasks.

    Args:
        run: the run of captioning. runs: those of the other tasks, by name.
        start: the time at the start of the demo, as time.monotonic() returned it.
    """
    rows = [("captioning", "scene-true captions", *scene_true_shares(sample, cache, run))]
    for task, folder in runs.items():
        scores = json.loads((folder / "scores-test.json").read_text())["scores"]
        shuffled = shuffled_scores(sample, cache, folder)
        rows.append((task, SCORE[task], scores[SCORE[task]], shuffled[SCORE[task]]))
    click.echo(f"\nphotographs {sample}, features {cache}, runs {run.parent}")
    click.echo(f"total time {time.monotonic() - start:.0f} s")
    click.echo("\none cache, four tasks; held-out scenes:")
    click.echo(f"  {'task':<12}{'score':<22}{'':>8}{'features of another image':>28}")
    for task, name, score, shuffled_score in rows:
        click.echo(f"  {task:<12}{name:<22}{score:>8.1%}{shuffled_score:>28.1%}")


def scene_true_share(sample: Path, captions: Mapping[Any, str]) -> float:
    """Return the share of captions (by image id) that are true in their scene."""
    scenes = load_scenes(sample)
    return float(np.mean([is_true(text, scenes[image_id]) for image_id, text in captions.items()]))


def scene_true_shares(sample: Path, cache: Path, run: Path) -> tuple[float, float]:
    """Return the share of scene-true captions of an evaluated run, and that of another image's
    features.
    """
    written = json.loads((run / "captions-test.json").read_text())
    captions = {record["image_id"]: record["caption"] for record in written}
    shuffled = generate_shuffled(sample, cache, run)
    return scene_true_share(sample, captions), scene_true_share(sample, shuffled)


def generate_shuffled(sample: Path, cache_path: Path, run: Path) -> dict[Any, Any]:
    """Return the output of each test example from the features of the next image, by example id."""
    machine, checkpoint, cache = open_machine(), load_checkpoint(run), FeatureCache(cache_path)
    task = checkpoint.new_task()
    examples = task.examples(open_source("sample", sample), "test")
    image_ids = list(dict.fromkeys(example.image_id for example in examples))
    next_ids = dict(zip(image_ids, [*image_ids[1:], image_ids[0]], strict=True))
    shuffled = [replace(example, image_id=next_ids[example.image_id]) for example in examples]
    captioner = checkpoint.captioner.to(machine.device)
    generator = make_generator(captioner, checkpoint, machine, {})
    return task_outputs(task, generator, cache, shuffled).by_id


def shuffled_scores(sample: Path, cache: Path, run: Path) -> dict[str, Any]:
    """Return the test scores of a run with features shuffled between images."""
    checkpoint = load_checkpoint(run)
    task = checkpoint.new_task()
    examples = task.examples(open_source("sample", sample), "test")
    return task.score(generate_shuffled(sample, cache, run), examples)


# ------------------------------------------------------------------------------------- other tasks


def train_task(
    task: str, sample: Path, cache: Path | None, run: Path, *options: str
) -> dict[str, Any]:
    """Train a task on the sample, evaluate it on the test split, and return its scores.

    Args:
        cache: its features; None: train without images.
        options: further options of pipeline.train.
    """
    dataset = ["--dataset", "sample", "--root", str(sample), "--features", str(cache or "none")]
    rate = ("--lr", RATE[task])
    run_command(train.main, "--task", task, *dataset, *OPTIONS, *rate, "--out", str(run), *options)
    run_command(evaluate.main, *dataset, "--checkpoint", str(run), "--split", "test")
    return json.loads((run / "scores-test.json").read_text())["scores"]


def ask_questions(sample: Path, run: Path) -> None:
    """Ask a question of each type of ASKED, each about another held-out scene."""
    source = open_source("sample", sample)
    assert isinstance(source, SampleSource)
    test_ids = {image.id for image in source.select("test")}
    for type_ in ASKED:
        question = next(
            question
            for question in source.questions
            if question.question_type == type_ and question.image_id in test_ids
        )
        test_ids.remove(question.image_id)  # each question is about another scene
        photograph = str(source.by_id[question.image_id].path)
        run_command(ask.main, photograph, question.text, "--checkpoint", str(run))
        click.echo(f"  true answer: {question.best}")


if __name__ == "__main__":
    main()
