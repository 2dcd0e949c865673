"""Registry of the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pipeline.cli import UserError
from pipeline.tasks.base import Task
from pipeline.tasks.captioning import Captioning
from pipeline.tasks.vqa import VisualQuestionAnswering

TASKS: dict[str, type[Task]] = {"captioning": Captioning, "vqa": VisualQuestionAnswering}


def task_of(training: Mapping[str, Any], segment: str) -> Task:
    """Create the task that a run's config.json records, with its options; UserError for an unknown
    task.
    """
    name = training.get("task", Captioning.name)
    if name not in TASKS:
        raise UserError(
            f"the checkpoint was trained for task {name!r}; this version has {', '.join(TASKS)}"
        )
    options = TASKS[name].Options
    if options is None:
        return TASKS[name](segment=segment)
    known = {item.name for item in fields(options)}
    return TASKS[name](
        options(**{key: value for key, value in training.items() if key in known}), segment
    )
