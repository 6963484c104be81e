"""Ways to adapt a model: ReFT, any PEFT config, parts of the model itself, or solved examples in the prompt.

way = as_way("lora", adapter)                                   # a row of WAYS
way = as_way({"mine": {"peft_type": "LORA", "r": 32}}, adapter)
model = way.build(base, task_type="CAUSAL_LM")                  # trainable, the rest of the base frozen
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Annotated, Any

import torch
from peft import PeftType, PromptLearningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import Field
from torch import nn

from trimtab.adapter.config import LORA_AT, ReftConfig
from trimtab.adapter.readout import pool_of
from trimtab.edits import METHODS
from trimtab.errors import NotPossible
from trimtab.runs.models import heads_beyond_peft
from trimtab.runs.reuse import Reuse, Store, choose_reuse
from trimtab.tasks.spec import Section
from trimtab.where.positions import Turns, parse_positions

_LINEAR = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
WAYS: dict[str, dict[str, Any]] = {
    "untuned": {"trains": "nothing"},
    "few-shot": {"trains": "nothing", "shots": 8},
    **{name: {"method": name} for name in METHODS},
    "joint": {"method": "loreft", "lora": {k: v for k, v in _LINEAR.items() if k != "peft_type"}},
    "lora": _LINEAR,
    "lora-qv": {"peft_type": "LORA", "r": 8, "lora_alpha": 16},
    "dora": {**_LINEAR, "use_dora": True},
    "rslora": {**_LINEAR, "use_rslora": True},
    "ia3": {"peft_type": "IA3"},
    "vera": {"peft_type": "VERA", "r": 64},
    "road": {"peft_type": "ROAD"},
    "beft": {"peft_type": "BEFT"},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 16},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 16},
    "bitfit": {"trains": "biases"},
    "ln": {"trains": "norms"},
    "head": {"trains": "head"},
    "full": {"trains": "everything"},
}
"""Where nothing is said of target modules, they are PEFT's own choice for the architecture (q and v for LoRA)."""
USUAL_RATES = (1e-3, 4e-3, 1.6e-2)
RATES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("LORA", LORA_AT), (5e-4, 1e-3, 2e-3, 4e-3)),
    "everything": (2e-5, 8e-5, 3.2e-4),
    **dict.fromkeys(("IA3", "VERA", "PREFIX_TUNING", "PROMPT_TUNING", "head"), (4e-3, 1.6e-2, 6.4e-2)),
}
"""Learning rates to start a search from, by `peft_type` or `trains`; `USUAL_RATES` for the others."""


class AdapterSpec(Section):
    """What `trimtab.ReftConfig` is made of; the values are checked, and said what they mean, there."""

    method: str = "loreft"
    r: int = 4
    positions: str = "f7+l7"
    layers: str | list[int] = "all"
    site: str = "block"
    tied: bool = True
    dropout: float = 0.0
    activation: Annotated[str | None, Field(examples=["relu"])] = None
    init_weights: bool | str = True
    lora: Annotated[dict[str, Any] | None, Field(examples=[{"r": 8, "target_modules": "all-linear"}])] = None


