"""Adapters on disjoint parts of one rotation, which take nothing from each other when they are used together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trimtab.adapter.tuner import ReftLayer
from trimtab.edits import Edit
from trimtab.edits.orthonormal import Rotation, retract_beside


def share_rotation(model: nn.Module, adapters: Sequence[str]) -> None:
    """Have adapters edit disjoint parts of one rotation: at each module the rows of all their R are orthonormal
    together, now and after every step of any optimizer (Wu et al. 2024, appendix: halves of one rank, two data sets).

    The first keeps its R now, and the others move away from it; a step moves the R of those that learn. So the parts
    are learnt at once, with `adapter_names` for each row, or one after another. Each adapter is saved as any other, and
    used alone or with the others; none writes where another reads by its R. What W reads may still be what another
    wrote, if they are used in sequence; `trimtab compose --parallel` makes of them the one adapter of the paper. To
    train them further after they were loaded, call this again.

    Raises:
        ValueError: there is no such adapter, they edit other modules, one has no R, or the ranks add up to more than
            the model's width.
    """
    layers = [m for m in model.modules() if isinstance(m, ReftLayer)]
    missing = set(adapters) - {name for layer in layers for name in layer.positions}
    if missing or len(set(adapters)) < 2:
        raise ValueError(f"adapters={list(adapters)}: give at least two that the model has.")
    families = [family for layer in layers for family in _families(layer, adapters)]
    for family in families:
        _move_apart(family)
        for edit in family:
            edit.rotation.family = tuple(each.rotation for each in family)


@torch.no_grad()
def _move_apart(family: Sequence[Edit]) -> None:
    """Each R out of the rows of those before it."""
    kept = family[0].rotation()
    for edit in family[1:]:
        before = edit.rotation()
        edit.rotation.set(retract_beside(before, kept))
        edit.follow(before)
        kept = torch.cat([kept, edit.rotation()])


def _families(layer: ReftLayer, adapters: Sequence[str]) -> list[list[Edit]]:
    """The edits of all adapters at a module, of each part."""
    own = [layer.edits(adapter) for adapter in adapters]
    if any(edits.keys() != own[0].keys() for edits in own):
        raise ValueError(f"adapters={list(adapters)}: not all of them edit {layer.site.name} alike.")
    families = [[edits[part] for edits in own] for part in own[0]]
    for family in families:
        if not all(isinstance(getattr(edit, "rotation", None), Rotation) for edit in family):
            raise ValueError(f"adapters={list(adapters)}: one has no rotation; use loreft, consreft, lobireft, ...")
        if (rank := sum(edit.r or 0 for edit in family)) > family[0].width:
            raise ValueError(f"adapters={list(adapters)}: ranks of {rank} in all, for a width of {family[0].width}.")
    return families
