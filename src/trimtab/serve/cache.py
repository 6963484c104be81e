"""Keys and values: rows of running requests side by side, and blocks of prompts kept for later ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

Shapes = list[tuple[int, int]]
"""(heads, head width) of each layer's keys and values in turn: k₀, v₀, k₁, v₁, ..."""


class RowCache(Cache):
    """Keys and values of up to `rows` sequences, each from column 0 on; a model sees those of one forward.

    Tensors of one shape are one: (tensors, rows, heads, columns, head width), so that moving a row is one copy. Columns
    grow as they are needed.
    """

    is_compileable = False

    def __init__(self, shapes: Shapes, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self._columns, self._first, self._last, self._width = 0, 0, 0, 0
        self._place = torch.empty(0)
        self._where: list[tuple[int, int]] = []
        kinds = list(dict.fromkeys(shapes))
        for i, shape in enumerate(shapes):
            self._where.append((kinds.index(shape), sum(other == shape for other in shapes[:i])))
        counts = [sum(other == kind for other in shapes) for kind in kinds]
        self._pools = [
            torch.zeros(n, rows, heads, 0, width, dtype=dtype, device=device)
            for n, (heads, width) in zip(counts, kinds, strict=True)
        ]

    def ensure(self, columns: int) -> None:
        """Make room for sequences of so many tokens."""
        if columns > self._columns:
            self._columns = max(columns, 64, self._columns + self._columns // 2)
            for i, old in enumerate(self._pools):
                new = old.new_zeros(*old.shape[:3], self._columns, old.shape[4])
                new[:, :, :, : old.shape[3]] = old
                self._pools[i] = new

    def show(self, rows: range, place: Tensor, width: int) -> None:
        """Before a forward: it runs `rows`, writes at columns `place` (rows, Q) and reads the first `width`."""
        self._first, self._last, self._width = rows.start, rows.stop, width
        self._place = place[:, None, :, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What attention calls: writes the new (B, heads, Q, d), returns all (B, heads, width, d)."""
        return self._written(2 * layer_idx, key_states), self._written(2 * layer_idx + 1, value_states)

    def _written(self, i: int, states: Tensor) -> Tensor:
        pool, n = self._where[i]
        own = self._pools[pool][n, self._first : self._last]
        own.scatter_(2, self._place.expand_as(states), states)
        return own[:, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def move(self, source: Sequence[int], target: Sequence[int], columns: int) -> None:
        """Rows `source` to `target`, all at once, as far as their first `columns`."""
        for pool in self._pools:
            pool[:, list(target), :, :columns] = pool[:, list(source), :, :columns]

    def clear(self, row: int) -> None:
        """Zeros: what is masked must still be a number."""
        for pool in self._pools:
            pool[:, row] = 0

    def read(self, row: int, start: int, end: int) -> list[Tensor]:
        """A copy of some columns of a row."""
        return [pool[:, row, :, start:end].clone() for pool in self._pools]

    def write(self, row: int, start: int, blocks: Sequence[Sequence[Tensor]]) -> None:
        """Blocks that were read, one after another, from column `start` on."""
        for pool, parts in zip(self._pools, zip(*blocks, strict=True), strict=True):
            states = torch.cat(parts, 2)
            pool[:, row, :, start : start + states.shape[2]] = states


class PrefixStore:
    """Blocks of keys and values by their key (`where.plan.block_keys`), the least recently used dropped first.

    Args:
        capacity: bytes; 0 keeps none.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.nbytes = capacity, 0
        self._blocks: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def get(self, key: bytes) -> list[Tensor]:
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def put(self, key: bytes, block: list[Tensor]) -> None:
        self._blocks[key] = block
        self.nbytes += _bytes(block)
        while self.nbytes > self.capacity:
            self.nbytes -= _bytes(self._blocks.popitem(last=False)[1])

    def clear(self) -> None:
        self._blocks.clear()
        self.nbytes = 0


def _bytes(block: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in block)