@dataclass(frozen=True)
class Way(ABC):
    """One way to adapt a model; `settings` decide all of it."""

    name: str
    settings: Mapping[str, Any]
    learning_rates: tuple[float, ...] = USUAL_RATES
    """Those that a search starts from; no part of the method."""
    first_seed: int | None = None
    """Of its trials, where it is not the experiment's; no part of the method either."""
    own_rates: bool = False
    """Whether its settings gave the learning rates."""

    trains = True
    """Whether there is anything to train."""
    shots = 0
    """Solved examples put before each prompt."""
    adds_tokens = False
    """Whether virtual tokens come before the input, so that positions in the batch are not those in the model."""
    takes_prompts = False
    """Whether the adapted model takes `prompt_lengths`."""
    leaves_base = False
    """Whether `unload` gives the base model back as it was before `build`, whatever was trained."""

    @property
    def joins(self) -> bool:
        """Whether several are trained sooner on one model, each in rows of its own, and come out as they do alone."""
        return False

    def join(self, adapted: Any, name: str, task_type: str, edit_turns: Turns = "each") -> None:
        """Put parameters of this way beside those that are there; needs `joins`. Raises NotPossible."""
        raise NotPossible(f"{self.name} is the only one on its model")

    @property
    def size_field(self) -> str | None:
        """The setting that says how many parameters there are, in equal steps; None where none does."""
        return None

    def resized(self, size: int) -> Way:
        """The same way with so many parameters a step; needs a `size_field`."""
        return replace(self, settings={**self.settings, str(self.size_field): size})

    def on_layers(self, layers: list[int], blocks: int) -> Way | None:
        """The same way on some of so many blocks alone; None where it cannot be told."""
        return None

    @abstractmethod
    def build(
        self, model: nn.Module, task_type: str, new: Sequence[str] = (), seed: int = 0, edit_turns: Turns = "each"
    ) -> nn.Module:
        """The model with this way's parameters trainable and all others frozen.

        Args:
            new: the model's modules without pretrained weights, which every way trains.
            seed: of what a method draws outside the global generator.
            edit_turns: what the prompt is in a conversation, to a way that counts in it.
        Raises:
            NotPossible: the model has no such parameters, or PEFT does not know where to put them.
        """

    def check(self) -> None:
        """Raises ValueError for a field or value that its config does not take."""
        return

    def reuse(self, model: Any, store: Store, checkpointing: bool) -> Reuse | str:
        """What of the frozen model's work need not be repeated, or why nothing."""
        return "weights below every token change"


class ReftWay(Way):
    """A ReFT adapter; the settings are `ReftConfig`'s fields."""

    takes_prompts = True
    leaves_base = True

    def on_layers(self, layers: list[int], blocks: int) -> Way:
        return replace(self, settings={**self.settings, "layers": layers})

    @property
    def size_field(self) -> str | None:
        return "r" if "r" in METHODS[self.settings["method"]].takes else None

    def config(self, task_type: str, new: Sequence[str] = (), edit_turns: Turns = "each") -> ReftConfig:
        whole = heads_beyond_peft(new) or None
        return ReftConfig(task_type=task_type, modules_to_save=whole, edit_turns=edit_turns, **self.settings)

    def check(self) -> None:
        self.config("CAUSAL_LM")

    def build(
        self, model: nn.Module, task_type: str, new: Sequence[str] = (), seed: int = 0, edit_turns: Turns = "each"
    ) -> nn.Module:
        try:
            config = self.config(task_type, new, edit_turns)
            config.pool = pool_of(model)
            adapted: nn.Module = get_peft_model(model, config)
        except ValueError as error:
            raise NotPossible(_first_line(error)) from error
        return adapted

    @property
    def joins(self) -> bool:
        """Where only the ends of prompts are edited: whole rows fill the processor by themselves, and gain nothing."""
        positions = parse_positions(self.settings["positions"])
        ends = positions.last > 0 and not positions.first
        return ends and not self.settings.get("lora") and not self.settings.get("dropout")  # drawn for a whole batch

    def join(self, adapted: Any, name: str, task_type: str, edit_turns: Turns = "each") -> None:
        try:
            config = self.config(task_type, edit_turns=edit_turns)
            config.pool = pool_of(adapted.get_base_model())
            adapted.add_adapter(name, config)
        except ValueError as error:
            raise NotPossible(_first_line(error)) from error

    def reuse(self, model: Any, store: Store, checkpointing: bool) -> Reuse | str:
        config = model.peft_config[model.active_adapter]
        if config.lora is not None:
            return super().reuse(model, store, checkpointing)
        return choose_reuse(model, config, store, checkpointing)


