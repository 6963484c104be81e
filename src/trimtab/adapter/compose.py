"""Adapters composed into one, where that is exact.

At a module, adapters in sequence are h₁ = h + w₁ Φ₁(h), h₂ = h₁ + w₂ Φ₂(h₁) and so on, as `set_adapter([first,
second])` with `set_scale` runs them. Where Φ₁(h) = B₁ᵀ(A₁ h + c₁) is affine, whoever reads h₁ reads an affine function
of h:

    A₂ h₁ + c₂ = (A₂ + w₁ A₂ B₁ᵀ A₁) h + (c₂ + w₁ A₂ B₁ᵀ c₁),

so that the whole is h + Σ wₖ Bₖᵀ fₖ(Aₖ' h + cₖ'), one `direft` edit of rank r₁ + r₂ + ... In parallel every adapter
reads h itself, and Aₖ' = Aₖ. Both are exact but for rounding the products, worked out in float64, to float32.

Exact are adapters of the same base, positions and site, on any layers, prefix and suffix tied or not, if what results
is one `direft` edit: all affine (LoReFT and its relatives without activation, vectors), or all with one activation that
nobody reads behind; so is one adapter with any weight, negative ones too. The rest is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.folder import Edits, SavedAdapter, as_edit, read_adapter, write_adapter
from trimtab.edits import ACTIVATIONS, Term
from trimtab.errors import AdapterError
from trimtab.where.plan import Part

_AT_ONCE = "Use them at once instead: model.base_model.set_adapter([first, second]) and trimtab.set_scale."


def compose(
    folders: Sequence[str | Path], weights: Sequence[float], output: str | Path, *, parallel: bool = False
) -> ReftConfig:
    """Write the one adapter that edits as these do together.

    Args:
        folders: adapters, in the order in which they edit.
        weights: of each, as `set_scale` takes them: 1 as it is, -1 reversed.
        parallel: each reads the hidden state without the others' edits, so that their changes are summed.
    Returns:
        The config of what was written.
    Raises:
        AdapterError: a folder is no adapter, or the composition is not exact; says why.
        FileExistsError: there is something at `output` already.
    """
    if len(weights) != len(folders) or not all(map(math.isfinite, weights)) or not any(weights):
        raise AdapterError(f"weights {list(weights)}: give one finite number for each adapter, not all of them 0.")
    adapters = [read_adapter(folder) for folder in folders]
    used = [(weight, adapter) for weight, adapter in zip(weights, adapters, strict=True) if weight]
    for name in ("base_model_name_or_path", "task_type", "positions", "edit_turns", "site"):
        _check_same(name, folders, adapters)
    _check_bases(folders, adapters)
    for folder, adapter in zip(folders, adapters, strict=True):
        if adapter.extras:
            raise AdapterError(f"{folder}: carries {adapter.extras[0]} beside its edits, which no sum has a place for.")
    tied = all(adapter.config.tied for _, adapter in used)
    modules = dict.fromkeys(module for _, adapter in used for module, _ in adapter.edits)
    parts: tuple[Part, ...] = ("edit",) if tied else ("prefix", "suffix")
    terms = {(m, p): _together([(w, _terms(a, m, p)) for w, a in used], parallel) for m in modules for p in parts}
    rank = max(len(own.rows) for own in terms.values())
    width = next(iter(terms.values())).rows.shape[1]
    if rank > width:
        raise AdapterError(f"the ranks add up to {rank}, more than the width {width} of the model. {_AT_ONCE}")
    config = _config(used[0][1].config, [a for _, a in used], tied, rank, list(terms.values()), len(modules))
    config.base_digest = next(filter(None, (adapter.config.base_digest for adapter in adapters)), None)
    edits: Edits = {place: _padded(own, rank) for place, own in terms.items()}
    write_adapter(output, config, edits)
    return config


def _check_same(name: str, folders: Sequence[Any], adapters: Sequence[SavedAdapter]) -> None:
    first = getattr(adapters[0].config, name)
    for folder, adapter in zip(folders, adapters, strict=True):
        own = getattr(adapter.config, name)
        if own != first:
            raise AdapterError(
                f"{name}: {first!r} in {folders[0]}, {own!r} in {folder}; one adapter has one. "
                + (
                    _AT_ONCE
                    if name in ("positions", "edit_turns", "site")
                    else "They do not belong to one model and task."
                )
            )


def _check_bases(folders: Sequence[Any], adapters: Sequence[SavedAdapter]) -> None:
    """Whether all that say so were made on the same weights, whatever these are called."""
    said = [(f, a.config.base_digest) for f, a in zip(folders, adapters, strict=True) if a.config.base_digest]
    for folder, digest in said:
        if digest != said[0][1]:
            raise AdapterError(f"base_digest: {said[0][0]} and {folder} were made on different weights of one name.")


def _terms(adapter: SavedAdapter, module: str, part: Part) -> tuple[Term, ...]:
    """Of one adapter at one place, in float64; none where it does not edit."""
    tensors = adapter.edits.get((module, part)) or adapter.edits.get((module, "edit"))
    if tensors is None:
        return ()
    try:
        with torch.no_grad():
            terms = as_edit(adapter.config, tensors).double().terms()
    except NotImplementedError:
        terms = ()
    if not terms or any(term.diagonal is not None for term in terms):
        raise AdapterError(
            f"method={adapter.config.method!r}: no sum of terms Bᵀ f(A h + b), which is all that one adapter can hold "
            f"of several. {_AT_ONCE}"
        )
    return terms


def _together(stages: Sequence[tuple[float, tuple[Term, ...]]], parallel: bool) -> Term:
    """Edits of one place, one after another or side by side, as one term."""
    done: list[Term] = []
    for weight, terms in stages:
        read = [term if parallel else _after(done, term) for term in terms]
        done += [term._replace(basis=weight * term.basis) for term in read]
    if len({term.activation for term in done}) > 1:
        raise AdapterError(
            "some of what is to be summed goes through an activation and the rest through another or none (LoReFT with "
            f"an activation is such a sum by itself); a direft edit has one activation for all of it. {_AT_ONCE}"
        )
    rows, bias, basis = (torch.cat([getattr(term, name) for term in done]) for name in ("rows", "bias", "basis"))
    return Term(rows, bias, basis, done[0].activation)


def _after(done: Sequence[Term], term: Term) -> Term:
    """A term that reads what earlier ones, functions of h, wrote: as a function of h."""
    rows, bias = term.rows, term.bias
    for earlier in done:
        mix = term.rows @ earlier.basis.mT
        if earlier.activation is not None and bool(mix.any()):
            raise AdapterError(
                "an adapter with an activation comes before one that reads the hidden state: what the second reads is "
                f"no longer linear in it. Put it last, sum them in parallel, or: {_AT_ONCE}"
            )
        rows, bias = rows + mix @ earlier.rows, bias + mix @ earlier.bias
    return term._replace(rows=rows, bias=bias)


def _config(
    first: ReftConfig, adapters: Sequence[SavedAdapter], tied: bool, rank: int, terms: Sequence[Term], modules: int
) -> ReftConfig:
    used = {term.activation for term in terms}
    if len(used) > 1:
        raise AdapterError(f"the layers need different activations, and one adapter has one. {_AT_ONCE}")
    return ReftConfig(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        inference_mode=True,
        method="direft",
        r=rank,
        positions=first.positions,
        edit_turns=first.edit_turns,
        layers=_layers([adapter.config.layers for adapter in adapters], modules),
        site=first.site,
        tied=tied,
        activation=next((name for name, function in ACTIVATIONS.items() if function in used), None),
    )


def _layers(own: Sequence[Any], modules: int) -> Any:
    """The layers of all together, of which there are as many as edited modules."""
    if "all" in own:
        return "all"
    layers = sorted({layer for layers in own for layer in layers})
    if len(layers) != modules:
        raise AdapterError(
            f"layers {list(own)}: the same blocks counted from both ends; train with them written alike."
        )
    return layers


def _padded(term: Term, rank: int) -> dict[str, Tensor]:
    """A `direft` edit of that rank: rows of zeros change nothing."""
    tensors = {"projection": term.basis, "weight": term.rows, "bias": term.bias}
    return {
        name: torch.cat([t, t.new_zeros(rank - len(t), *t.shape[1:])]).float().contiguous()
        for name, t in tensors.items()
    }
