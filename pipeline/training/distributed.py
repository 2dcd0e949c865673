"""Several processes of one run, started by torchrun: join, reduce, gather and wait.

With one process, every function returns its input. Reduced tensors are on the CPU, so that no
device waits.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.cli import UserError
from pipeline.runtime import Machine

# how long to wait for a live process: scoring a large dev split takes minutes
PATIENCE = timedelta(hours=1)
LOST = ("Connection closed", "Connection reset", "gloo", "NCCL", "Timed out", "Broken pipe")


@contextlib.contextmanager
def joined(machine: Machine) -> Iterator[None]:
    """Join the process group and leave it at the end; UserError if a process is lost."""
    if machine.world == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if machine.device.type == "cuda" else "gloo"
    if machine.device.type == "cuda":
        torch.cuda.set_device(machine.device)
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        told = f"WORLD_SIZE is {machine.world}, but the processes do not meet ({error})"
        raise UserError(f"{told}; start them by torchrun, or unset WORLD_SIZE") from error
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        told = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"rank {machine.rank} lost the other processes of the run ({told}); where one "
            "ended, its own error says why; go on "
            "with --resume"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def all_reduce(*numbers: float) -> list[float]:
    """The sum of each number over all processes."""
    if not dist.is_initialized():
        return list(numbers)
    added = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(added)
    return added.tolist()


def broadcast(value: Any) -> Any:
    """The value of rank 0, in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Wait until all processes are here."""
    all_gather(None)


@contextlib.contextmanager
def first_alone(machine: Machine) -> Iterator[None]:
    """Rank 0 runs the block before the other processes, which may then read what it wrote."""
    if machine.rank:
        barrier()
    yield
    if not machine.rank:
        barrier()


def shared_memory(size: int) -> tuple[np.ndarray, bool] | None:
    """A buffer of `size` bytes as float16 that all processes of a machine share, and whether this
    process must fill it; None if the system has no such memory.

    It is an anonymous file (memfd): it disappears with the last process, and does not count as
    /dev/shm, which is small in containers. Call `barrier` once it is filled.
    """
    if not hasattr(os, "memfd_create"):
        return None
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    made = os.memfd_create("onceover-features") if first else -1
    if first:
        os.ftruncate(made, size)
    here = socket.gethostname()
    where = next(
        (pid, fd)
        for host, pid, fd in all_gather((here, os.getpid(), made))
        if host == here and fd >= 0
    )
    file = made if first else os.open(f"/proc/{where[0]}/fd/{where[1]}", os.O_RDWR)
    memory = np.frombuffer(mmap.mmap(file, size), np.float16)
    barrier()  # until all have it
    os.close(file)
    return memory, first
