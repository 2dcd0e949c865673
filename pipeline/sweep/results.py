"""The results of a finished run, as a row of the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.cli import UserError
from pipeline.evaluate.task import outputs_path
from pipeline.scoring.comparison import Row
from pipeline.sweep.runs import Run, read_state


def row_of(run: Run) -> Row:
    """Read what the comparison says about a finished run.

    Raises UserError if a file is damaged.
    """
    from pipeline.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(run.folder)
    task = checkpoint.new_task()
    (scores,) = _read(run.scores, run.scores)
    examples = outputs_path(task, run.scores)
    if task.scored_as_captions:
        examples = run.scores.with_name("scores-images.jsonl")
    log = run.folder / "metrics.jsonl"
    lines = _read(log, run.folder) if log.exists() else []
    validations = [line for line in lines if "seconds" in line]
    rates = [line["train"]["captions_per_s"] for line in validations if line.get("train")]
    return Row(
        name=run.name,
        metric=task.metric,
        scores=scores.get("scores", {}),
        intervals=scores.get("intervals", {}),
        examples=_read(examples, run.scores) if examples.exists() else [],
        parameters=sum(p.numel() for p in checkpoint.captioner.parameters()),
        trained_per_s=sum(rates) / len(rates) if rates else None,
        decoded_per_s=scores.get("decoded_per_s"),
        minutes=validations[-1]["seconds"]["elapsed"] / 60 if validations else None,
        peak_bytes=max(read_state(run)["peak_bytes"].values(), default=0),
    )


def _read(file: Path, made_again: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON file or of JSON lines.

    made_again: what to delete so that the sweep makes the file again.
    """
    try:
        text = file.read_text(encoding="utf-8")
        # not splitlines, which also splits at other characters, and a caption may have them
        texts = text.rstrip("\n").split("\n") if file.suffix == ".jsonl" else [text]
        records = [json.loads(each) for each in texts if each]
    except (ValueError, RecursionError):
        records = [None]
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{file} is damaged; delete {made_again}, and the same command makes it")
    return records
