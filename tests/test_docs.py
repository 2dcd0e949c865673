"""The documents say what the code does: option pages, and the README's commands in their order."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from data.datasets.sample import draw_sample
from pipeline import sweep
from pipeline.sources import SAMPLE_ROOT
from tests.test_commands import SMALL, works

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What cannot run here: it installs, needs a download, or several GPUs.
NOT_RUN = (
    "git clone",
    "make ",
    "python3 -m venv",
    ".venv/bin/",
    "source ",
    "torchrun ",
    "photograph ->",
    "HDF5 cache ->",
)


def options_script():
    spec = importlib.util.spec_from_file_location(
        "write_options", ROOT / "docs" / "write_options.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    ["extract", "convert", "train", "evaluate", "caption", "ask", "classify", "sweep", "export"],
)
def test_the_page_of_a_command_lists_the_options_that_it_has(name):
    written = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert written == options_script().page(name), "run: python docs/write_options.py"


def test_the_readme_has_at_most_150_lines_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def test_the_decoder_of_the_documents_is_the_one_that_is_tested():
    page = (ROOT / "docs" / "decoders.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    assert block == (ROOT / "tests" / "toys" / "bag.py").read_text(encoding="utf-8")


def test_the_sweep_of_the_documents_is_read(tmp_path):
    page = (ROOT / "docs" / "decoders.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```", page, re.S | re.M)
    (tmp_path / "sweep.toml").write_text(block)
    told = works(sweep.main, tmp_path / "sweep.toml", "--dry-run")
    assert told.count("pipeline.train") == told.count("pipeline.evaluate") == 9
    assert "--meshed" in told


def commands_of_readme() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", README, re.S | re.M)
    return [
        line
        for block in blocks
        for line in block.splitlines()
        if "pipeline" in line and not line.startswith(NOT_RUN)
    ]


def made_small(line: str) -> list[str]:
    """The arguments of a README command, with what makes it end in seconds."""
    _, _, module, *arguments = shlex.split(line)
    if module == "pipeline.train":
        more = dict(zip(SMALL[::2], SMALL[1::2], strict=True)) if "--init" not in arguments else {}
        if "lstm" in arguments:
            more = {"--width": "32"}
        more |= {"--epochs": "1", "--batch": "20", "--beam": "2"}
        arguments += [part for pair in more.items() if pair[0] not in arguments for part in pair]
    if "mobilenetv2_100" in arguments:
        arguments += ["--weights", "random", "--size", "64"]
    if module == "pipeline.evaluate":
        arguments += ["--bootstrap", "20"]
    return [module, *arguments]


def test_the_commands_and_the_python_of_the_readme_run_in_their_order(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "pipeline.sources.ensure_sample",
        lambda root: root.exists() or draw_sample(root, 60, seed=3),
    )
    ran = []
    for line in commands_of_readme():
        if "--dataset coco2017" in line:  # needs COCO, and weights from the hub
            continue
        if "PHOTOS" in line and not (tmp_path / "PHOTOS").exists():
            photographs = sorted(SAMPLE_ROOT.rglob("*.jpg"))[:12]
            (tmp_path / "PHOTOS").mkdir()
            rows = [
                {"file_name": path.name, "text": f"a scene of number {n}"}
                for n, path in enumerate(photographs)
            ]
            for path in photographs:
                shutil.copy(path, "PHOTOS")
            Path("PHOTOS/metadata.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
        module, *arguments = made_small(line)
        works(importlib.import_module(module).main, *arguments)
        ran.append(line)
    assert len(ran) >= 12
    assert len(list(Path("PHOTOS").glob("*.txt"))) == 12
    shutil.copy(next(SAMPLE_ROOT.rglob("*.jpg")), "photo.jpg")
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    exec(compile(block, "README.md", "exec"), {})
    assert "'CIDEr'" in capsys.readouterr().out
    assert (tmp_path / "captioner" / "config.json").exists()
