"""ReFT adapters of AdapterHub's `adapters` (1.3.0): positions are in the config, the kind only half.

A saved DiReFT has NoReFT's config and tensors to the letter (`subtract_projection` is not among the fields that are
saved), and `adapters` itself loads it as a NoReFT. Which it is must be given.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from trimtab.adapter.weights import read_pickle
from trimtab.edits import ACTIVATIONS
from trimtab.errors import AdapterError, ConversionError, ModelError
from trimtab.interop.base import Base, Runner, by_hand, task_of
from trimtab.interop.convert import Adapter, Format, Given, make_adapter

_KEY = re.compile(r"(.+)\.reft_layer\.refts\.([^.]+)\.units\.(\d)\.(.+)")
Units = dict[tuple[str, str], dict[str, Tensor]]


class AdapterHub(Format):
    """A folder with `adapter_config.json` (architecture reft) and `pytorch_adapter.bin` or `adapter.safetensors`."""

    name = "adapterhub"

    def recognises(self, path: Path) -> bool:
        """By the config, which holds another `config`."""
        try:
            return isinstance(json.loads((path / "adapter_config.json").read_text()).get("config"), dict)
        except (OSError, ValueError):
            return False

    def read(self, path: Path, given: Given) -> Adapter:
        """Its edits, and a static head such as a classifier where it differs from the base's."""
        saved = json.loads((path / "adapter_config.json").read_text())
        config = saved["config"]
        if config.get("architecture") != "reft":
            raise ConversionError(f"{path}: an adapter of architecture {config.get('architecture')!r}, not reft.")
        positions = given.need("positions", "", _positions(config))
        head = _head(path)
        labels = [tensor.shape[0] for tensor in head.values() if tensor.dim() == 2]
        base = given.open(saved.get("model_name") or None, task_of(saved["model_class"]), labels[-1] if head else None)
        if base.config.model_type != saved["model_type"]:
            raise ConversionError(
                f"{path}: trained on a {saved['model_type']}, but {base.name} is a {base.config.model_type}."
            )
        method = "loreft" if config["orthogonality"] else None
        method = given.need("method", "noreft or direft: AdapterHub saves both alike", method)
        units = {key: _tensors(own) for key, own in _units(path, config, base).items()}
        return make_adapter(
            base,
            method,
            positions,
            units,
            dropout=config["dropout"],
            activation=_activation(config),
            modules=_changed(head, base),
            unsaid=(
                *([f"method: {method}, as given"] if not config["orthogonality"] else []),
                *([f"base model: {base.name}, as given"] if not saved.get("model_name") else []),
                "where a prompt ends: AdapterHub counts positions from the ends of each forward's input, trimtab from "
                "those of the prompt; and a prompt shorter than prefix and suffix is halved, not edited twice",
            ),
        )

    def run(self, path: Path, adapter: Adapter) -> Runner:
        """AdapterHub's formula on the file as it is."""
        saved = json.loads((path / "adapter_config.json").read_text())
        subtracts = adapter.config.method != "direft"
        functions = {
            key: _formula(own, subtracts, _activation(saved["config"]))
            for key, own in _units(path, saved["config"], adapter.base).items()
        }
        return by_hand(adapter.base, functions, adapter.config.parsed_positions, _head(path))


def _positions(config: dict[str, Any]) -> str:
    parts = [
        f"{end}{config[key]}" for end, key in (("f", "prefix_positions"), ("l", "suffix_positions")) if config[key]
    ]
    return "+".join(parts)


def _activation(config: dict[str, Any]) -> str | None:
    name: str | None = config["non_linearity"]
    return "silu" if name == "swish" else name


def _read(path: Path, safe: str, pickled: str) -> dict[str, Tensor]:
    """The tensors of one of the two files that `adapters` writes; a pickle is read as tensors alone."""
    if (path / safe).exists():
        return load_file(path / safe)
    if not (path / pickled).exists():
        return {}
    try:
        return read_pickle(path / pickled)
    except AdapterError as error:
        raise ConversionError(str(error)) from None


def _units(path: Path, config: dict[str, Any], base: Base) -> Units:
    """The tensors as saved, by block of the base and part."""
    if getattr(base.config, "is_encoder_decoder", False):
        raise ConversionError(f"{path}: {base.name} is an encoder-decoder, both of whose halves AdapterHub edits.")
    found: dict[int, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in _read(path, "adapter.safetensors", "pytorch_adapter.bin").items():
        match = _KEY.fullmatch(key)
        if not match:
            raise ConversionError(f"{path}: {key} is no part of a ReFT adapter.")
        block = int(re.findall(r"\d+", match[1])[-1])
        found.setdefault(block, {}).setdefault(int(match[3]), {})[match[4]] = tensor.float()
    parts = ["edit"]
    if not config["tied_weights"]:
        parts = ["prefix", "suffix"]
    one_end = [i for i, key in enumerate(("prefix_positions", "suffix_positions")) if config[key]]
    if len(parts) == 2 and len(one_end) == 1:  # the other unit is saved too, but edits nothing
        found = {block: {0: units[one_end[0]]} for block, units in found.items()}
        parts = ["edit"]
    return {
        (base.module_of("block", block), parts[unit]): own
        for block, units in sorted(found.items())
        for unit, own in units.items()
    }


def _rows(own: dict[str, Tensor]) -> Tensor:
    """The projection (r, d), which with orthogonality is a parametrization that torch has to work out."""
    if "projection.weight" in own:
        return own["projection.weight"]
    original = own["projection.parametrizations.weight.original"]
    layer = parametrizations.orthogonal(nn.Linear(original.shape[1], original.shape[0], bias=False))
    layer.load_state_dict({k.removeprefix("projection."): v for k, v in own.items() if k.startswith("projection.")})
    rows: Any = layer.weight
    return rows.detach()  # type: ignore[no-any-return]


def _tensors(own: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "projection" if "projection.weight" in own else "rotation"
    return {name: _rows(own), "weight": own["learned_source.weight"], "bias": own["learned_source.bias"]}


def _formula(own: dict[str, Tensor], subtracts: bool, activation: str | None) -> Any:
    rows, act = _rows(own), ACTIVATIONS[activation] if activation else nn.Identity()

    def edited(h: Tensor) -> Tensor:
        source = act(h @ own["learned_source.weight"].T + own["learned_source.bias"])
        return h + (source - h @ rows.T if subtracts else source) @ rows

    return edited


def _head(path: Path) -> dict[str, Tensor]:
    """The parameters of a static head, by their names in the model.

    Raises:
        ConversionError: a flexible head, which belongs to no transformers class.
    """
    tensors = _read(path, "model_head.safetensors", "pytorch_model_head.bin")
    config = json.loads((path / "head_config.json").read_text()) if (path / "head_config.json").exists() else {}
    if config.get("config"):
        raise ConversionError(
            f"{path}: a flexible head ({config['config'].get('head_type')}) of {config.get('model_class')}, which no "
            "transformers class has. Exact: the adapter without its head files, or with a static head."
        )
    return {name: tensor.float() for name, tensor in tensors.items()}


def _changed(head: dict[str, Tensor], base: Base) -> dict[str, Tensor]:
    """The head, or nothing where it is the base's own (a language model's is saved with every adapter)."""
    if not head:
        return head
    try:
        own = base.load().state_dict()
    except ModelError:
        return head
    same = all(name in own and torch.equal(own[name].cpu(), tensor) for name, tensor in head.items())
    return {} if same else head
