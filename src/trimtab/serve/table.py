"""`AdapterTable`: the edits of many adapters as a few tensors, run on any mix of rows at once.

Every edit is a sum of terms Bᵀ f(A h + b) + c ⊙ h (`Edit.terms`), so an adapter is rows of A and B, a b and an f for
each row, and a c, at each edited module. A smaller rank is padded with zero rows, a module that is not edited with
zeros: both are exact. An adapter with a prefix and a suffix edit is two entries.

Shapes: entries E · rank r, rows of the table at each site · width d · lines G of K rows (`where.plan.Group`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from trimtab.adapter.hooks import hook
from trimtab.edits import ACTIVATIONS, Term
from trimtab.where.plan import Group, Span, plan
from trimtab.where.sites import Site

_FUNCTIONS = tuple(ACTIVATIONS.values())


class _Views(NamedTuple):
    """Of entries at one site."""

    rows: Tensor
    """A (E, r, d)."""
    bias: Tensor
    """b (E, r)."""
    basis: Tensor
    """B (E, r, d)."""
    code: Tensor
    """f (E, r): 0 for none, else one more than its place in `ACTIVATIONS`."""
    diagonal: Tensor
    """c (E, d)."""


class _Place(NamedTuple):
    """Where a site's tensors stand in an entry's vector."""

    start: int
    rank: int
    width: int

    @property
    def lengths(self) -> list[int]:
        """Of A, B, b, f and c, which follow one another."""
        return [self.rank * self.width, self.rank * self.width, self.rank, self.rank, self.width]

    @property
    def size(self) -> int:
        return sum(self.lengths)

    def of(self, vectors: Tensor) -> _Views:
        """Views of vectors (E, size)."""
        own = vectors[:, self.start : self.start + self.size]
        rows, basis, bias, code, diagonal = own.split(self.lengths, 1)
        shape = (self.rank, self.width)
        return _Views(rows.unflatten(1, shape), bias, basis.unflatten(1, shape), code, diagonal)


class _Used(NamedTuple):
    """What of the table's formula an entry needs."""

    sites: frozenset[str]
    """That it edits."""
    codes: frozenset[int]
    """Of its activations."""
    scales: bool
    """Whether it has a c."""


class Layout:
    """How an entry is laid out: for each site, A, B, b and f of `rank` rows, and c.

    Args:
        sites: the modules that adapters may edit.
        rank: rows of the table at each. An edit takes its r, or 2 r where it subtracts and has an activation.
    Raises:
        ValueError: a module is there twice.
    """

    def __init__(self, sites: Sequence[Site], rank: int) -> None:
        self.sites, self.rank, self.size = tuple(sites), rank, 0
        self.places: dict[str, _Place] = {}
        for site in sites:
            if site.name in self.places:
                raise ValueError(f"{site.name} is meant by two of the sites to be served; name it once.")
            self.places[site.name] = place = _Place(self.size, rank, site.width)
            self.size += place.size
        self._starts = list(accumulate((n for place in self.places.values() for n in place.lengths), initial=0))[:-1]

    @torch.no_grad()
    def vector(self, edits: Mapping[str, Sequence[Term]]) -> Tensor:
        """One entry (size,), float32 on the CPU.

        Raises:
            ValueError: a module is no site, or an edit has another width or more rows than fit.
        """
        vector = torch.zeros(self.size)
        for name, terms in edits.items():
            if name not in self.places:
                raise ValueError(
                    f"edits {name}, which is not served; the sites fixed at start are {_some(list(self.places))}."
                )
            self._fill(name, self.places[name].of(vector.unsqueeze(0)), terms)
        return vector

    def used(self, vector: Tensor) -> _Used:
        """What an entry (size,) on the CPU holds, in one pass: view by view took a millisecond of a step."""
        values = vector.numpy()
        some = np.logical_or.reduceat(values, self._starts).reshape(len(self.places), -1)  # A, B, b, f, c
        sites = frozenset(name for name, part in zip(self.places, some, strict=True) if part[1] or part[4])
        starts = [start for start, has in zip(self._starts[3::5], some[:, 3], strict=True) if has]
        codes = frozenset(int(code) for start in starts for code in values[start : start + self.rank])
        return _Used(sites, codes - {0}, bool(some[:, 4].any()))

    def _fill(self, name: str, views: _Views, terms: Sequence[Term]) -> None:
        needed, width = sum(len(term.rows) for term in terms), self.places[name].width
        if terms[0].rows.shape[1] != width:
            raise ValueError(
                f"{name}: the edit is for hidden states of width {terms[0].rows.shape[1]}, this model's have {width}: "
                "the adapter was trained on another base model."
            )
        if needed > self.rank:
            raise ValueError(
                f"{name}: the edit takes {needed} rows of a table of {self.rank}; start with a larger max_rank."
            )
        rows, bias, basis, code, diagonal = (view[0] for view in views)
        start = 0
        for term in terms:
            own = slice(start, start := start + len(term.rows))
            rows[own], bias[own], basis[own] = term.rows, term.bias, term.basis
            code[own] = 0 if term.activation is None else 1 + _FUNCTIONS.index(term.activation)
            diagonal += 0 if term.diagonal is None else term.diagonal


Key = tuple[bytes, str]
"""An adapter's digest and the part of it."""


