"""Registry of the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.cli import UserError, from_record
from pipeline.tasks.base import Task
from pipeline.tasks.captioning import Captioning
from pipeline.tasks.dialog import VisualDialog
from pipeline.tasks.sentiment import Sentiment
from pipeline.tasks.vqa import VisualQuestionAnswering

TASKS: dict[str, type[Task]] = {
    "captioning": Captioning,
    "vqa": VisualQuestionAnswering,
    "dialog": VisualDialog,
    "sentiment": Sentiment,
}


def task_of(training: Mapping[str, Any], segment: str) -> Task:
    """Create the task of a run with its options.

    training: the settings of the run, as in its config.json.
    segment: unit of the texts, one of data.segmentation.SEGMENTS.

    Raises UserError for an unknown task.
    """
    name = training.get("task", Captioning.name)
    if name not in TASKS:
        raise UserError(
            f"the checkpoint was trained for task {name!r}; this version has {', '.join(TASKS)}"
        )
    task = TASKS[name]
    if task.Options is None:
        return task(segment=segment)
    return task(from_record(task.Options, training), segment)
