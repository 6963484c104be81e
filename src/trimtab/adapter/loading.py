"""What a file may change: its own adapter's tensors, its `modules_to_save`, and embeddings that were resized.

Files hold R under `rotation`; parameters are called `rotation.halved` and hold half of it.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from trimtab.adapter.config import LORA_AT, REFT
from trimtab.adapter.joint import as_lora
from trimtab.adapter.weights import read_tensors, weights_in

_FROM_PRETRAINED = inspect.unwrap(PeftModel.from_pretrained).__code__
_FILE, _PARAMETER = ".rotation", ".rotation.halved"


def as_saved(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """From what parameters hold to what files hold, exactly."""
    return {
        key.removesuffix(".halved") if key.endswith(_PARAMETER) else key: t * 2 if key.endswith(_PARAMETER) else t
        for key, t in parameters.items()
    }


def check_reloaded(config: PeftConfig, adapter: str) -> None:
    """Refuse a folder of other edits than those of the adapter, already on the model, that it is loaded into.

    PEFT reads the config of an adapter that is new to the model only, and tells nobody else which folder it loads; so
    that is found in its own call. A config given to `from_pretrained` is what the caller wants.

    Raises:
        ValueError: naming the fields that differ.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not PeftModel.load_adapter.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or (frame.f_back and frame.f_back.f_code is _FROM_PRETRAINED):
        return
    folder, found = frame.f_locals["model_id"], frame.f_locals["hf_hub_download_kwargs"]
    try:
        saved = type(config).from_pretrained(folder, **found)
    except (OSError, ValueError):  # a folder of weights alone
        return
    for name in FIXED:
        own, other = (_strength(one, name) for one in (config, saved))
        if own != other:
            raise ValueError(
                f"adapter {adapter!r}: {folder} was saved with {name}={other!r}, but the adapter of that name on this "
                f"model has {name}={own!r}, which PEFT would keep. Load it under another name, or first call "
                f"model.delete_adapter({adapter!r})."
            )


STRENGTHS = ("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora")
FIXED = ("method", "positions", "edit_turns", "activation", "site", "pool", "lora", *STRENGTHS)
"""Fields that decide what weights do, by which PEFT does not go when it loads over an adapter."""


def _strength(config: Any, name: str) -> Any:
    """A field's value; of a LoRA beside edits, what decides its strength."""
    value = getattr(config, name, None)
    if name != "lora" or value is None:
        return value
    lora = as_lora(value, config.task_type)
    return {each: getattr(lora, each) for each in STRENGTHS}


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


def take_over_loading(model: Any) -> None:
    """Have transformers' `load_adapter` and `from_pretrained` read a ReFT adapter as PEFT does, with the same checks.

    They load by name whatever a file holds, the base model's own weights included.
    """
    if hasattr(model, "_load_pretrained_model") and "_load_pretrained_model" not in vars(model):
        model._load_pretrained_model = partial(_load, model._load_pretrained_model)


def _load(original: Callable[..., Any], model: Any, **kwargs: Any) -> Any:
    from transformers.utils.loading_report import LoadStateDictInfo

    adapter, config = next(reversed(model.peft_config.items()))  # which transformers has just added
    if config.peft_type not in (REFT, LORA_AT):
        return original(model=model, **kwargs)
    try:
        tensors = kwargs.get("state_dict") or read_tensors(_there(Path(kwargs["checkpoint_files"][0])))
        own = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
        set_peft_model_state_dict(model, own, adapter)
    except BaseException:
        model.delete_adapter(adapter)
        raise
    return LoadStateDictInfo(set(), set(), set(), [], {}, set()), None


def _there(path: Path) -> Path:
    """The file that transformers names, or, since of a folder it names safetensors unseen, what is there instead."""
    return path if path.exists() else weights_in(path.parent)


@contextmanager
def expect_missing(*modules: str) -> Iterator[None]:
    """Around a base model's `from_pretrained`, silences that these modules have no weights yet: the adapter has them.

    All else that transformers reports of the weights, it reports as ever.

    Examples:
        >>> with trimtab.expect_missing("score"):
        ...     base = AutoModelForSequenceClassification.from_pretrained("models/tiny-llama", num_labels=2)
    """
    logger, silenced = logging.getLogger("transformers.modeling_utils"), _Expected(modules)
    logger.addFilter(silenced)
    try:
        yield
    finally:
        logger.removeFilter(silenced)


class _Expected(logging.Filter):
    """Takes the rows of what is expected out of the table that transformers logs, and lets an empty table pass by."""

    def __init__(self, modules: Iterable[str]) -> None:
        super().__init__()
        self.row = re.compile(rf"(?:{'|'.join(map(re.escape, modules))})\..*\|.*MISSING")

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if "LOAD REPORT" not in said:
            return True
        lines = [line for line in said.splitlines() if not self.row.match(line)]
        rows = [line for line in lines if "|" in line][1:]  # behind the head
        if not any("MISSING" in row for row in rows):
            lines = [line for line in lines if "MISSING:" not in line]
        record.msg, record.args = "\n".join(lines), ()
        return bool(rows)
