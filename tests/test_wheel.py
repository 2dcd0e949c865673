"""The wheel holds all that the commands need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_commands_run_from_an_installed_wheel_outside_the_tree(tmp_path):
    """The wheel goes into an empty environment; the packages it needs are those of this one, by its
    path.
    """
    tree = tmp_path / "tree"  # a copy: building writes beside the sources
    tree.mkdir()
    for name in ("pipeline", "models", "data"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        tree,
    ]
    subprocess.run(list(map(str, build)), check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("onceover-*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel]
    subprocess.run(list(map(str, install)), check=True, capture_output=True)
    needed = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (site / "needed.pth").write_text(f"{needed}\n")  # after the wheel's own packages
    # a .pth file in a .pth folder is not read, so the tree stays out
    for path in needed.glob("*onceover*"):
        assert path.suffix in (".pth", ".dist-info")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, *arguments],
            cwd=tmp_path / "work",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    (tmp_path / "work").mkdir()
    where = run(
        "-c",
        "import data.cache.reader, models.decoders.transformer, pipeline.evaluate as e; "
        "print(e.__file__)",
    )
    assert str(site) in where
    run(
        "-c",
        "from pathlib import Path; from data.datasets.sample import draw_sample; "
        "draw_sample(Path('sample'), 60)",
    )
    at = ["--dataset", "karpathy", "--root", "sample", "--features", "cache"]
    run(
        "-m",
        "pipeline.extract",
        *at[:4],
        "--backbone",
        "test_resnet",
        "--weights",
        "scenes",
        "--out",
        "cache",
    )
    small = [
        "--width",
        "32",
        "--heads",
        "2",
        "--encoder-layers",
        "1",
        "--decoder-layers",
        "1",
        "--feedforward",
        "64",
    ]
    run("-m", "pipeline.train", *at, *small, "--epochs", "1", "--out", "run")
    assert "CIDEr" in run(
        "-m", "pipeline.evaluate", *at, "--checkpoint", "run", "--bootstrap", "20"
    )
    photo = next((tmp_path / "work" / "sample").rglob("*.jpg"))
    assert photo.name in run("-m", "pipeline.caption", str(photo), "--checkpoint", "run")
