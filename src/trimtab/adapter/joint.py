"""A LoRA in the same adapter: `ReftConfig(lora={"r": 8})` trains, saves and loads both as one.

PEFT's own LoRA layers are put on the model under the adapter's name, before the edits are hooked, so that an edited
module may be one of them. What PEFT does to an adapter's layers it then does to both kinds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trimtab.edits.base import check_tensor

FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
)
"""Of `LoraConfig`, those that change nothing but the LoRA's own tensors, and need no more than them to be loaded."""
_KEY = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")


def as_lora(fields: Any, task_type: Any = None) -> LoraConfig:
    """The LoRA's config, of an adapter for this task.

    Raises:
        ValueError: it is no mapping of `FIELDS`, or PEFT refuses a value.
    """
    if not isinstance(fields, Mapping) or (unknown := sorted(set(fields) - set(FIELDS))):
        wrong = repr(unknown[0]) if isinstance(fields, Mapping) else repr(fields)
        raise ValueError(f"lora: {wrong}: must be a mapping of {', '.join(FIELDS)}, as peft.LoraConfig has them.")
    try:
        return LoraConfig(task_type=task_type, **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora={dict(fields)}: {error}") from None


def inject(model: nn.Module, lora: LoraConfig, adapter: str, own: bool) -> None:
    """Put LoRA layers on the model.

    Args:
        own: LoRA layers that are there already are of our adapters.
    Raises:
        ValueError: they are not, or the model has no such modules.
    """
    there = loras(model)
    if there and not own:
        raise ValueError(f"adapter {adapter!r}: lora: the model has LoRA layers of another adapter; unload it first.")
    ours = vars(model).pop("peft_config", None)  # which PEFT would add the LoRA's to
    try:
        inject_adapter_in_model(lora, model, adapter)
    finally:
        vars(model).pop("peft_config", None)
        if ours is not None:
            model.peft_config = ours


def loras(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLayer]:
    """LoRA layers, those of one adapter or all, by their names."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer for name, layer in found.items() if adapter is None or adapter in layer.r}


def lora_keys(model: nn.Module, adapter: str) -> set[str]:
    """Names of the LoRA's parameters in an adapter."""
    return {
        f"{name}.{own}"
        for name, layer in loras(model, adapter).items()
        for own, _ in cast(nn.Module, layer).named_parameters()
        if adapter in own.split(".") and not own.startswith("base_layer.")
    }


def is_lora(key: str) -> bool:
    """Whether a key of a file is that of a LoRA's tensor."""
    return bool(_KEY.search(key))


def check_lora(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for tensors that hold no finite numbers."""
    for key, tensor in tensors.items():
        check_tensor(f"{where}{key}", tensor, tuple(tensor.shape), None)


def remove(model: nn.Module) -> None:
    """Put the modules that LoRA layers stand for back in their places."""
    for name, layer in loras(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
