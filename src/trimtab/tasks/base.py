"""What every task has: its rows by split, its examples, its tokens and its scores."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from trimtab.errors import BrokenLine, DataError
from trimtab.tasks.files import Broken, Row, needed, read_rows
from trimtab.tasks.messages import one_turn
from trimtab.tasks.scores import Array, Score, Truth
from trimtab.tasks.spec import SPLITS, TaskSpec
from trimtab.tasks.tokens import Encoded, Turns

SpecT = TypeVar("SpecT", bound=TaskSpec)
CUT, CUT_MOST = 0.1, 500
"""The share of train, and at most how many rows, that validate when no validation data is given."""
Label = int | float | tuple[int, ...] | None
"""A class, a number, or several classes: all that a text has, or one a word; None of a text to write."""


@dataclass(frozen=True)
class Example:
    """One row, ready to tokenise: `texts` is the prompt, or the text or pair of a classification."""

    texts: tuple[str, ...]
    answer: str
    label: Label
    row: Row
    set: str | None = None
    """Which of several test sets it is from."""


@dataclass(frozen=True)
class Head:
    """The model that a task needs: a class of transformers, and what its config says where the head is new."""

    auto: str
    config: Mapping[str, Any] = field(default_factory=dict)
    pool: str | None = "model"
    """Which tokens a head for whole texts reads; None: those that the model was pretrained to be read at."""

    @property
    def is_new(self) -> bool:
        """Whether the model gets modules without pretrained weights, so that no two tasks share it."""
        return bool(self.config)


class Task(ABC, Generic[SpecT]):
    """A task of a recipe. Splits are read once, when first asked for."""

    spec_class: ClassVar[type[TaskSpec]]
    task_type: ClassVar[str]
    """PEFT's name for it."""
    generates = False
    """Whether the model writes text, prompt first, instead of filling in a head's outputs."""
    takes_shots = False
    """Whether solved examples can stand before a prompt."""
    unit = "rows"
    """What its examples are called."""
    prompt_said = ""
    """What the prompt is, where that is not plain."""

    def __init__(self, name: str, spec: SpecT, seed: int = 0) -> None:
        """Nothing is read yet; `seed` draws the share of train that validates where no validation data is given."""
        self.name, self.spec, self.seed = name, spec, seed
        self.score: Score = spec.SCORES[spec.score]
        self.validation_is_cut = spec.data.validation is None
        """No validation data is given: a tenth of train (1 to 500 rows) validates, and train leaves it out."""
        self.test_is_validation = spec.data.test is None
        """No test data is given: `examples("test")` are those of validation."""
        part: Callable[[str], Any] = spec.for_set  # a spec of the same type
        self.sets: dict[str, Task[Any]] = {set_: type(self)(set_, part(set_), seed) for set_ in spec.data.sets}
        """Where there are several test sets, the task of each alone; `examples("test")` are those of all, in order."""
        self.broken: dict[str, list[BrokenLine]] = {}
        """By split, which is not train's, the lines that `skip_bad_rows` left out of it."""
        self.skipped = 0
        """How many rows `skip_bad_rows` left out of train, and of validation where that is cut from it."""
        self.first_flaw: str | None = None
        """What is wrong with the first of those."""
        self._rows: dict[str, list[Row]] = {}
        self._examples: dict[str, list[Example]] = {}
        for one in self.sets.values():
            one._rows = self._rows  # train is read once

    # ---- data --------------------------------------------------------------------------------------------------

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
            self._examples[split] = self._made(split, self.spec.data.skip_bad_rows and self._of_train(split))
        return self._examples[split]

    @abstractmethod
    def example(self, row: Row, where: str) -> Example:
        """Make an example of a row; raises DataError starting with `where`."""

    def examples_of(self, row: Row, where: str) -> list[Example]:
        """All that a row gives; raises DataError starting with `where`."""
        return [self.example(row, where)]

    @abstractmethod
    def question(self, row: Row, where: str) -> Example:
        """The example without its answer, which the row need not hold; raises DataError starting with `where`."""

    def prepared(self, row: Row, where: str) -> Row:
        """The row with the turns of its conversation, where it has one, as fields."""
        name = self.spec.data.conversation
        return {**row, **one_turn(row, name, where)} if name else row

    def rows(self, file: str | Path, skip_bad_rows: bool | None = None) -> list[Row]:
        """A file's rows, read as the task's own are. Raises DataError."""
        data = self.spec.data
        skip = data.skip_bad_rows if skip_bad_rows is None else skip_bad_rows
        return read_rows(file, columns=data.columns, skip_bad_rows=skip, separator=data.separator)

    def sample(self) -> Example:
        """The question of a row that holds its fields' names."""
        return self.question({name: f"<{name}>" for name in self.examples("train")[0].row}, "the sample")

    @property
    def edit_turns(self) -> Turns:
        """What a prompt is in a conversation."""
        return "each"

    @property
    def settled(self) -> SpecT:
        """The spec with what the training data decided, so that the task can be used without that."""
        return self.spec

    # ---- model -------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def head(self) -> Head:
        """The model it needs."""

    @abstractmethod
    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        training: bool,
        max_length: int = 512,
        cut: bool = False,
    ) -> tuple[list[Encoded], int]:
        """Tokenise examples, with answers or labels when `training`; also return how many were too long.

        Args:
            max_length: in tokens.
            cut: what is longer is cut where the task allows it, instead of left out.
        """

    def rendered(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[str, bool]:
        """The text that a prompt becomes, and whether the tokenizer adds its special tokens to that."""
        raise NotImplementedError

    read_by: ClassVar[str] = ""
    """For a task that does not generate: the expression that a model card prints of `logits` and `base`."""

    def census(self, examples: Sequence[Example]) -> tuple[str, list[str]]:
        """What answers the examples have, in short, and what is odd about them."""
        return "", []

    def decoding(self) -> dict[str, Any]:
        """Arguments of `generate` for a task that generates."""
        return {}

    @abstractmethod
    def read(self, outputs: Sequence[Any]) -> list[Any]:
        """Predictions from what the model gave for each example: its text, or its head's outputs."""

    def told(self, outputs: Sequence[Any]) -> list[dict[str, Any]]:
        """Predictions as people read them, each with what there is to say beside it, by column."""
        return [{"prediction": self.readable(prediction)} for prediction in self.read(outputs)]

    blank: ClassVar[str] = "the model's answer is empty"
    """What an empty prediction means."""

    # ---- scores ------------------------------------------------------------------------------------------------

    @property
    def shown(self) -> tuple[Score, ...]:
        """The scores that are told, the main one first."""
        return (self.score, *self.score.beside)

    @property
    def score_said(self) -> str:
        """What the main score is, in words."""
        return self.score.name

    @property
    def binary(self) -> bool:
        """Whether the main score is the plain share of right items."""
        return self.score.binary and not self.sets

    @abstractmethod
    def truth(self, examples: Sequence[Example]) -> Truth:
        """What predictions on the examples are held against."""

    def scores(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """The scores by name, the main one first; all are better when higher.

        Over several test sets these are each set's main score, and first the plain mean of those.

        Raises ValueError when there are no examples, or not one prediction for each.
        """
        if not examples or len(predictions) != len(examples):
            raise ValueError(
                f"{self.name}: {len(predictions)} predictions for {len(examples)} examples; give one for each"
            )
        parts = self.by_set(examples)
        if not parts:
            truth = self.truth(examples)
            return {score.name: score.value(predictions, truth) for score in self.shown}
        found = {}
        for name, places in parts.items():
            one = self.sets[name]
            truth = one.truth([examples[i] for i in places])
            found[name] = one.score.value([predictions[i] for i in places], truth)
        return {self.score.name: sum(found.values()) / len(found), **found}

    def readable(self, prediction: Any) -> Any:
        """A prediction, or what was wanted, as people read it: a text, a number, the name of a class."""
        return prediction

    def faults(self, predictions: Sequence[Any], examples: Sequence[Example]) -> list[float]:
        """How far each prediction is from right, which is 0."""
        if parts := self.by_set(examples):
            faults = [0.0] * len(examples)
            for name, places in parts.items():
                own = self.sets[name].faults([predictions[i] for i in places], [examples[i] for i in places])
                for place, fault in zip(places, own, strict=True):
                    faults[place] = fault
            return faults
        truth = self.truth(examples)
        if self.score.item is not None:
            return [1 - value for value in self.score.per_item(predictions, truth)]
        pairs = zip(predictions, truth.wanted, strict=True)
        return [float(self.readable(p) != self.readable(w)) for p, w in pairs]

    def confusion(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, dict[str, int]]:
        """How often which class was predicted where which was expected, `{expected: {predicted: count}}`.

        Empty where there are no classes.
        """
        return {}

    def majority(self, examples: Sequence[Example]) -> tuple[Any, float]:
        """The commonest answer of train, and the main score of giving it to each of the examples."""
        answers = self.constants(examples, 1)[0]
        return self.readable(answers[0]), self.scores(answers, examples)[self.score.name]

    def constants(self, examples: Sequence[Example], most: int) -> list[list[Any]]:
        """Predictions for the examples that are all the same answer: each of so many of train's commonest."""
        known = self.truth(self.examples("train")).wanted
        wanted = {repr(self.readable(one)): one for one in known}
        counts = Counter(repr(self.readable(one)) for one in known)
        return [[wanted[name]] * len(examples) for name, _ in counts.most_common(most)]

    def weighted(self, examples: Sequence[Example]) -> Callable[[Sequence[Any], Array], Array]:
        """The main score for resampled items: (predictions (n,), weights (B, n)) -> (B,)."""
        parts = self.by_set(examples)
        if not parts:
            truth = self.truth(examples)
            return lambda predictions, weights: self.score.weighted(predictions, truth, weights)
        each = [(places, self.sets[name].weighted([examples[i] for i in places])) for name, places in parts.items()]

        def mean(predictions: Sequence[Any], weights: Array) -> Array:
            found = [of([predictions[i] for i in places], weights[:, places]) for places, of in each]
            return np.asarray(np.mean(found, axis=0))

        return mean

    def by_set(self, examples: Sequence[Example]) -> dict[str, list[int]]:
        """The places of each test set's examples; empty where these are of no set."""
        counts = Counter(e.set for e in examples if e.set in self.sets)
        return {name: [i for i, e in enumerate(examples) if e.set == name] for name in self.sets if counts[name]}

    # ---- rows --------------------------------------------------------------------------------------------------

    def _of_train(self, split: str) -> bool:
        return split == "train" or (split == "validation" and self.validation_is_cut)

    def _made(self, split: str, skip: bool) -> list[Example]:
        made: list[Example] = []
        bad: list[DataError] = []
        rows = self._limited(split)
        for number, row in rows:
            try:
                where = self._where(split, number)
                made += self.examples_of(self.prepared(row, where), where)
            except DataError as error:
                bad.append(error)
        if bad and not made:
            raise bad[0]
        if not skip:
            self.broken[split] = [error for error in bad if isinstance(error, BrokenLine)]
            if others := [error for error in bad if not isinstance(error, BrokenLine)]:
                remedy = f"; or leave out such rows, {len(bad)} of {len(rows)}: data: skip_bad_rows: true"
                raise DataError(f"{others[0]}{remedy if self._of_train(split) else ''}")
            return made
        self.skipped += len(bad)
        self.first_flaw = self.first_flaw or (str(bad[0]) if bad else None)
        return made

    def _limited(self, split: str) -> list[tuple[int, Row]]:
        """Numbered rows of a split; a limit counts after validation is cut off."""
        cut = self.validation_is_cut and split != "test"
        rows = self._read("train" if cut else split)
        chosen: Sequence[int] = range(len(rows))
        if cut:
            validating = self._validating(rows)
            held = set(validating)
            chosen = validating if split == "validation" else [i for i in chosen if i not in held]
        return [(i + 1, rows[i]) for i in chosen[: getattr(self.spec.data.limit, split)]]

    def _validating(self, rows: list[Row]) -> list[int]:
        """Places of the rows that validate: of a group all or none, since rows of one source tell of one another."""
        groups = list(self._grouped(rows).values())
        if len(groups) < 2:
            one = "one row" if len(rows) < 2 else f"rows of one {self.spec.data.group}"
            raise DataError(f"{self.source('train')}: {one} cannot be split; give data: validation:, or more rows")
        count = max(1, min(int(len(groups) * CUT), CUT_MOST * len(groups) // len(rows)))
        strata = [Counter(self.stratum(rows[i]) for i in places).most_common(1)[0][0] for places in groups]
        return [i for at in share(strata, count, self.seed) for i in groups[at]]

    def _grouped(self, rows: Sequence[Row]) -> dict[Hashable, list[int]]:
        """The places of the training file's rows by group; each alone where there are none."""
        name, found = self.spec.data.group, dict[Hashable, list[int]]()
        for i, row in enumerate(rows):
            alone = not name or isinstance(row, Broken)
            found.setdefault(i if alone else self.group_of(row, self._where("train", i + 1)), []).append(i)
        return found

    def group_of(self, row: Row, where: str) -> str:
        """What says which rows are of one source. Raises DataError starting with `where`."""
        return str(needed(row, str(self.spec.data.group), f"{where}: data: group"))

    def sources(self, examples: Sequence[Example], split: str) -> list[Hashable]:
        """Of each example what it is not independent of: its group or, without groups, its row. Raises DataError."""
        where = f"{self.name}: {split}"
        return [self.group_of(e.row, where) if self.spec.data.group else id(e.row) for e in examples]

    def shared(self, one: str, other: str) -> int:
        """How many examples of the other split stand in this one word for word."""
        seen = {self.told_apart(e) for e in self.examples(one)}
        return sum(self.told_apart(e) in seen for e in self.examples(other))

    def told_apart(self, example: Example) -> Hashable:
        """What two examples that are the same have in common."""
        return (example.texts, example.answer, example.label)

    def shared_groups(self, one: str, other: str) -> int:
        """How many groups of the other split are in this one too. Raises DataError."""
        return len({*self.sources(self.examples(one), one)} & {*self.sources(self.examples(other), other)})

    def stratum(self, row: Row) -> str:
        """What validation has the same share of as train; the same for all rows where there is no such thing."""
        return ""

    def _read(self, split: str) -> list[Row]:
        data = self.spec.data
        name: str = getattr(data, split)
        if name not in self._rows:
            self._rows[name] = read_rows(data.name, name, config=data.config) if data.name else self.rows(name)
        return self._rows[name]

    def source(self, split: str) -> str:
        """The file, or the Hub dataset's split."""
        data = self.spec.data
        return f"{data.name}[{getattr(data, split)}]" if data.name else str(getattr(data, split))

    def _where(self, split: str, number: int) -> str:
        source = self.source("train" if split == "validation" and self.validation_is_cut else split)
        return f"{source}, row {number}"


def crossed(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Pairs of an expected and a predicted class, counted."""
    found: dict[str, dict[str, int]] = {}
    for (expected, predicted), count in sorted(Counter(pairs).items()):
        found.setdefault(expected, {})[predicted] = count
    return found


def share(strata: Sequence[str], count: int, seed: int) -> list[int]:
    """Places of `count` items, drawn by the seed so that each stratum gives its part (one more or less).

    The only item of its stratum stays where it is, unless all are such.
    """
    draw, sizes = random.Random(seed), Counter(strata)
    places = [i for i, stratum in enumerate(strata) if sizes[stratum] > 1] or list(range(len(strata)))
    draw.shuffle(places)
    places.sort(key=strata.__getitem__)
    drawn = [places[int((k + 0.5) * len(places) / count)] for k in range(min(count, len(places)))]
    draw.shuffle(drawn)
    return drawn
