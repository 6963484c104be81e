"""Control vectors in GGUF, as llama.cpp, repeng and EasySteer write and read them.

`direction.N` (d,) is added at the output of block N, counted from 0, at every token. llama.cpp refuses a file with a
`direction.0`; repeng and EasySteer take it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import ConversionError
from trimtab.interop.base import Runner
from trimtab.interop.convert import Adapter, Format, Given
from trimtab.interop.formats.vectors import add_by_hand, constant_adapter

_ARCHITECTURE = "controlvector"


class Gguf(Format):
    """One file."""

    name = "gguf"
    file = "control_vector.gguf"

    def recognises(self, path: Path) -> bool:
        """By its first bytes."""
        place = self.path_in(path) if path.is_dir() else path
        if not place.is_file():
            return False
        with place.open("rb") as file:
            return file.read(4) == b"GGUF"

    def read(self, path: Path, given: Given) -> Adapter:
        """Edits of every token, unless other positions are given."""
        base = given.open(None)
        positions = given.positions or "all"
        unsaid = (
            f"positions: {positions}{', as given' if given.positions else ', as llama.cpp and repeng apply it'}",
            f"base model: {base.name}, as given",
        )
        return constant_adapter(base, self._directions(path), positions, unsaid)

    def write(self, adapter: Adapter, path: Path, given: Given) -> list[str]:
        """Raises ConversionError unless each edit is a constant of every token at a block's output."""
        config = adapter.config
        if config.site != "block":
            raise ConversionError(
                f"site={config.site!r}: a control vector is added at a block's output. Exact: site block."
            )
        if config.parsed_positions.scope != "all":
            raise ConversionError(
                f"positions={config.positions!r}: a control vector is added at every token. Exact: positions all."
            )
        if adapter.modules:
            raise ConversionError(f"modules_to_save={config.modules_to_save}: a control vector holds no head.")
        indices = adapter.indices
        vectors = {indices[name]: vector.float() for name, vector in adapter.constants().items()}
        package = _package()
        writer = package.GGUFWriter(path, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", adapter.base.config.model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors))
        for block, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{block}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if 0 not in vectors:
            return []
        return [
            "block 0 is edited: repeng and EasySteer take its vector, but llama.cpp refuses a file with a direction.0. "
            "Exact for llama.cpp: an adapter with layers from 1 on"
        ]

    def run(self, path: Path, adapter: Adapter) -> Runner:
        """The file's vectors, added."""
        return add_by_hand(adapter, self._directions(path))

    def _directions(self, path: Path) -> dict[int, Tensor]:
        """By block, read by the gguf package; llama.cpp adds up those of one block."""
        place = self.path_in(path) if path.is_dir() else path
        found: dict[int, Tensor] = {}
        for tensor in _package().GGUFReader(place).tensors:
            kind, _, number = tensor.name.partition(".")
            if kind != "direction" or not number.isdecimal():
                raise ConversionError(f"{place}: {tensor.name!r}: a model, not a control vector (direction.N).")
            if tensor.tensor_type.name not in ("F32", "F16", "F64"):
                raise ConversionError(
                    f"{place}: {tensor.name} is quantized ({tensor.tensor_type.name}); F32 is needed."
                )
            vector = torch.from_numpy(tensor.data.copy()).float().squeeze()
            found[int(number)] = found.get(int(number), 0) + vector
        return found


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ConversionError("GGUF needs the gguf package: pip install 'trimtab[gguf]'.") from None
    return gguf
