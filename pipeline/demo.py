"""All commands on the embedded sample, in a few minutes: draw, extract, train, evaluate, caption,
and, with the same cache, a second task: train on questions, evaluate, ask.

The last line of the output is the share of scene-true captions of the held-out scenes. A caption is
scene-true if it names two objects, each with its colour, size and shape, and a relation between
them, and all of this is true in the drawn scene. If the features are shuffled between images, the
share must fall to almost zero. The accuracy of the answers must fall to that of the questions
without images.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from data.cache.reader import FeatureCache
from data.datasets.registry import open_source
from data.datasets.sample import is_true, load_scenes
from data.datasets.scene_questions import SampleSource
from data.examples import Example
from pipeline import ask, caption, evaluate, extract, train
from pipeline.checkpoints.checkpoint import load_checkpoint
from pipeline.decoding.captioner import generate_texts, make_generator
from pipeline.runtime import open_machine
from pipeline.tasks.captioning import caption_examples
from pipeline.tasks.vqa import VisualQuestionAnswering

SHOWN = 5  # held-out scenes that are captioned
ASKED = ("colour", "count", "relation")  # types of the questions about held-out scenes
VQA_LENGTH = ("--minutes", "1")  # length of the training of visual question answering
# chosen on dev (docs/log.md)
VQA_OPTIONS = ("--batch", "16", "--lr", "5e-4")


@click.command(context_settings={"show_default": True})
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("."),
    help="folder for the sample, the cache, the run and the captions",
)
def main(work: Path) -> None:
    """Run all commands on the embedded sample: draw it, extract features, train a decoder, evaluate
    it, and caption a few held-out scenes. Then train and ask about questions with the same cache.
    """
    start = time.monotonic()
    sample, cache, run = work / "datasets/sample", work / "cache/sample", work / "runs/sample"
    vqa_run = run.with_name("sample-vqa")
    for folder in (run, vqa_run):  # a sample and a cache are reused, but the decoders are trained
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
    train_vqa(sample, cache, vqa_run, *VQA_LENGTH)
    ask_questions(sample, vqa_run)
    report_answers(sample, cache, vqa_run)
    report(sample, cache, run, captions, start)


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


def report(sample: Path, cache: Path, run: Path, captions: Path, start: float) -> None:
    """Print the scores, the paths of the results and the shares of scene-true captions.

    start: the time at the start of the demo, as time.monotonic() returned it.
    """
    scores = json.loads((run / "scores-test.json").read_text())
    captions_by_id = {
        record["image_id"]: record["caption"]
        for record in json.loads((run / "captions-test.json").read_text())
    }
    true_share = scene_true_share(sample, captions_by_id)
    examples = caption_examples(open_source("sample", sample).select("test"))
    shuffled_captions = generate_shuffled(cache, run, examples)
    shuffled_share = scene_true_share(sample, shuffled_captions)
    click.echo(
        f"\nheld-out scenes: {len(captions_by_id)}; total time {time.monotonic() - start:.0f} s"
    )
    for name, value in scores["scores"].items():
        click.echo(f"  {name:<8} {value:.4f}")
    for name, path in (
        ("photographs", sample),
        ("features", cache),
        ("checkpoint", run),
        ("captions", captions),
    ):
        click.echo(f"  {name}: {path}")
    click.echo(
        "(scene-true: the caption names two objects, with their sizes, colours and shapes, and "
        "their relative position, and all of this is true)"
    )
    echo_share("scene-true captions, features shuffled between images", shuffled_share)
    echo_share("scene-true captions", true_share)


def echo_share(name: str, share: float) -> None:
    """Print a share, 0 to 1, in percent."""
    click.echo(f"{name}: {100 * share:.1f} %")


def scene_true_share(sample: Path, captions: Mapping[Any, str]) -> float:
    """Return the share of captions (by image id) that are true in their scene."""
    scenes = load_scenes(sample)
    return float(np.mean([is_true(text, scenes[image_id]) for image_id, text in captions.items()]))


def generate_shuffled(
    cache_path: Path, run: Path, examples: Sequence[Example]
) -> dict[int | str, str]:
    """Generate the text of each example from the features of the next image.

    Returns the texts by example id.
    """
    machine, checkpoint, cache = open_machine(), load_checkpoint(run), FeatureCache(cache_path)
    image_ids = list(dict.fromkeys(example.image_id for example in examples))
    next_ids = dict(zip(image_ids, [*image_ids[1:], image_ids[0]], strict=True))
    shuffled = [replace(example, image_id=next_ids[example.image_id]) for example in examples]
    captioner = checkpoint.captioner.to(machine.device)
    generator = make_generator(captioner, checkpoint, machine, {})
    texts = generate_texts(generator, cache, shuffled)
    return {example_id: best[0].text for example_id, best in texts.items()}


# ----------------------------------------------------------------------- visual question answering


def train_vqa(sample: Path, cache: Path, run: Path, *options: str) -> None:
    """Train visual question answering on the sample, and evaluate it on the test split.

    options: further options of pipeline.train.
    """
    dataset = ["--dataset", "sample", "--root", str(sample), "--features", str(cache)]
    options = (*VQA_OPTIONS, "--out", str(run), *options)
    run_command(train.main, "--task", "vqa", *dataset, *options)
    run_command(evaluate.main, *dataset, "--checkpoint", str(run), "--split", "test")


def shuffled_scores(sample: Path, cache: Path, run: Path) -> dict[str, Any]:
    """Return the test scores of a run of `train_vqa` with features shuffled between images."""
    task = VisualQuestionAnswering()
    examples = task.examples(open_source("sample", sample), "test")
    return task.score(generate_shuffled(cache, run, examples), examples)


def report_answers(sample: Path, cache: Path, run: Path) -> None:
    """Print the accuracy of a run of `train_vqa` on the test split."""
    scores = json.loads((run / "scores-test.json").read_text())["scores"]
    shuffled = shuffled_scores(sample, cache, run)
    click.echo()
    echo_share("correct answers, features shuffled between images", shuffled["accuracy"])
    echo_share("correct answers", scores["accuracy"])


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
