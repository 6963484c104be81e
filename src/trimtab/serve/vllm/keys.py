"""Keys of vLLM's prefix cache: a block that holds edited tokens says by what and where; others say nothing more."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from trimtab.serve.vllm.carried import NAME, read
from trimtab.where.plan import edits_within

FUNCTION = "generate_block_hash_extra_keys"
HOME = "vllm.v1.core.kv_cache_utils"
USERS = ("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")
"""Modules that hold a reference of their own."""


def extra_keys(request: Any, start: int, end: int) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """What the tokens from `start` to `end` add to the hash of their block; see `where.plan.block_keys`."""
    params = request.sampling_params
    carried = read(params.extra_args) if params is not None else None
    if carried is None:
        return ()
    within = edits_within(carried.edits, carried.prompt, start, end - start)
    return tuple((NAME, (edit.digest, edit.scale, part, *offsets)) for edit, part, offsets in within)


def _keyed(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def keyed(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        own = extra_keys(request, start_token_idx, end_token_idx)
        return ((keys or ()) + own if own else keys), mm_idx

    keyed.__trimtab__ = True  # type: ignore[attr-defined]
    return keyed


def install() -> None:
    """Replace the function in every module that has it.

    Raises:
        RuntimeError: one still has the old one.
    """
    original = getattr(import_module(HOME), FUNCTION)
    keyed = original if hasattr(original, "__trimtab__") else _keyed(original)
    for name in USERS:
        import_module(name)
    for module in _holders():
        setattr(module, FUNCTION, keyed)
    if missed := missing():
        raise RuntimeError(f"{', '.join(missed)}: {FUNCTION} was not replaced.")


def missing() -> list[str]:
    """Modules in which the function is not ours."""
    return [module.__name__ for module in _holders() if not hasattr(getattr(module, FUNCTION), "__trimtab__")]


def _holders() -> list[ModuleType]:
    loaded = [module for name, module in sorted(sys.modules.items()) if name.startswith("vllm.")]
    return [module for module in loaded if FUNCTION in getattr(module, "__dict__", {})]
