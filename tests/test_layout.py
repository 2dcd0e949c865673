"""The house: who may import whom, names that no file has, that importing does nothing, and folders with our packages' names."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"extract", "train", "evaluate", "caption", "demo"}
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


def python(cwd: Path, *arguments: str, path: str = str(ROOT)) -> subprocess.CompletedProcess:
    """Python in folder `cwd`, which stands on its path before `path`, as before the .pth file of `make install`."""
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_an_editable_install_puts_the_root_on_the_path_and_adds_no_import_hook(tmp_path):
    pytest.importorskip("setuptools", minversion="70.1")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("pipeline", "models", "data"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    python(tmp_path, "-c", "from setuptools import build_meta; build_meta.build_editable('.')")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        top = {name: wheel.read(name).decode().strip() for name in wheel.namelist() if "/" not in name}
    assert list(top.values()) == [str(tmp_path)] and next(iter(top)).endswith(".pth")


def test_commands_run_beside_plain_folders_with_our_names(tmp_path):
    for name in ("data", "models", "pipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "captions.json").touch()
    done = python(tmp_path, "-m", "pipeline.evaluate", "--help")
    assert (done.returncode, done.stderr) == (0, "") and "Usage: python -m pipeline.evaluate" in done.stdout


@pytest.mark.parametrize("name", ["data/__init__.py", "models/__init__.py", "data.py", "models.py"])
def test_a_package_that_hides_ours_is_one_plain_error(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    told = f"{tmp_path / name} hides Onceover's package {name.split('/')[0].removesuffix('.py')!r}"
    done = python(tmp_path, "-m", "pipeline.evaluate", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {told}") and done.stderr.count("\n") == 1 and "Rename it" in done.stderr
    done = python(tmp_path, "-c", "import pipeline.scoring")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"ImportError: {told}")


def test_a_foreign_package_on_pythonpath_or_imported_before_is_named(tmp_path):
    (tmp_path / "theirs" / "data").mkdir(parents=True)
    (tmp_path / "theirs" / "data" / "__init__.py").touch()
    done = python(tmp_path, "-m", "pipeline.evaluate", "--help", path=f"{tmp_path / 'theirs'}{os.pathsep}{ROOT}")
    assert done.returncode == 2 and f"{tmp_path / 'theirs' / 'data' / '__init__.py'} hides" in done.stderr
    begin = f"import sys; sys.path.insert(0, {str(tmp_path / 'theirs')!r}); import data; del sys.path[0]\n"
    done = python(tmp_path, "-c", begin + "import pipeline.scoring")
    assert "ImportError" in done.stderr and "it was imported before" in done.stderr
    begin = "import types, sys; sys.modules['models'] = types.ModuleType('models')\n"
    done = python(tmp_path, "-c", begin + "import pipeline.scoring")
    assert "ImportError: a module called 'models' hides" in done.stderr
