"""The PEFT tuner: edits hooked onto the blocks of a frozen model. The only file that registers hooks.

Each edited block gets a submodule `reft` that holds the adapters' parameters, and one forward hook. No module of the
base model is replaced, and no hook of anyone else is touched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TaskType
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.forward import (
    BASE,
    Pass,
    Passes,
    Prompt,
    as_lengths,
    as_real,
    find_packed,
    first_supervised,
    named_arguments,
    past_length,
)
from trimtab.edits import METHODS, Edit
from trimtab.edits.orthonormal import restore
from trimtab.where.positions import Positions
from trimtab.where.sites import Site, find_sites, host

_NO_MERGE = (
    "a ReFT adapter is not merged in place: an edit of hidden states at some tokens only is no change of the weights. "
    "Keep the adapter beside the base model; it costs nothing while decoding when only the prompt is edited. A saved "
    "one that edits every token (positions='all') at mlp or attention can be: `trimtab merge ADAPTER OUTPUT`."
)


class ReftLayer(nn.Module, BaseTunerLayer):
    """The edits of one block, by adapter name: `reft_edit` where tied, else `reft_prefix` and `reft_suffix`."""

    adapter_layer_names = ("reft_edit", "reft_prefix", "reft_suffix")
    other_param_names = ("positions", "scaling")

    def __init__(self, site: Site, passes: Passes) -> None:
        super().__init__()
        self._site = (site,)  # in a tuple, so that the block is not registered as a child of its own child
        self._passes = passes
        self.reft_edit, self.reft_prefix, self.reft_suffix = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.positions: dict[str, Positions] = {}
        self.scaling: dict[str, float] = {}
        self._active_adapter: list[str] = []
        self.hook = site.module.register_forward_hook(self._edit_output)

    @property
    def site(self) -> Site:
        return self._site[0]

    @property
    def base_layer(self) -> nn.Module:
        return self.site.module

    def add(self, adapter: str, config: ReftConfig) -> None:
        """Create the adapter's edits for this block, on the block's device."""
        for name in config.edit_names():
            with warnings.catch_warnings():
                if config.inference_mode:  # how an adapter starts does not matter when it is about to be loaded
                    warnings.simplefilter("ignore")
                edit = METHODS[config.method](
                    self.site.width,
                    config.r,
                    dropout=config.dropout,
                    activation=config.activation,
                    init_weights=config.init_weights,
                )
            getattr(self, f"reft_{name}")[adapter] = edit
        self.positions[adapter] = config.parsed_positions
        self.scaling[adapter] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter)

    def edits(self, adapter: str) -> dict[str, Edit]:
        """The adapter's edits here, by `edit`, `prefix` or `suffix`."""
        named = {name: getattr(self, f"reft_{name}") for name in ("edit", "prefix", "suffix")}
        return {name: edits[adapter] for name, edits in named.items() if adapter in edits}

    def _edit_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook: the block's output with the rows of this pass edited; None leaves it as it is."""
        if self.disable_adapters or not self.positions:
            return None
        running = self._passes.current
        names = self.active_adapters if running is None or running.adapter_names is None else running.adapter_names
        names = [n for n in dict.fromkeys(names) if n in self.positions and self.scaling[n] != 0]
        if not names:
            return None
        if running is None:
            raise RuntimeError(
                f"{self.site.name} ran outside a forward of its model, so the tokens to edit are not known. Call the "
                "whole model; to recompute blocks in the backward pass use the model's own gradient checkpointing."
            )
        hidden = before = output if isinstance(output, Tensor) else output[0]
        for name in names:
            hidden = self._edited(hidden, name, running)
        if hidden is before:
            return None
        return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))

    def _edited(self, hidden: Tensor, adapter: str, running: Pass) -> Tensor:
        if hidden.dim() != 3 or hidden.shape[-1] != self.site.width:
            raise RuntimeError(
                f"{self.site.name} gives hidden states of shape {tuple(hidden.shape)}, but (batch, tokens, "
                f"{self.site.width}) was expected. Choose another site."
            )
        positions = self.positions[adapter]
        rows = running.rows(adapter, positions, hidden)
        if rows is None:
            return hidden
        parts = {"edit": slice(None), "prefix": slice(positions.first), "suffix": slice(positions.first, None)}
        states = hidden.reshape(-1, hidden.shape[-1])
        for name, edit in self.edits(adapter).items():
            index = rows.flat[:, parts[name]].reshape(-1)
            change = edit(states.index_select(0, index)) * self.scaling[adapter]
            change = torch.where(rows.valid[:, parts[name]].reshape(-1, 1), change, 0).to(states.dtype)
            states = states.index_add(0, index, change)
        return states.view_as(hidden)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        """The block's device; no dtype, since edits keep float32 whatever the base's."""
        own = {id(p) for p in self.parameters()}
        return next((p.device for p in base_layer.parameters() if id(p) not in own), None), None

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(_NO_MERGE)


