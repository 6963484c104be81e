"""Where predictions are wrong: the worst of them, and which class is taken for which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.tasks.base import Example, Task

Confusion = dict[str, dict[str, int]]
"""How often each class was predicted where another, or itself, was expected: `{expected: {predicted: count}}`."""


@dataclass(frozen=True)
class Miss:
    """A wrong prediction."""

    input: str
    expected: Any
    got: Any


@dataclass(frozen=True)
class Failures:
    """Where a model fails on examples of a task."""

    worst: list[Miss]
    """The furthest from right first; of equally wrong ones those of another kind come before more of one kind."""
    confusion: Confusion
    """Empty for a task without classes."""


def failures(task: Task[Any], examples: Sequence[Example], predictions: Sequence[Any], most: int = 5) -> Failures:
    """The worst `most` predictions that are not right, and the confusion of all.

    Raises ValueError when there is not one prediction for each example.
    """
    faults = task.faults(predictions, examples)
    misses = [
        Miss("\n".join(example.texts), task.readable(wanted), task.readable(prediction))
        for example, wanted, prediction in zip(examples, task.truth(examples).wanted, predictions, strict=True)
    ]
    often: Counter[str] = Counter()
    order = []
    for place, (miss, fault) in enumerate(zip(misses, faults, strict=True)):
        kind = repr((miss.expected, miss.got))
        order.append((-fault, often[kind], place))
        often[kind] += 1
    worst = [misses[place] for fault, _, place in sorted(order) if fault < 0]
    return Failures(worst[:most], task.confusion(predictions, examples))
