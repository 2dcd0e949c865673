"""Visual question answering on real photographs, with and without the right photograph.

    python -m benchmarks.real_questions coco --features cache/vqa --work FOLDER [--seeds 0,1,2]
    python -m benchmarks.real_questions daquar --features cache/daquar --work FOLDER

Options of pipeline.train follow after `--`. `coco` trains on five sources of questions about COCO
photographs together and scores each apart. A train question about yes or no whose text occurs in
val is left out, because in balanced pairs the same text has the opposite answer there; the fitted
part and the dev part of train are kept apart in the same way. A question that two sources have
about one photograph counts once. vqax also has other questions; those whose text occurs in val are
left out too. `daquar` trains on train.csv and scores test.csv.

With several seeds, the last row is their ensemble.

Two models without the right photograph stand beside each model, and the differences are tested by
the paired bootstrap over photographs: the same weights with the regions of another photograph
("shuffled"), and a model of the same sizes that is trained without regions ("blind").

--dev scores the dev part of train instead of val or test, to choose options.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.commands import command, train
from benchmarks.measure import header, real_option
from data.datasets.registry import open_source
from data.datasets.vqa import QuestionSource

SOURCES = ("vqax", "yesno", "okvqa", "aokvqa", "pope")  # of a repeated question the first counts
BALANCED = ("yesno", "vqax", "pope")

Entry = dict[str, Any]
Pair = tuple[list[Entry], list[Entry]]  # questions and annotations, in the same order


@click.command(context_settings={"show_default": True})
@real_option("folder of real photographs and questions")
@click.argument("data", type=click.Choice(("coco", "daquar")))
@click.option("--features", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for the runs")
@click.option("--seeds", default="0", help="seeds of the runs, separated by commas")
@click.option("--dev", is_flag=True, help="score the dev part of train")
@click.option("--blind/--no-blind", default=True, help="also train a model without regions")
@click.argument("more", nargs=-1)
def main(
    real: Path, data: str, features: Path, work: Path, seeds: str, dev: bool, blind: bool,
    more: tuple[str, ...],
) -> None:  # fmt: skip
    """Train on real questions, and score with the right, with another and without a photograph."""
    work.mkdir(parents=True, exist_ok=True)
    prepare = prepare_coco if data == "coco" else prepare_daquar
    train_files, scored = prepare(real / "tasks", work, dev)
    click.echo(json.dumps(header()))
    click.echo(
        "| seed | questions | n | right photograph | shuffled | difference | blind | difference |"
    )
    click.echo("|---|---|---|---|---|---|---|---|")
    runs = {seed: [work / f"run{seed}"] for seed in seeds.split(",")}
    for seed, (run,) in runs.items():
        given = ["--task", "vqa", "--dataset", "vqa", *train_files, *more, "--seed", seed]
        train(run, *given, "--features", features)
        if blind:
            train(blind_run(run), *given, "--features", "none")
    if len(runs) > 1:
        runs["ensemble"] = [run for (run,) in runs.values()]
    for seed, members in runs.items():
        for name, (files, shuffled_files) in scored.items():
            folder = work / f"scores-{seed}" / name
            click.echo(row(seed, name, members, folder, files, shuffled_files, features, blind))


def blind_run(run: Path) -> Path:
    """The run of the same seed without regions."""
    return run.with_name(run.name.replace("run", "blind"))


def row(
    seed: str, name: str, runs: list[Path], folder: Path, files: list[str],
    shuffled_files: list[str], features: Path, blind: bool,
) -> str:  # fmt: skip
    """Score a run, or an ensemble of several, on one set of questions, and format the row."""
    right = evaluate(folder / "right", runs, files, features)
    shuffled = evaluate(folder / "shuffled", runs, shuffled_files, features)
    cells = [seed, name, str(right["examples"]), with_interval(right)]
    others = [(folder / "shuffled", shuffled)]
    if blind:
        blind_runs = [blind_run(run) for run in runs]
        others.append(
            (folder / "blind", evaluate(folder / "blind", blind_runs, files, Path("none")))
        )
    for other, scores in others:
        out = other.with_name(f"{other.name}-difference.json")
        command("evaluate", "--answers", f"{folder / 'right'}-answers.json", "--against",
                f"{other}-answers.json", *files, "--out", out)  # fmt: skip
        difference = json.loads(out.read_text())["against"]["differences"]["accuracy"]
        low, high = difference["interval"]
        cells += [f"{scores['scores']['accuracy']:.3f}",
                  f"{difference['value']:+.3f} ({low:+.3f} to {high:+.3f})"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def evaluate(out: Path, runs: list[Path], files: list[str], features: Path) -> Entry:
    """Answer the questions with a run or an ensemble. Returns the content of scores.json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scores = Path(f"{out}.json")
    checkpoints = [part for run in runs for part in ("--checkpoint", run)]
    command("evaluate", *checkpoints, "--dataset", "vqa", *files, "--features", features, "--split",
             "all", "--out", scores, "--answers-out", f"{out}-answers.json")  # fmt: skip
    return json.loads(scores.read_text())


def with_interval(record: Entry) -> str:
    """Format the accuracy of a scores.json with its interval."""
    low, high = record["intervals"]["accuracy"]
    return f"{record['scores']['accuracy']:.3f} ({low:.3f} to {high:.3f})"


