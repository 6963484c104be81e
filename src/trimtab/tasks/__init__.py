"""The kinds of task by the `type:` of a recipe: text in, a score out. A new one is one file and one row here."""

from __future__ import annotations

from typing import Any

from trimtab.tasks.base import Example, Head, Task
from trimtab.tasks.classification import ClassificationTask
from trimtab.tasks.conversation import ConversationTask
from trimtab.tasks.generation import GenerationTask
from trimtab.tasks.multilabel import MultiLabelTask
from trimtab.tasks.regression import RegressionTask
from trimtab.tasks.spec import TaskSpec
from trimtab.tasks.tagging import TaggingTask

__all__ = ["TASKS", "Example", "Head", "Task", "TaskSpec", "build_task"]

TASKS: dict[str, type[Task[Any]]] = {
    "generation": GenerationTask,
    "conversation": ConversationTask,
    "classification": ClassificationTask,
    "multi_label_classification": MultiLabelTask,
    "token_classification": TaggingTask,
    "regression": RegressionTask,
}


def build_task(name: str, spec: TaskSpec, seed: int = 0) -> Task[Any]:
    """The task that a recipe's entry describes; nothing is read yet, and nothing is raised."""
    return TASKS[spec.type](name, spec, seed)
