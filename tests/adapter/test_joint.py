"""A LoRA and edits in one adapter: both learn, are saved, loaded, scaled and left behind as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, outputs_of, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_config import anatomy, leaves_no_trace
from torch import Tensor

from trimtab import ReftConfig, set_scale
from trimtab.adapter.compose import compose
from trimtab.adapter.explain import explain
from trimtab.adapter.folder import inspect_adapter
from trimtab.adapter.weights import WEIGHTS
from trimtab.errors import AdapterError

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def config(**fields: Any) -> ReftConfig:
    return ReftConfig(task_type="CAUSAL_LM", **{"r": 2, "positions": "f2+l2", "lora": LORA, **fields})


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone().index_fill_(1, torch.arange(5), -100)}


def trained(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), config(**fields))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        losses.append(model(**batch()).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    return model.eval()


def test_both_are_trained_and_nothing_else() -> None:
    untouched = outputs_of(tiny("llama"), "llama")
    model = get_peft_model(tiny("llama"), config())
    assert torch.equal(outputs_of(model, "llama"), untouched)
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learnt) == 3 * (3 + 4) and all("reft_" in name or "lora_" in name for name in learnt)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = dict(trained().named_parameters())
    moved = [name.split(".default")[0] for name in before if not torch.equal(before[name], after[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"lora_A", "lora_B", "reft_edit"}
    assert set(before) == set(after)


def test_what_is_said_of_a_saved_one(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    info = inspect_adapter(tmp_path)
    assert info.config.method_text == "loreft, rank 2, with a LoRA of rank 2"
    assert info.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_scale_off_and_away() -> None:
    model, base = trained(), outputs_of(tiny("llama"), "llama")
    whole = outputs_of(model, "llama")
    set_scale(model, "default", 0)
    assert torch.equal(outputs_of(model, "llama"), base)
    set_scale(model, "default", 1.0)
    assert torch.equal(outputs_of(model, "llama"), whole)
    leaves_no_trace(model)


def test_an_edited_module_may_be_one_of_the_loras(tmp_path: Path) -> None:
    model = trained(site=r".*\.down_proj")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert torch.equal(outputs_of(again, "llama"), outputs_of(model, "llama"))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"bias": "all"}, "lora: 'bias': must be a mapping of r, lora_alpha"),
        (8, "lora: 8: must be a mapping"),
        ({"r": 0}, "r"),
        ({"target_modules": ["nowhere"]}, "Target modules .*nowhere.* not found"),
    ],
)
def test_bad_loras(lora: Any, message: str) -> None:
    model = tiny("llama")
    before = anatomy(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(lora=lora))
    assert anatomy(model) == before


def test_layers_of_another_lora_are_left_alone() -> None:
    lora = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has LoRA layers of another adapter"):
        get_peft_model(lora.get_base_model(), config())


def without_lora(folder: Path) -> None:
    kept = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if "lora_" not in key}
    save_file(kept, folder / WEIGHTS)


def without_one(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[next(key for key in tensors if "lora_A" in key)]
    save_file(tensors, folder / WEIGHTS)


def unsaid(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora": None}))


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[next(key for key in tensors if "lora_B" in key)].fill_(float("nan"))
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "inspected", "loaded"),
    [
        (without_lora, "holds no tensor of the LoRA that its config has", "Missing: .*lora_A"),
        (without_one, None, "Missing: .*lora_A"),
        (unsaid, "is no part of this ReFT adapter", "Without a place here: .*lora_A"),
        (not_finite, "lora_B.*NaN or infinity", "lora_B.*NaN or infinity"),
    ],
)
def test_damaged_files(damage: Any, inspected: str | None, loaded: str, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    damage(tmp_path)
    if inspected:
        with pytest.raises(AdapterError, match=inspected):
            inspect_adapter(tmp_path)
    with pytest.raises(ValueError, match=loaded):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_what_takes_edits_alone_refuses_it(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "it")
    with pytest.raises(AdapterError, match=r"carries .*lora_A.* beside its edits"):
        compose([tmp_path / "it"], [-1.0], tmp_path / "other")
    with pytest.raises(ValueError, match="the adapter has a LoRA too"):
        explain(model, batch()["input_ids"][0])
