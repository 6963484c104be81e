"""The PEFT tuner: edits hooked onto the blocks of a frozen model. The only file, with edit.py, that registers hooks.

Each edited block gets a submodule `reft` that holds the adapters' parameters, and one forward hook. No module of the
base model is replaced, and no hook of anyone else is touched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NoReturn, cast, get_args

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.forward import BASE, Pass
from trimtab.adapter.hooks import hook
from trimtab.adapter.identity import OtherBase, base_digest, differ
from trimtab.adapter.joint import as_lora, check_lora, inject, lora_keys, loras, remove
from trimtab.adapter.loading import (
    as_saved,
    check_reloaded,
    own_modules,
    resized_embeddings,
    saved_twice,
    take_over_loading,
)
from trimtab.adapter.offloading import bring_back, execution_device
from trimtab.adapter.readout import pool_of
from trimtab.adapter.running import Forwards
from trimtab.edits import METHODS, Edit, as_parameters, check_dtype
from trimtab.edits.orthonormal import Rotation
from trimtab.where.plan import Part
from trimtab.where.positions import Positions, parse_positions
from trimtab.where.sites import Site, find_sites, host

_NO_MERGE = (
    "a ReFT adapter is not merged in place: an edit of hidden states at some tokens only is no change of the weights. "
    "Keep the adapter beside the base model; it costs nothing while decoding when only the prompt is edited. A saved "
    "one that edits every token (positions='all') at mlp or attention can be: `trimtab merge ADAPTER OUTPUT`."
)
_NO_VLLM_SAMPLES = (
    " Trainers that sample through vLLM merge the adapter at each step to send vLLM its weights: set use_vllm=False, "
    "so that transformers samples with the edits. Once trained, an adapter runs on vLLM by `trimtab serve MODEL "
    "--engine vllm`."
)
OUTSIDE = (
    "{} ran outside a forward of its model, so the tokens to edit are not known. Call the whole model; to recompute "
    "blocks in the backward pass use the model's own gradient checkpointing."
)
_NO_AVERAGE = (
    "ReFT adapters cannot be averaged into one: the mean of two rotations is none. Use several at once, with weights: "
    "model.base_model.set_adapter([first, second]) and trimtab.set_scale(model, first, 0.7). Saved ones become one by "
    "`trimtab compose`, where that is exact."
)

_ON_TOP = (
    "adapter {0!r}: a {1} around a model with ReFT would train its edits too and save them with its own tensors. Put "
    "ReFT around the other one instead, get_peft_model(model_with_the_other, ReftConfig(...)), or train a LoRA and "
    "edits as one adapter, ReftConfig(lora={{'r': 8}})."
)


class ReftLayer(nn.Module, BaseTunerLayer):
    """The edits of one block, by adapter name: `reft_edit` where tied, else `reft_prefix` and `reft_suffix`."""

    adapter_layer_names = ("reft_edit", "reft_prefix", "reft_suffix")
    other_param_names = ("positions", "scaling", "tasks", "loras", "told")

    def __init__(self, site: Site, passes: Forwards) -> None:
        super().__init__()
        self._site = (site,)  # in a tuple, so that the block is not registered as a child of its own child
        self._passes = passes
        self.reft_edit, self.reft_prefix, self.reft_suffix = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.positions: dict[str, Positions] = {}
        self.scaling: dict[str, float] = {}
        self.told: dict[str, str] = {}
        """Each adapter in words."""
        self.tasks: dict[str, Any] = {}
        self.loras: dict[str, tuple[LoraLayer, ...]] = {}
        """The LoRA layers of the adapters that have some, of the whole model."""
        self._active_adapter: list[str] = []
        self.loaded: dict[Edit, dict[str, Tensor]] = {}
        """What loading found for edits of an offloaded block, until PEFT is done with it."""
        # Before other hooks, which then see what the next block reads, such as those that record hidden states.
        self.hook = hook(site, self.edited, first=True)

    @property
    def site(self) -> Site:
        return self._site[0]

    @property
    def base_layer(self) -> nn.Module:
        return self.site.module

    def extra_repr(self) -> str:
        return "\n".join(f"{name}: {told}, width {self.site.width}" for name, told in self.told.items())

    def add(self, adapter: str, config: ReftConfig, lora: tuple[LoraLayer, ...] = ()) -> None:
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
        self.scaling[adapter], self.tasks[adapter], self.loras[adapter] = 1.0, config.task_type, lora
        self.told[adapter] = f"{config.method_text}, positions {config.positions}"
        self._move_adapter_to_device_of_base_layer(adapter)

    def rotations(self) -> list[Rotation]:
        """Every R of every adapter here, active or not."""
        return [
            module for edits in self.edit_dicts().values() for module in edits.modules() if isinstance(module, Rotation)
        ]

    def widen(self) -> None:
        """Undo a cast to less than float32 through `.data`, as TRL's trainers make of what trains on a base of 4 or 8
        bits."""
        modules = (module for edits in self.edit_dicts().values() for module in edits.modules())
        for parameter in (p for module in modules for p in module._parameters.values() if p is not None):
            if parameter.dtype.itemsize < 4 and not hasattr(parameter, "full_tensor"):
                parameter.data = parameter.data.float()
                parameter.grad = parameter.grad.float() if parameter.grad is not None else None

    def edits(self, adapter: str) -> dict[Part, Edit]:
        """The adapter's edits here, by `edit`, `prefix` or `suffix`."""
        return {name: edits[adapter] for name, edits in self.edit_dicts().items() if adapter in edits}

    def edit_dicts(self) -> dict[Part, Any]:
        """The edits of all adapters here."""
        return {name: getattr(self, f"reft_{name}") for name in get_args(Part)}

    def made(self, names: list[str] | None) -> list[tuple[str, Positions, float]]:
        """Which of these adapters' edits, or the active ones', are made here, where and at what scale."""
        names = [] if self.disable_adapters else self.active_adapters if names is None else names
        told = [n for n in dict.fromkeys(names) if n in self.positions and self.scaling[n] != 0]
        return [(n, parse_positions("all") if self.loras[n] else self.positions[n], self.scaling[n]) for n in told]

    def edited(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, d) with the rows of this pass edited; themselves where there are none."""
        if self.disable_adapters or not self.positions:
            return hidden
        running = self._passes.current()
        names = [name for name, _, _ in self.made(running.adapter_names if running is not None else None)]
        if names and running is None:
            raise RuntimeError(OUTSIDE.format(self.site.name))
        # Adapters that each have rows of their own edit all of them at once; others go on from one another's edits.
        apart = [names] if running is not None and running.adapter_names is not None else [[name] for name in names]
        for together in apart if names else ():
            hidden = self._edited(hidden, together, cast(Pass, running))
        return hidden

    def _edited(self, hidden: Tensor, adapters: list[str], running: Pass) -> Tensor:
        """Hidden states (B, T, d) with the edits of adapters of which no two edit the same token."""
        check_states(self.site, hidden)
        edits, places, kept = [], [], []
        for adapter in adapters:
            positions = self.positions[adapter]
            apart: tuple[Part, ...] = ("prefix", "suffix") if adapter in self.reft_prefix else ("edit",)
            rows = running.rows(adapter, positions, hidden, apart)
            if rows is None:
                continue
            parts = {"edit": slice(None), "prefix": slice(positions.first), "suffix": slice(positions.first, None)}
            for name, edit in self.edits(adapter).items():
                edits.append((edit, self.scaling[adapter]))
                places.append(rows.flat[:, parts[name]].reshape(-1))
                kept.append(rows.valid[:, parts[name]].reshape(-1, 1))
        if not edits:
            return hidden
        states, index = hidden.reshape(-1, hidden.shape[-1]), _joined(places)
        sizes = [place.shape[0] for place in places]  # len() would be a constant of a graph
        before = states.index_select(0, index).split(sizes)
        changes = [edit(own) * scale for (edit, scale), own in zip(edits, before, strict=True)]
        change = torch.where(_joined(kept), _joined(changes), 0).to(states.dtype)
        return states.index_add(0, index, change).view_as(hidden)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "nn.DataParallel runs copies of the model that share its hooks, so edits would land in the wrong one. "
            "Use DistributedDataParallel (torchrun, accelerate launch), or show the process one GPU (with "
            "CUDA_VISIBLE_DEVICES)."
        )

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        """The block's device, or that it runs on if it is offloaded; no dtype, since edits keep float32 whatever the
        base's."""
        own = {id(p) for p in self.parameters()}
        device = next((p.device for p in base_layer.parameters() if id(p) not in own), None)
        return execution_device(base_layer) if device is not None and device.type == "meta" else device, None

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(_NO_MERGE)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_states(site: Site, hidden: Tensor) -> None:
    """Raises RuntimeError for an output that is no hidden states of the site's width."""
    if hidden.dim() != 3 or hidden.shape[-1] != site.width:
        raise RuntimeError(
            f"{site.name} gives hidden states of shape {tuple(hidden.shape)}, but (batch, tokens, {site.width}) was "
            "expected. Choose another site."
        )


