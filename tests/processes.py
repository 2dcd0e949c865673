"""Processes of their own for tests, begun in milliseconds: importing torch takes seconds, so one
server (Python's forkserver) imports the commands once a test session, and every process is its
fork. `torchrun` itself is run by tests/test_train.py.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pipeline.train", "pipeline.evaluate", "tests.kill_extraction"])
ROOT = Path(__file__).resolve().parents[1]


def begin(
    work: Callable[..., object], *arguments: object, said: Path, **environment: str
) -> BaseProcess:
    """`work(*arguments)` in a process of its own; what it prints goes into the file `said`."""
    process = SERVER.Process(target=_begun, args=(work, arguments, said, environment))
    process.start()
    return process


def _begun(
    work: Callable[..., object], arguments: tuple, said: Path, environment: dict[str, str]
) -> None:
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the platform's own, not this server
    work(*arguments)


def command(module: str, arguments: list[str]) -> None:
    """`python -m MODULE ARGUMENTS`, where the module is imported already."""
    importlib.import_module(module).main(arguments)


def run_ranks(arguments: list[str], processes: int, folder: Path) -> str:
    """pipeline.train in several processes, with the environment that torchrun gives; all that
    they print.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
    }
    files = [folder / f"said-{rank}.txt" for rank in range(processes)]
    ranks = [
        begin(
            command,
            "pipeline.train",
            arguments,
            said=said,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **shared,
        )
        for rank, said in enumerate(files)
    ]
    for rank in ranks:
        rank.join(120)
        rank.kill()  # only one that hangs is still there
    said = "".join(file.read_text() for file in files)
    assert [rank.exitcode for rank in ranks] == [0] * processes, said
    return said


def import_anew(*packages: str) -> None:
    """Forget these packages, so that they read the environment again when they are imported."""
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]
