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
from data.files import atomic_write_text, json_lines
from data.sources import Source
from pipeline.cli import UserError, flag_of
from pipeline.decoding.options import by_option
from pipeline.evaluate.checkpoint import Evaluation, open_generator, open_split
from pipeline.evaluate.config import EvaluateConfig
from pipeline.scoring.bootstrap import interval, paired_difference, resample
from pipeline.scoring.report import format_p, signature_line
from pipeline.tasks.base import Task
from pipeline.tasks.dialog import VisualDialog
from pipeline.tasks.registry import TASKS
from pipeline.tasks.vqa import VisualQuestionAnswering, VqaOptions
from pipeline.terminal import progress, say

# the options of pipeline.evaluate that only some tasks have, and these tasks
TASKS_OF: dict[str, list[str]] = {}
for _task in TASKS.values():
    for _name in _task.evaluate_options:
        TASKS_OF.setdefault(_name, []).append(_task.name)


def score_task(config: EvaluateConfig, evaluation: Evaluation) -> None:
    """Decode a split of a dataset with a checkpoint, and score its outputs."""
    checkpoints, task, cache, folder = evaluation
    refuse_options(config, task, f"{folder} was trained for --task {task.name}")
    if (decoding := config.given()) and (checkpoints[0].answers or config.consensus):
        name = "consensus" if config.consensus else next(iter(decoding))
        reason = "chooses among its answers" if checkpoints[0].answers else "generates no captions"
        raise UserError(f"{flag_of(name)} has no effect: {folder} {reason}; remove the option")
    task.set_options({name: getattr(config, name) for name in task.evaluate_options})
    source, split = open_split(config, checkpoints)
    examples = task.examples(source, split, config.limit)
    examples, _, left_out = with_rows(examples, source.by_id, cache, split)
    if decoding and all(task.candidates(example) for example in examples):
        raise UserError(
            f"{flag_of(next(iter(decoding)))} has no effect: all {task.unit} of split {split} have "
            "candidates, which are ranked; remove the option"
        )
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
    outputs, about = compute_outputs(config, evaluation, examples)
    first = checkpoints[0]
    if cut := first.count_cut(example.prompt for example in examples):
        unit, max_prompt = first.vocabulary.unit, first.captioner.config.max_prompt
        say(f"{cut:,} {task.unit} have more than {max_prompt} {unit} and lost their first {unit}")
    about = {"left_out_unreadable": left_out, **about}
    report(config, task, source, split, examples, outputs, others, folder.name, out, about)


