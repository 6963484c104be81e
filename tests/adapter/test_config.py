"""A bad config names field, value and what is allowed, before any model is touched; a good one survives a file."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import outputs_of, tiny
from peft import PeftConfig, PeftType, get_peft_model
from torch import nn

from trimtab import METHODS, ReftConfig
from trimtab.adapter.config import REFT

BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "lorefft"}, r"method='lorefft': must be one of loreft, direft, .* Did you mean 'loreft'\?"),
    ({"method": "LoReFT"}, r"method='LoReFT': .* Did you mean 'loreft'\?"),
    ({"method": None}, r"method=None: must be one of loreft"),
    ({"r": 0}, r"r=0: must be a whole number of at least 1"),
    ({"r": -2}, r"r=-2: must be a whole number of at least 1"),
    ({"r": 4.0}, r"r=4.0: must be a whole number"),
    ({"r": True}, r"r=True: must be a whole number"),
    ({"r": "4"}, r"r='4': must be a whole number"),
    ({"positions": "x7"}, r"positions='x7': 'x7' is not a position. Allowed: fN .* 'prompt', 'generated' or 'all'"),
    ({"positions": "f0"}, r"positions='f0': 'f0' edits nothing"),
    ({"positions": ""}, r"positions='': '' is not a position"),
    ({"positions": "f7+f3"}, r"positions='f7\+f3': 'f' is given twice"),
    ({"positions": "l3+f7"}, r"positions='l3\+f7': write the prefix first, as in 'f7\+l3'"),
    ({"positions": "f7 + l7"}, r"positions='f7 \+ l7': 'f7 ' is not a position"),
    ({"positions": 7}, r"positions=7: must be a string"),
    ({"positions": ["f7"]}, r"positions=\['f7'\]: must be a string"),
    ({"layers": "last"}, r"layers='last': must be 'all' or a list of block indices"),
    ({"layers": []}, r"layers=\[\]: must be 'all' or a list"),
    ({"layers": 3}, r"layers=3: must be 'all' or a list"),
    ({"layers": [0, "1"]}, r"layers=\[0, '1'\]: must be 'all' or a list"),
    ({"layers": [1, 1]}, r"layers=\[1, 1\]: must be each block once"),
    ({"layers": [True]}, r"layers=\[True\]: must be 'all' or a list"),
    ({"site": ""}, r"site='': must be block, attention, mlp, heads or a module pattern"),
    ({"site": None}, r"site=None: must be block"),
    ({"tied": 1}, r"tied=1: must be true or false"),
    ({"tied": False, "positions": "f7"}, r"tied=False: needs a prefix and a suffix .* positions='f7'"),
    ({"tied": False, "positions": "all"}, r"tied=False: needs a prefix and a suffix .* positions='all'"),
    ({"dropout": 1.0}, r"dropout=1.0: must be a number from 0 up to, not including, 1"),
    ({"dropout": -0.1}, r"dropout=-0.1: must be a number from 0"),
    ({"dropout": float("nan")}, r"dropout=nan: must be a number from 0"),
    ({"dropout": "0.1"}, r"dropout='0.1': must be a number from 0"),
    ({"activation": "swish"}, r"activation='swish': must be one of relu, gelu, silu, tanh"),
    ({"activation": "relu", "method": "consreft"}, r"activation='relu': method 'consreft' has no W h \+ b"),
    ({"init_weights": "pyreft"}, r"init_weights='pyreft': must be True, False or 'paper'"),
    ({"init_weights": 1}, r"init_weights=1: must be True, False or 'paper'"),
    ({"modules_to_save": "classifier"}, r"modules_to_save='classifier': must be null or a list of module names"),
    ({"task_type": "CAUSAL"}, r"(?i)task.?type"),
]

MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"r": 33}, r"r=33: larger than the width 32 of model.layers.0"),
    ({"layers": [3]}, r"layers=\[3\]: \[3\] not there; the model has blocks 0 to 2"),
    ({"layers": [0, -4]}, r"layers=\[0, -4\]: \[-4\] not there"),
    ({"layers": [0, -3]}, r"layers=\[0, -3\]: names a block twice"),
    ({"site": "blocks"}, r"site='blocks': matches no module name as a whole"),
    ({"site": "["}, r"site='\[': not a regular expression"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReftConfig(**fields)


def anatomy(model: nn.Module) -> Any:
    """What adding an adapter could leave behind: modules, parameters, hooks, attributes, what is trainable."""
    return [
        (
            name,
            type(module),
            sorted(k for k in module.__dict__ if k != "_is_hf_initialized"),
            [list(v) for k, v in module.__dict__.items() if k.endswith("_hooks") and v],
            [(n, id(p), p.requires_grad) for n, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]


def leaves_no_trace(model: Any) -> None:
    """An adapter on the tiny Llama: switched off, and taken off, the model is what it was."""
    base = outputs_of(tiny("llama"), "llama")
    with model.disable_adapter():
        assert torch.equal(outputs_of(model, "llama"), base)
    left = model.unload()
    assert torch.equal(outputs_of(left, "llama"), base)
    kept, plain = ([(name, kind, hooks) for name, kind, _, hooks, _ in anatomy(m)] for m in (left, tiny("llama")))
    assert kept == plain


@pytest.mark.parametrize(("fields", "message"), MISFITS, ids=[str(fields) for fields, _ in MISFITS])
def test_misfits_leave_the_model_as_it_was(fields: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    before = anatomy(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, ReftConfig(task_type="CAUSAL_LM", **fields))
    after = anatomy(model)
    left = [(a[0], set(a[2]) ^ set(b[2])) for a, b in zip(after, before, strict=True) if a != b]
    assert after == before, left


@pytest.mark.parametrize(("fields", "message"), MISFITS, ids=[str(fields) for fields, _ in MISFITS])
def test_a_misfit_second_adapter_leaves_the_first_as_it_was(fields: dict[str, Any], message: str) -> None:
    model = get_peft_model(tiny("llama"), ReftConfig(task_type="CAUSAL_LM"))
    before = anatomy(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", ReftConfig(task_type="CAUSAL_LM", **fields))
    assert anatomy(model) == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["a.b", "__base__"])
def test_bad_adapter_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){name}"):
        get_peft_model(tiny("llama"), ReftConfig(task_type="CAUSAL_LM"), adapter_name=name)


GOOD: list[dict[str, Any]] = [
    {},
    *({"method": method} for method in METHODS),
    {"method": "direft", "r": 1, "positions": "all", "layers": [0, -1], "site": "mlp", "activation": "gelu"},
    {"positions": "f3+l2", "tied": False, "dropout": 0.1, "init_weights": "paper"},
    {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "init_weights": False},
    {"site": r"model\.layers\.\d+\.self_attn", "layers": [1]},
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_files(fields: dict[str, Any], tmp_path: Path) -> None:
    config = ReftConfig(**fields)
    config.save_pretrained(tmp_path)
    for reader in (ReftConfig, PeftConfig):
        again = reader.from_pretrained(tmp_path)
        assert isinstance(again, ReftConfig)
        assert again.to_dict() == {**config.to_dict(), "inference_mode": again.inference_mode}
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == "REFT" and "import trimtab" in raw["requires"]
    assert all(raw[key] == value for key, value in fields.items())


@pytest.mark.parametrize("layers", [(0, 2), range(3), {1}])
def test_collections_become_lists(layers: Any, tmp_path: Path) -> None:
    config = ReftConfig(layers=layers, modules_to_save=("score",))  # type: ignore[arg-type]
    assert config.layers == sorted(layers) and config.modules_to_save == ["score"]
    config.save_pretrained(tmp_path)
    assert ReftConfig.from_pretrained(tmp_path).layers == config.layers


def test_a_bad_file_is_as_good_an_error(tmp_path: Path) -> None:
    ReftConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"loreft"', '"quantum"'))
    with pytest.raises(ValueError, match="method='quantum': must be one of loreft"):
        PeftConfig.from_pretrained(tmp_path)


def test_copies_and_pickles() -> None:
    config = ReftConfig(layers=[0], positions="f1+l1", tied=False)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config and twin.peft_type is REFT is PeftType.REFT  # type: ignore[attr-defined]


def test_the_registered_type() -> None:
    assert PeftType("REFT") is REFT and REFT == "REFT" and REFT in list(PeftType)


def test_help_for_every_field() -> None:
    theirs = {field.name for field in dataclasses.fields(PeftConfig)}
    own = [field for field in dataclasses.fields(ReftConfig) if field.name not in theirs]
    assert len(own) > 10 and all(field.metadata.get("help") for field in own), "shown by command lines and docs"


def test_numpy_integers_are_refused_rather_than_saved_wrongly() -> None:
    with pytest.raises(ValueError, match="r="):
        ReftConfig(r=np.int64(4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("rank", "Here it is r."),
        ("low_rank_dimension", "Here it is r."),
        ("target_modules", "Here it is site (block, attention, mlp, heads or a pattern of module names) and layers."),
        ("component", "Here it is site."),
        ("intervention", "Here it is method and r, as in method='loreft', r=4."),
        ("representations", "Here it is layers, site, method and r, as in layers"),
        ("lora_alpha", "trimtab.set_scale"),
        ("positionss", "Here it is positions."),
        ("zzz", "There are "),
    ],
)
def test_fields_of_other_libraries(field: str, said: str) -> None:
    with pytest.raises(TypeError, match=rf"ReftConfig\(\) got an unexpected keyword argument '{field}'") as error:
        ReftConfig(**{field: 4})
    assert said in str(error.value)


def test_help_shows_the_fields() -> None:
    told = ReftConfig.__doc__ or ""
    assert "positions (default 'f7+l7'): Edited tokens: fN" in told
    assert "target_modules" not in {field.name for field in dataclasses.fields(ReftConfig)}
