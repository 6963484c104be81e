"""A LoRA of PEFT, which any server of LoRA adapters takes: exact for edits of every token where a projection ends."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from trimtab.adapter.weights import WEIGHTS
from trimtab.errors import ConversionError
from trimtab.interop.base import Runner, logits_of
from trimtab.interop.convert import Adapter, Format, Given
from trimtab.interop.projections import Change, changes_of


class Lora(Format):
    """A folder as PEFT saves it."""

    name = "lora"

    def write(self, adapter: Adapter, path: Path, given: Given) -> list[str]:
        """Raises ConversionError, also where a bias is needed and the target does not take `lora_bias`."""
        changes = changes_of(adapter)
        needed = max(float(change.bias.abs().max()) for change in changes)
        if needed and not given.lora_bias:
            raise ConversionError(
                f"the edits need a bias on {', '.join(_targets(adapter, changes)[:2])} (up to {needed:.2g}), "
                "which would be lost: a LoRA has none without lora_bias. Exact: a target that takes lora_bias, as PEFT "
                "does; trimtab merge where the model's layers have a bias; or edits with b = 0."
            )
        config = LoraConfig(
            task_type=adapter.base.task,
            base_model_name_or_path=adapter.base.name,
            inference_mode=True,
            r=adapter.rank,
            lora_alpha=adapter.rank,
            target_modules=_targets(adapter, changes),
            lora_bias=bool(needed),
            fan_in_fan_out=changes[0].transposed,
            modules_to_save=adapter.config.modules_to_save,
        )
        tensors = dict(adapter.modules)
        for change in changes:
            tensors[f"{change.layer}.lora_A.weight"] = change.down
            tensors[f"{change.layer}.lora_B.weight"] = change.up
            if needed:
                tensors[f"{change.layer}.lora_B.bias"] = change.bias
        config.save_pretrained(str(path))
        packed = {f"base_model.model.{name}": tensor.float().contiguous() for name, tensor in tensors.items()}
        save_file(packed, path / WEIGHTS, {"format": "pt"})
        if not needed:
            return []
        return [
            "lora_bias is set, since the edits add a bias: PEFT takes it; a server that does not has to refuse the file"
        ]

    def run(self, path: Path, adapter: Adapter) -> Runner:
        """Loaded by PEFT."""
        model = PeftModel.from_pretrained(adapter.base.load(), str(path)).eval()

        def run(ids: Tensor, prompt: int) -> Tensor:
            return logits_of(model, ids)

        return run


def _targets(adapter: Adapter, changes: list[Change]) -> list[str]:
    """The layers' last names, as servers expect them, where those mean no other layer; else their whole names."""
    whole = [change.layer for change in changes]
    last = sorted({name.rpartition(".")[2] for name in whole})
    meant = {name for name, _ in adapter.base.skeleton.named_modules() if name.rpartition(".")[2] in last}
    return last if meant == set(whole) else whole
