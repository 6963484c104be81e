"""Base models and tokenizers by local folder or Hub name, with an error that says which could not be had."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging
from transformers.utils.hub import cached_file

from trimtab.adapter.readout import set_pool
from trimtab.errors import MemoryFull, ModelError
from trimtab.tasks import Head
from trimtab.tasks.tokens import Collator


@dataclass(frozen=True)
class ModelSource:
    """Where a base model comes from, and how it is loaded."""

    name: str
    """A local folder or a Hub name."""
    dtype: str = "auto"
    attention: str = "auto"


class Loaded(NamedTuple):
    """A model for a task."""

    model: nn.Module
    new: list[str]
    """The modules without pretrained weights, trained with any adapter."""


def identity_of(source: ModelSource) -> tuple[ModelSource, str | None]:
    """What tells a model apart, also from one that its folder held before."""
    return source, hash_of_model(source)


def hash_of_model(source: ModelSource) -> str | None:
    """Of a local model's files; None of one from the Hub."""
    kinds = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
    files = sorted(f for f in Path(source.name).glob("*") if f.suffix in kinds)
    return _hash_of(tuple((f, f.stat().st_mtime_ns) for f in files)) if files else None


@cache
def _hash_of(files: tuple[tuple[Path, int], ...]) -> str:
    """Of files of some age, names and contents."""
    whole = hashlib.sha256()
    for file, _ in files:
        with file.open("rb") as opened:
            whole.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()} ".encode())
    return whole.hexdigest()[:16]


class Base:
    """The frozen model and its tokenizer; loaded once for all tasks that need no new head, and for each that does.

    Raises:
        ModelError: there is no such tokenizer.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source, self.identity = source, identity_of(source)
        self.tokenizer = load_tokenizer(source.name)
        self._shared: dict[str, nn.Module] = {}

    def load(self, head: Head, seed: int) -> Loaded:
        """The model with such a head.

        Args:
            seed: of what is new in it.
        Raises:
            ModelError: it cannot be loaded, or none of its weights fit.
        """
        if head.is_new:
            return self._with_new_head(head, seed)
        if head.auto not in self._shared:
            self._shared[head.auto] = load_model(self.source, getattr(transformers, head.auto))
        return Loaded(self._shared[head.auto], [])

    def _with_new_head(self, head: Head, seed: int) -> Loaded:
        name = self.source.name
        with loading(name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **head.config)
            config.pad_token_id = Collator(self.tokenizer).pad_id  # by which a decoder's head finds the last token
            set_seed(seed)
            how = {"dtype": as_dtype(self.source.dtype), "attn_implementation": as_attention(self.source.attention)}
            model, new = _with_head(name, head, config, **how)
        try:
            set_pool(model, pool_for(head, name))
        except ValueError as error:
            raise ModelError(str(error)) from None
        return Loaded(_placed(model, name), new)


def _with_head(name: str, head: Head, config: Any, **how: Any) -> Loaded:
    auto: Any = getattr(transformers, head.auto)
    how |= {"config": config, "output_loading_info": True, "trust_remote_code": False}
    model, info = auto.from_pretrained(name, **how)
    new = heads_of(model, info["missing_keys"])
    if model.base_model_prefix in new:
        raise ModelError(f"cannot load the model {name!r}: none of its weights fit a {type(model).__name__}")
    return Loaded(model, new)


def new_modules(name: str, head: Head) -> list[str]:
    """The modules without pretrained weights of a model with such a head, which takes no memory. Raises ModelError."""
    if not head.is_new:
        return []
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **head.config)
        return _with_head(name, head, config, device_map="meta").new


def pool_for(head: Head, name: str) -> str:
    """Which tokens such a head reads on this model.

    Raises:
        ModelError: sentence-transformers' files say something that there is no word for here.
    """
    if head.pool is not None:
        return head.pool
    modules = _json_of(name, "modules.json") or []
    folder = next((one["path"] for one in modules if str(one.get("type")).endswith(".Pooling")), None)
    said = _json_of(name, f"{folder}/config.json") if folder is not None else None
    if said is None:
        return "model"
    modes = said.get("pooling_mode") or [key for key, on in said.items() if key.startswith("pooling_mode_") and on]
    found = [POOLING_MODES.get(mode) for mode in ([modes] if isinstance(modes, str) else modes)]
    if len(found) != 1 or found[0] is None:
        raise ModelError(f"{name}: {folder}/config.json pools by {modes}; give pool: mean, first, last or model")
    return found[0]


POOLING_MODES = {
    **dict.fromkeys(("mean", "pooling_mode_mean_tokens"), "mean"),
    **dict.fromkeys(("cls", "pooling_mode_cls_token"), "first"),
    **dict.fromkeys(("lasttoken", "pooling_mode_lasttoken"), "last"),
}
"""sentence-transformers' words."""


