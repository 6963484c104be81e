"""Classification: a text, or a pair of texts, in; one of several classes out."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from trimtab.errors import DataError
from trimtab.tasks.base import Example, Head, Label, Task, crossed
from trimtab.tasks.files import Row, as_text, field, is_blank, is_missing, needed
from trimtab.tasks.scores import CLASS_SCORES, F1, Score, Truth
from trimtab.tasks.spec import FieldNames, Names, TaskSpec, one_of
from trimtab.tasks.tokens import Encoded, encode_texts

SHOWN = 12
"""Classes that are listed."""


class TextSpec(TaskSpec):
    """What tasks on whole texts share."""

    text: Annotated[FieldNames, Field(examples=["sentence"])]
    """the text's field, or [first, second] for a pair"""


TextSpecT = TypeVar("TextSpecT", bound=TextSpec)


class PooledSpec(TextSpec):
    """What tasks with one answer a text share."""

    pool: Annotated[
        Literal["mean", "first", "last", "model"] | None,
        Field(exclude_if=lambda value: value is None, examples=["mean"]),
    ] = None
    """Which tokens the head reads: all, the first, the last, or as the model's architecture does; without it, as the
    model was pretrained (where sentence-transformers' files say so)."""


class TextTask(Task[TextSpecT]):
    """A task on a whole text, or a pair, that a head reads."""

    task_type = "SEQ_CLS"

    def question(self, row: Row, where: str) -> Example:
        values = [field(row, name, where) for name in self.spec.text]
        if all(map(is_missing, values)):
            needed(row, self.spec.text[0], where)  # of a pair, one may be empty
        texts = tuple(as_text(value, name, where) for value, name in zip(values, self.spec.text, strict=True))
        return Example(texts, "", 0, row)  # any label: one that is none asks for a prompt's batch

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        training: bool,
        max_length: int = 512,
        cut: bool = False,
    ) -> tuple[list[Encoded], int]:
        """Tokenise, labels included; texts longer than `max_length` are cut to it, in evaluation too, and counted."""
        pairs = [encode_texts(tokenizer, e.texts, e.label, max_length) for e in examples]
        return [encoded for encoded, _ in pairs], sum(was_cut for _, was_cut in pairs)

    def told_apart(self, example: Example) -> Hashable:
        return example.texts  # a text that is scored is not new where it was trained on with another label

    @property
    def shown(self) -> tuple[Score, ...]:
        others = (score for score in self.spec.SCORES.values() if score is not self.score)
        return (self.score, *others)


class LabelledSpec(TextSpec):
    """What tasks whose answers have names share."""

    label: Annotated[str, Field(examples=["label"])]
    """the field that holds the class"""
    labels: Annotated[Names | None, Field(examples=[["refund", "delivery"]])] = None
    """The classes in order, of two that which `f1` is of last; without it, those of the training file, sorted."""


NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
LabelledSpecT = TypeVar("LabelledSpecT", bound=LabelledSpec)


