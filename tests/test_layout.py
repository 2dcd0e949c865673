"""The house: who may import whom, names that no file has, that importing does nothing, and folders
with our packages' names.
"""

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
STAGES = {
    *("extract", "convert", "train", "evaluate", "caption", "ask", "classify", "sweep", "export"),
    "demo",
}
SHARED = {
    "cli",
    "runtime",
    "terminal",
    "sources",
}  # files of pipeline/ that commands and rooms share
FILES = sorted(
    path
    for room in ("pipeline", "models", "data")
    for path in (ROOT / room).rglob("*.py")
    if "weights" not in path.parts
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, also inside functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                name if (name := f"{node.module}.{alias.name}") in MODULES else node.module
                for alias in node.names
            }
    return (found & MODULES.keys()) - {module_of(path)}


def room_of(module: str) -> str:
    """models, data, `pipeline.ROOM` for a room of pipeline, `shared`, or `command`."""
    top, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    if top != "pipeline":
        return top
    if name in STAGES:
        return "command"
    return "shared" if name in SHARED or not name else f"pipeline.{name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_room_imports_only_what_the_table_allows(path):
    """DESIGN: models and data stand alone; rooms of pipeline import everything but commands; only
    demo runs commands.
    """
    room, rooms = room_of(module_of(path)), {room_of(module) for module in imported(path)}
    if room in ("models", "data"):
        assert rooms <= {room}
    elif room == "command":
        own = module_of(path).split(".")[1]
        others = {
            module.split(".")[1] for module in imported(path) if room_of(module) == "command"
        } - {own}
        assert own in ("demo", "sweep") or not others
    else:
        assert "command" not in rooms


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A path that leads back to where it began; empty where there is none."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for following in sorted(arrows.get(path[-1], ())):
            if following in path:
                return [*path[path.index(following) :], following]
            if following not in done and (found := search([*path, following])):
                return found
        done.add(path[-1])
        return []

    return next(
        (found for start in sorted(arrows) if start not in done and (found := search([start]))), []
    )


def test_no_file_imports_itself_through_others():
    assert circle({module: imported(path) for module, path in MODULES.items()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_room_of_pipeline_imports_itself_through_others():
    arrows: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        arrows.setdefault(room_of(module), set()).update(
            {room_of(other) for other in imported(path)} - {room_of(module)}
        )
    assert circle({room: others for room, others in arrows.items() if room != "command"}) == []


def test_no_file_is_named_for_odds_and_ends():
    assert not [
        path for path in FILES if path.stem in {"utils", "common", "helpers", "misc", "opt"}
    ]


def test_main_of_each_stage_has_at_most_25_lines():
    for stage in STAGES:
        folder = ROOT / "pipeline" / stage
        tree = ast.parse(
            (folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")).read_text()
        )
        main = next(
            node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"
        )
        assert main.end_lineno - main.lineno + 1 <= 25, stage


IMPORTS = """
import importlib, io, sys
plain = sys.stdout, sys.stderr
for stage in sys.argv[1:]:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("pipeline", "models", "data"):
            del sys.modules[name]
    sys.stdout = sys.stderr = said = io.StringIO()
    importlib.import_module(f"pipeline.{stage}")
    sys.stdout, sys.stderr = plain
    if said.getvalue():
        sys.exit(f"importing pipeline.{stage} prints {said.getvalue()!r}")
"""


@pytest.mark.slow
def test_importing_a_stage_prints_nothing_and_writes_nothing(tmp_path):
    """In one new process, where each stage imports all of our files anew."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *sorted(STAGES)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def python(cwd: Path, *arguments: str, path: str = str(ROOT)) -> subprocess.CompletedProcess:
    """Python in folder `cwd`, which stands on its path before `path`, as before the .pth file of
    `make install`.
    """
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_an_editable_install_puts_the_root_on_the_path_and_adds_no_import_hook(tmp_path):
    pytest.importorskip("setuptools", minversion="70.1")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("pipeline", "models", "data"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    python(tmp_path, "-c", "from setuptools import build_meta; build_meta.build_editable('.')")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        top = {
            name: wheel.read(name).decode().strip() for name in wheel.namelist() if "/" not in name
        }
    assert list(top.values()) == [str(tmp_path)] and next(iter(top)).endswith(".pth")


def test_commands_run_beside_plain_folders_with_our_names(tmp_path):
    for name in ("data", "models", "pipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "captions.json").touch()
    done = python(tmp_path, "-m", "pipeline.evaluate", "--help")
    assert (done.returncode, done.stderr) == (
        0,
        "",
    ) and "Usage: python -m pipeline.evaluate" in done.stdout


@pytest.mark.parametrize("name", ["data/__init__.py", "models/__init__.py", "data.py", "models.py"])
def test_a_package_that_hides_ours_is_one_plain_error(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    told = f"{tmp_path / name} hides Onceover's package {name.split('/')[0].removesuffix('.py')!r}"
    done = python(tmp_path, "-m", "pipeline.evaluate", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith(f"Error: {told}")
        and done.stderr.count("\n") == 1
        and "Rename it" in done.stderr
    )
    done = python(tmp_path, "-c", "import pipeline.scoring")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"ImportError: {told}")


def test_a_foreign_package_on_pythonpath_or_imported_before_is_named(tmp_path):
    (tmp_path / "theirs" / "data").mkdir(parents=True)
    (tmp_path / "theirs" / "data" / "__init__.py").touch()
    done = python(
        tmp_path,
        "-m",
        "pipeline.evaluate",
        "--help",
        path=f"{tmp_path / 'theirs'}{os.pathsep}{ROOT}",
    )
    assert (
        done.returncode == 2
        and f"{tmp_path / 'theirs' / 'data' / '__init__.py'} hides" in done.stderr
    )
    begin = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'theirs')!r}); import data; del "
        "sys.path[0]\n"
    )
    done = python(tmp_path, "-c", begin + "import pipeline.scoring")
    assert "ImportError" in done.stderr and "it was imported earlier" in done.stderr
    begin = "import types, sys; sys.modules['models'] = types.ModuleType('models')\n"
    done = python(tmp_path, "-c", begin + "import pipeline.scoring")
    assert "ImportError: a module called 'models' hides" in done.stderr
