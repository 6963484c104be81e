"""What earlier versions wrote of a run, with the keys that they did not know at their defaults.

So the default of a key that is added must be what was done before there was one: then no finished run is orphaned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from trimtab.runs.trainer import TrainingSpec
from trimtab.runs.ways import AdapterSpec, as_way
from trimtab.tasks import TASKS
from trimtab.tasks.spec import Section

SECTIONS: dict[str, type[Section]] = {"adapter": AdapterSpec, "training": TrainingSpec}
"""What is said of a task beside its spec."""
SOURCE = {"dtype": "auto", "attention": "auto"}
_NO_DATA = {"train": ""}


def completed(run: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a run, of any version, as this one would write it; as it is where that cannot be said."""
    try:
        return {**SOURCE, **run, "task": completed_task(run["task"])}
    except (KeyError, TypeError, ValidationError):  # keys that are no more
        return dict(run)


def completed_trial(run: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a trial, whose task has its data beside it and its way to adapt apart."""
    try:
        settings = dict(as_way({"earlier": run["settings"]}, AdapterSpec()).settings)
        return {"examples": None, **completed(run), "settings": settings}
    except (KeyError, TypeError, ValueError):
        return dict(run)


def completed_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task's spec and sections. Raises KeyError or ValidationError."""
    beside = {key: task[key] for key in task.keys() & {*SECTIONS, "sets"}}
    spec = {key: value for key, value in task.items() if key not in beside}
    whole = TASKS[spec["type"]].spec_class.model_validate({"data": _NO_DATA, **spec}).model_dump(mode="json")
    parts = {key: one.model_validate(task[key]).deciding() for key, one in SECTIONS.items() if key in task}
    return {key: value for key, value in {**whole, **beside, **parts}.items() if key in task or key != "data"}
