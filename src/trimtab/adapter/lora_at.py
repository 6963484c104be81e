"""A LoRA at chosen tokens: PEFT's own LoRA layers, of which all other tokens see the frozen weights alone.

    get_peft_model(base, LoraAtConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", positions="f7+l7"))

The tokens are those that the same `positions` of a `ReftConfig` edit, told in the same way. It is a PEFT method of its
own, LORA_AT, whose tensors have names of their own, so that no program which reads LoRAs takes one of these for a LoRA
of every token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn, cast, get_args

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.adapter.config import LORA_AT, REQUIRES, OwnFiles
from trimtab.adapter.forward import Edits, Made, Same
from trimtab.adapter.joint import FIELDS, loras
from trimtab.adapter.loading import check_reloaded, take_over_loading
from trimtab.adapter.running import Forwards
from trimtab.adapter.tuner import OUTSIDE
from trimtab.edits.base import written
from trimtab.where.positions import Positions, Turns, parse_positions
from trimtab.where.sites import find_blocks

_TAKES = {*FIELDS, "modules_to_save", "init_lora_weights", "layers_pattern", "lora_bias", "fan_in_fan_out"}
"""Of `LoraConfig`, fields under which a token's change is B A x of the LoRA's own tensors; in some others of PEFT's
methods it is not, or the frozen weights change too."""
_STARTS = (True, False, "gaussian", "orthogonal")
_OF_PEFT = {one.name for one in fields(PeftConfig)}
_NOT_MERGED = (
    "a LoRA at some tokens only is no change of the weights, so it is not merged into them, nor with another one. "
    "Keep it beside the base model."
)
_NAMES = (".lora_A", ".lora_at_A"), (".lora_B", ".lora_at_B")
"""A tensor's name in the model, and in a file."""


@dataclass
class LoraAtConfig(OwnFiles, LoraConfig):
    """Configuration of a LoRA that acts at chosen tokens.

    Takes the fields of `peft.LoraConfig` that change the LoRA alone: rank, alpha, dropout, targets, patterns, rslora.
    `target_modules="all-linear"` are those within the blocks, since a pooler behind them has no tokens.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    positions: str = field(default="f7+l7", metadata={"help": "Changed tokens, as in ReftConfig."})
    edit_turns: Turns = field(default="each", metadata={"help": "What the prompt is in a conversation, as there."})
    requires: str = field(default=REQUIRES, metadata={"help": "For people who open the file."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type, self.requires = LORA_AT, REQUIRES
        parse_positions(self.positions)
        if self.edit_turns not in get_args(Turns):
            raise ValueError(f"edit_turns={self.edit_turns!r}: must be one of {', '.join(get_args(Turns))}.")
        if self.init_lora_weights not in _STARTS:
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r}: must be one of {_STARTS}.")
        usual = LoraConfig()
        for name in {one.name for one in fields(LoraConfig)} - _TAKES - _OF_PEFT:
            if (value := getattr(self, name)) != getattr(usual, name):
                raise ValueError(f"{name}={value!r}: does not go with positions, which only plain LoRA layers have.")

    @property
    def parsed_positions(self) -> Positions:
        return replace(parse_positions(self.positions), turns=self.edit_turns)


class LoraAtModel(LoraModel):
    """Puts such LoRAs on a model; what `PeftModel.base_model` is for them."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, and then each layer is held to its tokens.

        Raises:
            ValueError: an encoder-decoder, or a layer that is not linear.
        """
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError("positions: an encoder-decoder's attention reads two texts, so which is meant is unknown.")
        config = cast(LoraAtConfig, self.peft_config[adapter_name])
        if config.target_modules == "all-linear":
            config.target_modules = sorted(_linears_in_blocks(model))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        found = loras(model, adapter_name)
        others = [
            n for n, one in found.items() if not isinstance(dict(one.lora_A.items()).get(adapter_name), nn.Linear)
        ]
        if others:
            self.delete_adapter(adapter_name)
            if not self.peft_config:
                super().unload()
            raise ValueError(f"target_modules: {others[0]} is no linear layer, as a LoRA at positions needs.")
        forwards = Forwards.of(model)
        for name, layer in found.items():
            held = vars(layer).get("forward")
            if held is None:
                held = vars(layer)["forward"] = _Held(name, layer, forwards)
                forwards.guests += 1
                forwards.editors.append(held.edits)
            held.positions[adapter_name] = config.parsed_positions
        take_over_loading(model)

    def unload(self) -> Any:
        """The base model as it was."""
        forwards, count = Forwards.of(self.model), len(loras(self.model))
        held = [vars(layer).get("forward") for layer in loras(self.model).values()]
        base = super().unload()
        forwards.guests -= count
        forwards.editors = [one for one in forwards.editors if getattr(one, "__self__", None) not in held]
        vars(base).pop("_load_pretrained_model", None)
        forwards.release()
        return base

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(_NOT_MERGED)

    merge_and_unload = add_weighted_adapter = merge_adapter

    # ---- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return _renamed(super()._get_adapter_state_dict(*args, **kwargs), *_NAMES)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Raises ValueError unless the file holds this adapter: PEFT alone would leave at zero what is missing."""
        check_reloaded(config, adapter_name)
        given = _renamed(state_dict, *((there, here) for here, there in _NAMES))
        plain = state_dict.keys() & given.keys()
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, given)
        own = {
            f"{name}.{kind}.{adapter_name}.weight"
            for name in loras(model, adapter_name)
            for kind in ("lora_A", "lora_B")
        }
        odd = sorted(own - set(found)) + sorted(key for key in plain if ".lora_" in key)
        if odd:
            raise ValueError(f"adapter {adapter_name!r}: the file does not fit this model and config, as in {odd[0]}.")
        return found


