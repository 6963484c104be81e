"""Base models of which accelerate keeps blocks on disk or in main memory: their edits stay where the blocks run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def execution_device(block: nn.Module) -> torch.device | None:
    """Where an offloaded block runs; None if its parameters are on the meta device for another reason."""
    hooks: list[Any] = [vars(module).get("_hf_hook") for module in block.modules()]
    device = next((hook.execution_device for hook in hooks if hasattr(hook, "execution_device")), None)
    return torch.device(device) if device is not None else None


def bring_back(edit: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Undo the offloading of an edit that was just loaded.

    PEFT dispatches an offloaded model anew once an adapter is there. With blocks on disk accelerate then empties the
    edits too, but finds no values for them, since its index lists the base model's tensors alone.

    Args:
        values: of the edit's parameters, by name.
    """
    if not values or not all(parameter.is_meta for parameter in edit.parameters()):
        return
    from accelerate.hooks import remove_hook_from_module

    device = execution_device(edit)
    hooks: list[Any] = [vars(module).get("_hf_hook") for module in edit.modules()]
    for hook in hooks:
        if hook is not None:
            hook.offload = False  # or removing it looks for the values that are not there
    remove_hook_from_module(edit, recurse=True)
    edit.load_state_dict(values, assign=True)
    edit.to(device)
