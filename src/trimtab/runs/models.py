"""Base models and tokenizers by local folder or Hub name, with an error that says which could not be had."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging


class ModelError(ValueError):
    """A base model that cannot be loaded. The message names it and says what to check."""


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Around a `from_pretrained` of `name`.

    Raises:
        ModelError: instead of what transformers raises for a damaged folder, or a name known neither here nor there.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = (
            "are its config.json, weights and tokenizer files there and whole?"
            if Path(name).is_dir()
            else "it is no local folder; on the Hub, check name and network."
        )
        raise ModelError(f"cannot load the model {name!r}: {remedy}\n{reason}") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises ModelError."""
    with loading(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        return tokenizer


def load_causal_lm(name: str, dtype: str = "auto", attention: str = "auto") -> Any:
    """The model on the device there is, in `dtype` ("auto": as its weights are stored). Raises ModelError."""
    with loading(name):
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=as_dtype(dtype), attn_implementation=as_attention(attention)
        )
    return model.to(device())


PEFT_HEADS = ("classifier", "score")
"""Top modules that PEFT trains and saves with any adapter of a classifier."""


def heads_of(model: Any, missing: Collection[str]) -> list[str]:
    """What of a classifier is trained with any adapter: the highest modules all new to it, and what PEFT takes for it.

    Args:
        missing: names of the parameters that no weights were loaded for.
    """
    found: list[str] = [name for name, _ in model.named_children() if name in PEFT_HEADS]
    for name, module in model.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        if (
            name
            and own
            and all(one in missing for one in own)
            and not any(f"{name}.".startswith(f"{f}.") for f in found)
        ):
            found.append(name)
    return found


def heads_beyond_peft(heads: Sequence[str]) -> list[str]:
    """Those that a config must name as `modules_to_save`; with all of them, since PEFT matches names by their ends."""
    return list(heads) if set(heads) - set(PEFT_HEADS) else []


def as_dtype(name: str) -> Any:
    """A recipe's `dtype:` as `from_pretrained` takes it."""
    return "auto" if name == "auto" else getattr(torch, name)


def as_attention(name: str) -> str | None:
    """A recipe's `attention:` as `from_pretrained` takes it."""
    return None if name == "auto" else name


def quiet() -> None:
    """No notes, bars or warnings of coming changes from the libraries underneath: what a command prints is ours."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
