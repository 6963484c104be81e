"""What a model goes on from, keys and values or a recurrent state, by whatever name it has.

transformers 5.24 calls it `cache` in nearly every model, where earlier ones say `past_key_values` or `cache_params`;
it still takes those names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import CausalLMOutputWithPast

NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
CACHE = next(name for name in NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})
"""The argument by which a language model takes one."""


def cache_in(values: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments; None without one, or where continuous batching hands out pages."""
    given = next((values[name] for name in NAMES if values.get(name) is not None), None)
    return None if is_paged(given) else given


def cache_of(output: Any) -> Any:
    """The cache among what a forward returned; None without one."""
    return cache_in(vars(output) if hasattr(output, "__dict__") else {})


def is_paged(cache: Any) -> bool:
    """Whether continuous batching holds it: its rows are chunks of many requests."""
    return isinstance(cache, PagedAttentionCache)


def past_length(past: Any) -> int | None:
    """Columns that a cache holds; None for a recurrent state, which does not count what it has seen."""
    if past is None:
        return 0
    if not hasattr(past, "get_seq_length"):
        return None
    try:
        return int(past.get_seq_length())
    except ValueError:  # no layer of it is an attention
        return None if past.has_previous_state() else 0
