"""What every stage asks of the machine: device, precision, threads, rank, free disk, and a progress bar.

Precision is chosen by the hardware and said: bf16 on a GPU that has it and on CPUs with avx512_bf16 or AMX, else fp32.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from pipeline.cli import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Machine:
    """Where a stage runs: `device`, the autocast `precision` (bf16 or fp32), this process's `rank` of `world`."""

    device: torch.device
    precision: str
    rank: int
    world: int

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def __str__(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{self.device.type}, {torch.get_num_threads()} threads"
        return f"{name}, {self.precision}"


def open_machine(device: str = "auto", seed: int = 0, precision: str = "auto") -> Machine:
    """Choose device and precision, seed every generator, and set up the allocator; UserError where it is not there."""
    _keep_freed_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = torch.device(_best_device() if device == "auto" else device)
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; use --device cpu or auto")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return Machine(found, _best_precision(found) if precision == "auto" else precision, rank, world)


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _best_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu" and sys.platform == "linux":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
    return "fp32"


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks: giving each step's tensors back and faulting them in again costs a CPU run 3-10x.

    The same as the variables MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ before the start,
    which win where they are set. Elsewhere than on glibc it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value, name in ((-3, 1 << 30, "MMAP_THRESHOLD"), (-1, (1 << 31) - 1, "TRIM_THRESHOLD"),
                                    (-2, 1 << 28, "TOP_PAD")):  # fmt: skip
            if f"MALLOC_{name}_" not in os.environ:
                libc.mallopt(option, value)


def say(text: str) -> None:
    """One line for the person at the terminal, by rank 0, on stderr: stdout is for results."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(text, err=True)


def refuse_what_cannot_fit(path: Path, need: int) -> str:
    """Compare `need` bytes with the free space where `path` will be; returns both as text, UserError if it lacks."""
    place = path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise UserError(f"{path} needs {human_bytes(need)}, {place} has {human_bytes(free)} free; choose another --out")
    return f"{human_bytes(need)}, {human_bytes(free)} free"


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """A bar with rate and time left on a terminal; a plain line every ten seconds where stderr is a file or a pipe."""

    def __init__(self, total: int, unit: str, what: str, enabled: bool = True) -> None:
        self.total, self.unit, self.what, self.done, self.note = total, unit, what, 0, ""
        self.start = self.last_line = time.monotonic()
        self.enabled = enabled
        tty = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=total, unit=f" {unit}", desc=what, dynamic_ncols=True, leave=False) if tty else None

    def step(self, count: int, note: str = "") -> None:
        self.done, self.note = self.done + count, note
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif self.enabled and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            left = (self.total - self.done) / max(self.rate, 1e-9)
            text = f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {self.rate:,.0f}/s, {left:.0f} s left"
            click.echo(f"{text}{'  ' + note if note else ''}", err=True)

    @property
    def rate(self) -> float:
        return self.done / max(time.monotonic() - self.start, 1e-9)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def progress(total: int, unit: str, what: str, enabled: bool = True) -> Iterator[Progress]:
    bar = Progress(total, unit, what, enabled)
    try:
        yield bar
    finally:
        bar.close()