class PeftWay(Way):
    """Any other PEFT method; the settings are its config's fields and `peft_type`."""

    @property
    def kind(self) -> Any:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[self.settings["peft_type"]]]

    @property
    def takes_prompts(self) -> bool:  # type: ignore[override]
        return "positions" in self.settings

    @property
    def adds_tokens(self) -> bool:  # type: ignore[override]
        return issubclass(self.kind, PromptLearningConfig)

    @property
    def moves_last_token(self) -> bool:
        """Whether the model is given embeddings, in which a decoder's classifier cannot tell where a text ends."""
        return self.adds_tokens and self.settings["peft_type"] != PeftType.PREFIX_TUNING

    @property
    def size_field(self) -> str | None:
        known = [one.name for one in fields(self.kind)]
        return next((name for name in ("num_virtual_tokens", "r") if name in known), None)

    def on_layers(self, layers: list[int], blocks: int) -> Way | None:
        known = [one.name for one in fields(self.kind)]
        if "exclude_modules" not in known or "exclude_modules" in self.settings:
            return None
        others = "|".join(str(block) for block in range(blocks) if block not in layers)
        return replace(self, settings={**self.settings, "exclude_modules": rf".*\.({others})\..*"})

    def resized(self, size: int) -> Way:
        alpha, r = self.settings.get("lora_alpha"), self.settings.get("r", 8)
        strength = {} if alpha is None else {"lora_alpha": max(1, round(size * alpha / r))}  # alpha / r stays
        return replace(self, settings={**self.settings, str(self.size_field): size, **strength})

    def config(self, task_type: str, new: Sequence[str] = (), seed: int = 0, edit_turns: Turns = "each") -> Any:
        chosen = {k: v for k, v in self.settings.items() if k != "peft_type"}
        if self.takes_prompts:
            chosen["edit_turns"] = edit_turns
        try:
            config = self.kind(task_type=task_type, **chosen)
        except TypeError as error:
            raise ValueError(f"{self.name}: {self.kind.__name__}: {str(error).partition('() ')[2] or error}") from None
        if extra := heads_beyond_peft(new):
            config.modules_to_save = [*(config.modules_to_save or []), *extra]
        if task_type == "TOKEN_CLS" and getattr(config, "target_modules", None) == "all-linear":
            config.exclude_modules = [*new]  # which PEFT knows by itself of a classifier of whole texts alone
        if hasattr(config, "projection_prng_key") and "projection_prng_key" not in self.settings:
            config.projection_prng_key = seed
        return config

    def check(self) -> None:
        self.config("CAUSAL_LM")

    def build(
        self, model: nn.Module, task_type: str, new: Sequence[str] = (), seed: int = 0, edit_turns: Turns = "each"
    ) -> nn.Module:
        if self.moves_last_token and task_type == "SEQ_CLS" and hasattr(model, "score"):
            raise NotPossible("virtual tokens move the last token, which a decoder's classifier reads")
        if self.moves_last_token and task_type == "TOKEN_CLS":
            raise NotPossible("virtual tokens move the words whose tags are read")
        try:
            adapted: nn.Module = get_peft_model(model, self.config(task_type, new, seed, edit_turns))
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:  # PEFT's, of a model it lacks
            raise NotPossible(_first_line(error)) from error
        return adapted


class PartWay(Way):
    """Parts of the model itself (`trains`), or none of it, with solved examples (`shots`) in the prompt or without."""

    @property
    def trains(self) -> bool:  # type: ignore[override]
        return bool(self.settings["trains"] != "nothing")

    @property
    def shots(self) -> int:  # type: ignore[override]
        return int(self.settings.get("shots", 0))

    def build(
        self, model: nn.Module, task_type: str, new: Sequence[str] = (), seed: int = 0, edit_turns: Turns = "each"
    ) -> nn.Module:
        part = self.settings["trains"]
        if part == "head" and task_type == "CAUSAL_LM":
            raise NotPossible("a model that generates has no new head")
        names = [name for name, _ in model.named_parameters()]
        head = {name for name in names if any(name.startswith(f"{module}.") for module in new)}
        chosen = PARTS[part](model, names) - head
        if part in ("biases", "norms") and not chosen:
            raise NotPossible(f"the model has no {part}")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen or (name in head and self.trains))
            # A new head is trained as it is with any adapter; steps of the model's own weights are smaller.
            if name in chosen and parameter.dtype in (torch.bfloat16, torch.float16):
                kind = str(parameter.dtype).removeprefix("torch.")
                raise NotPossible(f"its weights are {kind}, in which small steps are lost; set dtype: float32")
        return model


