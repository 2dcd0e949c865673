"""Shared functions of the benchmarks: hardware, interleaved timing, memory, the report."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import click
import torch

from pipeline.runtime import Machine


def real_option(help: str) -> Callable:
    """Return the option --real: the folder of real photographs, which may be absent."""
    return click.option(
        "--real",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="ONCEOVER_REAL",
        default="../shared/real",
        help=help,
    )


def header() -> dict[str, object]:
    """Return the hardware and the date for the report."""
    return {"hardware": f"{_processor()}, {os.cpu_count()} cores", "date": str(date.today())}


def precisions(machine: Machine) -> tuple[str, ...]:
    """Return the precisions to measure: fp32, and bf16 if the hardware supports it.

    A CPU without bf16 instructions emulates bf16. The emulation is many times slower than fp32, so
    that such a comparison is meaningless.
    """
    return ("fp32", "bf16") if machine.precision == "bf16" else ("fp32",)


def why_fp32(machine: Machine) -> dict[str, str]:
    """Return the line of the report that explains fp32; empty if the machine supports bf16."""
    if machine.precision == "bf16":
        return {}
    missing = "avx512_bf16 or amx_bf16" if machine.device.type == "cpu" else "bf16"
    return {
        "precision": f"fp32 on both sides: this {machine.device.type} has no {missing}, bf16 "
        "would only be emulated"
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def waiter(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until the device has finished its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def seconds_of(
    work: Callable[[], object],
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds of one call of `work`, by `clock`."""
    synchronize()
    start = clock()
    work()
    synchronize()
    return clock() - start


def in_turn(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each function of `works` in each round, by name.

    clock: time.process_time counts only this process, on a machine with other jobs.

    The functions take turns in each round, so that all of them see the same load of the machine. An
    additional first round is not counted.
    """
    seconds_by_name: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(rounds + 1):
        for name, work in works.items():
            seconds = seconds_of(work, synchronize, clock)
            click.echo(f"round {round_number} of {rounds}, {name}: {seconds:.2f} s", err=True)
            if round_number:
                seconds_by_name[name].append(seconds)
    return seconds_by_name


def peak_above(work: Callable[[], object]) -> float:
    """Return the peak memory of `work` in GB, above the memory of this process before (Linux)."""
    # Return freed memory to the system, so that `work` cannot reuse it unnoticed.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def peak_memory() -> float:
    """Return the peak memory of this process in GB (Linux)."""
    return _resident("VmHWM")


def _resident(name: str) -> float:
    """The memory of this process in GB: current (VmRSS) or peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e9


def ratio(slower: list[float], faster: list[float]) -> float:
    """Return the median over the rounds of the ratio of two durations."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def report(figures: Mapping[str, object], out: Path | None) -> None:
    """Print the figures by name. If `out` is given, also write them as JSON."""
    for name, value in figures.items():
        click.echo(f"{name:<52} {value:.4g}" if isinstance(value, float) else f"{name:<52} {value}")
    if out:
        out.write_text(json.dumps(figures, indent=2) + "\n")


def peak_of(work: Callable[[], object], machine: Machine) -> float:
    """Return the peak memory in GB of a call of `work` above that before it."""
    if machine.device.type != "cuda":
        return peak_above(work)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def memory_alone(
    measure: Callable[[], float], machine: Machine, module: str, *options: object
) -> float:
    """Return the result of `measure`: peak memory, which nothing else of this process may raise.

    On a CPU a process of its own measures it, by `python -m MODULE OPTIONS`, whose last word is the
    result. Only Linux can; elsewhere NaN.
    """
    if machine.device.type == "cuda":
        return measure()
    if sys.platform != "linux":
        return float("nan")
    command = [sys.executable, "-m", module, *map(str, options), "--device", "cpu"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout.split()[-1])
