"""An adapter knows the weights it was made on."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import trimtab
from trimtab import OtherBase, ReftConfig
from trimtab.adapter.compose import compose
from trimtab.adapter.identity import base_digest
from trimtab.adapter.weights import CONFIG
from trimtab.errors import AdapterError

CONFIGURED = {"task_type": "CAUSAL_LM", "r": 2, "init_weights": "paper"}


def base(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return tiny("llama")


def other() -> Any:
    """Of the same shape, with other weights in its blocks."""
    model = base()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(0.1)
    return model


def save(folder: Path, model: Any) -> Path:
    get_peft_model(model, ReftConfig(**CONFIGURED)).save_pretrained(str(folder))
    return folder


def said(folder: Path) -> Any:
    return json.loads((folder / CONFIG).read_text())["base_digest"]


def test_the_same_weights_read_the_same_in_every_dtype() -> None:
    whole = base()
    rounded = copy.deepcopy(whole).bfloat16()
    digest = base_digest(whole)
    assert digest is not None
    assert digest == base_digest(rounded) == base_digest(copy.deepcopy(rounded).float())
    assert digest == base_digest(copy.deepcopy(rounded).half())
    assert base_digest(whole.half()) is None  # rounded twice on the way to bfloat16


@pytest.mark.parametrize("changed", range(3))
def test_other_weights_are_told(changed: int) -> None:
    model = base()
    digest = base_digest(model)
    with torch.no_grad():
        list(model.model.layers.parameters())[changed].mul_(1.5)
    assert base_digest(model) not in (digest, None)


def test_adapters_on_a_model_are_no_part_of_it() -> None:
    digest = base_digest(base())
    for config in (ReftConfig(**CONFIGURED), LoraConfig(target_modules=["q_proj"])):
        assert base_digest(get_peft_model(base(), config).get_base_model()) == digest


def sharded(model: Any) -> None:
    parameter = model.model.layers[0].mlp.up_proj.weight
    parameter.data = torch.empty(0)


def packed(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)


UNKNOWN = {
    "meta": lambda model: model.to("meta"),
    "sharded": sharded,
    "packed": packed,
    "quantized": lambda model: setattr(model, "hf_quantizer", object()),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_weights_that_cannot_be_read_have_none(kind: str) -> None:
    model = base()
    UNKNOWN[kind](model)
    assert base_digest(model) is None


def test_a_model_without_blocks_has_none() -> None:
    assert base_digest(nn.Sequential(nn.Linear(2, 2))) is None


def test_loading_onto_other_weights_warns_with_both_names(tmp_path: Path) -> None:
    first = base()
    first.config._name_or_path = first.name_or_path = "the/first"
    folder = str(save(tmp_path / "a", first))
    second = other()
    second.name_or_path = "the/second"
    with pytest.warns(OtherBase, match=r"made on the/first.* the/second"):
        PeftModel.from_pretrained(second, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", trimtab.OtherBase)
        PeftModel.from_pretrained(base(), folder)
        with pytest.raises(OtherBase):
            PeftModel.from_pretrained(other(), folder)
        third = other()
        with pytest.raises(OtherBase):
            third.load_adapter(folder)


def test_saving_again_says_the_base_it_is_on_then(tmp_path: Path) -> None:
    first = save(tmp_path / "a", base())
    with pytest.warns(OtherBase):
        moved = PeftModel.from_pretrained(other(), str(first))
    moved.save_pretrained(str(tmp_path / "b"))
    assert said(first) == base_digest(base())
    assert said(tmp_path / "b") == base_digest(other())


def test_the_digest_is_of_the_base_before_it_was_trained(tmp_path: Path) -> None:
    model = get_peft_model(base(), ReftConfig(**CONFIGURED))
    UNKNOWN["sharded"](model.get_base_model())
    model.save_pretrained(str(tmp_path / "a"))
    assert said(tmp_path / "a") == base_digest(base())


def test_an_adapter_that_does_not_say_is_taken(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", base())
    config = json.loads((folder / CONFIG).read_text())
    del config["base_digest"]
    (folder / CONFIG).write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherBase)
        PeftModel.from_pretrained(other(), str(folder))


def test_what_is_composed_has_the_base_of_its_parts(tmp_path: Path) -> None:
    a, b, c = save(tmp_path / "a", base()), save(tmp_path / "b", base()), save(tmp_path / "c", other())
    assert compose([a, b], [1, 1], tmp_path / "ab").base_digest == said(a)
    with pytest.raises(AdapterError, match="base_digest"):
        compose([a, c], [1, 1], tmp_path / "ac")
