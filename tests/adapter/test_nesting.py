"""ReFT around another PEFT method, which stays what it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, tiny
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import trimtab
from trimtab import LoraAtConfig, ReftConfig

IDS = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))


def lora(strength: float = 0.3) -> Any:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(5)
    model = get_peft_model(tiny("llama"), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, strength)
    return model


def reft(**fields: Any) -> ReftConfig:
    common = {"task_type": "CAUSAL_LM", "r": 2, "positions": "f1+l2", "init_weights": "paper"}
    return ReftConfig(**{**common, **fields})


def logits(model: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_cache": False}, {"prompt_lengths": [5, 5]}, {"prefill_chunk_size": 3}, {"num_beams": 2}]
)
def test_generation_is_that_without_a_lora_that_does_nothing(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(1)
    alone = get_peft_model(tiny("llama"), reft()).eval()
    torch.manual_seed(1)
    around = get_peft_model(lora(0), reft()).eval()
    edits = {k.rpartition("layers.")[2]: v for k, v in alone.state_dict().items() if ".reft." in k}
    for key, value in around.state_dict().items():
        if ".reft." in key:
            value.copy_(edits[key.rpartition("layers.")[2]])
    how = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **kwargs}
    assert torch.equal(around.generate(input_ids=IDS, **how), alone.generate(input_ids=IDS, **how))
    with trimtab.prompts(around, [5, 5]), trimtab.prompts(alone, [5, 5]):
        assert torch.allclose(logits(around), logits(alone), atol=1e-6)


@pytest.mark.parametrize("name", ["default", "reft"])
def test_the_lora_below_stays_in_use_frozen_and_apart(name: str, tmp_path: Path) -> None:
    below = lora()
    plain = logits(below)
    model = get_peft_model(below, reft(), adapter_name=name).eval()
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert {key for key, p in model.named_parameters() if p.requires_grad and ".reft." not in key} == set()
    model.save_pretrained(tmp_path / "edits")
    below.save_pretrained(tmp_path / "lora")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / "lora").eval()), plain)
    folder = tmp_path / "edits" / ("" if name == "default" else name)
    assert all(".reft." in key for key in load_file(folder / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(lora(), folder, adapter_name=name).eval()
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(model.unload()), plain)


@pytest.mark.parametrize(
    "below",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
)
def test_virtual_tokens_below_are_refused(below: Any) -> None:
    with pytest.raises(ValueError, match="virtual tokens are not in the batch"):
        get_peft_model(get_peft_model(tiny("llama"), below), reft())


def test_what_edits_the_model_already_is_not_left_there() -> None:
    base = tiny("llama")
    model = get_peft_model(base, reft())
    with pytest.raises(ValueError, match=r"one of that name edits this model at model.layers.\d already"):
        get_peft_model(base, reft(layers=[1]))
    with pytest.raises(ValueError, match="this model has ReFT already"):
        get_peft_model(model, reft(), adapter_name="more")


def test_another_strength_is_no_checkpoint_of_the_same_adapter(tmp_path: Path) -> None:
    joint = {"r": 4, "target_modules": ["q_proj"]}
    for number, config in enumerate(
        (
            lambda alpha: reft(lora={**joint, "lora_alpha": alpha}),
            lambda alpha: LoraAtConfig(task_type="CAUSAL_LM", **joint, alpha_pattern={"q_proj": alpha}),
        )
    ):
        get_peft_model(tiny("llama"), config(64)).save_pretrained(tmp_path / str(number))
        model = get_peft_model(tiny("llama"), config(8))
        with pytest.raises(ValueError, match=r"was saved with .*alpha"):
            model.load_adapter(str(tmp_path / str(number)), "default")
        get_peft_model(tiny("llama"), config(64)).load_adapter(str(tmp_path / str(number)), "default")
