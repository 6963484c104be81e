"""What a model goes on from, keys and values or a recurrent state, by whatever name it has.

transformers 5.24 calls it `cache` in nearly every model, where earlier ones say `past_key_values` or `cache_params`;
it still takes those names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
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


def keys_of(past: Any) -> Tensor | None:
    """The keys (B, heads, columns, d) of the last layer that keeps some; None where none does."""
    layers = getattr(getattr(past, "self_attention_cache", past), "layers", None) or ()
    kept = (getattr(layer, "keys", None) for layer in reversed(layers))
    return next((keys for keys in kept if isinstance(keys, Tensor) and keys.dim() == 4 and keys.numel()), None)


def rows_among(past: Any, before: Tensor | None) -> Tensor | None:
    """Which rows of a cache now may be which of those (B', B), whose last layer's keys were `before`; None if nobody
    moved them since.

    A key of the last layer tells of all tokens up to its own, and of their edits. The last column that is still there
    is compared, which a crop leaves as it was.
    """
    now = keys_of(past)
    if now is before:
        return None
    if now is None or before is None:
        return torch.zeros(1, 1, dtype=torch.bool)
    column = min(now.shape[2], before.shape[2], past_length(past) or 0) - 1
    own, others = (keys[:, :, column].flatten(1).to(now.device) for keys in (now, before))
    if now.untyped_storage().data_ptr() == before.untyped_storage().data_ptr() and torch.equal(own, others):
        return None  # a crop
    numbers = torch.unique(torch.cat([own, others]), dim=0, return_inverse=True)[1]
    same: Tensor = numbers[: len(own)].unsqueeze(1) == numbers[len(own) :]
    return same


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