class LabelledTask(TextTask[LabelledSpecT]):
    """A task whose answers have names, that the model's config holds too."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    """The class of transformers."""
    problem: ClassVar[Mapping[str, Any]] = {}
    """What the model's config says beside the names."""

    def example(self, row: Row, where: str) -> Example:
        names = self.named(row, where)
        places = tuple(self.place(name, where) for name in names)
        return replace(self.question(row, where), answer=self.joined(names), label=self.label(places))

    @property
    def head(self) -> Head:
        names = dict(enumerate(self.labels))
        label2id = {name: i for i, name in names.items()}
        config = {"num_labels": len(names), "id2label": names, "label2id": label2id, **self.problem}
        return Head(self.auto, config, getattr(self.spec, "pool", "model"))

    @property
    def score_said(self) -> str:
        """With the class, where the score is of one of two."""
        return f"f1 of {self.labels[1]!r}" if self.score is F1 and len(self.labels) == 2 else self.score.name

    @property
    def settled(self) -> LabelledSpecT:
        return self.spec.model_copy(update={"labels": self.labels})

    @cached_property
    def labels(self) -> list[str]:
        """The names of the classes in order; those of the training data, sorted, unless the recipe says.

        Raises DataError when the training data has one class only, a class field that is missing or empty, or classes
        that the score cannot be taken of.
        """
        names = self.spec.labels or self._names_in_train()
        if flaw := self.score.flaw("", Truth([], choices=names)):
            raise DataError(f"{self.name}: {flaw}")
        return names

    def _names_in_train(self) -> list[str]:
        names = set[str]()
        for i, row in enumerate(self._read("train"), 1):
            try:
                names.update(self.named(row, self._where("train", i)))
            except DataError as error:
                if not self.spec.data.skip_bad_rows:
                    raise DataError(f"{error}; or leave out such rows: data: skip_bad_rows: true") from None
        if len(names) < 2:
            always = repr(names.pop()) if names else "empty"
            raise DataError(f"{self.source('train')}: {self.spec.label!r} is always {always}; a task needs two classes")
        return sorted(names, key=lambda n: (0, int(n), n) if n.lstrip("-").isdecimal() else (1, 0, n))

    @abstractmethod
    def named(self, row: Row, where: str) -> Sequence[str]:
        """The classes that a row names. Raises DataError."""

    def label(self, places: tuple[int, ...]) -> Label:
        """An example's label, of the numbers of the classes that its row names."""
        return places

    def places(self, label: Any) -> Sequence[int]:
        """The numbers of the classes in a label."""
        found: Sequence[int] = label
        return found

    def joined(self, names: Sequence[str]) -> str:
        """Several names as one text."""
        return ", ".join(names)

    def place(self, name: str, where: str) -> int:
        """The class of a name, of the same number spelt otherwise or, where the recipe names the classes in order and
        none by a number, of a number that counts from `first`."""
        if name in self.labels:
            return self.labels.index(name)
        if NUMBER.fullmatch(name):
            numbers = [float(n) if NUMBER.fullmatch(n) else None for n in self.labels]
            if numbers.count(float(name)) == 1:
                return numbers.index(float(name))
            ordered = self.spec.labels is not None and name.isdecimal() and not any(n.isdecimal() for n in self.labels)
            if ordered and 0 <= int(name) - self.first < len(self.labels):
                return int(name) - self.first
        raise DataError(
            f"{where}: {self.spec.label} is {name[:60]!r}, not one of the labels {', '.join(self.labels[:20])}; mend "
            "the row, or name every class in labels:, in quotes, as the file spells it or in the order of its numbers"
        )

    @cached_property
    def first(self) -> int:
        """The number of the first class: 1 where train has no 0 but the number of classes, as AG News has; else 0."""
        found = {label_name(row.get(self.spec.label)) for row in self._read("train")}
        ends = "0" in found, str(len(self.labels)) in found
        if not any(ends) and self.spec.labels and all(name.isdecimal() for name in found):
            raise DataError(
                f"{self.source('train')}: {self.spec.label} is {', '.join(sorted(found)[:20])}, with neither 0 nor "
                f"{len(self.labels)}, so that the first of labels: may be 0 or 1; write the names into the file"
            )
        return int(ends == (False, True))

    def truth(self, examples: Sequence[Example]) -> Truth:
        return Truth([e.label for e in examples], classes=len(self.labels), choices=self.labels)

    def readable(self, prediction: Any) -> str:
        return self.joined([self.labels[place] for place in self.places(prediction)])

    def census(self, examples: Sequence[Example]) -> tuple[str, list[str]]:
        """The classes with their counts; names that differ by case or punctuation alone; texts that contradict."""
        counts = Counter(self.labels[place] for e in examples for place in self.places(e.label))
        most = [f"{name} ({count})" for name, count in counts.most_common(SHOWN)]
        more = [f"and {len(counts) - SHOWN} more"] if len(counts) > SHOWN else []
        alike: dict[str, list[str]] = {}
        for name in self.labels:
            plain = "" if name.lstrip("-").isdecimal() else re.sub(r"[\W_]+", "", name.casefold())
            alike.setdefault(plain or name, []).append(name)
        odd = [
            f"{' and '.join(map(repr, names))} are classes apart; if they are one, spell them alike"
            for names in alike.values()
            if len(names) > 1
        ]
        if {"-1", "0"} <= counts.keys():
            odd.append("'-1' is a class too; if it marks rows without a label, remove them")
        odd += [f"{name!r} is a class; if it marks rows without a label, empty it" for name in counts if is_blank(name)]
        labels: dict[tuple[str, ...], set[Label]] = {}
        for e in examples:
            labels.setdefault(e.texts, set()).add(e.label)
        if torn := [texts for texts, found in labels.items() if len(found) > 1]:
            both = " and ".join(sorted(repr(self.readable(one)) for one in labels[torn[0]])[:2])
            said = f"{len(torn)} texts have" if len(torn) > 1 else "a text has"
            odd.append(f"{said} more than one label; {torn[0][0][:40]!r} has {both}; keep the right one")
        return ", ".join([*most, *more]), odd


class ClassificationSpec(LabelledSpec, PooledSpec):
    """Text (or a pair of texts) in, one of several classes out."""

    SCORES = CLASS_SCORES
    example_rows = (
        {"sentence": "Where is my parcel?", "label": "delivery"},
        {"sentence": "I want my money back.", "label": "refund"},
    )
    type: Literal["classification"]
    score: Annotated[str, one_of(CLASS_SCORES)] = "accuracy"


class ClassificationTask(LabelledTask[ClassificationSpec]):
    """Predictions are class numbers, from 0."""

    spec_class = ClassificationSpec
    read_by = "dict(zip(base.config.id2label.values(), logits.softmax(0).tolist()))"

    def named(self, row: Row, where: str) -> Sequence[str]:
        return [label_name(needed(row, self.spec.label, where))]

    def places(self, label: Any) -> Sequence[int]:
        return [int(label or 0)]

    def stratum(self, row: Row) -> str:
        return label_name(row.get(self.spec.label))

    def label(self, places: tuple[int, ...]) -> int:
        return places[0]

    def read(self, outputs: Sequence[Sequence[float]]) -> list[int]:
        return [max(range(len(logits)), key=logits.__getitem__) for logits in outputs]

    def confusion(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, dict[str, int]]:
        wanted = map(self.readable, self.truth(examples).wanted)
        return crossed(zip(wanted, map(self.readable, predictions), strict=True))

    def told(self, outputs: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        """The class's name, and each class's probability."""
        found = []
        for best, logits in zip(self.read(outputs), outputs, strict=True):
            weights = [math.exp(value - logits[best]) for value in logits]
            found.append(told_shares(self.labels[best], self.labels, [w / sum(weights) for w in weights]))
        return found


def told_shares(prediction: str, names: Sequence[str], shares: Sequence[float]) -> dict[str, Any]:
    """A prediction with each class's probability."""
    return {"prediction": prediction, **{f"p({n})": round(share, 6) for n, share in zip(names, shares, strict=True)}}


def label_name(value: Any) -> str:
    """A class as text: true for True, 3 for 3.0 (a column of numbers with a gap), and strings without outer spaces."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
