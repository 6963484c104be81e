"""Regression: a text, or a pair of texts, in; a number out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from trimtab.errors import DataError
from trimtab.tasks.base import Example, Head
from trimtab.tasks.classification import PooledSpec, TextTask
from trimtab.tasks.files import Row, needed
from trimtab.tasks.scores import NUMBER_SCORES, Truth
from trimtab.tasks.spec import one_of


class RegressionSpec(PooledSpec):
    """Text (or a pair of texts) in, one number out."""

    SCORES = NUMBER_SCORES
    example_rows = ({"sentence": "Could not be better.", "label": 5.0}, {"sentence": "It will do.", "label": 2.5})
    type: Literal["regression"]
    label: Annotated[str, Field(examples=["label"])]
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

    def example(self, row: Row, where: str) -> Example:
        value = needed(row, self.spec.label, where)
        return replace(self.question(row, where), answer=str(value), label=self.label(value, where))

    def truth(self, examples: Sequence[Example]) -> Truth:
        return Truth([e.label for e in examples])

    def label(self, value: Any, where: str) -> float:
        """The number that a field's value is; raises DataError for none."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            said = str(value)[:60]
            remedy = "write a point for the comma" if "," in said else "mend it or remove the row"
            raise DataError(f"{where}: {self.spec.label} is {said!r}, not a finite number; {remedy}")
        return number

    def census(self, examples: Sequence[Example]) -> tuple[str, list[str]]:
        """The range of the numbers."""
        numbers = [value for e in examples if isinstance(value := e.label, float)]
        return f"{min(numbers):g} to {max(numbers):g}, {sum(numbers) / len(numbers):.3g} on average", []

    def faults(self, predictions: Sequence[Any], examples: Sequence[Example]) -> list[float]:
        return [abs(p - w) for p, w in zip(predictions, self.truth(examples).wanted, strict=True)]

    def readable(self, prediction: float) -> float:
        """In as many digits as float32 has."""
        return float(f"{prediction:.6g}")

    def read(self, outputs: Sequence[Sequence[float]]) -> list[float]:
        return [values[0] for values in outputs]
