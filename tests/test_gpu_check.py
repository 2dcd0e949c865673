"""benchmarks.gpu_check: a part that fails or hangs is recorded, and the others run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Part, run_parts
from tests.test_commands import refused

ROOT = Path(__file__).resolve().parents[1]
FIGURES = (
    "import json, sys; json.dump({'ours, images/s at batch 8': 1234.5}, open(sys.argv[1], 'w'))"
)


def python(code: str, *more: str) -> list[str]:
    return [sys.executable, "-c", code, *more]


def read(folder: Path) -> dict[str, dict]:
    record = json.loads((folder / "gpu-check.json").read_text())
    return {part["name"]: part for part in record["parts"]}


def test_a_part_that_fails_or_hangs_is_recorded_and_the_others_run(tmp_path):
    child = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', \
'import time; time.sleep(60)']); open({str(tmp_path / 'child')!r}, 'w').write(str(p.pid)); \
print('begun', flush=True); time.sleep(60)"
    parts = [
        Part("a", python(FIGURES, "{json}"), 20, {"images per s": "ours, images/s"}),
        Part("b", python("print('line'); raise ValueError('no | kernel')"), 20),
        Part("c", python(child), 3),
        Part("d", [sys.executable, "-m", "pytest", "--version"], 20),
        Part("e", python("pass"), 20),
    ]
    results = run_parts(parts, {"card": "a card"}, tmp_path)
    assert [r.result for r in results] == ["passed", "failed", "time-out", "failed", "passed"]
    found = read(tmp_path)
    assert list(found) == list("abcde")
    assert found["a"]["shown"] == {"images per s": 1234.5} and found["a"]["seconds"] > 0
    assert found["b"]["error"] == "ValueError: no | kernel"
    assert found["c"]["error"] == "stopped after 3 s; last line: begun"
    assert found["d"]["error"] == "all tests were skipped"
    page = (tmp_path / "gpu-check.md").read_text()
    assert page.startswith("# GPU check: a card\n") and "2 passed, 2 failed, 1 time-out" in page
    assert "| a | passed | " in page and "images per s 1234 |" in page
    assert "ValueError: no \\| kernel |" in page
    for _ in range(100):  # what a part started is stopped with it
        if not Path(f"/proc/{(tmp_path / 'child').read_text()}").exists():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of a part that took too long still runs")


@pytest.mark.slow
def test_both_files_are_written_after_every_part_and_the_total_time_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "TOTAL_SECONDS", 6)
    spy = "import json, sys; parts = json.load(open(sys.argv[1]))['parts']; "
    spy += "sys.exit([part['result'] for part in parts[:2]] != ['passed', 'not run'])"
    parts = [
        Part("first", python("pass"), 20),
        Part("sees the first", python(spy, str(tmp_path / "gpu-check.json")), 20),
        Part("takes all the time", python("import time; time.sleep(60)"), 60),
        Part("has no time", python("pass"), 20),
    ]
    start = time.monotonic()
    results = run_parts(parts, {}, tmp_path, factor=2)
    assert time.monotonic() - start < 30
    assert [r.result for r in results] == ["passed", "passed", "time-out", "not run"]
    assert read(tmp_path)["has no time"]["error"] == "no time left of 12 s"


def test_tests_leave_time_for_the_benchmarks(tmp_path, monkeypatch):
    parts = [Part("test: x", python("pass"), 20), Part("y", python("pass"), 20)]
    monkeypatch.setattr(gpu_check, "TEST_SECONDS", 0)
    assert [r.result for r in run_parts(parts, {}, tmp_path)] == ["not run", "passed"]


def test_each_group_of_tests_has_a_test_that_needs_a_gpu():
    lines = (ROOT / "tests" / "test_gpu.py").read_text().splitlines()
    names = [line for line in lines if line.startswith("def test_")]
    for words in gpu_check.TESTS.values():
        assert sum(words in name for name in names) == 1, words
    assert len(names) == len(gpu_check.TESTS)


def test_every_benchmark_takes_the_options_it_is_run_with():
    for device in ("cpu", "cuda"):
        for part in gpu_check.benchmark_parts(device):
            module = __import__(part.command[2], fromlist=["main"])
            module.main.make_context(part.name, list(part.command[3:]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_plain_message(tmp_path):
    message = refused(gpu_check.main, "--out", tmp_path / "out")
    assert "torch finds no CUDA device" in message and not (tmp_path / "out").exists()
    assert "no part contains 'nothing'" in refused(
        gpu_check.main, "--device", "cpu", "--only", "nothing"
    )


@pytest.mark.slow
def test_the_check_runs_on_a_cpu_from_end_to_end(tmp_path):
    only = [word for name in ("token CIDEr", "extraction, ", "self-critical training")
            for word in ("--only", name)]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", *only]
    done = subprocess.run(
        [*command, "--out", tmp_path], cwd=ROOT, env={**os.environ, "ONCEOVER_REAL": "none"}
    )
    parts = read(tmp_path)
    assert done.returncode == 0 and len(parts) == 3, parts
    assert parts["extraction, test_resnet"]["shown"]["images per s"] > 0
    assert parts["self-critical training"]["shown"]["samples per s"] > 0
