"""The processes of the runs: their signals, their memory and their GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from pipeline.cli import UserError
from pipeline.terminal import say

OF_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


class Launcher:
    """Runs programs, one after the other. A context manager, which handles signals.

    Ctrl-C and SIGTERM are forwarded to the program; pipeline.train then saves its run and ends.

    gpu: value of CUDA_VISIBLE_DEVICES for the programs; None: that of this process.
    """

    def __init__(self, gpu: str | None = None) -> None:
        self.gpu = gpu
        self.stop_signal = 0  # the signal that arrived, or 0
        self.pid = 0  # of the program that runs, or 0

    def __enter__(self) -> Launcher:
        self.handlers: dict[int, Any] = {
            signum: signal.signal(signum, self._forward)
            for signum in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.handlers.items():
            # None: the handler was not set from Python, and Python cannot set it again
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _forward(self, signum: int, _: Any) -> None:
        self.stop_signal = signum
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def exit_if_stopped(self) -> None:
        """Exit with the code 128 + signal if a signal has arrived."""
        if self.stop_signal:
            say("the sweep was stopped; the same command continues it")
            sys.exit(128 + self.stop_signal)

    def run(self, arguments: Sequence[str]) -> tuple[int, int]:
        """Run a program. Returns its exit status and the most memory in bytes that it held.

        0 bytes: the system does not say.
        """
        environment = {k: v for k, v in os.environ.items() if k not in OF_TORCHRUN}
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        process = subprocess.Popen(arguments, env=environment)
        self.pid = process.pid
        if self.stop_signal:  # it arrived while the program was started
            self._forward(self.stop_signal, None)
        try:
            if not hasattr(os, "wait4"):
                return process.wait(), 0
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            self.pid = 0
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def own_gpu(devices: Iterable[str]) -> str | None:
    """Return the GPU of this process of torchrun, as CUDA_VISIBLE_DEVICES names it.

    devices: --device of its runs. None: without torchrun, without GPUs, or if no run needs one.

    Raises UserError if this machine has fewer GPUs than processes.
    """
    if "LOCAL_RANK" not in os.environ or not {"auto", "cuda"} & {*devices}:
        return None
    visible, rank = os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ["LOCAL_RANK"])
    if visible is None:
        import torch

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    else:  # CUDA ignores the rest of the list from the first invalid entry on
        names = (name.strip() for name in visible.split(","))
        gpus = [*takewhile(lambda name: name not in ("", "-1"), names)]
    if not gpus:
        return None
    if rank >= len(gpus):
        raise UserError(
            f"there is no GPU for process {rank} of this machine, which has {len(gpus)} GPUs"
            f"{'' if visible is None else f' (CUDA_VISIBLE_DEVICES={visible})'}; start at most "
            f"{len(gpus)} processes"
        )
    return gpus[rank]
