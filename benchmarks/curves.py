"""Plot training runs from their metrics.jsonl: CIDEr on dev, and the loss or reward on train.

    python -m benchmarks.curves runs/f8k-scst [runs/OTHER ...] --out docs/scst_flickr8k.svg

Needs matplotlib: pip install -e ".[bench]".
"""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument(
    "runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="the image file; the suffix selects the format (.svg, .png, ...)",
)
def main(runs: tuple[Path, ...], out: Path) -> None:
    """Plot the curves of RUNS over minutes."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise click.ClickException(
            "plotting needs matplotlib: pip install -e '.[bench]'"
        ) from error
    mpl.use("Agg")
    mpl.rcParams |= {
        "svg.hashsalt": "onceover",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot

    figure, (score_axes, train_axes) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [
            line for line in lines if "seconds" in line
        ]  # only lines of validations contain the time
        minutes = [line["seconds"]["elapsed"] / 60 for line in lines]
        scores = [
            (minute, line["dev"]["CIDEr"])
            for minute, line in zip(minutes, lines, strict=True)
            if "dev" in line
        ]
        score_axes.plot(*zip(*scores, strict=True), marker=".", label=run.name)
        metric = "reward" if any("reward" in line["train"] for line in lines) else "loss"
        training = [
            (minute, line["train"][metric])
            for minute, line in zip(minutes, lines, strict=True)
            if line["train"]
        ]
        train_axes.plot(*zip(*training, strict=True), marker=".", label=run.name)
    score_axes.set(title="CIDEr on dev", xlabel="minutes")
    train_axes.set(title=f"{metric} on train", xlabel="minutes")
    for axes in (score_axes, train_axes):
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        score_axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    click.echo(out)


if __name__ == "__main__":
    main()
