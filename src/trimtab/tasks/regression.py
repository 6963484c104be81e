"""Regression: a text, or a pair of texts, in; a number out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from trimtab.errors import DataError
from trimtab.tasks.base import Example, Head
from trimtab.tasks.classification import PooledSpec, TextTask
from trimtab.tasks.scores import NUMBER_SCORES
from trimtab.tasks.spec import one_of


class RegressionSpec(PooledSpec):
    """Text (or a pair of texts) in, one number out."""

    SCORES = NUMBER_SCORES
    type: Literal["regression"]
    label: str
    """the field that holds the number"""
    score: Annotated[str, one_of(NUMBER_SCORES)] = "correlation"


class RegressionTask(TextTask[RegressionSpec]):
    """Predictions are numbers."""

    spec_class = RegressionSpec
    read_by = "logits.item()"

    @property
    def head(self) -> Head:
        config = {"num_labels": 1, "problem_type": "regression"}
        return Head("AutoModelForSequenceClassification", config, self.spec.pool)

    @property
    def label_field(self) -> str:
        return self.spec.label

    def label(self, value: Any, where: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(
                f"{where}: {self.spec.label} is {str(value)[:60]!r}, not a finite number; mend it or remove the row"
            )
        return number

    def census(self, examples: Sequence[Example]) -> tuple[str, list[str]]:
        """The range of the numbers."""
        numbers = [float(e.label or 0) for e in examples]
        return f"{min(numbers):g} to {max(numbers):g}, {sum(numbers) / len(numbers):.3g} on average", []

    def read(self, outputs: Sequence[Sequence[float]]) -> list[float]:
        return [values[0] for values in outputs]
