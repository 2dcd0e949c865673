"""Evaluation of the outputs of a task other than captioning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from data import DataError
from data.examples import Example, with_rows
from data.files import atomic_write_text
from data.results import read_results, write_results
from data.sources import Source
from pipeline.cli import UserError, flag_of
from pipeline.evaluate.checkpoint import Evaluation, decode, open_split
from pipeline.evaluate.config import EvaluateConfig
from pipeline.scoring.bootstrap import interval, paired_difference, resample
from pipeline.scoring.report import format_p, signature_line
from pipeline.scoring.wups import NotInstalled, open_wordnet
from pipeline.tasks.base import Task
from pipeline.tasks.vqa import VisualQuestionAnswering, VqaOptions
from pipeline.terminal import say

OF_CAPTIONING = (
    "ids", "df", "meteor", "spice", "train_captions", "examples", "segment", "cache_dir",
)  # fmt: skip
OF_ANSWERS = ("answers_out", "accuracy", "wups")


def score_task(config: EvaluateConfig, evaluation: Evaluation) -> None:
    """Decode a split of a dataset with a checkpoint, and score its outputs."""
    checkpoints, task, cache, folder = evaluation
    refuse_options(config, f"{folder} was trained for --task {task.name}", OF_CAPTIONING)
    set_options(config, task)
    source, split = open_split(config, checkpoints)
    examples = task.examples(source, split, config.limit)
    examples, _, left_out = with_rows(examples, source.by_id, cache, split)
    say(
        f"{folder} on {split} of {source.dataset} {source.root}: {len(examples):,} "
        f"{task.unit}, {left_out} photographs left out"
    )
    if left_out and config.server:
        raise UserError(
            f"--server needs all {task.unit} of a split, but {left_out} photographs are unreadable"
        )
    out = config.out or folder / f"scores-{split}.json"
    others = check_files(config, task, source, examples, out)
    texts, decoding = decode(config, checkpoints, cache, examples)
    first = checkpoints[0]
    if cut := first.count_cut(example.prompt for example in examples):
        unit, max_prompt = first.vocabulary.unit, first.captioner.config.max_prompt
        say(f"{cut:,} {task.unit} have more than {max_prompt} {unit} and lost their first {unit}")
    outputs = {example_id: candidates[0].text for example_id, candidates in texts.items()}
    about = {"left_out_unreadable": left_out, "decoding": decoding}
    report(config, task, source, split, examples, outputs, others, folder.name, out, about)


def score_answers(config: EvaluateConfig) -> None:
    """Score the answers of a file on the questions of a dataset.

    Raises:
        DataError: the file lacks an answer, or has an answer to another question.
    """
    assert config.answers is not None
    refuse_options(config, "--answers are scored by the accuracy of answers", OF_CAPTIONING)
    task = VisualQuestionAnswering(VqaOptions(output="words"))
    set_options(config, task)
    source = config.open_source()
    split = config.split or source.reported()
    all_examples = task.examples(source, split)
    examples = task.examples(source, split, config.limit) if config.limit else all_examples
    given = read_results(config.answers, task.result_fields)
    outputs = choose_outputs(given, examples, config.answers)
    if unknown := given.keys() - {example.id for example in all_examples}:
        where = f"{config.answers}: question {min(unknown)} is not in"
        if unknown & {example.id for example in task.examples(source, "all")}:
            raise UserError(
                f"{where} split {split} of {source.annotations} ({len(unknown):,} such); pass "
                "--split all, or a file with the answers of this split only"
            )
        raise DataError(f"{where} {source.annotations} ({len(unknown):,} such)")
    others = check_files(config, task, source, examples, config.out)
    name = config.answers.name
    report(config, task, source, split, examples, outputs, others, name, config.out, {})


def refuse_options(config: EvaluateConfig, reason: str, names: Sequence[str]) -> None:
    """Raise UserError if one of these options is passed."""
    if passed := [name for name in names if getattr(config, name)]:
        what = "captioning" if passed[0] in OF_CAPTIONING else "visual question answering"
        raise UserError(f"{flag_of(passed[0])} is an option of {what}; {reason}")
    if names is OF_CAPTIONING and config.format == "latex":
        raise UserError(f"--format latex is a table of captioning scores; {reason}")


def set_options(config: EvaluateConfig, task: Task) -> None:
    """Set the options of the command that change the scores of a task.

    Raises:
        UserError: an option does not apply to the task, or WordNet is not installed.
    """
    if not isinstance(task, VisualQuestionAnswering):
        return refuse_options(config, f"the task is {task.name}", OF_ANSWERS)
    task.set_scores(config.accuracy, config.wups)
    if config.wups:
        try:
            open_wordnet()
        except NotInstalled as error:
            raise UserError(f"--wups: {error}") from error


def check_files(
    config: EvaluateConfig,
    task: Task,
    source: Source,
    examples: Sequence[Example],
    out: Path | None,
) -> dict[Any, str] | None:
    """Check all files of the command before anything is decoded or written.

    Returns the outputs of --against by example id, or None without --against.

    Raises:
        DataError: an output file is an input file, or an example has no output in --against.
        UserError: an option does not apply.
    """
    outputs = [("--answers-out", config.answers_out)] if config.answers_out else []
    if config.server:
        outputs.append(("--server", server_path(config, source, out)))
    if out:
        outputs += [("--out", out), ("--out", outputs_path(out))]
    config.check_outputs(outputs, source)
    if not any(example.targets for example in examples):
        for name in ("against", "accuracy", "wups"):
            if getattr(config, name):
                raise UserError(
                    f"{flag_of(name)} is for scores, but the {task.unit} have no answers; add "
                    "them (--annotations, or the column answer of a folder's metadata)"
                )
        if config.format == "json":
            raise UserError(
                f"--format json prints scores, but the {task.unit} have no answers; add them "
                "(--annotations, or the column answer of a folder's metadata)"
            )
        if config.answers and not outputs:
            raise UserError(
                f"the {task.unit} have no answers, so nothing is scored; add them (--annotations, "
                "or the column answer of a folder's metadata), or pass --server or --answers-out "
                "to write a file"
            )
    if config.against is None:
        return None
    return choose_outputs(
        read_results(config.against, task.result_fields), examples, config.against
    )


def outputs_path(out: Path) -> Path:
    """The path of the outputs of each example, beside scores.json."""
    return out.with_name(f"{out.stem}-outputs.jsonl")


def server_path(config: EvaluateConfig, source: Source, out: Path | None) -> Path:
    """The path of the file for the evaluation server (EvalAI), which has the official name:

    v2_OpenEnded_mscoco_test2015_NAME_results.json for the questions of
    v2_OpenEnded_mscoco_test2015_questions.json.

    Raises:
        UserError: the questions are from a CSV file, which no server evaluates.
    """
    file = source.annotations or source.root
    if file.suffix.lower() != ".json":
        raise UserError(
            f"--server writes the answers to the questions of a VQA questions file, but {file} is "
            "another kind of dataset; --answers-out FILE writes a results file"
        )
    folder = out.parent if out else Path()
    return folder / f"{file.stem.removesuffix('_questions')}_{config.server}_results.json"


def choose_outputs(
    given: Mapping[int, str], examples: Sequence[Example], file: Path
) -> dict[int | str, str]:
    """Return the outputs of a results file for the examples.

    Raises:
        DataError: an example has no output.
    """
    if missing := [example.id for example in examples if example.id not in given]:
        raise DataError(f"question {missing[0]} has no answer in {file} ({len(missing):,} such)")
    return {example.id: given[example.id] for example in examples}  # type: ignore[index]


def report(
    config: EvaluateConfig,
    task: Task,
    source: Source,
    split: str,
    examples: Sequence[Example],
    outputs: Mapping[Any, str],
    others: Mapping[Any, str] | None,
    name: str,
    out: Path | None,
    about: Mapping[str, Any],
) -> None:
    """Write the outputs and their scores to files, and print the scores.

    Args:
        others: the outputs of --against; None without --against.
        out: path of scores.json; None: no files of scores.
        name: name of the outputs in the printed table.
        about: further entries of scores.json.
    """
    write_outputs(config, task, source, outputs, out)
    scored = None
    if any(example.targets for example in examples):
        scored = score_outputs(config, task, outputs, examples)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        path = outputs_path(out)
        atomic_write_text(path, output_lines(examples, outputs, scored.each if scored else []))
        say(f"outputs: {path}")
    if scored is None:
        say(f"the {task.unit} have no answers, so nothing is scored")
        return
    record: dict[str, Any] = {
        "task": task.name,
        "split": split,
        "examples": len(examples),
        "images": len({example.image_id for example in examples}),
        "scores": scored.scores,
        "intervals": {key: interval(values) for key, values in scored.resampled.items()},
        **about,
    }
    parts = {
        "task": task.name,
        "n": len(examples),
        "refs": f"{(source.annotations or source.root).name}-{split}",
        **task.describe(examples),
        "bootstrap": f"{config.bootstrap}.seed{config.seed}" if config.bootstrap else "no",
    }
    record["signature"] = signature_line(parts)
    if config.against and others is not None and scored.resampled:
        other = score_outputs(config, task, others, examples)
        record["against"] = {
            "name": config.against.name,
            "scores": other.scores,
            "differences": {
                key: paired_difference(
                    scored.scores[key], other.scores[key], values, other.resampled[key]
                )
                for key, values in scored.resampled.items()
            },
        }
    if out is not None:
        atomic_write_text(out, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        say(f"scores: {out}")
    print_record(config, name, record)


class Scored(NamedTuple):
    """The scores of outputs.

    each: the scores of each example by name; empty if examples have none.
    scores: the result of `Task.score`.
    resampled: [resamples] scores by name; empty without intervals.
    """

    each: list[dict[str, float]]
    scores: dict[str, Any]
    resampled: dict[str, np.ndarray]


def score_outputs(
    config: EvaluateConfig, task: Task, outputs: Mapping[Any, str], examples: Sequence[Example]
) -> Scored:
    """Score outputs by example id, with the bootstrap settings of the command."""
    each = task.example_scores(outputs, examples)
    statistics = task.statistics(each, examples) if config.bootstrap else []
    resampled = resample(statistics, config.bootstrap, config.seed) if statistics else {}
    return Scored(each, task.score(outputs, examples), resampled)


def write_outputs(
    config: EvaluateConfig,
    task: Task,
    source: Source,
    outputs: Mapping[Any, str],
    out: Path | None,
) -> None:
    """Write the results files of --answers-out and --server."""
    paths = [config.answers_out] if config.answers_out else []
    paths += [server_path(config, source, out)] if config.server else []
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_results(path, outputs, task.result_fields)
        say(f"{'for the evaluation server' if path != config.answers_out else 'answers'}: {path}")


def output_lines(
    examples: Sequence[Example], outputs: Mapping[Any, str], scores: Sequence[Mapping[str, float]]
) -> str:
    """The output of each example as JSON lines, with its scores if there are any."""
    lines = []
    for number, example in enumerate(examples):
        entry: dict[str, Any] = {
            "id": example.id,
            "image_id": example.image_id,
            "prompt": example.prompt,
            "output": outputs[example.id],
        }
        if scores:
            entry |= {"targets": example.targets, "scores": scores[number]}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines)


def print_record(config: EvaluateConfig, name: str, record: Mapping[str, Any]) -> None:
    """Print the scores as a table, or the whole record as JSON."""
    if config.format == "json":
        click.echo(json.dumps({"name": name, **record}, indent=2, ensure_ascii=False))
        return
    for key, value in record["scores"].items():
        if isinstance(value, Mapping):
            click.echo(key)
            for group, mean in value.items():
                click.echo(f"  {group:<30} {mean:.4f}")
            continue
        line = f"{key:<12} {value:.4f}"
        if key in record["intervals"]:
            low, high = record["intervals"][key]
            line += f"  95 % {low:.4f} to {high:.4f}"
        click.echo(line)
    for key, item in record.get("against", {}).get("differences", {}).items():
        low, high = item["interval"]
        click.echo(
            f"{key} against {record['against']['name']}: {record['against']['scores'][key]:.4f}, "
            f"difference {item['value']:+.4f}, 95 % {low:+.4f} to {high:+.4f}, "
            f"p {format_p(item['p'], config.bootstrap)}"
        )
    click.echo(f"signature {record['signature']}")
