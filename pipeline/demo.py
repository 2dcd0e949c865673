"""All commands on the embedded sample, in a few minutes: draw, extract, train, evaluate, caption.

The last line of the output is the share of scene-true captions of the held-out scenes. A caption is
scene-true if it names two objects, each with its colour, size and shape, and a relation between
them, and all of this is true in the drawn scene. If the features are shuffled between images, the
share must fall to almost zero.
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

SHOWN = 5  # held-out scenes that are captioned


@click.command(context_settings={"show_default": True})
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("."),
    help="folder for the sample, the cache, the run and the captions",
)
def main(work: Path) -> None:
    """Run all commands on the embedded sample: draw it, extract features, train a decoder, evaluate
    it, and caption a few held-out scenes.
    """
    start = time.monotonic()
    sample, cache, run = work / "datasets/sample", work / "cache/sample", work / "runs/sample"
    if run.exists():  # an existing sample and cache are reused, but the decoder is trained again
        backup = run.with_name(f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        run.rename(backup)
        click.echo(f"{run} already existed and was renamed to {backup}")
    dataset = ["--dataset", "sample", "--root", str(sample)]
    run_command(extract.main, *dataset, "--out", str(cache))
    run_command(train.main, *dataset, "--features", str(cache), "--out", str(run))
    run_command(evaluate.main, *dataset, "--checkpoint", str(run), "--features", str(cache))
    test = open_source("sample", sample).select("test")
    photographs = [str(image.path) for image in test[:SHOWN]]
    captions = str(work / "captions.json")
    run_command(caption.main, *photographs, "--checkpoint", str(run), "--out", captions)
    report(sample, cache, run, work / "captions.json", start)


def run_command(command: click.Command, *arguments: str) -> None:
    """Print a command and run it as from the command line."""
    click.secho(f"\n$ python -m {command.name} {' '.join(arguments)}", bold=True)
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
    shuffled_captions = caption_shuffled(cache, run, list(captions_by_id))
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
    click.echo(
        f"scene-true captions, features shuffled between images: {shuffled_share:.1%}".replace(
            "%", " %"
        )
    )
    click.echo(f"scene-true captions: {true_share:.1%}".replace("%", " %"))


def scene_true_share(sample: Path, captions: dict[int, str]) -> float:
    """Return the share of captions (by image id) that are true in their scene."""
    scenes = load_scenes(sample)
    return float(np.mean([is_true(text, scenes[image_id]) for image_id, text in captions.items()]))


def caption_shuffled(cache_path: Path, run: Path, image_ids: list[int]) -> dict[int, str]:
    """Caption each image from the features of the next image. Returns captions by image id."""
    machine, checkpoint, cache = open_machine(), load_checkpoint(run), FeatureCache(cache_path)
    next_ids = [*image_ids[1:], image_ids[0]]
    captioner = checkpoint.captioner.to(machine.device)
    generation = make_generation(checkpoint.decoding, checkpoint.vocabulary, {})
    generator = CaptionGenerator(captioner, checkpoint.vocabulary, machine, generation)
    captions = caption_rows(generator, cache, next_ids)
    return {
        image_id: captions[next_id][0].text
        for image_id, next_id in zip(image_ids, next_ids, strict=True)
    }


if __name__ == "__main__":
    main()
