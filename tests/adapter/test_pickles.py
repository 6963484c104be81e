"""Adapters saved with `safe_serialization=False`: the same to the bit in every way of loading, and no code is run.

What is wrong within such a file is in test_bad_adapters.py, beside the same in safetensors.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import hub as standin
import pytest
import torch
from helpers import outputs_of, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_bad_adapters import Trap
from test_config import anatomy
from test_hub import hub  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

import trimtab
from trimtab import ReftConfig
from trimtab.adapter.folder import inspect_adapter
from trimtab.adapter.hub import local, push
from trimtab.adapter.lora_at import LoraAtConfig
from trimtab.adapter.weights import PICKLE, WEIGHTS, read_tensors
from trimtab.errors import AdapterError
from trimtab.interop.convert import Given, convert

SPRUNG = Path("/tmp/trimtab-trap-was-sprung")
TARGETS = ["q_proj", "down_proj"]
CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "tied": ("llama", lambda: reft()),
    "untied": ("llama", lambda: reft(positions="f1+l2", tied=False)),
    "without_r": ("llama", lambda: reft(method="direft")),
    "joint": ("llama", lambda: reft(lora={"r": 2, "target_modules": TARGETS})),
    "modules_to_save": ("llama", lambda: reft(modules_to_save=["lm_head"])),
    "classifier": ("bert_seq_cls", lambda: reft(task_type="SEQ_CLS")),
    "lora_at": ("llama", lambda: LoraAtConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS)),
}


def reft(**fields: Any) -> ReftConfig:
    return ReftConfig(**{"task_type": "CAUSAL_LM", "r": 2, "positions": "f2", "init_weights": "paper", **fields})


def trained(base: str = "llama", config: Any = None) -> Any:
    model = get_peft_model(tiny(base), config or reft()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "rotation" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained().save_pretrained(tmp_path / "emoji", safe_serialization=False)
    return tmp_path / "emoji"


def trap(folder: Path) -> Path:
    torch.save({**torch.load(folder / PICKLE, weights_only=True), "more": Trap()}, folder / PICKLE)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    base, config = CONFIGS[name]
    model = trained(base, config())
    expected = outputs_of(model, base)
    model.save_pretrained(tmp_path / "safe")
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert not (tmp_path / "pickle" / WEIGHTS).exists() and not (tmp_path / "safe" / PICKLE).exists()
    safe, pickled = load_file(tmp_path / "safe" / WEIGHTS), read_tensors(tmp_path / "pickle" / PICKLE)
    assert safe.keys() == pickled.keys() and all(torch.equal(safe[key], pickled[key]) for key in safe)
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(tiny(base), tmp_path / "pickle", low_cpu_mem_usage=lean).eval()
        assert torch.equal(outputs_of(loaded, base), expected)
    other = get_peft_model(tiny(base), config(), adapter_name="first").eval()
    other.load_adapter(tmp_path / "pickle", "second")
    other.set_adapter("second")
    assert torch.equal(outputs_of(other, base), expected)
    other.load_adapter(tmp_path / "pickle", "first")
    other.set_adapter("first")
    assert torch.equal(outputs_of(other, base), expected)


def test_what_is_said_of_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    PeftModel.from_pretrained(tiny("llama"), folder).save_pretrained(tmp_path / "safe")
    said, safe = inspect_adapter(folder), inspect_adapter(tmp_path / "safe")
    assert said.shapes == safe.shapes and said.edit_norms == safe.edit_norms
    assert said.bytes_on_disk == (folder / PICKLE).stat().st_size


def test_transformers_own_loading(folder: Path, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    before = outputs_of(model, "llama")
    with pytest.raises(AdapterError, match=f"{PICKLE}: not a pickle of tensors alone"):
        model.load_adapter(str(trap(Path(shutil.copytree(folder, tmp_path / "trap")))))
    assert torch.equal(outputs_of(model, "llama"), before) and not SPRUNG.exists()
    model.load_adapter(str(folder))
    expected = outputs_of(PeftModel.from_pretrained(tiny("llama"), folder), "llama")
    assert torch.equal(outputs_of(model, "llama"), expected)


def test_safetensors_come_first_and_are_said_to(folder: Path) -> None:
    first = trained()
    expected = outputs_of(first, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first.save_pretrained(folder)  # after the pickle
    trap(folder)
    assert torch.equal(outputs_of(PeftModel.from_pretrained(tiny("llama"), folder), "llama"), expected)
    assert inspect_adapter(folder).bytes_on_disk == (folder / WEIGHTS).stat().st_size and not SPRUNG.exists()
    os.utime(folder / WEIGHTS, (0, 0))
    with pytest.warns(UserWarning, match=f"{WEIGHTS}: of an earlier save, and read before {PICKLE}. Remove one"):
        trained().save_pretrained(folder, safe_serialization=False)


def test_a_pickle_with_code_is_refused_before_the_model_is_touched(folder: Path) -> None:
    trap(folder)
    base: Any = tiny("llama")
    before = anatomy(base)
    with pytest.raises(AdapterError, match=f"{folder / PICKLE}: not a pickle of tensors alone.*No code in it was run"):
        PeftModel.from_pretrained(base, folder)
    assert anatomy(base) == before
    model = trained()
    answer = outputs_of(model, "llama")
    with pytest.raises(AdapterError, match="not a pickle of tensors alone"):
        model.load_adapter(folder, "new")
    for load in (  # where PEFT opens it without a word to the config
        lambda: model.load_adapter(folder, "default"),
        lambda: PeftModel.from_pretrained(tiny("llama"), folder, config=reft()),
    ):
        with pytest.raises(Exception, match="Weights only load failed"):
            load()
    assert list(model.peft_config) == ["default"] and torch.equal(outputs_of(model, "llama"), answer)
    assert not SPRUNG.exists()


def test_what_is_no_whole_tensor_is_not_saved(tmp_path: Path) -> None:
    model = trained()
    parts = {
        key: t.to_sparse() if key.endswith("layers.0.reft.reft_edit.default.weight") else t
        for key, t in model.state_dict().items()
    }
    with pytest.raises(
        AdapterError, match=r"layers\.0\.reft\.reft_edit\.weight is a Tensor that safetensors could not"
    ):
        model.save_pretrained(tmp_path, safe_serialization=False, state_dict=parts)
    assert not (tmp_path / "adapter_config.json").exists()


def test_from_the_hub(hub: standin.Hub, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    def put(name: str, *files: Path) -> None:
        hub.repositories[name] = {file.name: file.read_bytes() for file in files}

    config = folder / "adapter_config.json"
    put("me/words", config, folder / PICKLE)
    expected = outputs_of(PeftModel.from_pretrained(tiny("llama"), folder), "llama")
    for name in ("me/words", local("me/words")):
        assert torch.equal(outputs_of(PeftModel.from_pretrained(tiny("llama"), name), "llama"), expected)
    put("me/empty", config)
    with pytest.raises(ValueError, match="Can't find weights"):
        PeftModel.from_pretrained(tiny("llama"), "me/empty")
    trap(folder)
    put("me/trap", config, folder / PICKLE)
    with pytest.raises(UnpicklingError, match="Weights only"):  # of the Hub, PEFT opens the file itself
        PeftModel.from_pretrained(tiny("llama"), "me/trap")
    with pytest.raises(AdapterError, match=f"{PICKLE}: not a pickle of tensors alone"):
        inspect_adapter(local("me/trap"))
    assert not SPRUNG.exists()


def test_a_pickle_is_not_pushed(hub: standin.Hub, folder: Path) -> None:  # noqa: F811
    with pytest.raises(AdapterError, match=f"{PICKLE}: pickles are not pushed; save the adapter again, as safetensors"):
        push(folder, "me/words")
    PeftModel.from_pretrained(tiny("llama"), folder).save_pretrained(folder)
    push(folder, "me/words")
    assert set(hub.repositories["me/words"]) == {"adapter_config.json", WEIGHTS, "README.md"}


def test_converted_to_safetensors(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), reft(modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "emoji", safe_serialization=False)
    convert(tmp_path / "emoji", tmp_path / "again", given=Given(base=str(tmp_path / "base")))
    assert not (tmp_path / "again" / PICKLE).exists()
    before, after = read_tensors(tmp_path / "emoji" / PICKLE), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_one_function_opens_pickles() -> None:
    """The importers and every command go through it, and it runs no code."""
    source = Path(trimtab.__file__).parent
    opening = {
        f"{file.relative_to(source)}: {line.strip()}"
        for file in source.rglob("*.py")
        for line in file.read_text().splitlines()
        if any(call in line for call in ("torch.load(", "pickle.load", "Unpickler(", "joblib", "allow_pickle=True"))
    }
    assert len(opening) == 1 and "weights.py" in min(opening) and "weights_only=True" in min(opening)