class Lines(NamedTuple):
    """A `Group` ready for the hooks."""

    row: Tensor
    """(G K,) of the flat batch."""
    valid: Tensor
    """(G, K, 1) bool."""
    entry: Tensor
    """(G,)."""
    scale: Tensor
    """(G, 1, 1)."""
    sites: frozenset[str]
    """That any of these entries edits."""
    codes: frozenset[int]
    """Of the activations among these entries."""
    scales: bool
    """Whether one of these entries has a c."""


class Entries:
    """Which keys have an entry of a table, and which of them are in use; the least recently used make room.

    Args:
        count: of entries.
    """

    def __init__(self, count: int) -> None:
        self.hits = self.misses = self.evictions = 0
        self._count = count
        self._free = list(range(count))
        self._resident: OrderedDict[Key, int] = OrderedDict()  # the least recently used first
        self._pins: dict[Key, int] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def resident(self) -> int:
        return len(self._resident)

    @property
    def pinned(self) -> int:
        return len(self._pins)

    def acquire(self, wanted: Mapping[Key, Tensor]) -> dict[Key, int] | None:
        """Pin vectors (size,) in the table: their entries, or None while too many others are pinned."""
        missing = [key for key in wanted if key not in self._resident]
        spare = [key for key in self._resident if key not in self._pins and key not in wanted]
        if len(missing) > len(self._free) + len(spare):
            return None
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        for key in missing:
            if not self._free:
                self._free.append(self._resident.pop(spare.pop(0)))
                self.evictions += 1
            self._load(self._free[-1], wanted[key])
            self._resident[key] = self._free.pop()
        for key in wanted:
            self._resident.move_to_end(key)
            self._pins[key] = self._pins.get(key, 0) + 1
        return {key: self._resident[key] for key in wanted}

    def release(self, keys: Iterable[Key]) -> None:
        """Unpin. The entries stay until others need the room."""
        for key in keys:
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]

    def _load(self, entry: int, vector: Tensor) -> None:
        """Put a vector (size,) there."""
        raise NotImplementedError


class AdapterTable(Entries):
    """Entries on the device, and a hook on each site that edits the rows of the running forward.

    Args:
        layout: of an entry.
        entries: how many are on the device at a time.
        device: the model's.
    """

    def __init__(self, layout: Layout, entries: int, device: torch.device | str = "cpu") -> None:
        super().__init__(entries)
        self.layout = layout
        self.vectors = torch.zeros(entries, layout.size, device=device)
        self.edited_rows = 0
        self._views = {name: place.of(self.vectors) for name, place in layout.places.items()}
        self._used = [_Used(frozenset(), frozenset(), False)] * entries
        self._lines: list[Lines] = []
        self._moves: Tensor | None = None
        self._handles = [self._hook(site) for site in layout.sites]

    def _hook(self, site: Site) -> RemovableHandle:
        return hook(site, partial(self._changed, site.name))

    def _load(self, entry: int, vector: Tensor) -> None:
        self.vectors[entry].copy_(vector)
        self._used[entry] = self.layout.used(vector)

    @contextmanager
    def editing(self, stages: Sequence[Sequence[Span]], moves: Tensor | None = None) -> Iterator[None]:
        """Edit the rows of the forward that runs inside the `with`; a later stage reads what an earlier one wrote.

        Args:
            moves: (rows of the flat batch,), which grows by how far each is moved: ‖change‖ / ‖h‖, summed over sites.
        """
        self._lines, self._moves = [self._ready(group) for spans in stages for group in plan(spans)], moves
        try:
            yield
        finally:
            self._lines, self._moves = [], None

    def _ready(self, group: Group) -> Lines:
        device, entries = self.vectors.device, [self._used[i] for i in group.entry.tolist()]
        self.edited_rows += int(group.valid.sum())
        return Lines(
            group.rows.reshape(-1).to(device),
            group.valid.unsqueeze(-1).to(device),
            group.entry.to(device),
            group.scale.view(-1, 1, 1).to(device),
            frozenset().union(*(used.sites for used in entries)),
            frozenset().union(*(used.codes for used in entries)),
            any(used.scales for used in entries),
        )

    def _changed(self, name: str, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        running = self._running(name, hidden)
        for lines in running:
            change = self._change(name, flat[lines.row], lines)
            if self._moves is not None:
                before = flat[lines.row].float().norm(dim=-1).clamp_min(1e-12)
                self._moves.index_add_(0, lines.row, change.float().norm(dim=-1) / before)
            flat = flat.index_add(0, lines.row, change.to(flat.dtype))
        return flat.view_as(hidden) if running else hidden

    def _running(self, name: str, hidden: Tensor) -> list[Lines]:
        """What of the running forward is edited at a site; hidden states as the model has them there."""
        return [lines for lines in self._lines if name in lines.sites]

    def _change(self, name: str, states: Tensor, lines: Lines) -> Tensor:
        """Bᵀ f(A h + b) + c ⊙ h of the states (G K, d) of the rows of `lines`; A, b, B gathered a line, not a row."""
        views = self._views[name]
        rows, bias, basis = (view[lines.entry] for view in (views.rows, views.bias, views.basis))
        states = states.view(*lines.valid.shape[:2], -1).float()
        source = torch.baddbmm(bias.unsqueeze(1), states, rows.mT)
        for i in sorted(lines.codes):
            source = torch.where(views.code[lines.entry].unsqueeze(1) == i, _FUNCTIONS[i - 1](source), source)
        change = torch.bmm(source, basis)
        if lines.scales:
            change += views.diagonal[lines.entry].unsqueeze(1) * states
        return torch.where(lines.valid, change * lines.scale, 0).flatten(0, 1)

    def close(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
