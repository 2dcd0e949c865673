"""The TOML file of a sweep: its tables, its runs and their names."""

from __future__ import annotations

import difflib
import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.cli import UserError, flag_of, options_of, read_config, setting_types, type_error
from pipeline.evaluate.config import EvaluateConfig
from pipeline.sources import SourceOptions
from pipeline.sweep.runs import Options, Run
from pipeline.training.config import TrainConfig

SHARED = ("features", "device", "precision")  # of both commands, beside the options of the dataset
CHOOSE_IMAGES = ("ids", "exclude_ids")  # the images to train on are often not those to score
TRAIN_TYPES, EVALUATE_TYPES = setting_types(TrainConfig), setting_types(EvaluateConfig)
SCORES_A_FILE = "the sweep scores the runs that it trained"
# options of the two commands that the file cannot have, with the reason
NOT_IN_FILE = {
    "config": "write the options into the file of the sweep",
    "out": "the sweep chooses the folder of each run",
    "resume": "the sweep continues a run that was stopped",
    "checkpoint": SCORES_A_FILE,
    "captions": SCORES_A_FILE,
    "references": SCORES_A_FILE,
    "answers": SCORES_A_FILE,
    "ranks": SCORES_A_FILE,
    "answers_out": "all runs would write this file",
}
FILES_BESIDE_RUNS = ("comparison.md", "comparison.json", "comparison.svg")


