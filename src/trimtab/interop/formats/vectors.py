"""Plain steering vectors: tensors (d,) in a safetensors or `.npz` file, named by the block whose output takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from trimtab.errors import ConversionError
from trimtab.interop.base import Base, Runner, by_hand
from trimtab.interop.convert import Adapter, Format, Given, as_constant, make_adapter

_PACKED = (".safetensors", ".npz")


class Vectors(Format):
    """One file, whose tensors are named by their block (`direction.3`, `layer_3`, `3`), or one tensor (layers, d)."""

    name = "vectors"

    def recognises(self, path: Path) -> bool:
        """By its ending."""
        return path.is_file() and path.suffix in _PACKED

    def read(self, path: Path, given: Given) -> Adapter:
        """Edits that add the vectors."""
        positions = given.need("positions", "the tokens the vectors are added at, such as all, prompt or l1")
        base = given.open(None)
        unsaid = (f"positions: {positions}, as given", f"base model: {base.name}, as given")
        return constant_adapter(base, by_block(path, given, base), positions, unsaid)

    def run(self, path: Path, adapter: Adapter) -> Runner:
        """The vectors of the file, added."""
        blocks = list(adapter.indices.values())  # in the order of reading
        return add_by_hand(adapter, by_block(path, Given(layers=blocks), adapter.base))


def constant_adapter(base: Base, vectors: Mapping[int, Tensor], positions: str, unsaid: tuple[str, ...]) -> Adapter:
    """The adapter that adds a vector (d,) to the output of each of these blocks.

    Raises:
        ConversionError: they are not of the model's width.
    """
    width = base.config.get_text_config().hidden_size
    wrong = [len(vector) for vector in vectors.values() if len(vector) != width]
    if wrong:
        raise ConversionError(f"vectors of {wrong[0]} numbers; {base.name} has hidden states of {width}.")
    tensors = {(base.module_of("block", block), "edit"): as_constant(vector) for block, vector in vectors.items()}
    return make_adapter(base, "lobireft", positions, tensors, unsaid=unsaid)


def add_by_hand(adapter: Adapter, vectors: Mapping[int, Tensor]) -> Runner:
    """The base with a vector (d,) added at the output of each of these blocks."""
    base = adapter.base
    functions = {(base.module_of("block", i), "edit"): lambda h, v=v: h + v for i, v in vectors.items()}
    return by_hand(base, functions, adapter.config.parsed_positions)


def by_block(path: Path, given: Given, base: Base) -> dict[int, Tensor]:
    """The vectors (d,) of a file by block.

    Raises:
        ConversionError: names that say no block, or shapes that are no vectors.
    """
    tensors = _tensors(path)
    if len(tensors) == 1 and not re.search(r"\d", next(iter(tensors))):
        return _of_one(path, next(iter(tensors.values())), given, len(base.sites("block")))
    found: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        numbers = re.findall(r"\d+", name)
        if len(numbers) != 1 or int(numbers[0]) in found:
            raise ConversionError(
                f"{path}: {name!r} does not name one block of its own; name each tensor by its block, counted from 0, "
                "such as 'direction.3'."
            )
        if tensor.squeeze().dim() != 1:
            raise ConversionError(
                f"{path}: {name!r} has shape {tuple(tensor.shape)}; a steering vector has one dimension."
            )
        found[int(numbers[0])] = tensor.squeeze()
    return found


def _of_one(path: Path, tensor: Tensor, given: Given, blocks: int) -> dict[int, Tensor]:
    """One tensor without a block in its name: (d,) for the given layers, or (layers, d)."""
    if tensor.dim() == 1 and given.layers:
        return dict.fromkeys(given.layers, tensor)
    if tensor.dim() == 2 and len(tensor) == (len(given.layers) if given.layers else blocks):
        return dict(zip(given.layers or range(blocks), tensor, strict=True))
    raise ConversionError(
        f"{path}: one tensor of shape {tuple(tensor.shape)}, and the model has {blocks} blocks: give --layers, as many "
        "as there are rows, or one for a single vector."
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(array).float() for name, array in arrays.items()}
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except Exception as error:
        raise ConversionError(f"{path}: not a whole file of tensors ({error}).") from None