# ------------------------------------------------------------------------------------------- files


def prepare_coco(
    tasks: Path, work: Path, dev: bool
) -> tuple[list[str], dict[str, tuple[list[str], list[str]]]]:
    """Write the joined train questions, and for each source the questions to score.

    Returns the options of the train files; by source those of its files and of its shuffled files.
    """
    folder = tasks / "vqa_coco"
    parts = {(s, split): read_pair(folder, s, split) for s in SOURCES for split in ("train", "val")}
    images = folder / "images"
    joined = work / "joined"
    write_pair(joined, join(parts[s, "train"] for s in SOURCES), images)
    dev_ids = {image.id for image in open_joined(joined, images).select("dev")}
    texts = {"val": set[str](), "dev": set[str]()}
    for (_, split), (questions, _) in parts.items():
        for question in questions:
            if split == "val" or question["image_id"] in dev_ids:
                texts["val" if split == "val" else "dev"].add(text_of(question))

    def is_kept(source: str, question: Entry) -> bool:
        text = text_of(question)
        if source not in BALANCED:
            return True
        return text not in texts["val"] and (
            question["image_id"] in dev_ids or text not in texts["dev"]
        )

    kept = [choose(parts[s, "train"], lambda q, s=s: is_kept(s, q)) for s in SOURCES]
    train_files = write_pair(work / "train", join(kept), images)
    scored = {}
    for number, source in enumerate(SOURCES):
        pair = parts[source, "val"]
        if dev:
            pair = choose(kept[number], lambda question: question["image_id"] in dev_ids)
        if pair[0]:
            files = write_pair(work / source, pair, images)
            scored[source] = (files, write_pair(work / f"{source}_shuffled", shuffle(pair), images))
    return train_files, scored


def open_joined(stem: Path, images: Path) -> QuestionSource:
    source = open_source("vqa", None, [Path(f"{stem}_annotations.json")], images,
                         questions=(Path(f"{stem}_questions.json"),))  # fmt: skip
    assert isinstance(source, QuestionSource)
    return source


def text_of(question: Entry) -> str:
    return question["question"].strip().lower()


def read_pair(folder: Path, source: str, split: str) -> Pair:
    questions = json.loads((folder / f"v2_OpenEnded_{source}_{split}_questions.json").read_text())
    annotations = json.loads((folder / f"v2_{source}_{split}_annotations.json").read_text())
    return questions["questions"], annotations["annotations"]


def join(pairs: Iterable[Pair]) -> Pair:
    """Join pairs. Of questions with the same text about one photograph the first is kept."""
    seen, joined = set(), ([], [])
    for pair in pairs:
        for question, annotation in zip(*pair, strict=True):
            key = question["image_id"], text_of(question)
            if key not in seen:
                seen.add(key)
                joined[0].append(question)
                joined[1].append(annotation)
    return joined


def choose(pair: Pair, wanted: Any) -> Pair:
    entries = [(q, a) for q, a in zip(*pair, strict=True) if wanted(q)]
    return [q for q, _ in entries], [a for _, a in entries]


def other_images(ids: Iterable[Any]) -> dict[Any, Any]:
    """For each image another one, in a random cycle through all of them."""
    order = np.random.default_rng(0).permutation(sorted(set(ids))).tolist()
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def shuffle(pair: Pair) -> Pair:
    """Ask each question about another photograph of the pair."""
    others = other_images(question["image_id"] for question in pair[0])
    questions, annotations = (
        [{**entry, "image_id": others[entry["image_id"]]} for entry in entries] for entries in pair
    )
    return questions, annotations


def write_pair(stem: Path, pair: Pair, images: Path) -> list[str]:
    """Write a pair of files, and return the options that open it."""
    files = Path(f"{stem}_questions.json"), Path(f"{stem}_annotations.json")
    files[0].write_text(json.dumps({"questions": pair[0]}))
    files[1].write_text(json.dumps({"annotations": pair[1], "info": stem.name}))
    return ["--questions", str(files[0]), "--annotations", str(files[1]), "--images", str(images)]


def prepare_daquar(
    tasks: Path, work: Path, dev: bool
) -> tuple[list[str], dict[str, tuple[list[str], list[str]]]]:
    """Write the questions to score, as `prepare_coco` does."""
    folder = tasks / "daquar"
    images = ["--images", str(folder / "images")]
    train_files = ["--annotations", str(folder / "train.csv"), *images]
    with open(
        (folder / ("train.csv" if dev else "test.csv")), newline="", encoding="utf-8"
    ) as file:
        rows = list(csv.DictReader(file))
    if dev:
        source = open_source("vqa", None, [folder / "train.csv"], folder / "images")
        names = {image.name for image in source.select("dev")}
        rows = [entry for entry in rows if entry["image"] in names]
    others = other_images(entry["image"] for entry in rows)
    shuffled = [{**entry, "image": others[entry["image"]]} for entry in rows]
    options = []
    for name, entries in (("scored", rows), ("shuffled", shuffled)):
        path = work / f"{name}.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("question", "answer", "image"))
            writer.writeheader()
            writer.writerows(entries)
        options.append(["--annotations", str(path), *images])
    return train_files, {"daquar": (options[0], options[1])}


if __name__ == "__main__":
    main()
