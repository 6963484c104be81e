"""What two adapters' configurations say, field by field: each field of one beside what it corresponds to in the other.

A method that can be set beside another is one class that answers for all of `FIELDS` and one row of `METHODS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.joint import as_lora
from trimtab.edits import METHODS as EDITS

FIELDS = {
    "method": "method",
    "rank": "rank",
    "where": "what is changed",
    "layers": "layers",
    "tokens": "tokens",
    "turns": "in a conversation",
    "parts": "prefix and suffix",
    "scale": "scale",
    "dropout": "dropout",
    "bias": "bias",
    "activation": "activation",
    "start": "start",
    "whole": "trained whole",
    "task": "task type",
    "pool": "classifier reads",
    "weights": "as weights",
    "beside": "trained with it",
}
"""What every method answers for, in the order it is shown in, and what it is called there."""
_OF_PEFT = {field.name for field in fields(PeftConfig)} | {"requires", "base_digest", "runtime_config"}
"""Of a file and its making, not of what the adapter does."""


@dataclass(frozen=True)
class Setting:
    """One line: a field, and what each of the two says of it."""

    name: str
    values: tuple[str, str]


class Settings(ABC):
    """What one adapter's configuration says."""

    answered: ClassVar[frozenset[str]]
    """The fields of the configuration that `said` covers."""
    takes_prompts = False
    """Whether the adapted model takes `prompt_lengths`."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def said(self) -> dict[str, str]:
        """In words, for each of `FIELDS`."""

    def others(self) -> dict[str, str]:
        """Fields that are not as the method has them by default, of those that `said` does not cover."""
        found = {}
        for field in fields(self.config):
            usual = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(self.config, field.name)
            if field.name not in self.answered | _OF_PEFT and value != usual and (value or usual):
                found[field.name] = _text(value)
        return found


class ReftSettings(Settings):
    """Of a ReFT adapter."""

    takes_prompts = True
    config: ReftConfig
    answered = frozenset(
        [
            "method",
            "r",
            "positions",
            "edit_turns",
            "layers",
            "site",
            "tied",
            "dropout",
            "activation",
            "init_weights",
            "modules_to_save",
            "lora",
            "pool",
        ]
    )

    def said(self) -> dict[str, str]:
        config, edit = self.config, EDITS[self.config.method]
        formula = " ".join((edit.__doc__ or "").split()).partition(": ")[0].partition(", ")[0].rstrip(".")
        where = config.parsed_positions
        return {
            "method": f"{config.method}: h becomes {formula}",
            "rank": f"{config.r}, of the edit of a hidden state" if config.r is not None else "the method has none",
            "where": "hidden states: "
            + ("what each block returns (site block)" if config.site == "block" else f"site {config.site}"),
            "layers": _text(config.layers),
            "tokens": where.words if where.scope else f"{where.words} ({config.positions})",
            "turns": "each answer's prompt" if config.edit_turns == "each" else "the first answer's prompt",
            "parts": "share one edit" if config.tied else "an edit each",
            "scale": "1, until trimtab.set_scale",
            "dropout": f"{config.dropout:g}, on the edit",
            "bias": "b, in every edit" if "bias" in edit.shapes(8, 1) else "none",
            "activation": config.activation or "none",
            "start": "changes nothing" if config.init_weights is True else "random, as pyreft's",
            "whole": _text(config.modules_to_save),
            "task": _text(config.task_type),
            "pool": "as the architecture does" if config.pool in (None, "model") else config.pool,
            "weights": _as_weights(config),
            "beside": f"a LoRA of rank {as_lora(config.lora).r}" if config.lora is not None else "nothing",
        }


def _as_weights(config: ReftConfig) -> str:
    if config.parsed_positions.scope != "all":
        return "cannot be merged: weights act on every token"
    if config.site not in ("attention", "mlp") or config.activation is not None:
        return "cannot be merged: no linear edit of attention or mlp"
    return "can be merged: trimtab merge"


class LoraSettings(Settings):
    """Of a LoRA."""

    config: LoraConfig
    answered = frozenset(
        [
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "rank_pattern",
            "alpha_pattern",
            "bias",
            "lora_bias",
            "use_rslora",
            "use_dora",
            "init_lora_weights",
            "modules_to_save",
        ]
    )

    def said(self) -> dict[str, str]:
        config, own = self.config, len(self.config.rank_pattern or {})
        root = "√r" if config.use_rslora else "r"
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        biases = {"none": "none", "all": "the model's own, trained", "lora_only": "the changed layers' own, trained"}
        return {
            "method": f"{'DoRA' if config.use_dora else 'LoRA'}: W becomes W + (α/{root}) B A",
            "rank": f"{config.r}, of the change of a weight" + (f"; {own} modules have their own" if own else ""),
            "where": f"weights: target_modules {_text(config.target_modules)}"
            + (f", without {_text(config.exclude_modules)}" if config.exclude_modules else ""),
            "layers": "all that have them" if config.layers_to_transform is None else _text(config.layers_to_transform),
            "tokens": "every token",
            "turns": "no such setting: every turn",
            "parts": "no such setting: all tokens alike",
            "scale": f"α/{root} = {config.lora_alpha}/{root.replace('r', str(config.r))} = {scale:.3g}"
            + (f"; {len(config.alpha_pattern)} modules have their own α" if config.alpha_pattern else ""),
            "dropout": f"{config.lora_dropout:g}, on what a changed module is given",
            "bias": biases[config.bias] + (", and one of B's" if config.lora_bias else ""),
            "activation": "no such setting: linear",
            "start": "changes nothing"
            if config.init_lora_weights in (True, "gaussian", "orthogonal")
            else _text(config.init_lora_weights),
            "whole": _text(config.modules_to_save),
            "task": _text(config.task_type),
            "pool": "as the architecture does",
            "weights": "can be merged: PEFT's merge_and_unload",
            "beside": "nothing",
        }


METHODS: dict[str, type[Settings]] = {"REFT": ReftSettings, "LORA": LoraSettings}
"""By `peft_type`."""


def side_by_side(a: Settings, b: Settings) -> list[Setting]:
    """Every field, with what both say; where one method has no such field, that."""
    said, others = (a.said(), b.said()), (a.others(), b.others())
    lines = [Setting(title, (said[0][name], said[1][name])) for name, title in FIELDS.items()]
    for name in dict.fromkeys([*others[0], *others[1]]):
        values = [own.get(name, _unset(side, name)) for own, side in zip(others, (a, b), strict=True)]
        lines.append(Setting(name, (values[0], values[1])))
    return lines


def _unset(side: Settings, name: str) -> str:
    return _text(getattr(side.config, name)) if hasattr(side.config, name) else "no such setting"


def _text(value: Any) -> str:
    """A field's value, for people."""
    if isinstance(value, Sequence | set) and not isinstance(value, str):
        return ", ".join(map(str, sorted(value, key=str) if isinstance(value, set) else value))
    return "nothing" if value is None else str(getattr(value, "value", value))
