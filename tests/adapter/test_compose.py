"""A composed adapter edits as its parts do together; what cannot be exact is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import outputs_of, tiny
from peft import PeftModel, get_peft_model
from torch import Tensor

from trimtab import METHODS, ReftConfig, set_scale
from trimtab.adapter.compose import compose
from trimtab.adapter.folder import inspect_adapter
from trimtab.errors import AdapterError

AFFINE = ["loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft", "vector", "postblock"]
REFUSED = {"red": "no sum of terms"}
ACTIVATED = ["gated"]


def saved(folder: Path, seed: int = 1, **fields: Any) -> Path:
    fields = {"method": "loreft", "r": 2, "positions": "f2+l2", **fields}
    model = get_peft_model(tiny("llama"), ReftConfig(task_type="CAUSAL_LM", init_weights="paper", **fields))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reft_" in name and "rotation" not in name:
                parameter.copy_(torch.randn(parameter.shape) / 3)
    model.save_pretrained(folder)
    return folder


def together(folders: list[Path], weights: list[float]) -> Tensor:
    """Both on the model, one after the other, as PEFT runs them."""
    names = [f"a{i}" for i in range(len(folders))]
    model: Any = PeftModel.from_pretrained(tiny("llama"), str(folders[0]), adapter_name="a0")
    for name, folder, weight in zip(names, folders, weights, strict=True):
        if name != "a0":
            model.load_adapter(str(folder), name)
        set_scale(model, name, weight)
    model.base_model.set_adapter(names)
    return outputs_of(model.eval(), "llama")


def check(folders: list[Path], weights: list[float], output: Path, **how: Any) -> None:
    compose(folders, weights, output, **how)
    composed = outputs_of(PeftModel.from_pretrained(tiny("llama"), str(output)).eval(), "llama")
    expected = together(folders, weights)
    assert (expected - outputs_of(tiny("llama"), "llama")).abs().max() > 0.1
    torch.testing.assert_close(composed, expected, rtol=1e-4, atol=2e-5)


def test_every_method_is_said_to_compose_or_not() -> None:
    assert set(METHODS) == {*AFFINE, *REFUSED, *ACTIVATED}


@pytest.mark.parametrize("method", AFFINE)
def test_two_in_sequence(method: str, tmp_path: Path) -> None:
    one, other = saved(tmp_path / "a"), saved(tmp_path / "b", 2, method=method, r=3)
    check([one, other], [0.7, -0.3], tmp_path / "c")
    check([other, one], [1.0, 1.0], tmp_path / "d")


@pytest.mark.parametrize("method", [*AFFINE, *ACTIVATED])
def test_one_reversed(method: str, tmp_path: Path) -> None:
    check([saved(tmp_path / "a", method=method)], [-1.0], tmp_path / "c")


def test_an_activation_last_or_summed(tmp_path: Path) -> None:
    """Behind constants it reads what they wrote; several of one activation are summed in parallel."""
    relu = {"method": "direft", "activation": "relu"}
    one, other = saved(tmp_path / "a", **relu), saved(tmp_path / "b", 2, **relu)
    with pytest.raises(AdapterError, match="activation comes before one that reads"):
        compose([one, other], [1, 1], tmp_path / "c")
    compose([one, other], [1, 2], tmp_path / "d", parallel=True)
    info = inspect_adapter(tmp_path / "d")
    assert (info.config.r, info.config.activation) == (4, "relu")
    with pytest.raises(AdapterError, match="a direft edit has one activation"):
        compose([saved(tmp_path / "e"), one], [1, 1], tmp_path / "f")
    assert not (tmp_path / "c").exists() and not (tmp_path / "f").exists()


def test_other_layers_and_parts(tmp_path: Path) -> None:
    one = saved(tmp_path / "a", layers=[0, 1])
    other = saved(tmp_path / "b", 2, layers=[1, 2], tied=False, r=1)
    check([one, other], [1.0, 0.5], tmp_path / "c")
    config = inspect_adapter(tmp_path / "c").config
    assert (config.layers, config.tied, config.r) == ([0, 1, 2], False, 3)


def test_in_parallel_the_order_does_not_matter(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "a"), saved(tmp_path / "b", 2)
    outs = []
    for name, folders in (("c", [one, other]), ("d", [other, one])):
        compose(folders, [1, 1], tmp_path / name, parallel=True)
        outs.append(outputs_of(PeftModel.from_pretrained(tiny("llama"), str(tmp_path / name)).eval(), "llama"))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=2e-5)
    assert (outs[0] - together([one, other], [1, 1])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "l2"}, r"positions: 'f2\+l2' in .*, 'l2' in .*; one adapter has one. Use them at once"),
        ({"site": "mlp"}, "site: 'block' in .*, 'mlp'"),
        ({"method": "red"}, "method='red': no sum of terms"),
        ({"method": "loreft", "activation": "relu"}, "LoReFT with an activation is such a sum by itself"),
        ({"r": 31}, "the ranks add up to 33, more than the width 32"),
        ({"layers": [-1]}, None),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    one = saved(tmp_path / "a", layers=[2] if message is None else "all")
    other = saved(tmp_path / "b", 2, **fields)
    with pytest.raises(AdapterError, match=message or "the same blocks counted from both ends"):
        compose([one, other], [1, 1], tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_bad_weights(weights: list[float], tmp_path: Path) -> None:
    one = saved(tmp_path / "a")
    with pytest.raises(AdapterError, match="give one finite number for each adapter"):
        compose([one, one], weights, tmp_path / "c")


def test_the_command(tmp_path: Path, trimtab: Any) -> None:
    one, other = saved(tmp_path / "a"), saved(tmp_path / "b", 2)
    code, said = trimtab("compose", one, other, "-w", "-0.7,0.3", "-o", tmp_path / "c")
    assert code == 0 and "direft, rank 4" in said
    code, said = trimtab("compose", one, other, "-o", tmp_path / "c")
    assert code == 2 and "is there already" in said
    code, said = trimtab("compose", one, "-w", "x", "-o", tmp_path / "d")
    assert code == 2 and said == "error: --weights 'x': give numbers, as in 0.7,-0.3\n"
