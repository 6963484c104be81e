"""Which tokens a classifier's head reads: one vector a text, from the encoder's last hidden states (B, T, d)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    found: Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return found


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.int().argmax(1)]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _first(hidden.flip(1), mask.flip(1))


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "mean": _mean,
    "first": _first,
    "last": _last,
    "model": None,
}
"""(hidden states (B, T, d), mask of real tokens (B, T)) -> (B, d); `model` is what the architecture does by itself."""


def set_pool(model: Any, how: str) -> None:
    """Let a classifier's head read the `mean` of a text's tokens, the `first`, the `last`, or what `model` does.

    The head finds that one vector wherever it looks: at every token of `last_hidden_state`, and in `pooler_output`,
    whose own layers are then passed over. No module is replaced; `model` takes it back.

    Args:
        model: as transformers' AutoModelForSequenceClassification gives it, before any adapter.
    Raises:
        ValueError: another word, or a model in whose head no such vector can be put.
    """
    if how not in POOLS:
        raise ValueError(f"pool={how!r}: must be one of {', '.join(POOLS)}")
    encoder: Any = getattr(model, "base_model", None)
    whole = not isinstance(encoder, nn.Module) or encoder is model or hasattr(model, "peft_config")
    if how != "model" and (whole or getattr(model.config, "is_encoder_decoder", False)):
        raise ValueError(
            f"pool={how!r}: {type(model).__name__} is no encoder with a head, before any adapter; use pool='model'"
        )
    if (earlier := vars(encoder).pop("_trimtab_pool", None)) is not None:
        earlier[1].remove()
    if POOLS[how] is not None:
        hook = encoder.register_forward_hook(partial(_pooled, how), with_kwargs=True)
        encoder._trimtab_pool = (how, hook)


def pool_of(model: Any) -> str:
    """What `set_pool` was told of a model."""
    found: str = vars(getattr(model, "base_model", model)).get("_trimtab_pool", ("model",))[0]
    return found


def _pooled(how: str, encoder: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """The forward hook."""
    hidden = output.last_hidden_state
    given = inspect.signature(encoder.forward).bind_partial(*args, **kwargs).arguments
    mask = given.get("attention_mask")
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2])
    if mask.dim() != 2:
        raise ValueError(f"pool={how!r}: needs an attention_mask (B, T), got {tuple(mask.shape)}")
    vector = POOLS[how](hidden, mask[:, -hidden.shape[1] :])  # type: ignore[misc]
    changed = {"last_hidden_state": vector.unsqueeze(1).expand_as(hidden)}
    if getattr(output, "pooler_output", None) is not None:
        changed["pooler_output"] = vector
    return type(output)(**{**output, **changed})