def unload(adapted: Any) -> None:
    """Take an adapter off its base model."""
    adapted.base_model.unload()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _norms(model: nn.Module, names: list[str]) -> set[str]:
    """The parameters of normalisations, which are told by the name of their class."""
    norms = {name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")}
    return {name for name in names if name.rpartition(".")[0] in norms}


PARTS: dict[str, Callable[[nn.Module, list[str]], set[str]]] = {
    "nothing": lambda model, names: set(),
    "head": lambda model, names: set(),
    "biases": lambda model, names: {name for name in names if name.rpartition(".")[2] == "bias"},
    "norms": _norms,
    "everything": lambda model, names: set(names),
}
"""What `trains:` names, beside a classifier's head: which parameters of the model."""


def as_way(entry: str | Mapping[str, Mapping[str, Any]], adapter: AdapterSpec) -> Way:
    """A row of `WAYS` by name, or `{name: settings}`; ReFT settings fill up from the recipe's `adapter`.

    Raises:
        ValueError: an unknown name, PEFT type or field, or a value that its config refuses.
    """
    if isinstance(entry, str):
        if entry not in WAYS:
            near = get_close_matches(entry, WAYS)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(
                f"{entry!r} is no method; there are {', '.join(WAYS)}, and {{name: {{peft_type: …}}}}{hint}"
            )
        name, settings = entry, dict(WAYS[entry])
    elif len(entry) == 1:
        name, settings = next((n, dict(s)) for n, s in entry.items())
    else:
        raise ValueError(f"a method is a name or one {{name: settings}}, not {dict(entry)!r}")
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no name for a method: a folder of trials is called so too; leave out the /")
    way = _made(name, settings, adapter)
    way.check()
    return way


def _made(name: str, settings: dict[str, Any], adapter: AdapterSpec) -> Way:
    own, seed = settings.pop("learning_rates", None), settings.pop("seed", None)
    numbers = isinstance(own, list) and own and all(type(r) in (int, float) and r > 0 for r in own)
    if own is not None and not numbers:
        raise ValueError(f"{name}: learning_rates: {own!r} is no list of positive numbers")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise ValueError(f"{name}: seed: {seed!r} is no whole number of at least 0")
    kind = str(settings.get("peft_type", "")).upper() or settings.get("trains", "")
    rates = tuple(sorted({float(rate) for rate in own or RATES.get(kind, USUAL_RATES)}))
    if "peft_type" in settings:
        known = [t.name for t in PeftType if t in PEFT_TYPE_TO_CONFIG_MAPPING and t.name != "REFT"]
        if kind not in known:
            raise ValueError(f"{name}: peft_type {kind!r} is none of {', '.join(known)}")
        if kind in ("LORA", LORA_AT):  # PEFT's alpha of 8, whatever r is, would be another strength for each
            settings = {**settings, "lora_alpha": settings.get("lora_alpha", 2 * settings.get("r", 8))}
        if kind == LORA_AT:
            settings = {"positions": adapter.positions, **settings}
        return PeftWay(name, {**settings, "peft_type": kind}, rates, seed, own is not None)
    if "trains" in settings:
        if settings["trains"] not in PARTS:
            raise ValueError(f"{name}: trains: {settings['trains']!r} is none of {', '.join(PARTS)}")
        if more := settings.keys() - {"trains", "shots"}:
            raise ValueError(f"{name}: {sorted(more)[0]!r} does not go with trains:")
        return PartWay(name, settings, rates, seed, own is not None)
    merged = AdapterSpec.model_validate({**adapter.model_dump(), **settings})
    # A field that came later is left out where it says nothing, so that outcomes from before are found again.
    return ReftWay(name, merged.model_dump(exclude=None if merged.lora else {"lora"}), rates, seed, own is not None)


def applicable(task_type: str) -> list[str]:
    """The ways to try when a recipe names none: all but the relatives of LoReFT that differ by a term."""
    left_out = {"noreft", "consreft", "lobireft", "direft_orthonormal"}
    left_out |= {"head"} if task_type == "CAUSAL_LM" else {"few-shot"}
    names = [name for name in WAYS if name not in left_out]
    return ["loreft", *(name for name in names if name != "loreft")]  # the reference comes first