def compute_outputs(
    config: EvaluateConfig, evaluation: Evaluation, examples: Sequence[Example]
) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Decode the examples, and print how long it took.

    Returns:
        The output of each example by id, and entries for scores.json.
    """
    from pipeline.decoding.outputs import task_outputs

    checkpoints, task, cache, _ = evaluation
    generator, decoding = open_generator(config, checkpoints)
    about: dict[str, Any] = {"decoding": decoding}
    with by_option(), progress(len(examples), task.unit, "evaluate") as bar:
        outputs = task_outputs(task, generator, cache, examples, config.batch, bar.step)
    say(
        f"{len(examples):,} {task.unit} in {bar.seconds:.1f} s, {bar.rate:.0f}/s, on "
        f"{generator.machine}"
    )
    about["decoded_per_s"] = bar.rate
    if outputs.ranked:
        about |= {"ranked": outputs.ranked, "ties": outputs.ties}
        say(
            f"{outputs.ranked:,} {task.unit} have candidates, which are ranked; in "
            f"{outputs.ties:,} of them candidates have equal scores and rank by their order"
        )
    return outputs.by_id, about


def score_file(config: EvaluateConfig) -> None:
    """Score a file of answers or of ranks of dialogue options.

    Raises:
        DataError: the file lacks an output, or has one of an unknown example.
    """
    file = config.answers or config.ranks
    assert file is not None
    task = VisualQuestionAnswering(VqaOptions(output="words")) if config.answers else VisualDialog()
    if config.rank and config.ranks:
        raise UserError("--rank orders the options of a checkpoint; --ranks are ordered already")
    refuse_options(config, task, f"a file of {task.result_fields.text.rstrip('s')}s is scored")
    task.set_options({name: getattr(config, name) for name in task.evaluate_options})
    whole = config.open_whole_source()
    for note in whole.notes:
        say(note)
    source = config.choose_images(whole)
    split = config.split or source.reported()
    examples = task.examples(source, split, config.limit)
    examples = [example for example in examples if task.candidates(example)] or examples
    known = {example.id for example in task.examples(whole, split)}
    given = task.read_outputs(file)
    outputs = choose_outputs(task, given, examples, file)
    if unknown := given.keys() - known:
        first = min(unknown, key=str)
        where = f"{file}: {task.unit.rstrip('s')} {first} is not in"
        if unknown & {example.id for example in task.examples(whole, "all")}:
            raise UserError(
                f"{where} split {split} of {source.annotations} ({len(unknown):,} such); pass "
                f"--split all, or a file of this split only"
            )
        raise DataError(f"{where} {source.annotations} ({len(unknown):,} such)")
    others = check_files(config, task, source, examples, config.out)
    report(config, task, source, split, examples, outputs, others, file.name, config.out, {})


def refuse_options(config: EvaluateConfig, task: Task, reason: str) -> None:
    """Raise UserError if an option is passed that only other tasks have."""
    for name, tasks in TASKS_OF.items():
        if getattr(config, name) and name not in task.evaluate_options:
            raise UserError(f"{flag_of(name)} is an option of --task {', '.join(tasks)}; {reason}")
    if config.format == "latex" and not task.scored_as_captions:
        raise UserError(f"--format latex is a table of captioning scores; {reason}")


def check_files(
    config: EvaluateConfig,
    task: Task,
    source: Source,
    examples: Sequence[Example],
    out: Path | None,
) -> dict[Any, Any] | None:
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
        outputs += [("--out", out), ("--out", outputs_path(task, out))]
    config.check_outputs(outputs, source)
    scorable = task.scorable(examples)
    if not scorable:
        for name in ("against", "accuracy", "wups", "rank"):
            if getattr(config, name):
                raise UserError(f"{flag_of(name)} is for scores, but {task.why_unscored}")
        if config.format == "json":
            raise UserError(f"--format json prints scores, but {task.why_unscored}")
        if (config.answers or config.ranks) and not outputs:
            raise UserError(
                f"nothing is scored, because {task.why_unscored}; or write a file: --server"
                f"{' or --answers-out' if config.answers else ''}"
            )
    if config.against is None:
        return None
    return choose_outputs(task, task.read_outputs(config.against), scorable, config.against)


def outputs_path(task: Task, out: Path) -> Path:
    """The path of the outputs of each example, beside scores.json.

    For sentiment: predictions.jsonl beside scores.json, predictions-test.jsonl beside
    scores-test.json, NAME-predictions.jsonl beside NAME.json.
    """
    if not task.outputs_name:
        return out.with_name(f"{out.stem}-outputs.jsonl")
    if out.stem == "scores" or out.stem.startswith("scores-"):
        return out.with_name(f"{task.outputs_name}{out.stem.removeprefix('scores')}.jsonl")
    return out.with_name(f"{out.stem}-{task.outputs_name}.jsonl")


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
    task: Task, given: Mapping[int | str, Any], examples: Sequence[Example], file: Path
) -> dict[int | str, Any]:
    """Return the outputs of a results file for the examples.

    Raises:
        DataError: an example has no output.
    """
    if missing := [example.id for example in examples if example.id not in given]:
        raise DataError(
            f"{task.unit.rstrip('s')} {missing[0]} has no {task.result_fields.text} in {file} "
            f"({len(missing):,} such)"
        )
    return {example.id: given[example.id] for example in examples}


def report(
    config: EvaluateConfig,
    task: Task,
    source: Source,
    split: str,
    examples: Sequence[Example],
    outputs: Mapping[Any, Any],
    others: Mapping[Any, Any] | None,
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
    write_outputs(config, task, source, examples, outputs, out)
    scorable = task.scorable(examples)
    scored = score_outputs(config, task, outputs, scorable) if scorable else None
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        path = outputs_path(task, out)
        each = scored.each if scored else []
        by_id = {e.id: scores for e, scores in zip(scorable, each, strict=bool(each))}
        atomic_write_text(path, output_lines(task, examples, outputs, by_id))
        say(f"outputs: {path}")
    if scored is None:
        say(f"nothing is scored, because {task.why_unscored}")
        return
    record: dict[str, Any] = {
        "task": task.name,
        "split": split,
        "examples": len(scorable),
        "images": len({example.image_id for example in scorable}),
        "scores": scored.scores,
        "intervals": {key: interval(values) for key, values in scored.resampled.items()},
        **about,
    }
    parts = {
        "task": task.name,
        "n": len(scorable),
        "refs": f"{(source.annotations or source.root).name}-{split}",
        **(task.describe(scorable) | ({"rank": "file"} if config.ranks else {})),
        "bootstrap": f"{config.bootstrap}.seed{config.seed}" if config.bootstrap else "no",
    }
    record["signature"] = signature_line(parts)
    if config.against and others is not None and scored.resampled:
        other = score_outputs(config, task, others, scorable)
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
    config: EvaluateConfig, task: Task, outputs: Mapping[Any, Any], examples: Sequence[Example]
) -> Scored:
    """Score outputs by example id, with the bootstrap settings of the command."""
    each = task.example_scores(outputs, examples)
    statistics = task.statistics(outputs, each, examples) if config.bootstrap else []
    resampled = resample(statistics, config.bootstrap, config.seed) if statistics else {}
    return Scored(each, task.score(outputs, examples), resampled)


def write_outputs(
    config: EvaluateConfig,
    task: Task,
    source: Source,
    examples: Sequence[Example],
    outputs: Mapping[Any, Any],
    out: Path | None,
) -> None:
    """Write the results files of --answers-out and --server."""
    paths = [config.answers_out] if config.answers_out else []
    paths += [server_path(config, source, out)] if config.server else []
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = task.results(outputs, examples)
        atomic_write_text(path, json.dumps(entries, ensure_ascii=False))
        say(f"{'for the evaluation server' if path != config.answers_out else 'answers'}: {path}")


def output_lines(
    task: Task,
    examples: Sequence[Example],
    outputs: Mapping[Any, Any],
    scores: Mapping[int | str, Mapping[str, float]],
) -> str:
    """The output of each example as JSON lines, with its scores if there are any.

    Args:
        scores: by example id.
    """
    entries = []
    for example in examples:
        entry = task.output_entry(example, outputs[example.id])
        if example.id in scores:
            entry["scores"] = scores[example.id]
        entries.append(entry)
    return json_lines(entries)


def print_record(config: EvaluateConfig, name: str, record: Mapping[str, Any]) -> None:
    """Print the scores as a table, or the whole record as JSON."""
    if config.format == "json":
        click.echo(json.dumps({"name": name, **record}, indent=2, ensure_ascii=False))
        return
    for key, value in record["scores"].items():
        if isinstance(value, Mapping):
            click.echo(key)
            for group, mean in value.items():
                text = f"{mean:.4f}" if isinstance(mean, float) else _counts(mean)
                click.echo(f"  {group:<30} {text}")
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


def _counts(row: Mapping[str, int]) -> str:
    """A row of the confusion matrix: the counts of the predicted labels."""
    return ", ".join(f"{label} {count:,}" for label, count in row.items() if count)
