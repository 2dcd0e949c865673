"""Device, precision, threads, rank and free disk space.

Precision is chosen by the hardware and printed: bf16 on GPUs that support it and on CPUs with
avx512_bf16 or AMX, else fp32.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.cli import UserError
from pipeline.terminal import human_bytes


@dataclass(frozen=True)
class Machine:
    """Where a stage runs: device, autocast precision (bf16 or fp32), and this process's `rank` of
    `world`.
    """

    device: torch.device
    precision: str
    rank: int
    world: int
    setup: str = ""  # settings made for speed, as printed

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def __str__(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{self.device.type}, {torch.get_num_threads()} threads"
        return f"{name}, {self.precision}{self.setup}"


def open_machine(device: str = "auto", seed: int = 0, precision: str = "auto") -> Machine:
    """Choose device and precision, seed all generators, and configure allocator and threads;
    UserError if the device is not available.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}, it must be at least 0 and below 2**63")
    setup = _keep_freed_memory() + _keep_to_quota()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = torch.device(_best_device() if device == "auto" else device)
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "--device cuda: torch sees no CUDA device here; use --device cpu or auto"
            )
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU, it has "
                f"{torch.cuda.device_count()}; start fewer"
            )
        found = torch.device("cuda", local)
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; use --device cpu or auto")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return Machine(
        found, _best_precision(found) if precision == "auto" else precision, rank, world, setup
    )


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


def _keep_freed_memory() -> str:
    """Configure glibc to keep freed memory. Returning the tensors of each step and faulting them in
    again makes a CPU run 3 to 10 times slower.

    Equals setting MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_, which win if
    they are set. No effect without glibc. Returns a text for the log.
    """
    done = False
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value, name in (
            (-3, 1 << 30, "MMAP_THRESHOLD"),
            (-1, (1 << 31) - 1, "TRIM_THRESHOLD"),
            (-2, 1 << 28, "TOP_PAD"),
        ):
            if f"MALLOC_{name}_" not in os.environ:
                done = bool(libc.mallopt(option, value)) or done
    return ", freed memory kept" if done else ""


def _keep_to_quota(group: Path = Path("/sys/fs/cgroup/cpu.max")) -> str:
    """Limit the number of threads to the CPU quota of a container (cgroup v2), which torch ignores.

    Threads beyond the quota wait for each other and cost up to 10 times the time. OMP_NUM_THREADS
    wins. Returns a text for the log.
    """
    try:
        quota, period = group.read_text().split()
    except (OSError, ValueError):
        return ""
    there = torch.get_num_threads()
    if (
        quota == "max"
        or "OMP_NUM_THREADS" in os.environ
        or (allowed := max(1, int(quota) // int(period))) >= there
    ):
        return ""
    torch.set_num_threads(allowed)
    return f", {allowed} of {there} threads: the container's share"


def refuse_what_cannot_fit(path: Path, need: int) -> str:
    """Compare `need` bytes with the free disk space at `path`. Returns both as text; UserError if
    the space is too small.
    """
    place = path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise UserError(
            f"{path} needs {human_bytes(need)}, {place} has {human_bytes(free)} free; choose "
            "another --out"
        )
    return f"{human_bytes(need)}, {human_bytes(free)} free"


def free_memory() -> int:
    """Bytes of RAM available without swapping, or all RAM if the system does not report it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return (
            int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        )
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
