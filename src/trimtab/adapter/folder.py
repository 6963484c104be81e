"""An adapter's folder: checked without its base model, and described.

`adapter_config.json` says what the edits are, `adapter_model.safetensors` holds their tensors. Anything else, above
all a pickle, is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.adapter.config import ReftConfig
from trimtab.edits import METHODS, Edit
from trimtab.edits.orthonormal import as_rotation
from trimtab.where.plan import Part

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_EDIT = re.compile(r"(?:base_model\.model\.)?(.+)\.reft\.reft_(edit|prefix|suffix)\.(\w+)")


_APART = "the two files do not belong together. Copy both from one save."


class AdapterError(ValueError):
    """A folder that is not a whole ReFT adapter. The message says which file, and what to do."""


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter is, read from its folder alone."""

    config: ReftConfig
    shapes: dict[str, tuple[int, ...]]
    """Of every saved tensor, those of `modules_to_save` too."""
    bytes_on_disk: int
    edit_norms: dict[str, float]
    """By edited module (and /prefix or /suffix): the Frobenius norm of [A c], where the edit is h + A h + c."""

    @property
    def base_model(self) -> str | None:
        name: str | None = self.config.base_model_name_or_path
        return name

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


@dataclass(frozen=True)
class SavedAdapter:
    """A folder's config and tensors, checked against each other."""

    config: ReftConfig
    edits: dict[tuple[str, Part], dict[str, Tensor]]
    """By edited module and part: the tensors by name."""
    shapes: dict[str, tuple[int, ...]]
    """Of every saved tensor, those of `modules_to_save` too."""


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read an adapter's folder and check it against itself: its config, and every tensor that the config asks for.

    Raises:
        AdapterError: the folder, its config or its tensors are missing, damaged, or do not belong together.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    edits: dict[tuple[str, Part], dict[str, Tensor]] = {}
    saved_whole = [*(config.modules_to_save or []), *EMBEDDING_LAYER_NAMES]
    for key, tensor in tensors.items():
        match = _EDIT.fullmatch(key)
        if match:
            edits.setdefault((match[1], cast(Part, match[2])), {})[match[3]] = tensor
        elif not any(f".{name}." in f".{key}" for name in saved_whole):
            raise AdapterError(
                f"{folder / WEIGHTS}: {key} is no part of this ReFT adapter: the weights are another method's, or "
                "modules_to_save is missing from the config. Copy both files from one save."
            )
    if not edits:
        raise AdapterError(
            f"{folder / WEIGHTS}: holds no edit (no tensor named ...reft.reft_...). Save the adapter again."
        )
    _check_places(folder / WEIGHTS, config, list(edits))
    for (module, part), own in edits.items():
        _check_edit(f"{folder / WEIGHTS}: {module}.reft.reft_{part}", config, own)
    return SavedAdapter(config, edits, {key: tuple(tensor.shape) for key, tensor in tensors.items()})


def inspect_adapter(folder: str | Path) -> AdapterInfo:
    """What an adapter is.

    Raises:
        AdapterError: as `read_adapter`.
    """
    saved = read_adapter(folder)
    norms = {
        module if part == "edit" else f"{module}/{part}": _edit_norm(METHODS[saved.config.method], own)
        for (module, part), own in saved.edits.items()
    }
    return AdapterInfo(saved.config, saved.shapes, (Path(folder) / WEIGHTS).stat().st_size, norms)


def _read_config(folder: Path) -> ReftConfig:
    path = folder / CONFIG
    if not path.exists():
        raise AdapterError(
            f"{folder}: no adapter_config.json there; give the folder that save_pretrained or train wrote."
        )
    try:
        kind = json.loads(path.read_text())["peft_type"]
    except (ValueError, KeyError, TypeError):
        raise AdapterError(
            f"{path}: not the JSON that PEFT writes; the file is damaged. Copy or save the adapter again."
        ) from None
    if kind != "REFT":
        raise AdapterError(f"{path}: an adapter of method {kind}, not ReFT; load it with PEFT alone.")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: {error}") from None
    assert isinstance(config, ReftConfig)
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        pickle = path.with_name("adapter_model.bin")
        if pickle.exists():
            raise AdapterError(
                f"{pickle}: a pickle, which can run code when opened; it was not opened. Ask for safetensors."
            )
        raise AdapterError(f"{path}: missing; the folder holds a config without weights. Copy the file there too.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: {_what_it_is(path)} ({error}).") from None


def _what_it_is(path: Path) -> str:
    """What a file that is no safetensors file looks like, and what to do."""
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(64)
    if start.startswith((b"\x80", b"PK")):
        return "a pickle under another name, which can run code when opened; it was not opened. Ask for safetensors"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run `git lfs pull`"
    return "not a whole safetensors file; copy or save the adapter again"


def _check_places(path: Path, config: ReftConfig, edits: list[tuple[str, Part]]) -> None:
    """Whether every edited module has the edits that the config asks for, and there are as many modules as it lists."""
    modules = list(dict.fromkeys(module for module, _ in edits))
    for module in modules:
        found = [part for other, part in edits if other == module]
        if sorted(found) != sorted(config.edit_names()):
            raise AdapterError(
                f"{path}: {module} has the edits {', '.join(sorted(found))}, but the config (tied {config.tied}) asks "
                f"for {' and '.join(config.edit_names())}: {_APART}"
            )
    if config.layers != "all" and len(modules) != len(config.layers):
        raise AdapterError(
            f"{path}: edits {len(modules)} modules ({', '.join(modules[:3])}{', ...' if modules[3:] else ''}), but the "
            f"config lists layers {config.layers}: {_APART}"
        )


def _check_edit(where: str, config: ReftConfig, tensors: dict[str, Tensor]) -> None:
    method = METHODS[config.method]
    basis = "rotation" if method.orthonormal else "projection"
    expected = {basis, "bias", *(["weight"] if method.has_weight else [])}
    if set(tensors) != expected:
        raise AdapterError(
            f"{where} holds {', '.join(sorted(tensors))}, but the config (method {config.method}) asks for "
            f"{', '.join(sorted(expected))}: {_APART}"
        )
    for name, tensor in tensors.items():
        shape = (config.r,) if name == "bias" else (config.r, *tensors[basis].shape[-1:])
        if tuple(tensor.shape) != shape:
            raise AdapterError(
                f"{where}.{name} has shape {tuple(tensor.shape)}, but the config's r={config.r} asks for "
                f"{shape}: {_APART}"
            )
        if not bool(tensor.isfinite().all()):
            raise AdapterError(
                f"{where}.{name} holds NaN or infinity: the run it comes from diverged. Use an earlier checkpoint, or "
                "train again with a lower learning rate."
            )
    if method.orthonormal:
        try:
            as_rotation(f"{where}.rotation", tensors["rotation"])
        except ValueError as error:
            raise AdapterError(str(error)) from None


def _edit_norm(method: type[Edit], tensors: dict[str, Tensor]) -> float:
    basis = tensors["rotation" if method.orthonormal else "projection"].double()
    weight = tensors["weight"].double() if method.has_weight else torch.zeros_like(basis)
    source = torch.cat([weight - basis if method.subtracts else weight, tensors["bias"].double().unsqueeze(1)], 1)
    gram = basis @ basis.mT  # |Bᵀ X|² = tr(Xᵀ B Bᵀ X), in r dimensions instead of d
    return float(torch.einsum("ik,ij,jk->", source, gram, source).clamp(min=0).sqrt())
