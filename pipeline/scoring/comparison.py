"""The comparison of several runs: one table, paired differences, and a plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.files import atomic_write_text
from pipeline.cli import UserError
from pipeline.scoring.bootstrap import mean_of_groups, paired_difference, resample
from pipeline.terminal import human_bytes, say

RESAMPLES, SEED = 1000, 0
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """A run of the comparison.

    metric: the score that is compared. If examples do not have it (macro F1), their accuracy is.
    scores, intervals: as in scores.json.
    examples: the scores of each example: {"id" or "image_id": ..., "scores": {name: value}}.
    trained_per_s: texts per second in training. decoded_per_s: examples per second in evaluation.
    minutes: of the training, with its validations. peak_bytes: memory of the processes; 0: unknown.
    """

    name: str
    metric: str
    scores: Mapping[str, Any]
    intervals: Mapping[str, Sequence[float]]
    examples: Sequence[Mapping[str, Any]]
    parameters: int
    trained_per_s: float
    decoded_per_s: float
    minutes: float
    peak_bytes: int


def compare_runs(rows: Sequence[Row]) -> dict[str, Any]:
    """Compare all pairs of runs by the paired bootstrap over images.

    Returns {"metric", "runs": [...], "pairs": [{"a", "b", "value", "interval", "p"}]}.

    Raises UserError if the runs have different tasks or were scored on different examples.
    """
    metric = rows[0].metric
    compared = metric if metric in rows[0].examples[0]["scores"] else "accuracy"
    first = [_key(example) for example in rows[0].examples]
    for row in rows[1:]:
        if row.metric != metric or {*map(_key, row.examples)} != {*first}:
            raise UserError(
                f"runs {rows[0].name} and {row.name} were scored on different examples or tasks, "
                "so they cannot be compared; put them into different files"
            )
    groups = [example.get("image_id", _key(example)) for example in rows[0].examples]
    resampled, values = {}, {}
    for row in rows:
        by_key = {_key(example): example["scores"][compared] for example in row.examples}
        each = np.array([by_key[key] for key in first])
        values[row.name] = float(each.mean())
        statistic = mean_of_groups(compared, each, groups)
        resampled[row.name] = resample([statistic], RESAMPLES, SEED)[compared]
    pairs = [
        {"a": a.name, "b": b.name}
        | paired_difference(values[a.name], values[b.name], resampled[a.name], resampled[b.name])
        for a, b in itertools.combinations(rows, 2)
    ]
    runs = []
    for row in rows:
        record = asdict(row)
        del record["examples"], record["metric"]
        runs.append(record)
    return {"metric": metric, "compared": compared, "runs": runs, "pairs": pairs}


def _key(example: Mapping[str, Any]) -> Any:
    return example["id"] if "id" in example else example.get("example", example.get("image_id"))


def write_comparison(comparison: Mapping[str, Any], folder: Path) -> str:
    """Write comparison.json, comparison.md and, with matplotlib, comparison.svg.

    Returns the table.
    """
    table = markdown(comparison)
    text = json.dumps(comparison, indent=1, ensure_ascii=False)
    atomic_write_text(folder / "comparison.json", text + "\n")
    atomic_write_text(folder / "comparison.md", table + "\n")
    say(f"comparison: {folder / 'comparison.md'}, {folder / 'comparison.json'}")
    try:
        plot(comparison, folder / "comparison.svg")
        say(f"plot: {folder / 'comparison.svg'}")
    except ImportError:
        say("no plot, because matplotlib is not installed: pip install 'onceover[plot]'")
    return table


def markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as two tables: the runs, and the differences of all pairs."""
    metric = comparison["metric"]
    lines = [
        f"| run | {metric} (95 %) | parameters | texts/s trained | examples/s decoded | minutes | "
        "peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in sorted(comparison["runs"], key=lambda run: -run["scores"][metric]):
        score = f"{run['scores'][metric]:.4f}"
        if metric in run["intervals"]:
            low, high = run["intervals"][metric]
            score += f" ({low:.4f} to {high:.4f})"
        memory = human_bytes(run["peak_bytes"]) if run["peak_bytes"] else "unknown"
        lines.append(
            f"| {run['name']} | {score} | {run['parameters'] / 1e6:.1f} M | "
            f"{run['trained_per_s']:,.0f} | {run['decoded_per_s']:,.0f} | {run['minutes']:.1f} | "
            f"{memory} |"
        )
    if comparison["pairs"]:
        lines += ["", f"Differences of {comparison['compared']}, paired bootstrap over images; "
                  f"bold where p is below {SIGNIFICANT}:", "",
                  "| run | other run | difference (95 %) | p |", "|---|---|---|---|"]  # fmt: skip
    for pair in comparison["pairs"]:
        low, high = pair["interval"]
        difference = f"{pair['value']:+.4f} ({low:+.4f} to {high:+.4f})"
        if pair["p"] < SIGNIFICANT:
            difference = f"**{difference}**"
        lines.append(f"| {pair['a']} | {pair['b']} | {difference} | {pair['p']:.3f} |")
    return "\n".join(lines)


def plot(comparison: Mapping[str, Any], file: Path) -> None:
    """Plot the score against minutes of training and against parameters.

    Raises ImportError if matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "onceover", "font.size": 9}
    from matplotlib import pyplot

    metric, runs = comparison["metric"], comparison["runs"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    for axis, label, values in (
        (axes[0], "minutes of training", [run["minutes"] for run in runs]),
        (axes[1], "parameters in millions", [run["parameters"] / 1e6 for run in runs]),
    ):
        for number, (run, value) in enumerate(zip(runs, values, strict=True)):
            score = run["scores"][metric]
            low, high = run["intervals"].get(metric, (score, score))
            error = [[max(0, score - low)], [max(0, high - score)]]
            axis.errorbar(value, score, yerr=error, fmt="o", capsize=3, color=f"C{number % 10}",
                          label=run["name"])  # fmt: skip
        axis.set(xlabel=label, ylabel=f"{metric} (95 %)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
