"""An adapter's folder: checked without its base model, and described.

`adapter_config.json` says what the edits are, `adapter_model.safetensors` (or `.bin`: weights.py) holds their tensors.
Anything else is refused.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.identity import base_digest
from trimtab.adapter.joint import check_lora, is_lora
from trimtab.adapter.weights import CONFIG, WEIGHTS, check_kind, read_tensors, weights_in
from trimtab.edits import METHODS, Edit, check_dtype
from trimtab.edits.base import APART
from trimtab.errors import AdapterError
from trimtab.where.plan import Part
from trimtab.where.sites import find_sites, host

_EDIT = re.compile(r"(?:base_model\.model\.)?(.+)\.reft\.reft_(edit|prefix|suffix)\.(\w+)")


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter is, read from its folder alone."""

    config: ReftConfig
    shapes: dict[str, tuple[int, ...]]
    """Of every saved tensor, those of `modules_to_save` too."""
    bytes_on_disk: int
    edit_norms: dict[str, float]
    """By edited module (and /prefix or /suffix): the Frobenius norm of [A c], where the edit is h + A h + c."""

    extras: tuple[str, ...] = ()
    """Keys of whatever else it carries: `modules_to_save`, resized embeddings, a LoRA."""

    @property
    def base_model(self) -> str | None:
        name: str | None = self.config.base_model_name_or_path
        return name

    @property
    def parameters(self) -> int:
        """Of all that was saved."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def extra_parameters(self) -> int:
        """Those of them that are no edit's."""
        return sum(torch.Size(self.shapes[key]).numel() for key in self.extras)


Edits = dict[tuple[str, Part], dict[str, Tensor]]
"""By edited module and edit, prefix or suffix: the saved tensors of one edit."""


@dataclass(frozen=True)
class SavedAdapter:
    """A folder's config and tensors, checked against each other."""

    config: ReftConfig
    edits: Edits
    shapes: dict[str, tuple[int, ...]]
    """Of every saved tensor, those of `modules_to_save` too."""
    extras: tuple[str, ...]
    """Keys of whatever else it carries: `modules_to_save`, resized embeddings, a LoRA."""


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read an adapter's folder and check it against itself: its config, and every tensor that the config asks for.

    Raises:
        AdapterError: the folder, its config or its tensors are missing, damaged, or do not belong together.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = weights_in(folder)
    tensors = read_tensors(path)
    edits, others = sorted_edits(tensors)
    _check_others(path, config, others)
    if not edits:
        raise AdapterError(f"{path}: holds no edit (no tensor named ...reft.reft_...). Save the adapter again.")
    _check_places(path, config, list(edits))
    for (module, part), own in edits.items():
        _check_edit(f"{path}: {module}.reft.reft_{part}", config, own)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return SavedAdapter(config, edits, shapes, tuple(others))


def _check_others(path: Path, config: ReftConfig, others: Mapping[str, Tensor]) -> None:
    """Whether what a file carries beside edits is what its config says: modules trained whole, a LoRA."""
    saved_whole = [*(config.modules_to_save or []), *EMBEDDING_LAYER_NAMES]
    lora = {key: tensor for key, tensor in others.items() if is_lora(key)} if config.lora is not None else {}
    for key in others:
        if key not in lora and not any(f".{name}." in f".{key}" for name in saved_whole):
            raise AdapterError(
                f"{path}: {key} is no part of this ReFT adapter: the weights are another method's, or modules_to_save "
                "is missing from the config. Copy both files from one save."
            )
    if config.lora is not None and not lora:
        raise AdapterError(f"{path}: holds no tensor of the LoRA that its config has: {APART}")
    try:
        check_lora(f"{path}: ", lora)
        for key in others:
            if key.endswith((".weight", ".bias")):  # not a buffer, which may hold counts
                check_dtype(f"{path}: {key}", others[key])
    except ValueError as error:
        raise AdapterError(str(error)) from None


def write_adapter(
    folder: str | Path, config: ReftConfig, edits: Edits, others: Mapping[str, Tensor] | None = None
) -> None:
    """Write a folder as `save_pretrained` would; it appears whole, and only if it can be read again.

    Args:
        edits: by the name of the module that keeps the edit's parameters, and part.
        others: parameters of modules trained whole, by their names in the base.
    Raises:
        AdapterError: the config and the tensors do not belong together.
        FileExistsError: there is something at `folder` already.
    """
    tensors = {
        f"{module}.reft.reft_{part}.{name}": t for (module, part), own in edits.items() for name, t in own.items()
    }
    tensors |= others or {}
    with fresh(Path(folder)) as staging:
        config.save_pretrained(str(staging))
        whole = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, staging / WEIGHTS, {"format": "pt"})
        read_adapter(staging)


