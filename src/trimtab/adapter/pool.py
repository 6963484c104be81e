"""`AdapterPool`: thousands of adapters beside one model, a few of them in use at a time.

An adapter in the pool is one flat vector in memory, its parameters and nothing else. The model has a few slots, which
are PEFT adapters like any other; putting an adapter into a slot points the slot's parameters at the vector and moves
nothing.

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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.tuner import ReftLayer
from trimtab.edits.orthonormal import as_rotation


class _Piece(NamedTuple):
    """Where a saved tensor stands in the vector."""

    key: str
    shape: torch.Size
    start: int
    is_rotation: bool

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
        self._vectors: dict[str, Tensor] = {}
        self._resident: OrderedDict[str, str] = OrderedDict()  # adapter -> slot, the least recently used first
        self._free = [f"slot{i}" for i in range(slots)]
        self._parameters: dict[str, list[Tensor]] = {}
        for slot in self._free:
            model.add_adapter(slot, config)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, ReftLayer) and m.edits("slot0")}
        self._pieces, self.size = _layout(layers)
        for slot in self._free:
            self._parameters[slot] = [
                parameter.requires_grad_(False)
                for layer in layers.values()
                for edit in layer.edits(slot).values()
                for parameter in edit.parameters()
            ]
        self._device = self._parameters["slot0"][0].device

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
        path = Path(folder) / "adapter_model.safetensors"
        vector = torch.empty(self.size)
        try:
            with safe_open(path, framework="pt") as file:
                found = set(file.keys())
                expected = {piece.key for piece in self._pieces}
                if found != expected:
                    some = sorted(found ^ expected)[0]
                    raise ValueError(f"{path}: of another configuration or base model than the pool ({some}).")
                for piece in self._pieces:
                    piece.of(vector).copy_(_checked(path, piece, file.get_tensor(piece.key)))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}).") from None
        self._vectors[name] = vector.to(self._device)

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            KeyError: it is not in the pool.
        """
        del self._vectors[name]
        if name in self._resident:
            self._free.append(self._resident.pop(name))

    def slot(self, name: str) -> str:
        """The slot (an adapter name of the model) that holds the adapter; if none, the least recently used gets it.

        Raises:
            KeyError: it is not in the pool.
        """
        if name in self._resident:
            self._resident.move_to_end(name)
            return self._resident[name]
        vector = self._vectors[name]
        slot = self._free.pop() if self._free else self._resident.popitem(last=False)[1]
        for piece, parameter in zip(self._pieces, self._parameters[slot], strict=True):
            parameter.data = piece.of(vector)
        self._resident[name] = slot
        return slot


def _layout(layers: dict[str, ReftLayer]) -> tuple[list[_Piece], int]:
    pieces, start = [], 0
    for module, layer in layers.items():
        for part, edit in layer.edits("slot0").items():
            for name, parameter in edit.named_parameters():
                saved = name.removesuffix(".halved")
                pieces.append(_Piece(f"{module}.reft_{part}.{saved}", parameter.shape, start, saved != name))
                start += parameter.numel()
    return pieces, start


def _checked(path: Path, piece: _Piece, tensor: Tensor) -> Tensor:
    if tensor.shape != piece.shape:
        raise ValueError(f"{path}: {piece.key} has shape {tuple(tensor.shape)}; the pool needs {tuple(piece.shape)}.")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{path}: {piece.key} holds NaN or infinity.")
    return as_rotation(f"{path}: {piece.key}", tensor) / 2 if piece.is_rotation else tensor
