"""Edits of every token at the end of a projection, as a change of the projection.

Where a module's output is y = P x + p, an edit of it at every token, y + Bᵀ(A y + c), is
(P + Bᵀ A P) x + p + Bᵀ(A p + c): a LoRA with A P and Bᵀ on that projection, and a bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.errors import ConversionError
from trimtab.interop.base import logits_of, samples
from trimtab.interop.convert import Adapter


@dataclass(frozen=True)
class Change:
    """Of one projection: x (in,) -> up (down x) + bias is added to its output (out,), all in float64."""

    layer: str
    down: Tensor
    """(r, in)"""
    up: Tensor
    """(out, r)"""
    bias: Tensor
    """(out,)"""
    transposed: bool
    """Whether the layer keeps its weight as (in, out), as GPT-2's do."""


def changes_of(adapter: Adapter) -> list[Change]:
    """The adapter as a change of projections. Loads the base model, for its weights.

    Raises:
        ConversionError: it edits some tokens only, is not affine, or no linear layer gives an edited module's output.
        ModelError: the base model's weights are not at hand.
    """
    config = adapter.config
    if config.parsed_positions.scope != "all":
        raise ConversionError(
            f"positions={config.positions!r}: no change of weights equals an edit at some tokens only. Exact: "
            "positions all, at site mlp or attention, without activation."
        )
    forms = adapter.affine()
    model = adapter.base.load()
    layers = _last_layers(adapter, model)
    changes = []
    for (module, _), (basis, reads, constant) in forms.items():
        layer = model.get_submodule(layers[module])
        if not layer.weight.is_floating_point():
            raise ConversionError(f"{layers[module]} is quantized: give --base the model in floating point.")
        weight = layer.weight.detach().cpu().double()
        transposed = isinstance(layer, Conv1D)
        weight = weight.T if transposed else weight
        bias = basis.mT @ constant
        if layer.bias is not None:
            bias = bias + basis.mT @ (reads @ layer.bias.detach().cpu().double())
        changes.append(Change(layers[module], reads @ weight, basis.mT.contiguous(), bias, transposed))
    return changes


def _last_layers(adapter: Adapter, model: Any) -> dict[str, str]:
    """By edited module the linear layer whose output is the module's, bit for bit, in a forward of the model.

    Raises:
        ConversionError: there is none, or it runs more than once.
    """
    modules = dict.fromkeys(name for name, _ in adapter.edits)
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs.setdefault(name, []).append(output if isinstance(output, Tensor) else output[0])

        return hook

    candidates = {module: [n for n, _ in linear if n == module or n.startswith(f"{module}.")] for module in modules}
    watched = dict.fromkeys([*modules, *(name for names in candidates.values() for name in names)])
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in watched]
    try:
        logits_of(model, samples(adapter.base, 1, 1)[0][0])
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for module in modules:
        last = [name for name in candidates[module] if _same(outputs.get(name, []), outputs[module])]
        if not last:
            raise ConversionError(
                f"site={adapter.config.site!r}: the output of {module} ({type(model.get_submodule(module)).__name__}) "
                "is not a linear layer's own: experts, a norm or a residual sum follow. Exact: a site that ends with "
                "its projection, such as mlp or attention of a Llama."
            )
        found[module] = last[-1]
    if len({id(model.get_submodule(name)) for name in found.values()}) < len(found):
        raise ConversionError(
            f"{adapter.base.name}: its blocks share one projection, so a change would reach all of them."
        )
    return found


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) == 1 and found[0].shape == wanted[0].shape and torch.equal(found[0], wanted[0])
