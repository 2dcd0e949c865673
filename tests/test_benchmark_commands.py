"""benchmarks.commands: runs of benchmarks are trained to their end."""

from __future__ import annotations

import subprocess
import types

import click
import pytest

from benchmarks import commands
from pipeline import train
from tests.test_commands import QUICK, at, run, works
from tests.test_train import interrupt_at, told


def test_a_benchmark_continues_an_interrupted_run_and_keeps_a_finished_one(
    world, tmp_path, monkeypatch
):
    def in_this_process(line, **_):
        assert line[1:3] == ["-m", "pipeline.train"]
        result = run(train.main, *line[3:])
        return types.SimpleNamespace(returncode=result.exit_code, stdout=result.output, stderr="")

    monkeypatch.setattr(subprocess, "run", in_this_process)
    given = [*at(world), "--features", world / "cache", *QUICK]
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(click.ClickException, match="continue with"):
            commands.train(tmp_path / "run", *given)
    commands.train(tmp_path / "run", *given)
    works(train.main, *given, "--out", tmp_path / "whole")
    assert told(tmp_path / "run") == told(tmp_path / "whole")
    files = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.safetensors")}
    commands.train(tmp_path / "run", *given)
    assert files == {path: path.read_bytes() for path in files}
