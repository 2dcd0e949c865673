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
from pipeline.scoring.report import format_p
from pipeline.terminal import human_bytes, say

RESAMPLES, SEED = 1000, 0
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """A run of the comparison.

    metric: the score that is compared. If examples do not have it (macro F1), their accuracy is.
    scores, intervals: as in scores.json.
    examples: {"id" or "image_id": ..., "scores": {name: value}} of each example. An example that
        could not be scored has no "scores".
    trained_per_s: texts per second in training. decoded_per_s: examples per second in evaluation.
    minutes: of the training, with its validations. peak_bytes: most memory of a process. None, or 0
        bytes: unknown.
    """

    name: str
    metric: str
    scores: Mapping[str, Any]
    intervals: Mapping[str, Sequence[float]]
    examples: Sequence[Mapping[str, Any]]
    parameters: int
    trained_per_s: float | None
    decoded_per_s: float | None
    minutes: float | None
    peak_bytes: int


def compare_runs(rows: Sequence[Row]) -> dict[str, Any]:
    """Compare all pairs of runs by the paired bootstrap over images.

    Returns {"metric", "compared", "runs": [...], "pairs": [{"a", "b", "value", "interval", "p"}]}.
    A run whose examples do not have the compared score is in no pair.

    Raises UserError if the runs have different tasks or were scored on different examples.
    """
    metric = rows[0].metric
    scored = {row.name: [e for e in row.examples if "scores" in e] for row in rows}
    has_metric = any(metric in e["scores"] for examples in scored.values() for e in examples)
    compared = metric if has_metric else "accuracy"
    with_examples = [row for row in rows if scored[row.name]]
    first = scored[with_examples[0].name] if with_examples else []
    keys = [_key(example) for example in first]
    groups = [example.get("image_id", _key(example)) for example in first]
    means, resampled = {}, {}
    for row in rows:
        by_key = {_key(e): e["scores"].get(compared) for e in scored[row.name]}
        if row.metric != metric or (by_key and by_key.keys() != {*keys}):
            other = rows[0] if row.metric != metric else with_examples[0]
            raise UserError(
                f"runs {other.name} and {row.name} were scored on different examples or tasks, "
                "so they cannot be compared; put them into different files"
            )
        each = np.array([by_key.get(key) for key in keys], float)  # None becomes NaN
        if not np.isnan(each).all():
            means[row.name] = float(np.nanmean(each))
            statistic = mean_of_groups(compared, each, groups)
            resampled[row.name] = resample([statistic], RESAMPLES, SEED)[compared]
    pairs = [
        {"a": a, "b": b} | paired_difference(means[a], means[b], resampled[a], resampled[b])
        for a, b in itertools.combinations(means, 2)
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
    """The comparison as two tables: the runs, the best first, and the differences of all pairs."""
    metric = comparison["metric"]
    head = [
        "run", metric, "95 % interval", "parameters", "texts/s in training",
        "examples/s in evaluation", "minutes of training", "peak memory",
    ]  # fmt: skip
    body = []
    for run in sorted(comparison["runs"], key=lambda run: -_score(run, metric)):
        score, memory = _score(run, metric), run["peak_bytes"]
        low_high = run["intervals"].get(metric)
        body.append(
            [
                run["name"],
                f"{score:.4f}" if np.isfinite(score) else "not computed",
                "{:.4f} to {:.4f}".format(*low_high) if low_high else "not computed",
                f"{run['parameters'] / 1e6:.1f} M",
                _number(run["trained_per_s"], ",.0f"),
                _number(run["decoded_per_s"], ",.0f"),
                _number(run["minutes"], ".1f"),
                human_bytes(memory) if memory else "unknown",
            ]
        )
    lines = _table(head, body, left=1)
    compared, pairs = comparison["compared"], comparison["pairs"]
    if not pairs:
        return "\n".join(lines)
    lines += [
        "",
        f"Differences of {compared}: run minus other run, by the paired bootstrap over images "
        f"({RESAMPLES:,} resamples).",
        f"Significant: p below {SIGNIFICANT:g}, not corrected for the number of pairs.",
        "",
    ]
    body = []
    for pair in pairs:
        body.append(
            [
                pair["a"],
                pair["b"],
                f"{pair['value']:+.4f}",
                "{:+.4f} to {:+.4f}".format(*pair["interval"]),
                format_p(pair["p"], RESAMPLES),
                "yes" if pair["p"] < SIGNIFICANT else "no",
            ]
        )
    head = ["run", "other run", "difference", "95 % interval", "p", "significant"]
    return "\n".join([*lines, *_table(head, body, left=2)])


def _score(run: Mapping[str, Any], metric: str) -> float:
    """The score of a run; -infinity if it was not computed."""
    score = run["scores"].get(metric)
    return -np.inf if score is None else score


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _table(head: Sequence[str], body: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a Markdown table. left: number of columns of text; the others align right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * w if n < left else "-" * (w - 1) + ":" for n, w in enumerate(widths)]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = [
            cell.ljust(width) if n < left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    return lines


def plot(comparison: Mapping[str, Any], file: Path) -> None:
    """Plot the score against minutes of training and against parameters.

    Raises ImportError if matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "onceover", "font.size": 9}
    from matplotlib import pyplot

    metric = comparison["metric"]
    runs = [run for run in comparison["runs"] if np.isfinite(_score(run, metric))]
    runs.sort(key=lambda run: -_score(run, metric))  # the legend has the order of the table
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    for axis, label, values in (
        (axes[0], "minutes of training", [run["minutes"] or np.nan for run in runs]),
        (axes[1], "parameters in millions", [run["parameters"] / 1e6 for run in runs]),
    ):
        for number, (run, value) in enumerate(zip(runs, values, strict=True)):
            score = run["scores"][metric]
            low, high = run["intervals"].get(metric, (score, score))
            error = [[max(0, score - low)], [max(0, high - score)]]
            axis.errorbar(value, score, yerr=error, fmt="o", capsize=3, color=f"C{number % 10}",
                          label=run["name"])  # fmt: skip
        axis.set(xlabel=label, ylabel=f"{metric} (95 %)")
        # from 0, so that runs of nearly equal minutes do not seem far apart
        axis.set_xlim(0, 1.1 * max([value for value in values if np.isfinite(value)] or [1]))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
