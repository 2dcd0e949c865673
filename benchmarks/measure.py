"""What benchmarks share: the hardware's name, medians of works that take turns, the report."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import click
import torch

from pipeline.runtime import Machine


def real_option(help: str) -> Callable:
    """The option --real: the folder of real photographs and captions."""
    return click.option(
        "--real",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        envvar="ONCEOVER_REAL",
        default="../shared/real",
        help=help,
    )


def header() -> dict[str, object]:
    """Hardware and date, for the report's first lines."""
    return {"hardware": f"{_processor()}, {os.cpu_count()} cores", "date": str(date.today())}


def precisions(machine: Machine) -> tuple[str, ...]:
    """What to measure in: fp32, and bf16 where the machine computes in it. A CPU that only emulates
    bf16 takes many times as long as in fp32, which says nothing of either side."""
    return ("fp32", "bf16") if machine.precision == "bf16" else ("fp32",)


def why_fp32(machine: Machine) -> dict[str, str]:
    """The line of the report that says why all is in fp32, where it is."""
    if machine.precision == "bf16":
        return {}
    lacks = "avx512_bf16 or amx_bf16" if machine.device.type == "cpu" else "bf16"
    return {
        "precision": f"fp32 on both sides: this {machine.device.type} has no {lacks}, bf16 "
        "would only be emulated"
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def waiter(device: torch.device) -> Callable[[], None]:
    """What waits until a device has done its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def seconds_of(work: Callable[[], object], synchronize: Callable[[], None] = lambda: None) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def in_turn(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each work in each round, after one that is not counted: all see the same busy or
    idle machine.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = seconds_of(work, synchronize)
            click.echo(f"round {number} of {rounds}, {name}: {seconds:.2f} s", err=True)
            if number:
                found[name].append(seconds)
    return found


def peak_above(work: Callable[[], object]) -> float:
    """GB of memory that a work takes at most, beyond what this process has in memory before it
    (Linux).
    """
    # what is free goes back, so that what follows is what the work takes
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    """GB of this process in memory, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e9


def ratio(slower: list[float], faster: list[float]) -> float:
    """Median over the rounds of how many times as long the one took."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def report(figures: Mapping[str, object], out: Path | None) -> None:
    """Print the figures by name, and write them as JSON where asked."""
    for name, value in figures.items():
        click.echo(f"{name:<52} {value:.4g}" if isinstance(value, float) else f"{name:<52} {value}")
    if out:
        out.write_text(json.dumps(figures, indent=2) + "\n")
