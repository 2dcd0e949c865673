"""pipeline.sweep: runs of a TOML file, what is done is skipped, and the comparison."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import evaluate, sweep, train
from pipeline.cli import UserError
from pipeline.scoring.comparison import Row, compare_runs, markdown
from tests.test_commands import refused, run, works

SWEEP = """
out = "{out}"
[train]
dataset = "karpathy"
root = "{world}/sample"
features = "{world}/cache"
preset = "tiny"
width = 16
epochs = 1
min-count = 1
[evaluate]
split = "val"
beam = 2
[grid]
decoder = ["pooled", "lstm"]
[[runs]]
name = "wide"
decoder = "pooled"
width = 32
heads = 4
"""


@pytest.fixture
def in_process(monkeypatch) -> None:
    """The runs share this process: importing torch takes most of the time of such small ones."""

    def run_process(arguments):
        assert arguments[:2] == [sys.executable, "-m"]
        stage = {"pipeline.train": train, "pipeline.evaluate": evaluate}[arguments[2]]
        return run(stage.main, *arguments[3:]).exit_code, 123_000_000

    monkeypatch.setattr(sweep, "run_process", run_process)


@pytest.fixture
def file(world, tmp_path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.format(out=tmp_path / "runs", world=world))
    return path


def test_the_runs_of_a_file_are_trained_scored_and_compared_once(file, tmp_path, in_process):
    assert works(sweep.main, file, "--dry-run").count("python -m pipeline.train") == 3
    assert not (tmp_path / "runs").exists()
    table = works(sweep.main, file)
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [each["name"] for each in record["runs"]] == ["pooled", "lstm", "wide"]
    assert (tmp_path / "runs" / "comparison.svg").read_text().startswith("<?xml")
    scores = {}
    for each in record["runs"]:
        own = json.loads((tmp_path / "runs" / each["name"] / "scores.json").read_text())
        assert each["scores"] == own["scores"] and own["decoding"]["beam"] == 2
        assert own["decoded_per_s"] == each["decoded_per_s"] > 0 < each["trained_per_s"]
        assert each["minutes"] > 0 and each["peak_bytes"] == 123_000_000
        scores[each["name"]] = own["scores"]["CIDEr"]
        assert f"| {each['name']} | {own['scores']['CIDEr']:.4f} (" in table
    assert len(record["pairs"]) == 3
    for pair in record["pairs"]:
        assert pair["value"] == pytest.approx(scores[pair["a"]] - scores[pair["b"]])
    before = (tmp_path / "runs" / "lstm" / "model.safetensors").stat().st_mtime_ns
    again = works(sweep.main, file)
    assert "$ python" not in again
    assert before == (tmp_path / "runs" / "lstm" / "model.safetensors").stat().st_mtime_ns
    file.write_text(file.read_text().replace("beam = 2", "beam = 1"))
    told = works(sweep.main, file)
    assert (
        told.count("$ python -m pipeline.evaluate") == 3
        and "$ python -m pipeline.train" not in told
    )
    file.write_text(file.read_text().replace("epochs = 1", "epochs = 2"))
    told = refused(sweep.main, file)
    assert "was trained with epochs = 1, but the file has 2" in told


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(file, tmp_path):
    file.write_text(file.read_text().replace("epochs = 1", "epochs = 40"))
    command = [sys.executable, "-m", "pipeline.sweep", str(file)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    saved = tmp_path / "runs" / "pooled" / "last.safetensors"
    until = time.monotonic() + 120
    while not saved.exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "runs" / "comparison.json").exists()
    told = works(sweep.main, file)
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert len(record["runs"]) == 3 and "| wide |" in told
    state = json.loads((tmp_path / "runs" / "pooled.json").read_text())
    assert state["done"] == ["train", "evaluate"]


@pytest.mark.slow
def test_processes_of_torchrun_share_the_runs(file, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "-m", "pipeline.sweep", str(file)], check=True)
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert all(each["peak_bytes"] > 1e8 for each in record["runs"])
    assert {each["name"] for each in record["runs"]} == {"pooled", "lstm", "wide"}


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('decoder = ["pooled", "lstm"]', 'decodr = ["pooled"]', "run pooled: No such option"),
        ('decoder = ["pooled", "lstm"]', 'decoder = ["gru"]', "run gru: Invalid value"),
        ('decoder = ["pooled", "lstm"]', 'decoder = "lstm"', "must be a list of values"),
        ("[grid]", "[grids]", "unknown key 'grids'"),
        ("beam = 2", "bem = 2", "No such option"),
        ('name = "wide"', 'name = "lstm"', "two runs have the name 'lstm'"),
        ('name = "wide"', 'name = "a/b"', "cannot be the name of a run"),
        ("heads = 4", "heads = [", "cannot be read"),
    ],
)
def test_mistakes_are_found_before_the_first_run(file, tmp_path, old, new, what):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert what in refused(sweep.main, file)
    assert not (tmp_path / "runs").exists()


def test_a_failed_run_is_named_and_the_others_go_on(file, tmp_path, in_process):
    text = file.read_text().replace('decoder = ["pooled", "lstm"]', 'decoder = ["pooled"]')
    file.write_text(text.replace("heads = 4", "heads = 5"))  # 32 is not a multiple of 5
    told = refused(sweep.main, file)
    assert "1 of 2 runs failed: wide" in told
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [each["name"] for each in record["runs"]] == ["pooled"] and record["pairs"] == []


def row(name: str, values: list[float], metric: str = "CIDEr") -> Row:
    examples = [{"image_id": n, "scores": {metric: v}} for n, v in enumerate(values)]
    scores = {metric: float(np.mean(values))}
    return Row(name, metric, scores, {}, examples, 1_000_000, 10, 10, 1, 0)


def test_only_differences_beyond_chance_are_bold():
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.2, 300)
    rows = [row("a", base), row("same", base + rng.normal(0, 0.2, 300)), row("better", base + 0.1)]
    comparison = compare_runs(rows)
    p = {(pair["a"], pair["b"]): pair["p"] for pair in comparison["pairs"]}
    assert p["a", "better"] < 0.05 < p["a", "same"]
    table = markdown(comparison)
    assert "| a | better | **-0.1000 (" in table and "| a | same | **" not in table
    with pytest.raises(UserError, match="different examples"):
        compare_runs([row("a", base), row("b", base[:200])])
