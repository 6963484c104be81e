"""Layers: which blocks are edited, by the names that searches and ablations give them."""

from __future__ import annotations

Layers = str | list[int]
"""`all`, or indices of blocks."""


def layer_sets(blocks: int) -> dict[str, Layers]:
    """All blocks, each third of them (where there are three or more), the first and the last."""
    third = max(1, blocks // 3)
    sets: dict[str, Layers] = {"all": "all", "first": [0], "last": [blocks - 1]}
    if blocks >= 3:
        sets |= {
            "lower": list(range(third)),
            "middle": list(range(third, blocks - third)),
            "upper": list(range(blocks - third, blocks)),
        }
    return sets
