"""The task families by the `type:` of a recipe; a new one is one file and one row here."""

from __future__ import annotations

from typing import Any

from trimtab.recipe.schema import TaskSpec
from trimtab.tasks.base import Example, Task
from trimtab.tasks.classification import ClassificationTask, RegressionTask
from trimtab.tasks.generation import GenerationTask

__all__ = ["TASKS", "Example", "Task", "build_task"]

TASKS: dict[str, type[Task[Any]]] = {
    "generation": GenerationTask,
    "classification": ClassificationTask,
    "regression": RegressionTask,
}


def build_task(name: str, spec: TaskSpec) -> Task[Any]:
    """The task a recipe's entry describes; nothing is read yet, and nothing is raised."""
    return TASKS[spec.type](name, spec)
