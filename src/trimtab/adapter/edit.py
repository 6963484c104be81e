"""An edit of one's own, made only within a `with`.

It is hooked to the same modules as an adapter's edits, right behind them, and finds its tokens through the same
`Forwards`. Which edits are open is known to the context (`contextvars`), so another thread or asyncio task edits
nothing, or something of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.adapter.forward import GUEST, Edits, Made, Same
from trimtab.adapter.hooks import hook, hooks_of
from trimtab.adapter.running import Forwards
from trimtab.adapter.tuner import OUTSIDE, ReftLayer, check_scale, check_states
from trimtab.edits.base import written
from trimtab.where.positions import Positions, parse_positions
from trimtab.where.sites import Site, find_sites

Change = Callable[[Tensor], Tensor] | Tensor


@contextmanager
def edit(
    model: nn.Module,
    change: Change,
    *,
    layers: Any = "all",
    positions: str = "all",
    site: str = "block",
    scale: float = 1.0,
) -> Iterator[None]:
    """Edit every forward of `model` within, in this thread or task alone: h becomes h + scale · (Φ(h) - h).

    Several nest, and are made in the order in which they were opened, after the edits of the model's adapters. All is
    undone at the end, also by an exception. It is no part of the model: nothing of it is saved or trained.

    Args:
        model: any model that an adapter could be put on, with adapters or without.
        change: Φ, a function of the edited tokens' hidden states (n, d), float32, that gives (n, d); or a matrix M
            (d, d), Φ(h) = M h; or a vector v (d,), Φ(h) = h + v.
        layers: as in `ReftConfig`.
        positions: as there.
        site: as there.
        scale: 0 leaves the model as it is, negative values reverse the edit.

    Examples:
        >>> with trimtab.edit(model, lambda h: h - (h @ u)[:, None] * u, layers=[10, 11], positions="all"):
        ...     model.generate(**batch)

    Raises:
        ValueError: a field is wrong, the tensor does not fit, or the model is compiled or checkpoints its gradients.
    """
    check_scale(scale)
    sites = find_sites(base_of(model), site, layers)
    with edit_at(model, sites, _as_function(change, sites), positions, scale):
        yield


@contextmanager
def edit_at(
    model: nn.Module,
    sites: Sequence[Site],
    function: Callable[[Tensor], Tensor],
    positions: str = "all",
    scale: float = 1.0,
) -> Iterator[None]:
    """As `edit`, for sites that were found and a change that is a function."""
    base = base_of(model)
    check_uncompiled(base)
    mine = _Edit(function, parse_positions(positions), float(scale))
    with _hooked(base, sites, mine):
        token = _open.set((*_open.get(), mine))
        try:
            yield
        finally:
            _open.reset(token)


def base_of(model: nn.Module) -> Any:
    """The model without PEFT's around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@dataclass(frozen=True, eq=False)
class _Edit:
    function: Callable[[Tensor], Tensor]
    positions: Positions
    scale: float

    @property
    def version(self) -> Any:
        """The same for a function opened again, or one made again from the same code and values."""
        function = getattr(self.function, "__func__", self.function)  # of a method, which is of its object too
        if not isinstance(function, FunctionType):
            return Same(function)
        values = [cell.cell_contents for cell in function.__closure__ or ()]
        values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        owner = getattr(self.function, "__self__", None)
        return Same(function.__code__, owner, *values), *(written(v) for v in values if isinstance(v, Tensor))


_open: ContextVar[tuple[_Edit, ...]] = ContextVar("edits", default=())
_lock = threading.Lock()


@contextmanager
def _hooked(base: nn.Module, sites: Sequence[Site], mine: _Edit) -> Iterator[None]:
    def made() -> Edits:
        open_here = mine in _open.get()
        return [[Made(GUEST, mine.positions, mine.scale, mine.version)] if open_here else []]

    with _lock:
        forwards = Forwards.of(base)
        forwards.guests += 1
        forwards.editors = [*forwards.editors, made]
    handles = [_hook(site, _Guest(forwards, site, mine)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        with _lock:
            forwards.guests -= 1
            forwards.editors = [editor for editor in forwards.editors if editor is not made]
            forwards.release()


def _hook(site: Site, guest: _Guest) -> RemovableHandle:
    """Behind the edits that are there already, and before all other hooks, which see what the next block reads."""
    handle, hooks = hook(site, guest.edited), hooks_of(site)
    for key, other in list(hooks.items()):
        owner = getattr(getattr(other, "change", None), "__self__", None)
        if not isinstance(owner, _Guest | ReftLayer):
            hooks.move_to_end(key)
    return handle


@dataclass(frozen=True)
class _Guest:
    forwards: Forwards
    site: Site
    edit: _Edit

    def edited(self, hidden: Tensor) -> Tensor:
        """With the edited tokens changed; themselves where this edit is not open."""
        if self.edit not in _open.get():
            return hidden
        running = self.forwards.current()
        if running is None or torch.compiler.is_compiling():
            raise RuntimeError(_COMPILED if running else OUTSIDE.format(self.site.name))
        check_states(self.site, hidden)
        rows = running.rows(None, self.edit.positions, hidden)
        index = rows.flat[rows.valid.squeeze(-1)] if rows is not None else torch.empty(0)
        if not len(index):
            return hidden
        states = hidden.reshape(-1, self.site.width)
        return states.index_copy(0, index, self._changed(states.index_select(0, index))).view_as(hidden)

    def _changed(self, states: Tensor) -> Tensor:
        h = states.to(torch.promote_types(states.dtype, torch.float32))
        with torch.autocast(h.device.type, enabled=False):
            changed: Any = self.edit.function(h.clone())  # which may write into what it is given
        if not isinstance(changed, Tensor) or changed.shape != h.shape or not changed.is_floating_point():
            found = f"{changed.dtype} {tuple(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(f"change: gave {found} at {self.site.name} for hidden states {tuple(h.shape)}.")
        scale = self.edit.scale
        return (changed if scale == 1 else h + scale * (changed.to(h) - h)).to(states)


def _as_function(change: Any, sites: list[Site]) -> Callable[[Tensor], Tensor]:
    if not isinstance(change, Tensor):
        if not callable(change):
            raise ValueError(f"change={change!r}: must be a function of h, a matrix (d, d) or a vector (d,).")
        return change  # type: ignore[no-any-return]
    if not change.is_floating_point() or not bool(change.isfinite().all()):
        raise ValueError(f"change: a tensor of {change.dtype} that must be floating-point, without NaN or infinity.")
    for site in sites:
        if tuple(change.shape) not in ((site.width,), (site.width, site.width)):
            raise ValueError(
                f"change: of shape {tuple(change.shape)}, but the hidden states of {site.name} have the width "
                f"{site.width}; give a matrix (d, d) or a vector (d,)."
            )
    if change.dim() == 1:
        return lambda h: h + change.to(h)
    return lambda h: h @ change.to(h).mT


def check_uncompiled(base: nn.Module) -> None:
    """Raises ValueError for a model whose forwards do not look for edits made since."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in base.modules()) or hasattr(base, "_compiled_call"):
        raise ValueError(_COMPILED)
    if base.training and any(getattr(m, "gradient_checkpointing", False) for m in base.modules()):
        raise ValueError(
            "edit: the model checkpoints its gradients, and would recompute its blocks after the edit has ended. Call "
            "model.eval(), or model.gradient_checkpointing_disable()."
        )


_COMPILED = (
    "edit: the model is compiled, and a compiled forward does not look for edits made since. Use the model as it was "
    "before torch.compile, and generate without a static cache."
)
