"""What a process keeps of one trial for the next: the base model, and the frozen model's work."""

from __future__ import annotations

import atexit
import gc
from functools import cache
from typing import Any

from trimtab.runs.models import Base, ModelSource, identity_of
from trimtab.runs.reuse import Store
from trimtab.runs.ways import unload

_stores: dict[Any, Store] = {}
_bases: dict[Any, Base] = {}
"""The base model that the last trial left as it was, so that the next need not load it."""


@cache
def _freeze_libraries() -> None:
    """Once: the collection that accelerate asks for in each trial would go by their 400,000 objects."""
    gc.freeze()


def base_for(source: ModelSource) -> Base:
    """The base model, which is the caller's to change: it is kept for nobody else."""
    _freeze_libraries()
    kept = _bases.pop(identity_of(source), None)
    _bases.clear()
    return kept or Base(source)


def give_back(base: Base, adapted: Any) -> None:
    """Keep the base model, without its adapters, for the next trial."""
    unload(adapted)
    adapted.base_model.model.eval()
    _bases[base.identity] = base


def store_for(source: ModelSource, gigabytes: float) -> Store:
    """What is kept of the frozen model's work, for all trials that this process makes on the same model."""
    key = identity_of(source)
    if key not in _stores:
        close_stores()
        _stores[key] = Store(int(gigabytes * 1e9))
    return _stores[key]


@atexit.register
def close_stores() -> None:
    """Drop what is kept, in memory and on disk, and the model with it."""
    for store in _stores.values():
        store.close()
    _stores.clear()
    _bases.clear()
