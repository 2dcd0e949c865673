"""The whole path on the embedded sample in a few minutes: draw, extract, train, evaluate, caption,
and a figure.

`scene-true captions` is the share of held-out scenes whose caption names two objects, each with its
colour, size and shape, and a relation between them, all true. With features shuffled between images
it must fall to almost nothing.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np

from data.cache.reader import FeatureCache
from data.datasets.registry import open_source
from data.datasets.sample import is_true, load_scenes
from pipeline import caption, evaluate, extract, train
from pipeline.checkpoints.checkpoint import load_checkpoint
from pipeline.decoding.captioner import CaptionGenerator, caption_rows, make_generation
from pipeline.runtime import open_machine

SHOWN = 5


@click.command(context_settings={"show_default": True})
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("."),
    help="folder that holds what is made",
)
def main(work: Path) -> None:
    """Draw the embedded sample, extract, train, evaluate, and caption a few held-out scenes."""
    start = time.monotonic()
    sample, cache, run = work / "datasets/sample", work / "cache/sample", work / "runs/sample"
    if run.exists():  # a demo trains anew; sample and cache are taken up where they stand
        aside = run.with_name(f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        run.rename(aside)
        click.echo(f"{run} was there: kept as {aside}")
    at = ["--dataset", "sample", "--root", str(sample)]
    stage(extract.main, *at, "--out", str(cache))
    stage(train.main, *at, "--features", str(cache), "--out", str(run))
    stage(evaluate.main, *at, "--checkpoint", str(run), "--features", str(cache))
    test = open_source("sample", sample).select("test")
    shown = [str(image.path) for image in test[:SHOWN]]
    stage(caption.main, *shown, "--checkpoint", str(run), "--out", str(work / "captions.json"))
    report(sample, cache, run, work / "captions.json", start)


def stage(command: click.Command, *arguments: str) -> None:
    """Run a stage as from the command line."""
    click.secho(f"\n$ python -m {command.name} {' '.join(arguments)}", bold=True)
    command.main(list(arguments), standalone_mode=False)


def report(sample: Path, cache: Path, run: Path, captions: Path, start: float) -> None:
    """Print the scores, the paths of the results, the time since `start`, and the two shares of
    scene-true captions.
    """
    scores = json.loads((run / "scores-test.json").read_text())
    written = {
        line["image_id"]: line["caption"]
        for line in json.loads((run / "captions-test.json").read_text())
    }
    true = scene_true(sample, written)
    shuffled = scene_true(sample, caption_shuffled(cache, run, list(written)))
    click.echo(f"\nheld-out scenes: {len(written)}; all in {time.monotonic() - start:.0f} s")
    for name, value in scores["scores"].items():
        click.echo(f"  {name:<8} {value:.4f}")
    for what, path in (
        ("photographs", sample),
        ("features", cache),
        ("checkpoint", run),
        ("captions", captions),
    ):
        click.echo(f"  {what}: {path}")
    click.echo(
        "(scene-true: two things, their sizes, colours and shapes, and where they stand to "
        "each other, all as drawn)"
    )
    click.echo(
        f"scene-true captions, features shuffled between images: {shuffled:.1%}".replace("%", " %")
    )
    click.echo(f"scene-true captions: {true:.1%}".replace("%", " %"))


def scene_true(sample: Path, captions: dict[int, str]) -> float:
    scenes = load_scenes(sample)
    return float(np.mean([is_true(text, scenes[image_id]) for image_id, text in captions.items()]))


def caption_shuffled(cache_path: Path, run: Path, image_ids: list[int]) -> dict[int, str]:
    """Captions by image id, each generated from the features of the next image."""
    machine, checkpoint, cache = open_machine(), load_checkpoint(run), FeatureCache(cache_path)
    others = [*image_ids[1:], image_ids[0]]
    captioner = checkpoint.captioner.to(machine.device)
    how = make_generation(checkpoint.decoding, checkpoint.vocabulary, {})
    found = caption_rows(
        CaptionGenerator(captioner, checkpoint.vocabulary, machine, how), cache, others
    )
    return dict(zip(image_ids, (found[other][0].text for other in others), strict=True))


if __name__ == "__main__":
    main()
