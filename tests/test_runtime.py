"""What a stage sets up on its machine, and says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pipeline import runtime


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("800000 100000", 8),
        ("max 100000", 8),
    ],
)
def test_threads_keep_to_the_containers_quota(text, allowed, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(text)
    threads = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said = runtime._limit_threads_to_quota(tmp_path / "cpu.max")
    assert threads == [allowed] and said == (
        f", {allowed} of 8 threads, by the CPU quota of the container" if allowed < 8 else ""
    )
    threads[0] = 8
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert runtime._limit_threads_to_quota(tmp_path / "cpu.max") == "" and threads == [8]
    assert runtime._limit_threads_to_quota(tmp_path / "absent") == ""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_and_it_is_said():
    """Page faults of writing 64 MB again and again, after the set-up: hardly any once the heap is
    there.
    """
    code = (
        "import resource, torch\nfrom pipeline.runtime import open_machine\n"
        "print(open_machine('cpu'))\n"
        "fill = lambda: torch.ones(16_000_000).sum().item()\n"
        "for _ in range(10): fill()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): fill()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    said, faults = done.stdout.splitlines()
    assert "freed memory kept" in said and int(faults) < 5 * 16_000_000 * 4 / 4096 / 10