class ReftModel(BaseTuner):
    """Puts ReFT adapters on a model; what `PeftModel.base_model` is for PEFT's own methods."""

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    # The layers share the record of running passes, so they cannot be injected into a model without this wrapper.
    uses_shared_state = True

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._sites: dict[str, Site] = {}
        self._layers: list[ReftLayer] = []
        self._passes = Passes()
        super().__init__(model, *args, **kwargs)
        self._handles = [
            handle
            for role, module in _entrances(model).items()
            for handle in (
                module.register_forward_pre_hook(partial(self._open_pass, role), with_kwargs=True, prepend=True),
                module.register_forward_hook(partial(self._close_pass, role), with_kwargs=True, always_call=True),
            )
        ]
        self._checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        if callable(getattr(model, "generate", None)):
            model.generate = partial(self._generate, model.generate)  # type: ignore[assignment, arg-type]

    # ---- placing edits -----------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._sites = self._checked_sites(model, self.peft_config[adapter_name], adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _checked_sites(self, model: nn.Module, config: Any, adapter_name: str) -> dict[str, Site]:
        """The config's sites by name; refuses what does not fit, before anything is touched."""
        if not isinstance(config, ReftConfig):
            raise ValueError(f"adapter {adapter_name!r}: expected a ReftConfig, got {type(config).__name__}.")
        if "." in adapter_name or adapter_name == BASE:
            raise ValueError(f"adapter name {adapter_name!r}: must not contain a dot nor be {BASE!r}.")
        sites = find_sites(model, config.site, config.layers)
        for site in sites:
            if config.r > site.width:
                raise ValueError(
                    f"r={config.r}: larger than the width {site.width} of {site.name}; use a rank well below it."
                )
            there = getattr(host(site.module), "reft", None)
            if there is not None and not (isinstance(there, ReftLayer) and there.site.module is site.module):
                raise ValueError(f"{site.name} already has a submodule called 'reft'; choose another site.")
        return {site.name: site for site in sites}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._sites

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Despite the name PEFT gives it, this replaces nothing: it hooks `target`."""
        place = host(target)
        layer = getattr(place, "reft", None)
        if layer is None:
            layer = ReftLayer(self._sites[current_key], self._passes)
            place.add_module("reft", layer)
            self._layers.append(layer)
        layer.add(adapter_name, peft_config)

    # ---- running -----------------------------------------------------------------------------------------------

    def _open_pass(self, role: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        passes = self._passes
        passes.open(Pass(Prompt()))  # first, so that every close has its open even if what follows raises
        lengths = kwargs.pop("prompt_lengths", None) if role in ("model", "pair") else None
        arguments = named_arguments(module, args, kwargs)
        if role in ("model", "pair"):
            if not torch.compiler.is_compiling():
                if passes.generation is None:  # which looked before its first step
                    self._upkeep()
                for checkpointing in self._checkpointing:
                    passes.bind(checkpointing)
            passes.labels, passes.prompt_lengths = arguments.get("labels"), as_lengths(lengths)
        if role == "inner" and passes.outer is not None:
            passes.replace(passes.outer)
        elif role != "pair":  # whose encoder and decoder open passes of their own
            passes.replace(self._pass(role, arguments))
        return args, kwargs

    def _close_pass(self, role: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        passes = self._passes
        closed = passes.close()
        past = _cache_in(kwargs)
        past = past if past is not None else _cache_in(vars(output) if hasattr(output, "__dict__") else {})
        if role in ("model", "decoder") and hasattr(past, "__dict__") and not hasattr(past, "_reft_prompt"):
            past._reft_prompt = closed.prompt  # later steps with this cache know where its prompt ended
        if role in ("model", "pair"):
            passes.labels = passes.prompt_lengths = None

    def _pass(self, role: str, arguments: dict[str, Any]) -> Pass:
        passes = self._passes
        past = _cache_in(arguments) if role != "encoder" else None
        start = past_length(past)
        if start == 0:
            getattr(past, "__dict__", {}).pop("_reft_prompt", None)  # a cache that was emptied begins anew
        ids = next((arguments[k] for k in ("input_ids", "inputs_embeds") if arguments.get(k) is not None), None)
        columns = start + ids.shape[1] if start is not None and isinstance(ids, Tensor) and ids.dim() >= 2 else None
        mask = arguments.get("attention_mask")
        blurred = None  # a mask over audio samples or frames, of which a hidden state covers several
        if ids is None and isinstance(mask, Tensor):
            blurred, mask = mask, None
        flat_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if flat_mask is not None and columns is not None and flat_mask.shape[1] > columns:
            flat_mask = flat_mask[:, :columns]  # Bloom's goes on over the free places of a static cache
        if passes.decoder_generation is not None and (
            role == "encoder" or (role == "decoder" and past is not None and start == 0)
        ):
            passes.decoder_generation = Prompt()  # Whisper's `generate` decodes a prompt for each segment, and others
        generation = {"encoder": None, "decoder": passes.decoder_generation}.get(role, passes.generation)
        if generation is not None and generation.awaits_mask and columns is not None:
            generation.receive_mask(columns, as_real(mask, columns))
        prompt = generation if generation is not None else getattr(past, "_reft_prompt", None) if start != 0 else None
        owner = None
        if prompt is None or (passes.prompt_lengths is not None and role != "decoder"):
            real = as_real(mask, columns)
            if start == 0 and flat_mask is None:
                owner, real = find_packed(arguments.get("position_ids")) or (None, real)
            prompt = self._prompt(role, start, Prompt(columns, real), owner)
            if role == "model" and blurred is not None and prompt.lengths is None:
                prompt.blurred = not bool(blurred.all())
        return Pass(
            prompt=prompt,
            start=start or 0,
            after_prompt=start is None or prompt.is_over(start, columns),
            mask=flat_mask if flat_mask is not None and flat_mask.shape[1] >= (columns or 0) else None,
            length=columns - (start or 0) if columns is not None else 0,
            owner=owner,
            adapter_names=passes.adapter_names,
            training=self.model.training and torch.is_grad_enabled(),
        )

    def _prompt(self, role: str, start: int | None, whole: Prompt, owner: Tensor | None) -> Prompt:
        """Where the prompt ends, if neither `generate` nor a cache knows: said outright, by labels or by the mask."""
        passes = self._passes
        lengths = passes.prompt_lengths
        if role == "encoder":
            generated = passes.generation.lengths if passes.generation is not None else None
            return Prompt(whole.width, whole.real, lengths if lengths is not None else generated)
        if lengths is not None and role != "decoder":
            if self.model.training and whole.width is not None:  # otherwise this may be the first chunk of several
                as_lengths(lengths, whole.width)
            if owner is not None and len(lengths) != len(owner):
                raise ValueError(
                    f"prompt_lengths: {len(lengths)} given, but {len(owner)} sequences are packed into this batch "
                    "(their position_ids start anew); give one a sequence."
                )
            return Prompt(None, whole.real, lengths)
        labels = passes.labels
        if self._is_lm and isinstance(labels, Tensor) and labels.dim() == 2 and start == 0:
            if role == "decoder":  # its input is a start token and then the labels
                return Prompt(whole.width, whole.real, first_supervised(labels, None) + 1)
            labels = labels if owner is None else labels[owner.to(labels.device)]
            return Prompt(whole.width, whole.real, first_supervised(labels, whole.real))
        return Prompt(whole.width, whole.real, guessed=self._is_lm, mid_sequence=start != 0)

    @property
    def _is_lm(self) -> bool:
        """Whether labels and inputs run on from a prompt to an answer, unlike those of a classifier."""
        configs = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        task = configs[0].task_type if configs else None
        if task is None:
            return bool(getattr(self.model, "can_generate", lambda: False)())
        return task in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model, which also takes `prompt_lengths` (B,) and remembers where the prompt ends."""
        self._upkeep()
        inputs = args[0] if args else kwargs.get("inputs")
        with self._passes.generating(inputs, kwargs):
            return original(*args, **kwargs)

    def _upkeep(self) -> None:
        """Retract what an optimizer, or anyone, moved off the manifold since the last pass."""
        rotations = [
            edit.rotation
            for layer in self._layers
            for name in layer.active_adapters
            for edit in layer.edits(name).values()
            if edit.orthonormal
        ]
        # Those in training by value: writes through `.data` leave no trace in the version.
        restore([r for r in rotations if r.halved.requires_grad])
        restore([r for r in rotations if r.changed()])

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around forward and generate; `adapter_names` gives each row an adapter of its own."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        unknown = sorted(set(names) - {BASE, *self.peft_config})
        if unknown:
            raise ValueError(f"adapter_names: no adapter {unknown}; there are {sorted(self.peft_config)} and {BASE!r}.")

        def pass_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "adapter_names": names}

        wrappers = [m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        handles = [m.register_forward_pre_hook(pass_names, with_kwargs=True) for m in wrappers]
        before, self._passes.adapter_names = self._passes.adapter_names, list(names)
        try:
            yield
        finally:
            self._passes.adapter_names = before
            for handle in handles:
                handle.remove()

    # ---- leaving, loading --------------------------------------------------------------------------------------

    def unload(self) -> nn.Module:
        """The base model as it was: no submodule, hook or wrapper of trimtab left on it."""
        for handle in (*self._handles, *(layer.hook for layer in self._layers)):
            handle.remove()
        for layer in self._layers:
            del host(layer.site.module).reft
        self.model.__dict__.pop("generate", None)
        for module in self._checkpointing:
            self._passes.unbind(module)
        for module in list(self.model.modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                name = next(n for n, m in self.model.named_modules() if m is module)
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        model: nn.Module = self.model
        return model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(_NO_MERGE)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(_NO_MERGE)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's renaming, and a check that the file holds this adapter: all of it, and nothing that has no place here.

        Raises:
            ValueError: tensors are missing or left over; PEFT alone would load what fits and leave the rest random.
        """
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {
            f"{module_name}.reft_{name}.{adapter_name}.{tensor}"
            for module_name, layer in model.named_modules()
            if isinstance(layer, ReftLayer)
            for name, edit in layer.edits(adapter_name).items()
            for tensor in edit.state_dict()
        }
        missing = sorted(expected - set(mapped))
        left_over = sorted(set(mapped) - expected - set(model.state_dict()))
        if missing or left_over:
            raise ValueError(
                f"adapter {adapter_name!r}: the file does not fit this model and config. "
                f"Missing: {_some(missing)}. Without a place here: {_some(left_over)}. "
                "It was saved from another base model, under another config, or incompletely."
            )
        return mapped


def set_scale(model: nn.Module, adapter: str, scale: float) -> None:
    """Multiply the edits of one adapter, from now on, by `scale`: 0 turns them off, negative values reverse them.

    Raises:
        ValueError: the model has no such adapter, or the scale is not a finite number.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: must be a finite number.")
    layers = [m for m in model.modules() if isinstance(m, ReftLayer)]
    if not any(adapter in layer.scaling for layer in layers):
        names = sorted({name for layer in layers for name in layer.scaling})
        raise ValueError(f"adapter={adapter!r}: no such ReFT adapter on this model; there are {names}.")
    for layer in layers:
        if adapter in layer.scaling:
            layer.scaling[adapter] = float(scale)


def _entrances(model: nn.Module) -> dict[str, nn.Module]:
    """The modules at which a forward may start: the model, what it wraps, and the halves of an encoder-decoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"pair": model, "encoder": model.get_encoder(), "decoder": model.get_decoder()}  # type: ignore[operator]
    inner = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    return {"model": model, "inner": inner} if isinstance(inner, nn.Module) and inner is not model else {"model": model}


def _cache_in(values: Mapping[str, Any]) -> Any:
    """Of attention, or else a recurrent model's state."""
    past = values.get("past_key_values")
    return past if past is not None else values.get("cache_params")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


register_peft_method(name="reft", config_cls=ReftConfig, model_cls=ReftModel)
