"""`AdapterPool`: thousands of adapters beside one model, a few of them in use at a time.

An adapter in the pool is one flat vector in memory, its parameters and nothing else. The model has a few slots, which
are PEFT adapters like any other; putting an adapter into a slot points the slot's parameters at the vector, moves
nothing, and gives the slot a new name. So a name that was handed out means one adapter for ever: once another adapter
has the slot, the old name is unknown to the model.

    pool = AdapterPool(model, config, slots=8)
    pool.add("emoji", "adapters/emoji")                                  # reads one file
    model.generate(**three_prompts, adapter_names=[pool.slot("emoji"), pool.slot("haiku"), "__base__"])
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from trimtab.adapter.config import WEIGHTS, ReftConfig
from trimtab.adapter.folder import read_tensors, sorted_edits
from trimtab.adapter.tuner import ReftLayer
from trimtab.edits import METHODS, as_parameters


class _Piece(NamedTuple):
    """Where a parameter stands in the vector."""

    edit: tuple[str, str]
    """The edited module, and edit, prefix or suffix."""
    name: str
    shape: torch.Size
    start: int

    def of(self, vector: Tensor) -> Tensor:
        return vector[self.start : self.start + self.shape.numel()].view(self.shape)


class AdapterPool:
    """Adapters of one configuration (method, rank, positions, layers) for one model.

    Args:
        model: a model that already has a ReFT adapter.
        config: what every adapter of the pool is.
        slots: how many may be in use at a time, in one batch say.

    Raises:
        ValueError: slots is not positive.
    """

    def __init__(self, model: PeftModel, config: ReftConfig, slots: int = 8) -> None:
        if slots < 1:
            raise ValueError(f"slots={slots}: must be at least 1.")
        self._model, self._config, self._uses = model, config, 0
        self._vectors: dict[str, Tensor] = {}
        self._resident: OrderedDict[str, str] = OrderedDict()  # adapter -> slot, the least recently used first
        self._free = [f"slot{i}" for i in range(slots)]
        for slot in self._free:
            model.add_adapter(slot, config)
        self._layers = [m for m in model.modules() if isinstance(m, ReftLayer) and m.edits("slot0")]
        self._pieces, self.size = _layout(self._layers)
        self._widths = {
            (layer.site.name, part): layer.site.width for layer in self._layers for part in config.edit_names()
        }
        for slot in self._free:
            for parameter in self._parameters(slot):
                parameter.requires_grad_(False)
        self._device = self._parameters("slot0")[0].device

    def __contains__(self, name: str) -> bool:
        return name in self._vectors

    def __len__(self) -> int:
        return len(self._vectors)

    def add(self, name: str, folder: str | Path) -> None:
        """Read an adapter's file into memory.

        Raises:
            ValueError: the name is taken, or the file does not hold just the tensors of the pool's configuration.
        """
        if name in self._vectors:
            raise ValueError(f"adapter {name!r} is in the pool already; remove it first.")
        path = Path(folder) / WEIGHTS
        edits, others = sorted_edits(read_tensors(path))
        if others or set(edits) != set(self._widths):
            some = next(iter(others), None) or ".reft.reft_".join(sorted(set(edits) ^ set(self._widths))[0])
            raise ValueError(f"{path}: of another configuration or base model than the pool ({some}).")
        method, parameters = METHODS[self._config.method], {}
        for (module, part), own in edits.items():
            where = f"{path}: {module}.reft.reft_{part}"
            parameters[module, str(part)] = as_parameters(
                method.check(where, own, self._config.r, self._widths[module, part])
            )
        vector = torch.empty(self.size)
        for piece in self._pieces:
            piece.of(vector).copy_(parameters[piece.edit][piece.name])
        self._vectors[name] = vector.to(self._device)

    def remove(self, name: str) -> None:
        """Forget an adapter; the slot it was in no longer goes by the name that was handed out.

        Raises:
            KeyError: it is not in the pool.
        """
        if name in self._resident:
            self._free.append(self._renamed(self._resident[name]))
            del self._resident[name]
        del self._vectors[name]

    def slot(self, name: str) -> str:
        """The slot (an adapter name of the model) that holds the adapter; if none, the least recently used gets it.

        The name stays this adapter's, and is refused by the model once the slot is another's: so are, in one batch,
        more adapters than there are slots.

        Raises:
            KeyError: it is not in the pool.
            RuntimeError: the slot that would be given up is set as the model's active adapter.
        """
        if name in self._resident:
            self._resident.move_to_end(name)
            return self._resident[name]
        vector = self._vectors[name]
        if self._free:
            slot = self._renamed(self._free[-1])
            self._free.pop()
        else:
            oldest = next(iter(self._resident))
            slot = self._renamed(self._resident[oldest])
            del self._resident[oldest]
        for piece, parameter in zip(self._pieces, self._parameters(slot), strict=True):
            parameter.data = piece.of(vector)
        self._resident[name] = slot
        return slot

    def _parameters(self, slot: str) -> list[Tensor]:
        return [p for layer in self._layers for edit in layer.edits(slot).values() for p in edit.parameters()]

    def _renamed(self, slot: str) -> str:
        """Give the slot a name that it never had."""
        if any(slot in layer.active_adapters for layer in self._layers):
            raise RuntimeError(f"{slot} is the model's active adapter: call set_adapter with another one first.")
        self._uses += 1
        new = f"{slot.partition('-')[0]}-{self._uses}"
        for layer in self._layers:
            layer.rename(slot, new)
        self._model.peft_config[new] = self._model.peft_config.pop(slot)
        return new


def _layout(layers: list[ReftLayer]) -> tuple[list[_Piece], int]:
    pieces, start = [], 0
    for layer in layers:
        for part, edit in layer.edits("slot0").items():
            for name, parameter in edit.named_parameters():
                pieces.append(_Piece((layer.site.name, part), name, parameter.shape, start))
                start += parameter.numel()
    return pieces, start
