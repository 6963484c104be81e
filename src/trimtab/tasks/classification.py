"""Classification and regression: a text, or a pair of texts, in; a class or a number out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from trimtab.recipe.schema import ClassificationSpec, RegressionSpec
from trimtab.tasks.base import Example, Task, field, is_missing, needed
from trimtab.tasks.scores import accuracy, f1, mcc, pearson, spearman
from trimtab.tasks.tokens import DataError, Encoded, Row, encode_texts

TextSpecT = TypeVar("TextSpecT", ClassificationSpec, RegressionSpec)


class TextTask(Task[TextSpecT]):
    """What classification and regression share."""

    def example(self, row: Row, where: str) -> Example:
        values = [field(row, name, where) for name in self.spec.text]
        if all(map(is_missing, values)):
            needed(row, self.spec.text[0], where)  # of a pair, one may be empty
        texts = tuple("" if is_missing(value) else str(value) for value in values)
        value = needed(row, self.spec.label, where)
        return Example(texts, str(value), self.label(value, where), row)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, training: bool
    ) -> tuple[list[Encoded], int]:
        """Tokenise, labels included; texts longer than `max_length` are cut to it, in evaluation too, and counted."""
        pairs = [encode_texts(tokenizer, e.texts, e.label, self.spec.training.max_length) for e in examples]
        return [encoded for encoded, _ in pairs], sum(cut for _, cut in pairs)

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """The outputs the model's head needs."""

    @abstractmethod
    def label(self, value: Any, where: str) -> int | float:
        """The label a field's value stands for; raises DataError for none."""


class ClassificationTask(TextTask[ClassificationSpec]):
    """Predictions are class numbers, 0 to `num_labels` - 1."""

    @cached_property
    def labels(self) -> list[str]:
        """The names of the classes in order; those of the training data, sorted, unless the recipe says.

        Raises DataError when the training data has one class only, or a class field that is missing or empty.
        """
        if self.spec.labels:
            return self.spec.labels
        rows = enumerate(self._read("train"), 1)
        names = {label_name(needed(row, self.spec.label, self._where("train", i))) for i, row in rows}
        if len(names) < 2:
            raise DataError(
                f"{self._source('train')}: {self.spec.label!r} is always {names.pop()!r}; a task needs two classes"
            )
        return sorted(names, key=lambda n: (0, int(n), n) if n.lstrip("-").isdecimal() else (1, 0, n))

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    def label(self, value: Any, where: str) -> int:
        """The class of a name or, where no class is named by a number, of a number counting from 0."""
        name = label_name(value)
        if name in self.labels:
            return self.labels.index(name)
        if name.isdecimal() and int(name) < len(self.labels) and not any(n.isdecimal() for n in self.labels):
            return int(name)
        raise DataError(
            f"{where}: {self.spec.label} is {name[:60]!r}, not one of the labels {', '.join(self.labels[:20])}"
        )

    def scores(self, predictions: Sequence[int], examples: Sequence[Example]) -> dict[str, float]:
        wanted = [int(e.label or 0) for e in examples]
        return {
            "accuracy": accuracy(predictions, wanted),
            "f1": f1(predictions, wanted, self.num_labels),
            "mcc": mcc(predictions, wanted),
        }

    def item(self, prediction: int, example: Example) -> float:
        return float(prediction == example.label)


class RegressionTask(TextTask[RegressionSpec]):
    """Predictions are numbers."""

    num_labels = 1

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

    def scores(self, predictions: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
        """Pearson's and Spearman's correlation and their mean; each 0 for constant or non-finite predictions."""
        wanted = [float(e.label or 0) for e in examples]
        linear, rank = pearson(predictions, wanted), spearman(predictions, wanted)
        return {"correlation": (linear + rank) / 2, "pearson": linear, "spearman": rank}

    def item(self, prediction: float, example: Example) -> float:
        """Minus the absolute error: a correlation has no items."""
        return -abs(prediction - float(example.label or 0))


def label_name(value: Any) -> str:
    """A class as text: true for True, 3 for 3.0 (a column of numbers with a gap), and strings without outer spaces."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
