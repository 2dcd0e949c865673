"""Device, precision, threads, rank of the process, and free disk space.

The default precision depends on the hardware: bf16 on GPUs that support it and on CPUs with
avx512_bf16 or AMX, otherwise fp32.
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
    """The hardware that a command runs on.

    Attributes:
        device: the device of the model.
        precision: "bf16" or "fp32", the precision of autocast.
        rank: number of this process among all processes.
        world: number of processes.
        setup: settings of the allocator and the threads, as printed.
    """

    device: torch.device
    precision: str
    rank: int
    world: int
    setup: str = ""

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return a context that runs matrix products in bf16 if the precision is bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def __str__(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{self.device.type}, {torch.get_num_threads()} threads"
        return f"{name}, {self.precision}{self.setup}"


def open_machine(device: str = "auto", seed: int = 0, precision: str = "auto") -> Machine:
    """Choose the device and the precision, and seed all random number generators.

    This also configures the memory allocator and the number of threads.

    Args:
        device: "auto", "cpu", "cuda" or "mps". "auto" chooses CUDA, else MPS, else the CPU.
        seed: the seed, from 0 to 2**63 - 1.
        precision: "auto", "bf16" or "fp32".

    Raises:
        UserError: the device is not available, or the seed is out of range.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}, it must be at least 0 and below 2**63")
    setup = _keep_freed_memory() + _limit_threads_to_quota()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device(_best_device() if device == "auto" else device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "--device cuda: torch finds no CUDA device; pass --device cpu or --device auto"
            )
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(
                f"there is no GPU for process {local_rank} of this machine, which has {gpus} GPUs; "
                f"start at most {gpus} processes"
            )
        chosen = torch.device("cuda", local_rank)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "--device mps: torch finds no Apple GPU; pass --device cpu or --device auto"
        )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    chosen_precision = _best_precision(chosen) if precision == "auto" else precision
    return Machine(chosen, chosen_precision, rank, world, setup)


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
    """Configure glibc to keep freed memory, and return a text for the log.

    Otherwise each step returns its tensors to the system and faults them in again, which makes a
    CPU run 3 to 10 times slower. The effect is that of the environment variables
    MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_, which override these
    settings. There is no effect without glibc.
    """
    changed = False
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value, name in (
            (-3, 1 << 30, "MMAP_THRESHOLD"),
            (-1, (1 << 31) - 1, "TRIM_THRESHOLD"),
            (-2, 1 << 28, "TOP_PAD"),
        ):
            if f"MALLOC_{name}_" not in os.environ:
                changed = bool(libc.mallopt(option, value)) or changed
    return ", malloc keeps freed memory" if changed else ""


def _limit_threads_to_quota(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> str:
    """Limit the threads to the CPU quota of a container (cgroup v2), and return a text for the log.

    torch ignores the quota. Threads beyond the quota wait for each other, and steps take up to 10
    times as long. The environment variable OMP_NUM_THREADS overrides this limit.
    """
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return ""
    if quota == "max" or "OMP_NUM_THREADS" in os.environ:
        return ""
    threads, allowed = torch.get_num_threads(), max(1, int(quota) // int(period))
    if allowed >= threads:
        return ""
    torch.set_num_threads(allowed)
    return f", {allowed} of {threads} threads, by the CPU quota of the container"


def check_free_space(path: Path, size: int) -> str:
    """Check that `size` bytes fit on the disk of `path`, which need not exist yet.

    Returns:
        The size and the free space as text.

    Raises:
        UserError: the free space is too small.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UserError(
            f"{path} needs {human_bytes(size)}, but {existing} has {human_bytes(free)} free; pass "
            "another --out"
        )
    return f"{human_bytes(size)}, {human_bytes(free)} free"


def free_memory() -> int:
    """Return the number of bytes of RAM that are available without swapping.

    If the system does not report it, return the size of the RAM.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
