"""Communication between the processes of one run, which torchrun starts.

With one process, every function returns its input. Reductions run on the CPU, so that they do not
wait for a GPU.
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

# Rank 0 alone scores dev, which takes minutes for a large split.
TIMEOUT = timedelta(hours=1)
# parts of torch's messages about a lost process
CONNECTION_ERRORS = (
    "Connection closed",
    "Connection reset",
    "gloo",
    "NCCL",
    "Timed out",
    "Broken pipe",
)


@contextlib.contextmanager
def process_group(
    machine: Machine, timeout: timedelta = TIMEOUT, advice: str = "Continue the run with --resume"
) -> Iterator[None]:
    """Context manager: joins the process group, and leaves it at exit.

    timeout: how long a process waits for the others. advice: what to do if another process ends.

    Raises UserError if the processes do not connect, or if another process ends.
    """
    if machine.world == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if machine.device.type == "cuda" else "gloo"
    if machine.device.type == "cuda":
        torch.cuda.set_device(machine.device)
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is {machine.world}, but the processes could not connect to each other "
            f"({error}); start them with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in CONNECTION_ERRORS):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"rank {machine.rank} lost the connection to the other processes of the run "
            f"({reason}). If another process ended, its error message gives the cause. {advice}"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def all_reduce(*numbers: float) -> list[float]:
    """Return the sum of each number over all processes."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def broadcast(value: Any) -> Any:
    """Return the value of rank 0 in every process."""
    if not dist.is_initialized():
        return value
    objects = [value]
    dist.broadcast_object_list(objects, 0)
    return objects[0]


def all_gather(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of the ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all processes have called this function."""
    all_gather(None)


@contextlib.contextmanager
def rank_zero_first(machine: Machine) -> Iterator[None]:
    """Context manager: rank 0 runs the block first, then all other processes run it.

    The other processes can read the files that rank 0 writes in the block.
    """
    if machine.rank:
        barrier()
    yield
    if not machine.rank:
        barrier()


def shared_memory(size: int) -> tuple[np.ndarray, bool] | None:
    """Allocate a buffer that all processes of a machine share.

    size: in bytes.

    Returns the buffer as a float16 array, and whether this process must fill it; None if the system
    has no memfd. After the buffer is filled, all processes must call `barrier`.

    The buffer is an anonymous file (memfd). The system frees it when the last process ends. It does
    not use /dev/shm, which is small in containers.
    """
    if not hasattr(os, "memfd_create"):
        return None
    is_owner = os.environ.get("LOCAL_RANK", "0") == "0"
    descriptor = os.memfd_create("onceover-features") if is_owner else -1
    if is_owner:
        os.ftruncate(descriptor, size)
    hostname = socket.gethostname()
    owner_pid, owner_descriptor = next(
        (pid, fd)
        for host, pid, fd in all_gather((hostname, os.getpid(), descriptor))
        if host == hostname and fd >= 0
    )
    if not is_owner:
        descriptor = os.open(f"/proc/{owner_pid}/fd/{owner_descriptor}", os.O_RDWR)
    memory = np.frombuffer(mmap.mmap(descriptor, size), np.float16)
    barrier()  # the owner must not close its descriptor before the others have opened the file
    os.close(descriptor)
    return memory, is_owner
