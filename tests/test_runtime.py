"""What a stage sets up on its machine, and says."""

from __future__ import annotations

import os
import resource
import sys

import pytest
import torch

from pipeline import runtime
from tests.processes import begin


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


def write_again_and_again() -> None:
    """Write 64 MB again and again after the set-up; print what it says and the page faults of five
    times.
    """
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    print(runtime.open_machine("cpu"))
    for number in range(15):
        if number == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16_000_000).sum().item()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_and_it_is_said(tmp_path):
    """Hardly any page faults once the heap is there."""
    process = begin(write_again_and_again, said=tmp_path / "said.txt")
    process.join()
    told = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 0, told
    said, faults = told.splitlines()
    assert "malloc keeps freed memory" in said and int(faults) < 5 * 16_000_000 * 4 / 4096 / 10
