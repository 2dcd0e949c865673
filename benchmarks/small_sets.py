"""Training on small datasets, compared with the best constant caption.

    python -m benchmarks.small_sets --features cache/f8k --work FOLDER [--sizes 12,30,100,200,500]
    [--seeds 0,1,2]

A dataset is the first N photographs of Flickr8k's train split by file name, with 1 or 5 captions
each. A decoder is trained with the default options of pipeline.train. Its captions of the 1,000 val
photographs are scored with their five references. The constant caption is the train caption with
the highest mean CIDEr on the train photographs; it is used for every val photograph.

Finished runs in --work are not repeated. The table is printed in Markdown.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.measure import header, real_option
from data.tokens import tokenize
from pipeline.scoring.metrics import cider
from pipeline.scoring.ngrams import References


@click.command(context_settings={"show_default": True})
@real_option("folder of Flickr8k")
@click.option(
    "--features",
    type=click.Path(exists=True, path_type=Path),
    default="cache/f8k",
    help="cache of Flickr8k",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="folder for the runs, which are kept",
)
@click.option(
    "--sizes", default="12,30,100,200,500", help="numbers of photographs, separated by commas"
)
@click.option("--captions", default="1,5", help="numbers of captions per photograph")
@click.option("--seeds", default="0,1,2", help="seeds of the runs")
def main(real: Path, features: Path, work: Path, sizes: str, captions: str, seeds: str) -> None:
    """Train on small subsets of Flickr8k with default options, and score val."""
    images = json.loads((real / "flickr8k" / "dataset_flickr8k.json").read_text())["images"]
    train = sorted(
        (image for image in images if image["split"] == "train"),
        key=lambda image: image["filename"],
    )
    val = [image for image in images if image["split"] == "val"]
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in map(int, sizes.split(",")):
        for count in map(int, captions.split(",")):
            part = [{**image, "sentences": image["sentences"][:count]} for image in train[:size]]
            dataset = work / f"dataset_{size}_{count}.json"
            constant = work / f"constant_{size}_{count}.json"
            dataset.write_text(json.dumps({"images": part + val}))
            caption = best_constant(part)
            constant.write_text(
                json.dumps([{"image_id": image["imgid"], "caption": caption} for image in val])
            )
            options = ["--dataset", "karpathy", "--root", str(real / "flickr8k")]
            options += ["--annotations", str(dataset), "--features", str(features)]
            runs = [
                measure(work / f"run_{size}_{count}_{seed}", options, constant, seed)
                for seed in seeds.split(",")
            ]
            rows.append(row(size, count, runs))
            click.echo(rows[-1], err=True)
    click.echo(json.dumps(header()))
    click.echo(
        "| photographs x captions | minutes | steps | dev CIDEr | val CIDEr | constant | "
        "difference, 95 % |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for line in rows:
        click.echo(line)


def best_constant(images: list[dict[str, Any]]) -> str:
    """Return the caption with the highest mean CIDEr over the references of all images."""
    captions = {
        image["imgid"]: [sentence["raw"] for sentence in image["sentences"]] for image in images
    }
    references, ids = References(captions), list(captions)
    texts = sorted({text for group in captions.values() for text in group})
    means = [cider(references, ids, [words] * len(ids)).mean() for words in map(tokenize, texts)]
    return texts[int(np.argmax(means))]


def measure(run: Path, options: list[str], constant: Path, seed: str) -> dict[str, Any]:
    """Train and evaluate one run with the commands of a user, and return its figures.

    A finished run is read from its JSON file.
    """
    record = run.with_suffix(".json")
    if record.exists():
        return json.loads(record.read_text())
    start = time.monotonic()
    resume = ["--resume"] if run.exists() else []
    run_command("train", *options, "--seed", seed, "--out", str(run), *resume)
    minutes = (time.monotonic() - start) / 60
    evaluation = ["--checkpoint", str(run), "--split", "val", "--against", str(constant)]
    run_command("evaluate", *options, *evaluation, "--out", str(run / "val.json"))
    scores = json.loads((run / "val.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "dev" in line]
    best = max(lines, key=lambda line: (line["dev"]["CIDEr"], -line["dev"]["loss"]))
    against = scores["against"]
    figures = {
        "minutes": minutes,
        "steps": lines[-1]["step"],
        "dev": best["dev"]["CIDEr"],
        "val": scores["scores"]["CIDEr"],
        "constant": against["scores"]["CIDEr"],
        "interval": against["differences"]["CIDEr"]["interval"],
    }
    record.write_text(json.dumps(figures))
    return figures


def run_command(stage: str, *options: str) -> None:
    command = [sys.executable, "-m", f"pipeline.{stage}", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def row(size: int, count: int, runs: list[dict[str, Any]]) -> str:
    """Return a row of the table. Minutes and steps are medians; scores are listed for each seed."""

    def scores(name: str) -> str:
        return ", ".join(f"{run[name]:.3f}" for run in runs)

    differences = ", ".join("{:+.3f} to {:+.3f}".format(*run["interval"]) for run in runs)
    minutes, steps = (statistics.median(run[name] for run in runs) for name in ("minutes", "steps"))
    cells = [
        f"{size} x {count}",
        f"{minutes:.1f}",
        f"{steps:,.0f}",
        scores("dev"),
        scores("val"),
        f"{runs[0]['constant']:.3f}",
        differences,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
