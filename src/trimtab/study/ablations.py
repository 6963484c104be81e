"""Variants of an adapter, one thing changed at a time, for `trimtab compare --ablate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.runs.experiment import Experiment
from trimtab.where.layers import layer_sets
from trimtab.where.positions import parse_positions

Variants = dict[str, dict[str, Any]]


def adapter_variants(task: Experiment, axes: str, blocks: int) -> list[Variants]:
    """The task's own adapter, called `as given`, and its variants along each of the comma-separated axes.

    A variant equal to the adapter, or that cannot be combined with the rest of it, is left out.

    Args:
        blocks: how many the model has.
    Raises:
        ValueError: an axis that there is not.
    """
    own = task.adapter.model_dump()
    found: Variants = {"as given": {}}
    for axis in map(str.strip, axes.split(",")):
        if axis not in AXES:
            raise ValueError(f"--ablate {axis!r}: there are {', '.join(AXES)}")
        found |= {name: change for name, change in AXES[axis](task, blocks).items() if {**own, **change} != own}
    return [{name: {**own, **change}} for name, change in found.items()]


def _positions(task: Experiment, blocks: int) -> Variants:
    """Prefix only, suffix only, each also with as many tokens as both; one; the prompt; all; as many at random."""
    parsed = parse_positions(task.adapter.positions)
    first, last = parsed.first or parsed.last or 7, parsed.last or parsed.first or 7
    tried = [f"f{first}+l{last}", f"f{first}", f"l{last}", f"f{first + last}", f"l{first + last}", "l1", "prompt"]
    tried += ["all"] if task.task.generates else []  # a classifier's text is all prompt
    tried.append(f"random{first + last}")
    return {f"positions {p}": {"positions": p, "tied": task.adapter.tied or "+" not in p} for p in dict.fromkeys(tried)}


def _layers(task: Experiment, blocks: int) -> Variants:
    return {f"layers {name}": {"layers": layers} for name, layers in layer_sets(blocks).items()}


def _ranks(task: Experiment, blocks: int) -> Variants:
    return {f"r {r}": {"r": r} for r in (1, 2, 4, 8, 16)}


def _tied(task: Experiment, blocks: int) -> Variants:
    both = "+" in task.adapter.positions
    return {f"tied {tied}".lower(): {"tied": tied} for tied in (True, False) if both or tied}


def _starts(task: Experiment, blocks: int) -> Variants:
    return {"init identity": {"init_weights": True}, "init paper": {"init_weights": "paper"}}


AXES: dict[str, Callable[[Experiment, int], Variants]] = {
    "positions": _positions,
    "layers": _layers,
    "r": _ranks,
    "tied": _tied,
    "init": _starts,
}
