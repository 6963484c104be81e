"""A run's answers in the format of AlpacaEval, whose judge is a model elsewhere.

[{"instruction": ..., "output": ..., "generator": "my-adapter", "dataset": ...}]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.errors import DataError
from trimtab.runs.folder import RunFolder


def alpaca_eval(folder: str | Path, generator: str | None = None, *, untuned: bool = False) -> list[dict[str, Any]]:
    """The test answers of the run in `folder`, or with `untuned` those of its base model.

    `instruction` and `dataset` come from the test rows: without such fields they are the prompt and the task's name.

    Raises:
        RunError: there is no finished run.
        DataError: the run writes no text, or its test data is gone or has changed.
    """
    left = RunFolder(folder)
    run, predictions, task = left.run, left.predictions("untuned" if untuned else "tuned"), left.task
    if not task.generates:
        raise DataError(f"{folder}: a run of type: {task.spec.type}, which writes no text")
    examples = task.examples("test")
    if len(examples) != len(predictions):
        raise DataError(f"{folder}: {len(predictions)} answers to {len(examples)} test rows; the data has changed")
    return [
        {
            "instruction": e.row.get("instruction", e.texts[0]),
            "output": prediction.strip(),
            "generator": generator or f"{Path(run['model']).name}-{run['name']}{'-untuned' if untuned else ''}",
            "dataset": e.row.get("dataset", e.set or run["name"]),
        }
        for e, prediction in zip(examples, predictions, strict=True)
    ]
