"""The log of a run: metrics.jsonl always, TensorBoard if installed, Weights & Biases with --wandb.

A line within an epoch has `step`, `epoch` (a fraction) and `train`. A line of a validation also has
`dev` and `seconds`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import atomic_write_text
from pipeline.cli import UserError
from pipeline.terminal import say


class Journal:
    """The log lines of a run in `folder`. enabled: True only in the process that writes."""

    def __init__(self, folder: Path, record: Mapping[str, Any], wandb: bool, enabled: bool) -> None:
        self.folder, self.record, self.enabled = folder, record, enabled
        self.path = folder / "metrics.jsonl"
        self.lines: list[dict[str, Any]] = []
        self.board: Any = None
        self.wandb = self._import_wandb() if wandb and enabled else None
        self.wandb_id: str | None = None

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of validations."""
        return [line for line in self.lines if "seconds" in line]

    @property
    def scored(self) -> list[dict[str, Any]]:
        """The lines with scores on dev."""
        return [line for line in self.lines if "dev" in line]

    def begin(
        self, epochs: Sequence[dict[str, Any]] = (), step: int = 0, wandb_id: str | None = None
    ) -> None:
        """Start the log, or continue it: later lines that a killed start had written are
        removed.
        """
        within = (
            [line for line in self._read() if "seconds" not in line and line["step"] <= step]
            if step
            else []
        )
        self.lines = sorted([*within, *epochs], key=lambda line: (line["step"], "seconds" in line))
        if not self.enabled:
            return
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say(
                "TensorBoard is not installed (pip install 'onceover[tensorboard]'); "
                "metrics.jsonl has the same figures"
            )
        else:
            self.board = SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=step + 1 if step else 0
            )
        if self.wandb:
            try:
                started = self.wandb.init(
                    project="onceover",
                    name=self.folder.name,
                    id=wandb_id,
                    resume="allow",
                    dir=str(self.folder),
                    config=dict(self.record),
                )
            except (
                Exception
            ) as error:  # not logged in, or no network: wandb raises many kinds of errors
                raise UserError(
                    f"--wandb: {error}; `wandb login`, or WANDB_MODE=offline, usually fixes it"
                ) from error
            self.wandb_id = started.id

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if not self.enabled:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        values = {
            f"{part}/{name}": value
            for part in ("train", "dev")
            for name, value in line.get(part, {}).items()
        }
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, line["step"])
            self.board.flush()
        if self.wandb:
            self.wandb.log(values, step=line["step"])

    def close(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()

    def _read(self) -> list[dict[str, Any]]:
        """The lines on disk. Invalid lines, such as a last one that a killed process left
        incomplete, are skipped.
        """
        found = []
        for text in (
            self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            if self.path.exists()
            else ()
        ):
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(text))
        return [line for line in found if isinstance(line, dict) and type(line.get("step")) is int]

    @staticmethod
    def _import_wandb() -> Any:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "--wandb: it is not installed; install it with: pip install 'onceover[wandb]'"
            ) from error
        return wandb
