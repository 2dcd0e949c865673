"""The house: who may import whom, names that no file has, and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"extract", "train", "evaluate", "caption", "demo", "pretrain"}
FILES = sorted(path for room in ("pipeline", "models", "data") for path in (ROOT / room).glob("*.py"))


def rooms_imported(path: Path) -> set[str]:
    """Rooms that a file imports: models, data, `pipeline` (shared) or `stage`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            room, _, module = name.partition(".")
            if room in ("models", "data"):
                found.add(room)
            elif room == "pipeline" and module:
                found.add("stage" if module.partition(".")[0] in STAGES else "pipeline")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_each_room_imports_only_what_the_table_allows(path):
    allowed = {"models": {"models"}, "data": {"data"}, "pipeline": {"models", "data", "pipeline"}}[path.parent.name]
    if path.stem == "demo":
        allowed = allowed | {"stage"}
    assert rooms_imported(path) <= allowed


def test_no_file_is_named_for_odds_and_ends():
    assert not [path for path in FILES if path.stem in {"utils", "common", "helpers", "misc", "opt"}]


def test_main_of_each_stage_has_at_most_25_lines():
    for stage in STAGES:
        tree = ast.parse((ROOT / "pipeline" / f"{stage}.py").read_text())
        main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert main.end_lineno - main.lineno + 1 <= 25, stage


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_importing_a_stage_prints_nothing_and_writes_nothing(stage, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"import pipeline.{stage}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])
