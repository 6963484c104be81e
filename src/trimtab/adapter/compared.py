"""What adapters do to the same hidden states: how far they move them, in which directions, how alike the results are.

Shapes: n tokens, of hidden states h (n, d) of the base model and h' (n, d) with an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter.hooks import hook
from trimtab.where.sites import Site

SHARE = 0.9
"""Of the changes' squared length, what the directions that are compared hold."""


@torch.no_grad()
def block_outputs(model: nn.Module, blocks: Sequence[Site], inputs: Sequence[dict[str, Any]]) -> Tensor:
    """What the blocks give, behind all edits: (blocks, n, d) in float32 on the CPU.

    Args:
        inputs: the arguments of one forward each, of a single row without padding; their tokens come one after another.
    """
    seen: dict[str, list[Tensor]] = {site.name: [] for site in blocks}

    def keep(name: str, hidden: Tensor) -> Tensor:
        seen[name].append(hidden[0].float().cpu())
        return hidden

    handles = [hook(site, partial(keep, site.name)) for site in blocks]
    try:
        for one in inputs:
            model(**one)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.cat(seen[site.name]) for site in blocks])


def moved(base: Tensor, edited: Tensor) -> Tensor:
    """‖h' - h‖ / ‖h‖ of each token: (..., n, d) -> (..., n)."""
    far: Tensor = (edited - base).norm(dim=-1) / base.norm(dim=-1).clamp(min=1e-12)
    return far


def directions(changes: Tensor, share: float = SHARE) -> Tensor:
    """The fewest principal directions that hold `share` of the squared length of changes h' - h (n, d).

    They are right singular vectors, of the changes as they are: a change that is the same at all tokens counts.

    Returns:
        (k, d), orthonormal rows, the strongest first; none where nothing changes.
    """
    rows: Tensor
    _, lengths, rows = torch.linalg.svd(changes.double(), full_matrices=False)
    held = lengths.square().cumsum(0)
    if not held.numel() or held[-1] == 0:
        return rows[:0]
    return rows[: int((held < share * held[-1]).sum()) + 1]


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of the principal angles between the spans of orthonormal rows (k, d) and (l, d): (min(k, l),), falling."""
    found: Tensor = torch.linalg.svdvals(a @ b.mT).clamp(max=1)
    return found


def overlap(a: Tensor, b: Tensor) -> float | None:
    """The mean squared cosine of the principal angles between two spans, of orthonormal rows (k, d) and (l, d).

    1 where one holds the other, 0 where they are at right angles, max(k, l) / d on average for random ones
    (`chance`); None where one of them is empty.
    """
    return float(cosines(a, b).square().mean()) if len(a) and len(b) else None


def chance(a: Tensor, b: Tensor) -> float:
    """The `overlap` to be expected of spans of these sizes whose directions are random."""
    return max(len(a), len(b)) / a.shape[1]


def cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment of the same n tokens (n, d) and (n, e) (Kornblith et al. 2019, arXiv:1905.00414).

    ‖XᵀY‖² / ‖XᵀX‖ ‖YᵀY‖, with X and Y centred: 1 where one is the other rotated, scaled and shifted. It leans towards 1
    where n is below the width. None where there is nothing to compare: all tokens are alike.
    """
    grams = [centred @ centred.mT for centred in (one.double() - one.double().mean(0) for one in (x, y))]
    size = grams[0].norm() * grams[1].norm()
    return float((grams[0] * grams[1]).sum() / size) if size > 0 else None
