"""A run's answers in the format of AlpacaEval, whose judge is a model elsewhere.

[{"instruction": ..., "output": ..., "generator": "my-adapter", "dataset": ...}]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from trimtab.recipe.schema import TaskSpec
from trimtab.tasks import build_task
from trimtab.tasks.tokens import DataError


def alpaca_eval(folder: str | Path, generator: str | None = None, *, untuned: bool = False) -> list[dict[str, Any]]:
    """The test answers of the run in `folder`, or with `untuned` those of its base model.

    `instruction` and `dataset` come from the test rows: without such fields they are the prompt and the task's name.

    Raises:
        DataError: there is no finished run of a generation task, or its test data is gone or has changed.
    """
    folder = Path(folder)
    try:
        run = json.loads((folder / "run.json").read_text())["run"]
        predictions = json.loads((folder / "predictions.json").read_text())["untuned" if untuned else "tuned"]
    except (OSError, ValueError, KeyError):
        raise DataError(f"{folder}: no finished run of trimtab there; give the folder of one task") from None
    spec: TaskSpec = TypeAdapter(TaskSpec).validate_python(run["task"])
    if spec.type != "generation":
        raise DataError(f"{folder}: a run of type: {spec.type}, which writes no text")
    examples = build_task(run["name"], spec).examples("test")
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
