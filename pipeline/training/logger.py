"""The log of a run: metrics.jsonl always, TensorBoard if installed, Weights & Biases with --wandb.

A training line has `step`, `epoch` (a fraction) and `train`. A validation line also has `dev` and
`seconds`.
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
    """Log of a run in `folder`.

    record: the settings of the run, for Weights & Biases.
    enabled: whether this process writes the log.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], wandb: bool, enabled: bool) -> None:
        self.folder, self.record, self.enabled = folder, record, enabled
        self.path = folder / "metrics.jsonl"
        self.lines: list[dict[str, Any]] = []
        self.board: Any = None
        self.wandb = self._import_wandb() if wandb and enabled else None
        self.wandb_id: str | None = None

    @property
    def validations(self) -> list[dict[str, Any]]:
        """The validation lines."""
        return [line for line in self.lines if "seconds" in line]

    @property
    def scored(self) -> list[dict[str, Any]]:
        """The validation lines with scores on dev. Empty with --train-on-dev."""
        return [line for line in self.lines if "dev" in line]

    def begin(
        self, validations: Sequence[dict[str, Any]] = (), step: int = 0, wandb_id: str | None = None
    ) -> None:
        """Start the log, or continue the log of a resumed run.

        validations: the validation lines of the saved state.
        step: the step of the saved state. Lines of later steps are removed.

        Raises UserError if Weights & Biases does not start.
        """
        training_lines = []
        if step:
            training_lines = [
                line for line in self._read() if "seconds" not in line and line["step"] <= step
            ]
        self.lines = sorted(
            [*training_lines, *validations], key=lambda line: (line["step"], "seconds" in line)
        )
        if not self.enabled:
            return
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say(
                "TensorBoard is not installed (pip install 'onceover[tensorboard]'); "
                "metrics.jsonl has the same metrics"
            )
        else:
            self.board = SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=step + 1 if step else 0
            )
        if self.wandb:
            try:
                wandb_run = self.wandb.init(
                    project="onceover",
                    name=self.folder.name,
                    id=wandb_id,
                    resume="allow",
                    dir=str(self.folder),
                    config=dict(self.record),
                )
            # Without a login or network, wandb raises many types of exceptions.
            except Exception as error:
                raise UserError(
                    f"--wandb: {error}; run `wandb login`, or set WANDB_MODE=offline"
                ) from error
            self.wandb_id = wandb_run.id

    def add(self, line: dict[str, Any]) -> None:
        """Write a training line or a validation line."""
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
        """Read the lines of metrics.jsonl. Invalid lines are skipped, for example an incomplete
        last line of a killed process.
        """
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                lines.append(json.loads(text))
        return [line for line in lines if isinstance(line, dict) and type(line.get("step")) is int]

    @staticmethod
    def _import_wandb() -> Any:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "--wandb: wandb is not installed; install it with: pip install 'onceover[wandb]'"
            ) from error
        return wandb
