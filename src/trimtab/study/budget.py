"""Equal budgets: every method at the largest rank, or on the most layers, whose parameters fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from trimtab.errors import NotPossible
from trimtab.runs.experiment import Experiment
from trimtab.runs.models import skeleton
from trimtab.runs.trial import trained_parameters
from trimtab.runs.ways import Way
from trimtab.where.sites import find_blocks


@dataclass(frozen=True)
class Fitted:
    """A way at its budget."""

    way: Way
    parameters: int | None
    """Trained ones, a new head aside; None where the model has no place for the way."""
    said: str
    """What was chosen, or why nothing was."""


def fitted(experiment: Experiment, way: Way, budget: int, new: Sequence[str] = ()) -> Fitted:
    """The way with the most parameters up to `budget`: the largest rank, or below rank 1 the most layers, that fit.

    Args:
        new: the modules of the model's head, which are told but not counted.
    """
    try:
        own, head = parameters(experiment, way, new)
        if way.size_field is None:
            return Fitted(way, own, f"{own:,} parameters, with nothing to choose{_beside(own, head)}")
        (one, _), (two, _) = (parameters(experiment, way.resized(size), new) for size in (1, 2))
        if two <= one:
            return Fitted(way, own, f"{own:,} parameters, of which {way.size_field} makes no more{_beside(own, head)}")
        if one > budget:
            return _on_layers(experiment, way.resized(1), one, budget, new)
        size, count = _largest(lambda size: _counted(experiment, way, size, new), budget, one, two)
        said = f"{way.size_field} {size} gives {count:,} of {budget:,} parameters{_beside(count, head)}"
        return Fitted(way.resized(size), count, said)
    except NotPossible as error:
        return Fitted(way, None, str(error))


def _counted(experiment: Experiment, way: Way, size: int, new: Sequence[str]) -> int | None:
    """None where there is no such size: a rank above the model's width, say."""
    try:
        return parameters(experiment, way.resized(size), new)[0]
    except NotPossible:
        return None


def _largest(counted: Callable[[int], int | None], budget: int, one: int, two: int) -> tuple[int, int]:
    """The largest size within the budget, and its count: in equal steps, as it mostly is, or found by halving.

    Args:
        one, two: the counts at sizes 1 and 2.
    """
    size = 1 + (budget - one) // (two - one)
    expected = one + (size - 1) * (two - one)
    if counted(size) == expected:
        return size, expected
    low, high, best = 1, size, one
    while low < high:
        middle = (low + high + 1) // 2
        count = counted(middle)
        if count is None or count > budget:
            high = middle - 1
        else:
            low, best = middle, count
    return low, best


def _on_layers(experiment: Experiment, way: Way, whole: int, budget: int, new: Sequence[str]) -> Fitted:
    blocks = len(find_blocks(_empty(experiment)))
    for number in range(min(budget * blocks // whole, blocks - 1), 0, -1):
        layers = spread(blocks, number)
        found = way.on_layers(layers, blocks)
        count, head = (whole, 0) if found is None else parameters(experiment, found, new)
        if found is not None and count <= budget:
            said = f"{way.size_field} 1 on blocks {layers} gives {count:,} of {budget:,} parameters"
            return Fitted(found, count, said + _beside(count, head))
    return Fitted(way, whole, f"{whole:,} parameters, the fewest it can have; the budget is {budget:,}")


def _beside(count: int, head: int) -> str:
    """What a report counts, where that is more."""
    return f", {count + head:,} with the new head" if head else ""


def spread(blocks: int, count: int) -> list[int]:
    """So many blocks, evenly spread, the last among them."""
    return sorted(blocks - 1 - i * blocks // count for i in range(count))


def parameters(experiment: Experiment, way: Way, new: Sequence[str] = ()) -> tuple[int, int]:
    """What the way trains on the experiment's model, and what of its new head. No weight is read.

    Raises NotPossible.
    """
    adapted = way.build(_empty(experiment), experiment.task.task_type, new)
    head = trained_parameters(adapted, new)
    return trained_parameters(adapted) - head, head


def _empty(experiment: Experiment) -> nn.Module:
    return skeleton(experiment.source.name, experiment.task.head).float()  # a count, whatever the weights are kept as