def adapter_from(
    tensors: Mapping[Any, Mapping[str, Any]], config: ReftConfig, base: nn.Module, output: str | Path
) -> ReftConfig:
    """Save tensors of one's own as an adapter, which everything that takes adapters then takes.

    Args:
        tensors: of each edited module, by its number among those of the config's site or by its name: the tensors of
            its edit as `METHODS[config.method].shapes` names them; of an untied one {"prefix": ..., "suffix": ...}.
        config: what the edits are; its `layers` follow from the tensors.
        base: the model that they are for, which is left alone.
        output: a folder that is not there yet.
    Returns:
        The config as saved.

    Examples:
        >>> config = ReftConfig(method="vector", positions="all", task_type="CAUSAL_LM")
        >>> trimtab.adapter_from({10: {"vector": v, "strength": torch.ones(1)}}, config, model, "steered")

    Raises:
        ValueError: the model has no such module, or the tensors are not those of the method.
        FileExistsError: there is something at `output` already.
    """
    sites = find_sites(base, config.site, "all")
    names: dict[nn.Module, str] = {module: name for name, module in base.named_modules()}
    numbers = {site.name: i for i, site in enumerate(sites)}
    edits: Edits = {}
    for key, own in tensors.items():
        number = numbers.get(key, -1) if isinstance(key, str) else key
        if not 0 <= number < len(sites):
            raise ValueError(f"tensors of {key!r}: the model has {', '.join(numbers)}, or 0 to {len(sites) - 1}.")
        site = sites[number]
        for part in config.edit_names():
            given = own if config.tied else own[part]
            checked = METHODS[config.method].check(f"{site.name}/{part}", given, config.r, site.width)
            edits[names[host(site.module)], part] = {name: t.detach().cpu() for name, t in checked.items()}
    saved = replace(
        config,
        layers=sorted(numbers[key] if isinstance(key, str) else key for key in tensors),
        base_model_name_or_path=config.base_model_name_or_path or getattr(base, "name_or_path", None),
        base_digest=base_digest(base) or config.base_digest,
        inference_mode=True,
    )
    write_adapter(output, saved, edits)
    return saved


def inspect_adapter(folder: str | Path) -> AdapterInfo:
    """What an adapter is.

    Raises:
        AdapterError: as `read_adapter`.
    """
    saved = read_adapter(folder)
    size = weights_in(Path(folder)).stat().st_size
    norms = {
        module if part == "edit" else f"{module}/{part}": _edit(saved.config, tensors, None).size()
        for (module, part), tensors in saved.edits.items()
    }
    return AdapterInfo(saved.config, saved.shapes, size, norms, saved.extras)


def did_you_mean(folder: Path) -> str:
    """Adapters beside a folder that are called much like it, as the end of a message."""
    beside = {path.parent.name: path.parent for path in folder.parent.glob(f"*/{CONFIG}")}
    found = [str(beside[name]) for name in difflib.get_close_matches(folder.name, beside)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def why_not_asked(folder: Path) -> str | None:
    """Why an adapter answers no prompts, by a glance at its config; None where it does, or is damaged, which is told
    when it is read."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind, task = config["peft_type"], config.get("task_type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if kind != "REFT":
        return f"it is of method {kind}, not ReFT"
    if task in (None, "CAUSAL_LM"):
        return None
    return f"it {'tags words' if task == 'TOKEN_CLS' else 'labels texts'} and does not generate"


def _read_config(folder: Path) -> ReftConfig:
    path = folder / CONFIG
    check_kind(path)
    if not path.exists():
        remedy = did_you_mean(folder) or "; give the folder that save_pretrained or train wrote."
        raise AdapterError(f"{folder}: no adapter_config.json there{remedy}")
    try:
        kind = json.loads(path.read_text())["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise AdapterError(
            f"{path}: not the JSON that PEFT writes; the file is damaged. Copy or save the adapter again."
        ) from None
    if kind != "REFT":
        raise AdapterError(
            f"{path}: an adapter of method {kind}, not ReFT; load it with PEFT alone. Beside another: trimtab show A B"
        )
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: {error}") from None
    assert isinstance(config, ReftConfig)
    return config


def sorted_edits(tensors: dict[str, Tensor]) -> tuple[Edits, dict[str, Tensor]]:
    """An adapter's tensors, edit by edit, and whatever else its file carries."""
    edits: Edits = {}
    others = {}
    for key, tensor in tensors.items():
        match = _EDIT.fullmatch(key)
        if match:
            edits.setdefault((match[1], cast(Part, match[2])), {})[match[3]] = tensor
        else:
            others[key] = tensor
    return edits, others


def _check_places(path: Path, config: ReftConfig, edits: list[tuple[str, Part]]) -> None:
    """Whether every edited module has the edits that the config asks for, and there are as many modules as it lists."""
    modules = list(dict.fromkeys(module for module, _ in edits))
    for module in modules:
        found = [part for other, part in edits if other == module]
        if sorted(found) != sorted(config.edit_names()):
            raise AdapterError(
                f"{path}: {module} has the edits {', '.join(sorted(found))}, but the config (tied {config.tied}) asks "
                f"for {' and '.join(config.edit_names())}: {APART}"
            )
    if config.layers != "all" and len(modules) != len(config.layers):
        raise AdapterError(
            f"{path}: edits {len(modules)} modules ({', '.join(modules[:3])}{', ...' if modules[3:] else ''}), but the "
            f"config lists layers {config.layers}: {APART}"
        )


def as_edit(config: ReftConfig, tensors: dict[str, Tensor]) -> Edit:
    """The edit that a config and an adapter's tensors make."""
    return _edit(config, tensors, config.activation)


def _edit(config: ReftConfig, tensors: dict[str, Tensor], activation: str | None) -> Edit:
    method = METHODS[config.method]
    edit = method(method.width_of(tensors, config.r), config.r, activation=activation, init_weights=None)
    edit.load_state_dict(tensors)
    return edit.eval()


def _check_edit(where: str, config: ReftConfig, tensors: dict[str, Tensor]) -> None:
    try:
        METHODS[config.method].check(where, tensors, config.r)
    except ValueError as error:
        raise AdapterError(str(error)) from None


@contextmanager
def fresh(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` once the block ends well; nothing is left of it otherwise.

    Raises:
        FileExistsError: there is something at `path` already.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there already; name another output, or remove it.")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    with tempfile.TemporaryDirectory(dir=there, prefix=".trimtab-") as folder:
        staging = Path(folder) / path.name
        yield staging
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(staging, path)
