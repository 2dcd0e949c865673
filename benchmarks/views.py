"""What augmented views of the photographs are worth, at equal numbers of steps.

    python -m pipeline.extract --dataset karpathy --root $ONCEOVER_REAL/flickr8k
        --views flip,crop:3,color:3 ... --out cache/views
    python -m benchmarks.views --features cache/views --work FOLDER [-- options of pipeline.train]

Trains one decoder per set of views on Flickr8k, without early stopping: on 2, 4 and 8 views (the
original among them). One cache with all views serves all runs: a run sees
the views of its set and no others. The table has CIDEr on dev after each epoch. The best epoch of
each run is scored on val, and compared with the run with 2 views by the paired bootstrap.

Finished runs in --work are not repeated. The table is printed in Markdown.
"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import click

from benchmarks.commands import command
from benchmarks.measure import header, real_option
from data.cache import reader
from pipeline import train

SETS = {
    2: ("flip",),
    4: ("flip", "crop1", "color1"),
    8: ("flip", "crop1", "crop2", "crop3", "color1", "color2", "color3"),
}
RECIPE = ["--preset", "tiny", "--epochs", "12", "--patience", "100"]


@click.command(context_settings={"show_default": True})
@real_option("folder of Flickr8k")
@click.option(
    "--features",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="cache of Flickr8k, extracted with --views flip,crop:3,color:3",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="folder for the runs, which are kept",
)
@click.argument("more", nargs=-1)
def main(real: Path, features: Path, work: Path, more: tuple[str, ...]) -> None:
    """Train with 2, 4 and 8 views for the same number of steps, and score val."""
    source = ["--dataset", "karpathy", "--root", str(real / "flickr8k")]
    source += ["--features", str(features)]
    for count, views in SETS.items():
        run = work / f"views_{count}"
        if not (run / "finished").exists():
            train_alone(views, [*source, *RECIPE, *more, "--out", str(run)])
            (run / "finished").touch()
    rows = []
    for count in SETS:
        run, against = work / f"views_{count}", work / "views_2" / "captions-val.json"
        scoring = [*source, "--checkpoint", str(run), "--split", "val"]
        if count != 2:
            scoring += ["--against", str(against)]
        command("evaluate", *scoring)
        rows.append(row(count, run))
    click.echo(json.dumps(header()))
    click.echo("| views | CIDEr on dev after each epoch | best | CIDEr on val | minus 2 views |")
    click.echo("|---|---|---|---|---|")
    for line in rows:
        click.echo(line)


def train_on(views: tuple[str, ...], options: list[str]) -> None:
    """Run pipeline.train on a cache of which only `views` and the original are used."""
    reader.views_of = lambda provenance: views
    train.main(options, standalone_mode=False)


def train_alone(views: tuple[str, ...], options: list[str]) -> None:
    """Run `train_on` in a process of its own. Raises ClickException if it fails."""
    arguments = (views, options)
    process = multiprocessing.get_context("spawn").Process(target=train_on, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise click.ClickException("the training failed; its message is above")


def row(count: int, run: Path) -> str:
    """Return a row of the table, from the metrics and the scores of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    dev = [line["dev"]["CIDEr"] for line in lines if "dev" in line]
    scores = json.loads((run / "scores-val.json").read_text())
    low, high = scores["intervals"]["CIDEr"]
    difference = ""
    if "against" in scores:
        against = scores["against"]["differences"]["CIDEr"]
        difference = "{:+.3f} ({:+.3f} to {:+.3f})".format(against["value"], *against["interval"])
    cells = [
        str(count),
        " ".join(f"{score:.3f}" for score in dev),
        f"epoch {dev.index(max(dev)) + 1}, {max(dev):.3f}",
        f"{scores['scores']['CIDEr']:.3f} ({low:.3f} to {high:.3f})",
        difference,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
