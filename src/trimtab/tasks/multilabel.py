"""Multi-label classification: a text, or a pair of texts, in; any number of several classes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from trimtab.errors import DataError
from trimtab.tasks.base import Example, Label
from trimtab.tasks.classification import LabelledSpec, LabelledTask, PooledSpec, label_name, told_shares
from trimtab.tasks.files import Row, field, is_missing, listed
from trimtab.tasks.scores import SET_SCORES
from trimtab.tasks.spec import one_of
from trimtab.tasks.tokens import Encoded, encode_texts


class MultiLabelSpec(LabelledSpec, PooledSpec):
    """Text (or a pair of texts) in, any number of several classes out."""

    SCORES = SET_SCORES
    example_rows = (
        {"sentence": "My parcel is late, I want my money back.", "label": ["delivery", "refund"]},
        {"sentence": "Where is my parcel?", "label": ["delivery"]},
    )
    type: Literal["multi_label_classification"]
    split_by: Annotated[str, Field(min_length=1)] = ","
    """What stands between the names in a label that is text instead of a list."""
    score: Annotated[str, one_of(SET_SCORES)] = "f1"


class MultiLabelTask(LabelledTask[MultiLabelSpec]):
    """Predictions are lists of class numbers, those with a probability of more than a half."""

    spec_class = MultiLabelSpec
    problem = {"problem_type": "multi_label_classification"}  # noqa: RUF012 (a constant)
    read_by = "dict(zip(base.config.id2label.values(), logits.sigmoid().tolist()))"
    blank = "no class has a probability above a half"

    def named(self, row: Row, where: str) -> Sequence[str]:
        value = listed(field(row, self.spec.label, where), self.spec.label, where)
        inside = value if isinstance(value, list) else [value]
        if isinstance(value, dict) or any(one != "" and is_missing(one) for one in inside):
            raise DataError(
                f"{where}: the field {self.spec.label!r} is {str(value)[:60]}; give a list of names, [] for none"
            )
        parts = value.split(self.spec.split_by) if isinstance(value, str) else value
        names = [label_name(part) for part in (parts if isinstance(parts, list) else [parts])]
        return list(dict.fromkeys(filter(None, names)))

    def label(self, places: tuple[int, ...]) -> Label:
        return tuple(sorted(places))

    def joined(self, names: Sequence[str]) -> str:
        return f"{self.spec.split_by} ".join(names)

    def stratum(self, row: Row) -> str:
        return str(row.get(self.spec.label))

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        training: bool,
        max_length: int = 512,
        cut: bool = False,
    ) -> tuple[list[Encoded], int]:
        """As of every text; the label is a 0 or 1 for each class."""
        count = len(self.labels)
        hot = [tuple(float(place in self.places(e.label or ())) for place in range(count)) for e in examples]
        pairs = [encode_texts(tokenizer, e.texts, own, max_length) for e, own in zip(examples, hot, strict=True)]
        return [encoded for encoded, _ in pairs], sum(was_cut for _, was_cut in pairs)

    def read(self, outputs: Sequence[Sequence[float]]) -> list[list[int]]:
        return [[place for place, logit in enumerate(logits) if logit > 0] for logits in outputs]

    def told(self, outputs: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        """The names, and each class's probability."""
        found = []
        for places, logits in zip(self.read(outputs), outputs, strict=True):
            shares = [0.5 + 0.5 * math.tanh(logit / 2) for logit in logits]  # the sigmoid, which so cannot overflow
            found.append(told_shares(self.joined([self.labels[i] for i in places]), self.labels, shares))
        return found
