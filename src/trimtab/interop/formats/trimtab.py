"""trimtab's own adapters, as PEFT saves and loads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

from peft import PeftModel, TaskType
from torch import Tensor, nn

import trimtab.adapter.tuner  # noqa: F401  (registers the method with PEFT)
from trimtab.adapter.folder import as_edit, read_adapter, write_adapter
from trimtab.adapter.weights import read_tensors, weights_in
from trimtab.edits import Edit
from trimtab.errors import ConversionError
from trimtab.interop.base import Runner, logits_of
from trimtab.interop.convert import Adapter, Format, Given
from trimtab.where.plan import Part
from trimtab.where.sites import host

_PREFIX = "base_model.model."


class Trimtab(Format):
    """A folder with `adapter_config.json` (peft_type REFT) and the tensors beside it."""

    name = "trimtab"
    keeps_turns = True

    def recognises(self, path: Path) -> bool:
        """A config of any of PEFT's methods, so that another than ReFT is refused by name."""
        config = path / "adapter_config.json"
        try:
            return config.is_file() and "peft_type" in json.loads(config.read_text())
        except ValueError:
            return False

    def read(self, path: Path, given: Given) -> Adapter:
        """Checked as `trimtab show` does."""
        saved = read_adapter(path)
        config = saved.config
        given.need("positions", "", config.positions)
        if config.lora is not None:
            raise ConversionError(f"{path}: has a LoRA beside its edits, and no other format holds both.")
        tensors = read_tensors(weights_in(path)) if saved.extras else {}
        modules = {key.removeprefix(_PREFIX): tensors[key] for key in saved.extras}
        base = given.open(config.base_model_name_or_path, config.task_type, _labels(modules))
        sites = base.sites(config.site, config.layers)
        if any(site.of_input for site in sites):
            raise ConversionError(f"site={config.site!r}: no other format edits what attention's heads give.")
        names = {_host_name(base.skeleton, site.module): site.name for site in sites}
        unknown = sorted({name for name, _ in saved.edits} ^ set(names))
        unknown += sorted(set(modules) - set(base.skeleton.state_dict()))
        if unknown:
            raise ConversionError(
                f"{path}: edits other modules than {base.name} has for its config ({unknown[0]} is on one side only): "
                "give --base the model it was trained on."
            )
        edits: dict[tuple[str, str], Edit] = {
            (names[name], part): as_edit(config, own) for (name, part), own in saved.edits.items()
        }
        return Adapter(base, config, edits, modules)

    def write(self, adapter: Adapter, path: Path, given: Given) -> list[str]:
        """As `save_pretrained` would."""
        skeleton = adapter.base.skeleton
        places = {name: _host_name(skeleton, skeleton.get_submodule(name)) for name, _ in adapter.edits}
        edits = {(places[name], cast(Part, part)): own for (name, part), own in adapter.tensors.items()}
        config, base = adapter.config, adapter.base.name
        if config.base_model_name_or_path != base:
            config = replace(config, base_model_name_or_path=base, base_digest=None)
        write_adapter(path, config, edits, adapter.modules)
        return []

    def run(self, path: Path, adapter: Adapter) -> Runner:
        """Loaded by PEFT."""
        model = PeftModel.from_pretrained(adapter.base.load(), str(path)).eval()

        def run(ids: Tensor, prompt: int) -> Tensor:
            extra = {"prompt_lengths": [prompt]} if adapter.base.task == TaskType.CAUSAL_LM else {}
            return logits_of(model, ids, **extra)

        return run


def _host_name(model: nn.Module, module: nn.Module) -> str:
    """Of the module that keeps the parameters of an edit at `module`."""
    place = host(module)
    names: dict[nn.Module, str] = {found: name for name, found in model.named_modules()}
    return names[place]


def _labels(modules: dict[str, Tensor]) -> int | None:
    """The classes of a saved head: the outputs of its last layer."""
    sizes = [tensor.shape[0] for name, tensor in modules.items() if tensor.dim() == 2]
    return sizes[-1] if sizes else None
