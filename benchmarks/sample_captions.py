"""Captions of the embedded sample, over each kind of regions: how many are true in their scene?

    python -m benchmarks.sample_captions [--work FOLDER] [--regions grid,detector,grid+detector]

For each kind of regions the script runs the commands of the demo: extract, train, evaluate. A
caption is scene-true if it names two objects, each with its colour, size and shape, and a relation
between them, and all of this is true in the drawn scene. The table has the share of scene-true
captions of the held-out scenes (split test), and the share with the features of another image.

The aim with regions of a detector: 0.95.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from benchmarks.measure import header
from pipeline import evaluate, extract, train
from pipeline.demo import run_command, scene_true_shares, set_aside


@click.command(context_settings={"show_default": True})
@click.option("--regions", default="grid,detector,grid+detector", help="kinds, with commas")
@click.option("--seed", default="0", help="seed of the runs")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("."),
    help="folder for the sample, the caches and the runs",
)
def main(regions: str, seed: str, work: Path) -> None:
    """Train captioning on the sample over each kind of regions, and score the held-out scenes."""
    sample = work / "datasets/sample"
    dataset = ["--dataset", "sample", "--root", str(sample)]
    rows = []
    for kind in regions.split(","):
        cache, run = work / f"cache/sample-{kind}", work / f"runs/sample-{kind}"
        set_aside(run)
        run_command(extract.main, *dataset, "--regions", kind, "--out", str(cache))
        start = time.monotonic()
        features = [*dataset, "--features", str(cache)]
        run_command(train.main, *features, "--seed", seed, "--out", str(run))
        minutes = (time.monotonic() - start) / 60
        run_command(evaluate.main, *features, "--checkpoint", str(run), "--split", "test")
        share, shuffled = scene_true_shares(sample, cache, run)
        rows.append((kind, f"{share:.3f}", f"{shuffled:.3f}", f"{minutes:.1f}"))
    click.echo(json.dumps(header()))
    click.echo(
        "| regions | scene-true captions | with features of another image | minutes to train |"
    )
    click.echo("|---|---|---|---|")
    for row in rows:
        click.echo(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
