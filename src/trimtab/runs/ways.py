"""What `trimtab compare` trains beside LoReFT: one row a method, any PEFT config besides.

contender = as_contender("lora", adapter)                       # a row of CONTENDERS
contender = as_contender({"mine": {"peft_type": "LORA", "r": 32}}, adapter)
model = contender.build(base, task_type="CAUSAL_LM")            # trainable, the rest of the base frozen
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType, PromptLearningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from trimtab.adapter.config import ReftConfig
from trimtab.edits import METHODS
from trimtab.recipe.schema import AdapterSpec, Recipe
from trimtab.runs.models import heads_beyond_peft

_LINEAR = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
CONTENDERS: dict[str, dict[str, Any]] = {
    "untuned": {"trains": "nothing"},
    "few-shot": {"trains": "nothing", "shots": 8},
    **{name: {"method": name} for name in METHODS},
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


class NotPossible(ValueError):
    """A contender that this model or task has no place for. The message says why."""


@dataclass(frozen=True)
class Contender:
    """One way to adapt a model; `settings` decide all of it."""

    name: str
    settings: Mapping[str, Any]
    """Fields of a PEFT config with its `peft_type`, or of a `ReftConfig`, or `trains`: what of the model itself."""

    @property
    def is_reft(self) -> bool:
        return "method" in self.settings

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.settings.get("trains") != "nothing"

    @property
    def shots(self) -> int:
        """Solved examples put before each prompt."""
        return int(self.settings.get("shots", 0))

    @property
    def adds_tokens(self) -> bool:
        """Whether virtual tokens come before the input, so that positions in the batch are not those in the model."""
        kind = self.settings.get("peft_type")
        return kind is not None and issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]], PromptLearningConfig)

    @property
    def moves_last_token(self) -> bool:
        """Whether the model is given embeddings, in which a decoder's classifier cannot tell where a text ends."""
        return self.adds_tokens and self.settings["peft_type"] != PeftType.PREFIX_TUNING

    def config(self, task_type: str) -> Any:
        """The PEFT config; raises ValueError for a field or value that it does not take."""
        if self.is_reft:
            return ReftConfig(task_type=task_type, **self.settings)
        fields = {k: v for k, v in self.settings.items() if k != "peft_type"}
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[self.settings["peft_type"]]]
        try:
            return kind(task_type=task_type, **fields)
        except TypeError as error:
            raise ValueError(f"{self.name}: {kind.__name__}: {str(error).partition('() ')[2] or error}") from None

    def build(self, model: nn.Module, task_type: str, heads: Sequence[str] = (), seed: int = 0) -> nn.Module:
        """The model with this contender's parameters trainable and all others frozen.

        Args:
            heads: the model's new modules, which every contender trains.
            seed: of what a method draws outside the global generator.
        Raises:
            NotPossible: the model has no such parameters, or PEFT does not know where to put them.
        """
        if "trains" not in self.settings:
            if task_type == "SEQ_CLS" and self.moves_last_token and hasattr(model, "score"):
                raise NotPossible("virtual tokens move the last token, which a decoder's classifier reads")
            try:
                adapted: nn.Module = get_peft_model(model, self._config_for(task_type, heads, seed))
                return adapted
            except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
                raise NotPossible(str(error).strip().partition("\n")[0] or type(error).__name__) from error
        part = self.settings["trains"]
        if self.shots and task_type == "SEQ_CLS":
            raise NotPossible("a classifier takes no solved examples")
        if part == "head" and task_type != "SEQ_CLS":
            raise NotPossible("a model that generates has no new head")
        names = [name for name, _ in model.named_parameters()]
        head = {name for name in names if any(name.startswith(f"{module}.") for module in heads)}
        chosen = PARTS[part](model, names) - head
        if part in ("biases", "norms") and not chosen:
            raise NotPossible(f"the model has no {part}")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen or (name in head and self.trains))
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                kind = str(parameter.dtype).removeprefix("torch.")
                raise NotPossible(f"its weights are {kind}, in which small steps are lost; set dtype: float32")
        return model

    def _config_for(self, task_type: str, heads: Sequence[str], seed: int) -> Any:
        config = self.config(task_type)
        if extra := heads_beyond_peft(heads):
            config.modules_to_save = [*(config.modules_to_save or []), *extra]
        if hasattr(config, "projection_prng_key") and "projection_prng_key" not in self.settings:
            config.projection_prng_key = seed
        return config


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


def as_contender(entry: str | Mapping[str, Mapping[str, Any]], adapter: AdapterSpec) -> Contender:
    """A row of `CONTENDERS` by name, or `{name: settings}`; ReFT settings fill up from the recipe's `adapter`.

    Raises:
        ValueError: an unknown name, PEFT type or field, or a value that its config refuses.
    """
    if isinstance(entry, str):
        if entry not in CONTENDERS:
            raise ValueError(
                f"{entry!r} is no method; there are {', '.join(CONTENDERS)}, and {{name: {{peft_type: …}}}}"
            )
        name, settings = entry, dict(CONTENDERS[entry])
    else:
        if len(entry) != 1:
            raise ValueError(f"a method is a name or one {{name: settings}}, not {dict(entry)!r}")
        name, settings = next((n, dict(s)) for n, s in entry.items())
    if "peft_type" in settings:
        kind = str(settings["peft_type"]).upper()
        known = [t.name for t in PeftType if t in PEFT_TYPE_TO_CONFIG_MAPPING]
        if kind not in known or kind == "REFT":
            raise ValueError(f"{name}: peft_type {kind!r} is none of {', '.join(k for k in known if k != 'REFT')}")
        settings = {**settings, "peft_type": kind}
    elif "trains" in settings:
        if settings["trains"] not in PARTS:
            raise ValueError(f"{name}: trains: {settings['trains']!r} is none of {', '.join(PARTS)}")
        if more := settings.keys() - {"trains", "shots"}:
            raise ValueError(f"{name}: {sorted(more)[0]!r} does not go with trains:")
    else:
        settings = AdapterSpec.model_validate({**adapter.model_dump(), **settings}).model_dump()
    contender = Contender(name, settings)
    if "trains" not in settings:
        contender.config("CAUSAL_LM")
    return contender


def choose_contenders(
    recipe: Recipe, tasks: Sequence[str] | None = None, only: Sequence[str] | None = None
) -> dict[str, list[Contender]]:
    """What to compare for each task: the recipe's methods, or all that fit the kind of task.

    Raises:
        ValueError: a task or method that is not there.
    """
    chosen = {}
    for name in recipe.chosen(tasks):
        spec = recipe.tasks[name]
        entries = recipe.compare.methods or applicable(spec.task_type)
        found = [as_contender(entry, spec.adapter) for entry in entries]
        for method in only or ():
            if method not in (c.name for c in found):
                found.append(as_contender(method, spec.adapter))
        often, count = Counter(c.name for c in found).most_common(1)[0]
        if count > 1:
            raise ValueError(f"compare: methods: {count} are called {often!r}; give each a name of its own")
        chosen[name] = [c for c in found if not only or c.name in only]
    return chosen


def applicable(task_type: str) -> list[str]:
    """The contenders to try when a recipe names none: all but the relatives of LoReFT that differ by a term."""
    left_out = {"noreft", "consreft", "lobireft", "direft_orthonormal"}
    left_out |= {"few-shot"} if task_type == "SEQ_CLS" else {"head"}
    names = [name for name in CONTENDERS if name not in left_out]
    return ["loreft", *(name for name in names if name != "loreft")]  # the reference comes first