def _renamed(tensors: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    def name(key: str) -> str:
        for before, after in pairs:
            key = key.replace(f"{before}.", f"{after}.")
        return key

    return {name(key): tensor for key, tensor in tensors.items()}


def _linears_in_blocks(model: nn.Module) -> set[str]:
    """Their names; those of LoRA layers that are there already, but not of what these hold."""
    held = tuple(f"{name}." for name in loras(model))
    named = [one for name, block in find_blocks(model) for one in block.named_modules(prefix=name)]
    return {name for name, m in named if isinstance(m, nn.Linear | Conv1D | LoraLayer) and not name.startswith(held)}


class _Held:
    """The forward of a LoRA layer that acts at some tokens only."""

    def __init__(self, name: str, layer: LoraLayer, forwards: Forwards) -> None:
        self.name, self.layer, self.forwards = name, layer, forwards
        self.positions: dict[str, Positions] = {}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, in) -> (B, T, out)"""
        layer = self.layer
        if kwargs.pop("adapter_names", None) is not None:
            raise NotImplementedError(
                "adapter_names: a LoRA at positions is that of a whole batch; call once for each adapter."
            )
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        active, running = self.active(), self.forwards.current()
        if active and running is None:
            raise RuntimeError(OUTSIDE.format(self.name))
        for name in active:
            result = self._changed(x, result, name, running)
        return result

    def active(self) -> list[str]:
        layer = self.layer
        return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in self.positions]

    def edits(self) -> Edits:
        layer: Any = self.layer
        made = []
        for name in self.active():
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            version = (Same(down, up), written(down), written(up))
            made.append(Made(name, self.positions[name], float(layer.scaling[name]), version))
        return [made]

    def _changed(self, x: Tensor, result: Tensor, adapter: str, running: Any) -> Tensor:
        if x.dim() != 3:
            raise RuntimeError(
                f"{self.name} is given a tensor of shape {tuple(x.shape)} instead of (batch, tokens, width), so which "
                "of its rows are meant is not known. Choose other target_modules."
            )
        rows = running.rows(None, self.positions[adapter], x)
        if rows is None:
            return result
        layer, index = cast(Any, self.layer), rows.flat.reshape(-1)
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        states = layer._cast_input_dtype(x.reshape(-1, x.shape[-1]).index_select(0, index), down.weight.dtype)
        change = up(down(layer.lora_dropout[adapter](states))) * layer.scaling[adapter]
        change = torch.where(rows.valid.reshape(-1, 1), change, 0).to(result.dtype)
        changed: Tensor = result.reshape(-1, result.shape[-1]).index_add(0, index, change).view_as(result)
        return changed


register_peft_method(name="lora_at", config_cls=LoraAtConfig, model_cls=LoraAtModel, prefix=LoraModel.prefix)
