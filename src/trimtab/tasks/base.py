"""What every task has: its rows by split, its examples, its tokens and its scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from trimtab.recipe.schema import SPLITS, DataSpec, TaskSpec
from trimtab.tasks.tokens import DataError, Encoded, Row, read_rows

SpecT = TypeVar("SpecT", bound=TaskSpec)
CUT, CUT_MOST = (
    0.1,
    500,
)  # the share of train, and at most how many rows, that validate when no validation data is given


@dataclass(frozen=True)
class Example:
    """One row, ready to tokenise: `texts` is the prompt, or the text or pair of a classification."""

    texts: tuple[str, ...]
    answer: str
    label: int | float | None
    row: Row
    set: str | None = None
    """Which of several test sets it is from."""


class Task(ABC, Generic[SpecT]):
    """A task of a recipe. Splits are read once, when first asked for."""

    def __init__(self, name: str, spec: SpecT) -> None:
        self.name, self.spec = name, spec
        self.main_score: str = spec.score
        self.validation_is_cut = spec.data.validation is None
        """No validation data is given: the last tenth of train (1 to 500 rows) validates, and train leaves it out."""
        self.test_is_validation = spec.data.test is None
        """No test data is given: `examples("test")` are those of validation."""
        part: Callable[[str], Any] = spec.for_set  # a spec of the same type
        self.sets: dict[str, Task[Any]] = {set_: type(self)(set_, part(set_)) for set_ in spec.data.sets}
        """Where there are several test sets, the task of each alone; `examples("test")` are those of all, in order."""
        self.skipped = 0
        """How many rows of train `skip_bad_rows` left out."""
        self._rows: dict[str, list[Row]] = {}
        self._examples: dict[str, list[Example]] = {}
        for one in self.sets.values():
            one._rows = self._rows  # train is read once

    def examples(self, split: str) -> list[Example]:
        """The examples of train, validation or test.

        Raises DataError for data that cannot be read or lacks a field, ValueError for another split.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
        split = "validation" if split == "test" and self.test_is_validation else split
        if split == "validation" and self.spec.data.validation is False:
            raise DataError(f"{self.name}: data: validation: false, so there is no validation split; choose another")
        if split == "test" and self.sets:
            return [replace(e, set=set_) for set_, one in self.sets.items() for e in one.examples("test")]
        if split not in self._examples:
            self._examples[split] = self._made(split, self.spec.data.skip_bad_rows and split == "train")
        return self._examples[split]

    def score(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """The scores by name, `main_score` first; all are better when higher.

        Over several test sets these are each set's main score, and first the plain mean of those.

        Raises ValueError when there are no examples, or not one prediction for each.
        """
        if not examples or len(predictions) != len(examples):
            raise ValueError(
                f"{self.name}: {len(predictions)} predictions for {len(examples)} examples; give one for each"
            )
        scores = self._set_scores(predictions, examples) or self.scores(predictions, examples)
        return {self.main_score: scores[self.main_score], **scores}

    def per_item(self, predictions: Sequence[Any], examples: Sequence[Example]) -> list[float]:
        """How right each prediction is, higher is better: for statistics on pairs."""
        return [self._task_of(e).item(p, e) for p, e in zip(predictions, examples, strict=True)]

    def _task_of(self, example: Example) -> Task[Any]:
        return self.sets.get(example.set or "", self)

    def _set_scores(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for set_, one in self.sets.items():
            pairs = [(p, e) for p, e in zip(predictions, examples, strict=True) if e.set == set_]
            if pairs:
                scores[set_] = one.score(*zip(*pairs, strict=True))[one.main_score]
        return {self.main_score: sum(scores.values()) / len(scores), **scores} if scores else {}

    @abstractmethod
    def example(self, row: Row, where: str) -> Example:
        """Make an example of a row; raises DataError starting with `where`."""

    @abstractmethod
    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, training: bool
    ) -> tuple[list[Encoded], int]:
        """Tokenise examples, with answers or labels when `training`; also return how many were too long."""

    @abstractmethod
    def scores(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]: ...

    @abstractmethod
    def item(self, prediction: Any, example: Example) -> float:
        """How right one prediction is, higher is better."""

    def _made(self, split: str, skip: bool) -> list[Example]:
        made: list[Example] = []
        bad: list[DataError] = []
        for number, row in self._limited(split):
            try:
                made.append(self.example(row, self._where(split, number)))
            except DataError as error:
                if not skip:
                    raise
                bad.append(error)
        if bad and not made:
            raise bad[0]
        self.skipped += len(bad)
        return made

    def _limited(self, split: str) -> list[tuple[int, Row]]:
        """Numbered rows of a split; a limit counts after validation is cut off."""
        first, rows = 1, self._read("train" if split == "validation" and self.validation_is_cut else split)
        if self.validation_is_cut and split != "test":
            cut = max(1, min(CUT_MOST, int(len(rows) * CUT)))
            if len(rows) < 2:
                raise DataError(
                    f"{self._source('train')}: one row cannot be split; give data: validation:, or more rows"
                )
            first, rows = (len(rows) - cut + 1, rows[-cut:]) if split == "validation" else (1, rows[:-cut])
        return list(enumerate(rows, first))[: getattr(self.spec.data.limit, split)]

    def _read(self, split: str) -> list[Row]:
        data: DataSpec = self.spec.data
        name: str = getattr(data, split)
        if name not in self._rows:
            self._rows[name] = (
                read_rows(data.name, name, config=data.config)
                if data.name
                else read_rows(name, columns=data.columns, skip_bad_rows=data.skip_bad_rows)
            )
        return self._rows[name]

    def _source(self, split: str) -> str:
        data = self.spec.data
        return f"{data.name}[{getattr(data, split)}]" if data.name else str(getattr(data, split))

    def _where(self, split: str, number: int) -> str:
        source = self._source("train" if split == "validation" and self.validation_is_cut else split)
        return f"{source}, row {number}"


def field(row: Row, name: str, where: str) -> Any:
    """The value of a field; raises DataError naming the fields there are."""
    if name not in row:
        raise DataError(f"{where}: no field {name!r}; the fields are {', '.join(map(str, row))}")
    return row[name]


def is_missing(value: Any) -> bool:
    """Whether a value is null, NaN or the empty string."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def needed(row: Row, name: str, where: str) -> Any:
    """The value of a field that must hold something; raises DataError for null, NaN and the empty string."""
    value = field(row, name, where)
    if is_missing(value):
        raise DataError(f"{where}: the field {name!r} is {value!r}; fill it or remove the row")
    return value
