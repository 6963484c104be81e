"""Edits merged into the weights: the base model itself, changed, for whatever knows no adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from trimtab.adapter.folder import fresh
from trimtab.errors import ConversionError
from trimtab.interop.base import Base, logits_of
from trimtab.interop.convert import (
    TOLERANCE,
    Check,
    Given,
    Report,
    compare,
    recognise,
    report,
)
from trimtab.interop.projections import Change, changes_of
from trimtab.runs.models import load_tokenizer

BIASES = ("mlp_bias", "attention_bias")
"""Switches of transformers' configs that give a model's projections a bias."""


def merge(source: Path, output: Path, given: Given | None = None, *, check: bool = True) -> Report:
    """Write the base model with an adapter's edits in its weights, for edits of every token where a projection ends.

    Raises:
        ConversionError: no change of the weights equals the edits; says what would be exact.
        FileExistsError: there is something at `output` already.
    """
    reader = recognise(source)
    with fresh(output) as staging:
        adapter = reader.read(source, given or Given())
        changes = changes_of(adapter)
        model, notes = _with_biases(adapter.base, changes)
        _add(model, changes)
        model.load_state_dict(adapter.modules, strict=False)
        model.save_pretrained(staging)
        notes += _save_tokenizer(adapter.base, staging)
        measured: Check | str = "not asked for"
        if check:
            tolerance = max(TOLERANCE, 16 * torch.finfo(model.dtype).eps)
            merged = replace(adapter.base, name=str(staging))
            measured = compare(adapter, lambda: reader.run(source, adapter), lambda: _runner(merged), tolerance)
    return report(reader.name, f"weights ({str(model.dtype).removeprefix('torch.')})", adapter, notes, measured)


def _with_biases(base: Base, changes: list[Change]) -> tuple[Any, list[str]]:
    """The model in the precision it is stored in, and with a bias on its projections if the changes need one.

    Raises:
        ConversionError: its class has none for them.
    """
    model = base.load("auto")
    needed = max(float(change.bias.abs().max()) for change in changes)
    if not needed or all(model.get_submodule(change.layer).bias is not None for change in changes):
        return model, []
    for switch in BIASES:
        if getattr(model.config, switch, None) is False:
            with_bias = _switched_on(model, switch)
            if all(with_bias.get_submodule(change.layer).bias is not None for change in changes):
                return with_bias, [f"{switch} is on in the merged model's config; the biases not needed are zero"]
    layer = changes[0].layer
    raise ConversionError(
        f"{layer}: the edits need a bias there (Rᵀb, entries up to {needed:.2g}), which would be lost: "
        f"{type(model).__name__} has none. Exact: trimtab convert --to lora, which carries it as lora_bias; or edits "
        "with b = 0."
    )


def _switched_on(model: Any, switch: str) -> Any:
    """The same model with biases, all zero but those it has."""
    config = type(model.config).from_dict({**model.config.to_dict(), switch: True})
    with_bias = type(model)(config).to(model.dtype)
    with_bias.generation_config = model.generation_config
    with torch.no_grad():
        for name, parameter in with_bias.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    with_bias.load_state_dict(model.state_dict(), strict=False)
    return with_bias.eval().to(model.device)


@torch.no_grad()
def _add(model: Any, changes: list[Change]) -> None:
    """Sums are formed in float64 and rounded once."""
    for change in changes:
        layer = model.get_submodule(change.layer)
        delta = change.up @ change.down
        weight = layer.weight.cpu().double() + (delta.T if change.transposed else delta)
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.cpu().double() + change.bias)


def _save_tokenizer(base: Base, path: Path) -> list[str]:
    if cached_file(base.name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return ["the base has no tokenizer to copy"]
    load_tokenizer(base.name).save_pretrained(path)
    return []


def _runner(base: Base) -> Any:
    model = base.load()
    return lambda ids, prompt: logits_of(model, ids)