def _json_of(name: str, file: str) -> Any:
    """What a file of a model's folder or Hub repository holds; None where there is none."""
    with loading(name):
        path = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Around a `from_pretrained` of `name`, with `trust_remote_code=False`: unset, transformers asks on the terminal.

    Raises:
        ModelError: instead of what transformers raises for a damaged folder, a name known neither here nor there, one
            that brings code, or a package that is not there.
    """
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"cannot load the model {name!r}: {reason} Install it, or set attention: auto") from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"cannot load the model {name!r}: it brings code of its own (auto_map in its files), which was not run "
                "and never is. Use a model that transformers knows, or load this one in Python and wrap it yourself."
            ) from None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = (
            "are its config.json, weights and tokenizer files there and whole?"
            if Path(name).is_dir()
            else f"{name} is a file; name the folder of a model, and files of rows with --task."
            if Path(name).is_file()
            else f"there is no such folder in {Path.cwd()}; on the Hub, check name and network."
        )
        raise ModelError(f"cannot load the model {name!r}: {remedy}\n{reason}") from error


@contextmanager
def fitting(what: str, remedy: str) -> Iterator[None]:
    """Raises MemoryFull, saying so, where memory does not hold `what`, the GPU's or the machine's."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        whose = "the GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        raise MemoryFull(f"{what} does not fit into {whose}; {remedy}") from None


def skeleton(name: str, head: Head, attention: str = "auto") -> nn.Module:
    """The model with such a head, without its weights and in no memory. Raises ModelError."""
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **head.config)
        with torch.device("meta"):
            how = {"attn_implementation": as_attention(attention), "trust_remote_code": False}
            model: nn.Module = getattr(transformers, head.auto).from_config(config, **how)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises ModelError."""
    with loading(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return tokenizer


def load_model(source: ModelSource, auto: Any = AutoModelForCausalLM) -> Any:
    """The model on the device there is, in the source's dtype ("auto": as its weights are). Raises ModelError."""
    with loading(source.name):
        model: Any = auto.from_pretrained(
            source.name,
            dtype=as_dtype(source.dtype),
            attn_implementation=as_attention(source.attention),
            trust_remote_code=False,
        )
    return _placed(model, source.name)


def _placed(model: Any, name: str) -> Any:
    """The model on the device. Raises MemoryFull."""
    with fitting(f"the model {name!r}", "set dtype: bfloat16, or take a smaller model"):
        return model.to(device())


PEFT_HEADS = ("classifier", "score")
"""Top modules that PEFT trains and saves with any adapter of a classifier."""


def heads_of(model: Any, missing: Collection[str]) -> list[str]:
    """What of a classifier is trained with any adapter: the modules without pretrained weights, and what PEFT takes for
    them.

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


def is_in(parameter: str, modules: Collection[str]) -> bool:
    """Whether a parameter, by its name in an adapted model, is of one of the base model's modules."""
    return any(f".{module}." in f".{parameter}" for module in modules)


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
