"""What a file may change: its own adapter's tensors, its `modules_to_save`, and embeddings that were resized.

Files hold R under `rotation`; parameters are called `rotation.halved` and hold half of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

_FILE, _PARAMETER = ".rotation", ".rotation.halved"


def as_saved(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """From what parameters hold to what files hold, exactly."""
    return {
        key.removesuffix(".halved") if key.endswith(_PARAMETER) else key: t * 2 if key.endswith(_PARAMETER) else t
        for key, t in parameters.items()
    }


def own_modules(model: nn.Module, adapter: str) -> set[str]:
    """Keys of the modules that the adapter trains whole."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in _load_map(module, adapter).values()
    }


def _load_map(wrapper: Any, adapter: str) -> dict[str, str]:
    names: dict[str, str] = wrapper.adapter_state_dict_load_map(adapter)
    return names


def resized_embeddings(model: nn.Module) -> set[str]:
    """Keys of the input and output embeddings, if their vocabulary is not the one that the model came with."""
    whole: Any = model
    base = whole.get_base_model() if hasattr(model, "get_base_model") else whole
    config: Any = getattr(base, "config", None)
    source = getattr(config, "_name_or_path", "")
    if not source or not hasattr(config, "vocab_size"):
        return set()
    try:
        original = type(config).from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return set()
    if original.vocab_size == config.vocab_size:
        return set()
    embeddings: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is each for each in embeddings)]
    return {key for key in model.state_dict() if any(key.startswith(f"{name}.") for name in names)}


def saved_twice(model: nn.Module, keys: Iterable[str]) -> set[str]:
    """Second copies of `modules_to_save`, which PEFT writes, under a name it does not read, where an embedding was
    resized."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    return {key for key in keys if any(key == f"{name}.modules_to_save.weight" for name in wrapped)}
