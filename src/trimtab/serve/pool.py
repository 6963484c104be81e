"""`AdapterPool`: the server's table of edits on a model that one calls oneself.

Any number of adapters of any kind in memory, a few on the device, and a batch whose rows have one each:

    pool = AdapterPool(model)
    pool.add("emoji", "adapters/emoji")
    with pool.rows(["emoji", "haiku", None]):
        model.generate(**three_prompts)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from trimtab.adapter.edit import base_of, check_uncompiled
from trimtab.adapter.forward import Edits, Made, Pass
from trimtab.adapter.identity import base_digest
from trimtab.adapter.running import Forwards
from trimtab.adapter.tuner import OUTSIDE, check_states
from trimtab.serve.registry import Adapter, Registry, places_in
from trimtab.serve.table import AdapterTable, Key, Layout, Lines
from trimtab.where.plan import Group, Part
from trimtab.where.positions import Positions
from trimtab.where.sites import find_sites


@dataclass(frozen=True, eq=False)
class _Rows:
    """Who edits which row of the batches of a `with`."""

    pool: AdapterPool
    adapters: Sequence[Adapter | None]
    entries: Mapping[Key, int]


_open: ContextVar[tuple[_Rows, ...]] = ContextVar("rows", default=())


class AdapterPool:
    """Adapters for one model, as `trimtab serve` holds them.

    Args:
        model: of transformers, or PEFT's around one, whose own adapters edit first.
        entries: of the table on the device: the adapters in use at a time, two of them one that is untied.
        max_rank: of an adapter's edit at most.
        site: what adapters may edit, as in `ReftConfig`.

    Raises:
        ValueError: the model is compiled, checkpoints its gradients, or has no such site.
    """

    def __init__(self, model: nn.Module, entries: int = 8, max_rank: int = 16, site: str = "block") -> None:
        base = base_of(model)
        check_uncompiled(base)
        if entries < 1 or max_rank < 1:
            raise ValueError(f"entries={entries}, max_rank={max_rank}: must both be at least 1.")
        layout = Layout(find_sites(base, site, "all"), max_rank)
        self.registry = Registry(layout, meant=places_in(base, layout), base=base_digest(base))
        self.forwards = Forwards.of(base)
        self.forwards.guests += 1
        self.forwards.editors.append(self._edits)
        self._table = _Table(self, layout, entries, next(base.parameters()).device)
        self._lock = threading.Lock()

    def add(self, name: str, folder: str | Path, replace: bool = False) -> None:
        """Read an adapter into memory.

        Raises:
            NameTaken: the name is in use, and `replace` is not set. AdapterError: it does not fit the model or table.
        """
        self.registry.add(name, folder, replace)

    def remove(self, name: str) -> None:
        """Forget an adapter; rows that have it keep it to the end of their `with`.

        Raises:
            UnknownAdapter: it is not in the pool.
        """
        self.registry.unload(name)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Give each row of the batches run within, in this thread or task alone, an adapter; None for the base model.

        Beams and returned sequences have that of their prompt.

        Raises:
            UnknownAdapter: of a name. ValueError: more adapters than the table has entries for.
        """
        adapters = [None if name is None else self.registry.get(name) for name in names]
        need: dict[Key, Tensor] = {
            (a.digest, part): vector for a in adapters if a is not None for part, vector in a.parts.items()
        }
        with self._lock:
            entries = self._table.acquire(need)
        if entries is None:
            raise ValueError(
                f"names: {len(need)} entries of a table of {len(self._table)} are needed, and not so many are free. "
                "Use fewer adapters at once, or a pool of more entries."
            )
        token = _open.set((*_open.get(), _Rows(self, adapters, entries)))
        try:
            yield
        finally:
            _open.reset(token)
            with self._lock:
                self._table.release(need)

    def _edits(self) -> Edits:
        rows = next((rows for rows in reversed(_open.get()) if rows.pool is self), None)
        adapters = rows.adapters if rows is not None else [None]
        return [[Made(f"{a.name} {a.digest.hex()[:8]}", a.positions, 1.0)] if a is not None else [] for a in adapters]

    def close(self) -> None:
        """Take the pool off the model."""
        self._table.close()
        self.forwards.guests -= 1
        self.forwards.editors.remove(self._edits)
        self.forwards.release()


class _Table(AdapterTable):
    """A table that finds the rows of a forward where the model's own adapters find theirs."""

    def __init__(self, pool: AdapterPool, layout: Layout, entries: int, device: torch.device) -> None:
        super().__init__(layout, entries, device)
        self._pool, self._sites_by_name = pool, {site.name: site for site in layout.sites}

    def _running(self, name: str, hidden: Tensor) -> list[Lines]:
        rows = next((rows for rows in reversed(_open.get()) if rows.pool is self._pool), None)
        if rows is None or not rows.entries:
            return []
        running = self._pool.forwards.current()
        if running is None:
            raise RuntimeError(OUTSIDE.format(name))
        check_states(self._sites_by_name[name], hidden)
        times, rest = divmod(len(hidden), len(rows.adapters))
        if rest or (times > 1 and not running.repeats) or running.owner is not None:
            raise ValueError(
                f"names: {len(rows.adapters)} for a batch of {len(hidden)} rows; give one a row, unpacked."
            )
        key = (rows, *hidden.shape[:2], hidden.device)
        if key not in running.kept:
            running.kept[key] = [self._ready(group) for group in _groups(rows, running, hidden, times)]
        return [line for line in running.kept[key] if name in line.sites]

    def _change(self, name: str, states: Tensor, lines: Lines) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return super()._change(name, states, lines)


def _groups(rows: _Rows, running: Pass, hidden: Tensor, times: int) -> Iterator[Group]:
    """The edited rows of a forward, those of the same positions together."""
    alike: dict[tuple[Positions, tuple[Part, ...]], list[int]] = {}
    for i in range(len(hidden)):
        adapter = rows.adapters[i // times]
        if adapter is not None:
            alike.setdefault((adapter.positions, tuple(adapter.parts)), []).append(i)
    for (positions, parts), members in alike.items():
        found = running.rows(None, positions, hidden, parts)
        if found is None:
            continue
        own = {"edit": slice(None), "prefix": slice(positions.first), "suffix": slice(positions.first, None)}
        for part in parts:
            digests = [cast(Adapter, rows.adapters[i // times]).digest for i in members]
            entry = torch.tensor([rows.entries[digest, part] for digest in digests])
            flat, valid = found.flat[members][:, own[part]], found.valid[members][:, own[part], 0]
            yield Group(flat, valid, entry, torch.ones(len(members)))
