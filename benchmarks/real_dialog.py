"""Visual dialog on real dialogues without photographs.

    python -m benchmarks.real_dialog --work FOLDER [--dev]

Options of pipeline.train follow after `--`. Trains --task dialog --text-only on the dialogues of
VisDial's val that have no answer options and on those of VisPro, and ranks the options of the 107
dialogues that have some. Beside it, the options ranked by how often the answer occurs in the train
dialogues; the difference is tested by the paired bootstrap over dialogues.

--dev only trains: the log has the scores on the dev part of train, to choose options.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from benchmarks.commands import command, train
from benchmarks.measure import header, real_option
from data.datasets.registry import open_source
from data.datasets.visdial import DialogSource
from data.files import atomic_write_text
from pipeline.decoding.ranking import rank_candidates

TRAIN = ("visdial_1.0_val_dev_dialogs.json", "vispro_dev_text_only.json")
SCORED = "visdial_1.0_val_dev_options.json"
DENSE = "visdial_1.0_val_dev_dense_annotations.json"


@click.command(context_settings={"show_default": True})
@real_option("folder of real dialogues")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for the run")
@click.option("--dev", is_flag=True, help="only train")
@click.argument("more", nargs=-1)
def main(real: Path, work: Path, dev: bool, more: tuple[str, ...]) -> None:
    """Train on real dialogues, and rank the options of others."""
    folder = real / "tasks" / "visdial"
    work.mkdir(parents=True, exist_ok=True)
    scored = dialogs_of(folder / SCORED)
    ids, run = work / "scored.txt", work / "run"
    atomic_write_text(ids, "\n".join(map(str, scored.dialogs)))
    train_files = [part for name in TRAIN for part in ("--dialogs", folder / name)]
    train(run, "--task", "dialog", "--dataset", "visdial", *train_files, "--text-only",
          "--exclude-ids", ids, *more)  # fmt: skip
    if dev:
        return
    frequency = work / "frequency.json"
    atomic_write_text(frequency, json.dumps(ranks_by_frequency(folder, scored)))
    files = ["--dialogs", folder / SCORED, "--dense", folder / DENSE]
    command("evaluate", "--ranks", frequency, *files, "--out", work / "frequency-scores.json")
    command("evaluate", "--checkpoint", run, "--dataset", "visdial", *files, "--text-only",
            "--split", "all", "--against", frequency, "--out", work / "scores.json")  # fmt: skip
    record = json.loads((work / "scores.json").read_text())
    other = json.loads((work / "frequency-scores.json").read_text())
    click.echo(json.dumps(header()))
    click.echo("| score | decoder | by frequency | difference |\n|---|---|---|---|")
    for name, value in record["scores"].items():
        low, high = record["intervals"][name]
        difference = record["against"]["differences"][name]
        below, above = difference["interval"]
        click.echo(
            f"| {name} | {value:.3f} ({low:.3f} to {high:.3f}) | {other['scores'][name]:.3f} | "
            f"{difference['value']:+.3f} ({below:+.3f} to {above:+.3f}) |"
        )


def dialogs_of(*files: Path) -> DialogSource:
    """Return the dialogues of files, without photographs."""
    source = open_source("visdial", None, dialogs=files, text_only=True)
    assert isinstance(source, DialogSource)
    return source


def ranks_by_frequency(folder: Path, scored: DialogSource) -> list[dict[str, object]]:
    """Rank options by how often they are an answer in train. Returns a file of ranks."""
    train = dialogs_of(*(folder / name for name in TRAIN))
    counts = Counter(
        each.answer
        for image_id, dialog in train.dialogs.items()
        if image_id not in scored.dialogs
        for each in dialog.rounds
    )
    entries: list[dict[str, object]] = []
    for image_id, dialog in scored.dialogs.items():
        for number, each in enumerate(dialog.rounds, start=1):
            ranks, _ = rank_candidates({0: [float(counts[text]) for text in each.candidates]})
            entries.append({"image_id": image_id, "round_id": number, "ranks": ranks[0]})
    return entries


if __name__ == "__main__":
    main()
