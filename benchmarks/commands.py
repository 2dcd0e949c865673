"""Commands of the pipeline for benchmarks, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click


def command(stage: str, *arguments: object) -> str:
    """Run a command of the pipeline. Returns what it printed.

    Raises ClickException with its output if it fails.
    """
    line = [sys.executable, "-m", f"pipeline.{stage}", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(line)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def train(run: Path, *arguments: object) -> None:
    """Train a run to its end. An interrupted run is continued; a finished one is not changed."""
    resume = ["--resume"] if (run / "config.json").exists() else []
    command("train", *arguments, "--out", run, *resume)
