"""What a run tells while it trains: metrics.jsonl always, TensorBoard where it is installed, Weights & Biases where asked for.

A line within an epoch has `step`, `epoch` (a fraction) and `train`; at an epoch's end also `dev` and `seconds`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.features import write_whole
from pipeline.cli import UserError
from pipeline.terminal import say


class Journal:
    """The lines of a run in `folder`; `enabled` only in the process that writes."""

    def __init__(self, folder: Path, record: Mapping[str, Any], wandb: bool, enabled: bool) -> None:
        self.folder, self.record, self.enabled = folder, record, enabled
        self.lines: list[dict[str, Any]] = []
        self.board: Any = None
        self.wandb = self._import_wandb() if wandb and enabled else None
        self.wandb_id: str | None = None

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of epochs' ends."""
        return [line for line in self.lines if "seconds" in line]

    def begin(self, lines: list[dict[str, Any]] = [], wandb_id: str | None = None) -> None:  # noqa: B006  (never changed)
        """Start, or go on after `lines`: what was told later than they, by a run that was killed, is taken back."""
        self.lines = list(lines)
        if not self.enabled:
            return
        self._write()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("TensorBoard is not installed (pip install 'onceover[tensorboard]'); metrics.jsonl has the same figures")
        else:
            step = lines[-1]["step"] + 1 if lines else None
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        if self.wandb:
            started = self.wandb.init(project="onceover", name=self.folder.name, id=wandb_id, resume="allow",
                                      dir=str(self.folder), config=dict(self.record))  # fmt: skip
            self.wandb_id = started.id

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if not self.enabled:
            return
        self._write()
        values = {f"{part}/{name}": value for part in ("train", "dev") for name, value in line.get(part, {}).items()}
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

    def _write(self) -> None:
        write_whole(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    @staticmethod
    def _import_wandb() -> Any:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb: it is not installed; install it with: pip install 'onceover[wandb]'") from error
        return wandb