class Adapters(dict[str, Any]):
    """Configs by adapter. `PeftModel.set_adapter` looks its argument up here: of a list, it is said who takes it."""

    def __contains__(self, name: object) -> bool:
        if isinstance(name, list | tuple | set):
            names = list(map(str, name))
            raise ValueError(
                f"{names}: PeftModel's own set_adapter takes one adapter. Several, one after another: "
                f"model.base_model.set_adapter({names}); another one for each row: adapter_names=."
            )
        return super().__contains__(name)

    def update(self, *added: Any, **more: Any) -> None:
        """PEFT's step of putting another tuner around a model that has one.

        Raises:
            ValueError: it is another method's, whose training and whose file would take in the edits.
        """
        for name, config in dict(*added, **more).items():
            if self and not isinstance(config, ReftConfig):
                raise ValueError(_ON_TOP.format(name, type(config).__name__))
        super().update(*added, **more)


class ReftModel(BaseTuner):
    """Puts ReFT adapters on a model; what `PeftModel.base_model` is for PEFT's own methods."""

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    uses_shared_state = False
    """What the layers share is kept with the model, for every tuner that comes by, and goes on without any."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._sites: dict[str, Site] = {}
        self._passes = Forwards.of(model)
        if not self._passes.layers:  # while the base is whole: later it may be sharded
            self._passes.base_digest = base_digest(model)
        whole: Any = model
        below = whole.peft_config if isinstance(model, PeftModel) else None
        if below is not None:  # which PEFT would add to, and save with the other method's
            self.peft_config = {}
        try:
            super().__init__(model, *args, **kwargs)
        except BaseException:
            self._passes.release()
            raise
        finally:
            if below is not None:
                whole.peft_config = below
        self.peft_config = Adapters(self.peft_config)
        if below is None:
            self.model.peft_config = self.peft_config
        take_over_loading(model)

    @property
    def has_loras(self) -> bool:
        """Whether an adapter here brought a LoRA, since when all LoRA layers of the model are this tuner's."""
        return self.tuner_layer_cls is not ReftLayer

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """PEFT's, of what is this tuner's: a method below stays as it is, in use and frozen."""
        for module in self.model.modules():
            saved = isinstance(module, AuxiliaryTrainingWrapper) and set(module._adapters) & set(self.peft_config)
            if saved or isinstance(module, self.tuner_layer_cls):
                module.enable_adapters(enabled)

    # ---- placing edits -----------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        self._sites = self._checked_sites(model, config, adapter_name)
        if config.lora is not None:
            inject(model, as_lora(config.lora, config.task_type), adapter_name, own=self._holds_loras())
            kinds: Any = (ReftLayer, LoraLayer)  # whose layers PEFT goes through, by isinstance
            self.tuner_layer_cls = kinds
            self._sites = self._checked_sites(model, config, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        below = () if self.has_loras else tuple(_other_tuners(model))
        for name, parameter in model.named_parameters():  # PEFT leaves in training what this adapter's file will lack
            if name.startswith(below) and ".reft.reft_" not in name:
                parameter.requires_grad = False

    def _holds_loras(self) -> bool:
        """Whether LoRA layers of the model belong to ReFT adapters, of this tuner or one that transformers made."""
        return self.has_loras or any(loras for layer in self._passes.layers for loras in layer.loras.values())

    def _checked_sites(self, model: nn.Module, config: Any, adapter_name: str) -> dict[str, Site]:
        """The config's sites by name; refuses what does not fit, before anything is touched."""
        if not isinstance(config, ReftConfig):
            raise ValueError(f"adapter {adapter_name!r}: expected a ReftConfig, got {type(config).__name__}.")
        if "." in adapter_name or adapter_name == BASE:
            raise ValueError(f"adapter name {adapter_name!r}: must not contain a dot nor be {BASE!r}.")
        if pool_of(model) != (config.pool or "model"):
            raise ValueError(
                f"adapter {adapter_name!r}: pool={config.pool or 'model'!r}, but this model's head reads "
                f"pool={pool_of(model)!r}. First call trimtab.set_pool(model, {config.pool or 'model'!r})."
            )
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"adapter {adapter_name!r}: the model below has {model.active_peft_config.peft_type.value}, whose "
                "virtual tokens are not in the batch, so that positions are not known. Put ReFT on a model without it."
            )
        sites = find_sites(model, config.site, config.layers, config.r)
        modules = {id(site.module) for site in sites}
        for layer in self._passes.layers:
            if adapter_name in layer.positions and id(layer.site.module) not in modules:
                raise ValueError(
                    f"adapter {adapter_name!r}: one of that name edits this model at {layer.site.name} already, and "
                    "would stay there. Take another name, or a model of its own: unload() the first, or load it anew."
                )
        for site in sites:
            there = getattr(host(site.module), "reft", None)
            _check_saved_modules(config, site.name)
            if isinstance(there, ReftLayer) and there.site.module is site.module and there.site != site:
                if there.site.of_input == site.of_input:  # found by another name, within another PeftModel
                    raise ValueError(
                        f"{site.name}: this model has ReFT already. Add to it with the first PeftModel's load_adapter "
                        "or add_adapter, or unload() that one first."
                    )
                side = "output" if site.of_input else "input"
                raise ValueError(f"{site.name}: an adapter edits its {side} already; use a model of its own.")
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
            self._passes.layers.append(layer)
        lora = loras(self.model, adapter_name) if peft_config.lora is not None else {}
        layer.add(adapter_name, peft_config, tuple(lora.values()))

    # ---- running -----------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around forward and generate; `adapter_names` gives each row an adapter of its own."""
        names = kwargs.get("adapter_names")
        if names is None:
            with self._passes.named(None):
                yield
            return
        if isinstance(names, str) or not len(names):
            raise ValueError(f"adapter_names={names!r}: must be a list of names, one a row.")
        unknown = sorted(set(names) - {BASE, *self.peft_config}, key=str)
        if unknown:
            raise ValueError(f"adapter_names: no adapter {unknown}; there are {sorted(self.peft_config)} and {BASE!r}.")

        def pass_names(module: nn.Module, args: Any, kwargs: Any) -> Any:
            own = self._passes.adapter_names()  # of the thread that runs the wrapper, which may be another one
            if own is not None and isinstance(module, LoraLayer):  # which counts beams as rows of their own
                own = [name for name in own for _ in range(len(args[0]) // len(own))]
            return (args, {**kwargs, "adapter_names": own}) if own is not None else None

        kinds = (AuxiliaryTrainingWrapper, LoraLayer) if self.has_loras else AuxiliaryTrainingWrapper
        wrappers: list[Any] = [m for m in self.model.modules() if isinstance(m, kinds)]
        handles = [m.register_forward_pre_hook(pass_names, with_kwargs=True) for m in wrappers]
        try:
            with self._passes.named(list(names)):
                yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- leaving, loading --------------------------------------------------------------------------------------

    def unload(self) -> nn.Module:
        """The base model as it was: no submodule, hook or wrapper of trimtab left on it, but what others edit by."""
        for layer in self._passes.layers:
            layer.hook.remove()
            del host(layer.site.module).reft
        self._passes.layers.clear()
        self._passes.release()
        if self.has_loras:
            remove(self.model)
        vars(self.model).pop("_load_pretrained_model", None)
        for module in list(self.model.modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                name = next(n for n, m in self.model.named_modules() if m is module)
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
        if hasattr(self.model, "peft_config") and not isinstance(self.model, PeftModel):
            del self.model.peft_config
        vars(self.model).pop("_hf_peft_config_loaded", None)
        model: nn.Module = self.model
        return model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(_NO_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(_NO_AVERAGE)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(_NO_MERGE + _NO_VLLM_SAMPLES)

    # ---- saving, loading: files hold R, parameters half of it --------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, config: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What is saved; PEFT asks before it writes the config. It finds the layers of an adapter below as well, say a
        LoRA of the same name."""
        config.base_digest = _digest_of(model) or config.base_digest
        found = super()._get_adapter_state_dict(model, config, *args, **kwargs)
        below = () if config.lora is not None else tuple(_other_tuners(model))
        return as_saved({key: t for key, t in found.items() if ".reft.reft_" in key or not key.startswith(below)})

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return super()._remove_adapter_name_from_key(key.removesuffix(".halved"), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's renaming, and a check that the file holds this adapter: all of it, and nothing that is not its own.

        Raises:
            ValueError: tensors are missing or left over; PEFT alone would load what fits and leave the rest random.
        """
        check_reloaded(config, adapter_name)
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        edits = [
            (f"{module_name}.reft_{name}", edit, layer)
            for module_name, layer in model.named_modules()
            if isinstance(layer, ReftLayer)
            for name, edit in layer.edits(adapter_name).items()
        ]
        expected = {f"{at}.{adapter_name}.{tensor}" for at, edit, _ in edits for tensor, _ in edit.named_parameters()}
        twice = saved_twice(model, mapped)
        mapped = {key: tensor for key, tensor in mapped.items() if key not in twice}
        if config.lora is not None:
            expected |= (own := lora_keys(model, adapter_name))
            check_lora("", {key: mapped[key] for key in own & set(mapped)})
        missing = sorted(expected - set(mapped))
        own = own_modules(model, adapter_name) | resized_embeddings(model)
        left_over = sorted(set(mapped) - expected - own | set(state_dict) & expected)
        if missing or left_over:
            raise ValueError(
                f"adapter {adapter_name!r}: the file does not fit this model and config. "
                f"Missing: {_some(missing)}. Without a place here: {_some(left_over)}. "
                "It was saved from another base model, under another config, or incompletely."
            )
        places = dict(model.named_parameters())
        for key in own & set(mapped) & places.keys():  # buffers may hold counts
            check_dtype(key, mapped[key])
        for at, edit, layer in edits:
            keys = {tensor: f"{at}.{adapter_name}.{tensor}" for tensor, _ in edit.named_parameters()}
            saved = {tensor.removesuffix(".halved"): mapped[key] for tensor, key in keys.items()}
            values = as_parameters(edit.check(at, saved, edit.r, edit.width))
            mapped |= {keys[tensor]: value for tensor, value in values.items()}
            if any(parameter.is_meta for parameter in layer.base_layer.parameters()):
                layer.loaded[edit] = values
        _check_base(model, config, adapter_name)
        return mapped

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The last that PEFT does in loading, after it dispatched a base model anew that is offloaded to disk."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._passes.layers:
            while layer.loaded:
                bring_back(*layer.loaded.popitem())


def _other_tuners(model: nn.Module) -> list[str]:
    """Prefixes of the keys of other methods' layers."""
    named = model.named_modules()
    return [f"{name}." for name, m in named if isinstance(m, BaseTunerLayer) and not isinstance(m, ReftLayer)]


def _digest_of(model: nn.Module) -> str | None:
    """Of the base, as it was before its first adapter."""
    layer = next((m for m in model.modules() if isinstance(m, ReftLayer)), None)
    return None if layer is None else layer._passes.base_digest


def _check_base(model: Any, config: ReftConfig, adapter: str) -> None:
    """Warn of an adapter that was made on other weights."""
    if differ(config.base_digest, _digest_of(model)):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        warnings.warn(
            f"adapter {adapter!r}: was made on {config.base_model_name_or_path}, whose weights are not those of this "
            f"model, {getattr(base, 'name_or_path', '') or type(base).__name__}; its edits will not do there what "
            "they did. Load it onto the weights it was made on.",
            OtherBase,
            stacklevel=2,
        )


def _check_saved_modules(config: ReftConfig, site: str) -> None:
    """Refuse to train whole, in a copy, what holds an edited module or its edits."""
    holders = list(accumulate(f"{site}.reft".split("."), "{}.{}".format))
    for name in config.modules_to_save or []:
        if name.startswith("reft") or any(holder.endswith(name) for holder in holders):
            raise ValueError(
                f"modules_to_save={config.modules_to_save!r}: {name!r} holds {site}, whose output is edited; a copy "
                "of it would not be. Name modules beside or within the edited ones."
            )


def check_scale(scale: Any) -> None:
    """Raises ValueError for what is no finite number."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: must be a finite number.")


def set_scale(model: nn.Module, adapter: str, scale: float) -> None:
    """Multiply the edits of one adapter, from now on, by `scale`: 0 turns them off, negative values reverse them.

    Raises:
        ValueError: the model has no such adapter, or the scale is not a finite number.
    """
    check_scale(scale)
    layers = [m for m in model.modules() if isinstance(m, ReftLayer)]
    if not any(adapter in layer.scaling for layer in layers):
        names = sorted({name for layer in layers for name in layer.scaling})
        raise ValueError(f"adapter={adapter!r}: no such ReFT adapter on this model; there are {names}.")
    for layer in layers:
        if adapter in layer.scaling:
            layer.scaling[adapter] = float(scale)
            for lora in layer.loras[adapter]:
                lora.set_scale(adapter, float(scale))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


register_peft_method(name="reft", config_cls=ReftConfig, model_cls=ReftModel)