def read_sweep(file: Path) -> tuple[Path, list[Run]]:
    """Read a TOML file. Returns the folder of the runs, and the runs.

    Raises:
        UserError: the file has unknown keys or options, values of a wrong type, no runs, or two
            runs of one name.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file; pass a TOML file with the runs")
    content = read_config(file)
    if unknown := content.keys() - {"out", "train", "evaluate", "grid", "runs"}:
        raise UserError(
            f"{file}: unknown key {min(unknown)!r}; the keys are out, train, evaluate, grid, runs "
            "(options of pipeline.train belong into [train])"
        )
    if problem := type_error(content.get("out", ""), [(Path, False)]):
        raise UserError(f"{file}: out is {problem}")
    out = Path(content.get("out") or Path("runs") / file.stem)
    train = _options(f"{file}: [train]", content.get("train", {}), TRAIN_TYPES)
    evaluate = _options(f"{file}: [evaluate]", content.get("evaluate", {}), EVALUATE_TYPES)
    runs = []
    for name, options in (*_grid_runs(file, content), *_listed_runs(file, content)):
        training = train | options
        scoring = _scoring(f"{file}: run {name}", training, evaluate)
        runs.append(Run(name, out / name, training, scoring))
    if not runs:
        raise UserError(f"{file} has no runs; write a table [grid] or [[runs]]")
    check_names(file, [run.name for run in runs])
    return out, runs


def _options(where: str, table: Any, types: Mapping[str, Any]) -> Options:
    """Return the options of a table, with "_" in their names. Raises UserError if one is wrong."""
    options = {}
    for key, value in _unique_names(where, table).items():
        _check_name(where, key, types)
        if problem := type_error(value, types[key]):
            raise UserError(f"{where}: {key} is {problem}")
        options[key] = value
    return options


def _unique_names(where: str, table: Any) -> Options:
    """Return a table with "_" for "-" in its keys."""
    if not isinstance(table, dict):
        raise UserError(f"{where} is {table!r}, it must be a table")
    plain: Options = {}
    for key, value in table.items():
        if (name := key.replace("-", "_")) in plain:
            raise UserError(f"{where}: {key} is set twice")
        plain[name] = value
    return plain


def _check_name(where: str, name: str, types: Mapping[str, Any]) -> None:
    """Raise UserError if a table cannot have the option."""
    if name in NOT_IN_FILE:
        raise UserError(f"{where}: {name} cannot be set: {NOT_IN_FILE[name]}; remove it")
    if name not in types:
        similar = difflib.get_close_matches(name, types, n=1)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        if name in EVALUATE_TYPES:
            hint = "; it is an option of pipeline.evaluate and belongs into [evaluate]"
        raise UserError(f"{where}: unknown option {name!r}{hint}")


def _grid_runs(file: Path, content: Mapping[str, Any]) -> list[tuple[str, Options]]:
    """Return the names and the options of all combinations of [grid]."""
    where = f"{file}: [grid]"
    grid = _unique_names(where, content.get("grid", {}))
    if not grid:
        return []
    labels = []
    for name, values in grid.items():
        _check_name(where, name, TRAIN_TYPES)
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: {name} is {values!r}, it must be a list of values")
        for value in values:
            if problem := type_error(value, TRAIN_TYPES[name]):
                raise UserError(f"{where}: {name} has {problem}")
        labels.append(labels_of(name, values))
    return [
        ("-".join(parts), dict(zip(grid, values, strict=True)))
        for parts, values in zip(
            itertools.product(*labels), itertools.product(*grid.values()), strict=True
        )
    ]


def _listed_runs(file: Path, content: Mapping[str, Any]) -> list[tuple[str, Options]]:
    """Return the names and the options of [[runs]]."""
    tables = content.get("runs", [])
    if not isinstance(tables, list):
        raise UserError(f"{file}: write each run as a table [[runs]]")
    runs = []
    for number, table in enumerate(tables, 1):
        where = f"{file}: run {number} of [[runs]]"
        plain = _unique_names(where, table)
        name = plain.pop("name", "")
        if not isinstance(name, str):
            raise UserError(f"{where}: name is {name!r}, it must be text")
        options = _options(where, plain, TRAIN_TYPES)
        labels = [labels_of(key, [value])[0] for key, value in options.items()]
        runs.append((name or "-".join(labels), options))
    return runs


def labels_of(name: str, values: Sequence[Any]) -> list[str]:
    """Return the values of an option as parts of the names of runs.

    Of a path this is its last part, or as many parts as make all values different.
    """
    depth = 1
    labels = [_label(name, value, depth) for value in values]
    while len({*labels}) < len(labels) and depth < 10:
        depth += 1
        labels = [_label(name, value, depth) for value in values]
    return labels


def _label(name: str, value: Any, depth: int) -> str:
    option = flag_of(name)[2:]
    if isinstance(value, bool):
        return option if value else f"no-{option}"
    if isinstance(value, list):
        return "+".join(_label(name, each, depth) for each in value)
    if isinstance(value, str):
        path = Path(value)
        return "-".join([part for part in path.parts if part != path.anchor][-depth:])
    return f"{option}={value}"


def check_names(file: Path, names: Sequence[str]) -> None:
    """Raise UserError if a name cannot be that of a folder, or if two folders would be the same."""
    seen: dict[str, str] = {}
    for name in names:
        usable = name.isprintable() and name == name.strip() and len(name.encode()) <= 200
        if not name or name[0] == "." or "/" in name or "\\" in name or not usable:
            raise UserError(
                f"{file}: {name!r} cannot be the name of a run, because a folder gets this name; "
                'write the run as [[runs]] with name = "..."'
            )
        # some file systems distinguish neither case nor composed and decomposed letters
        folder = unicodedata.normalize("NFC", name).casefold()
        if folder in FILES_BESIDE_RUNS:
            raise UserError(f"{file}: {name!r} is a file of the comparison, and no name of a run")
        if folder in seen:
            differ = (
                "" if seen[folder] == name else f" and {name!r}, which some systems take as equal"
            )
            raise UserError(
                f"{file}: two runs have the name {seen[folder]!r}{differ}; write them as [[runs]] "
                "with different names"
            )
        seen[folder] = name


def _scoring(where: str, training: Options, evaluate: Options) -> Options:
    """Return the options of pipeline.evaluate: [evaluate], and what it has in common with training.

    Raises UserError if only some images are trained on, and the file does not say which to score.
    """
    chosen = next((name for name in CHOOSE_IMAGES if name in training), None)
    if chosen and not evaluate.keys() & {"split", *CHOOSE_IMAGES}:
        raise UserError(
            f"{where}: {chosen} chooses the images to train on, and not those to score; write "
            "split, ids or exclude_ids into [evaluate]"
        )
    dataset = next(item for item in fields(SourceOptions) if item.name == "dataset")
    name = training.get("dataset", dataset.default)
    names = [*SHARED]
    if evaluate.get("dataset", name) == name:
        names += [item.name for item in (*fields(SourceOptions), *options_of(dataset, name))]
    shared = [key for key in training if key in names and key not in CHOOSE_IMAGES]
    return {key: training[key] for key in shared} | evaluate
