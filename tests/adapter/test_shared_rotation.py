"""Adapters on parts of one rotation: orthonormal together whoever learns, and one adapter when composed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, outputs_of, tiny
from peft import PeftModel, get_peft_model
from torch import Tensor

from trimtab import ReftConfig, share_rotation
from trimtab.adapter.compose import compose
from trimtab.adapter.tuner import ReftLayer
from trimtab.edits.orthonormal import TOLERANCE, orthonormality_error


def two(**fields: Any) -> Any:
    """A model with fresh adapters `a`, rank 2, and `b`, rank 3."""
    common = {"positions": "f2+l2", "layers": [0, 2]}
    model: Any = None
    for name, r in (("a", 2), ("b", 3)):
        config = ReftConfig(task_type="CAUSAL_LM", **{**common, "r": r, **fields})
        if model is None:
            model = get_peft_model(tiny("llama"), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


def rotations(model: Any, adapter: str) -> list[Tensor]:
    layers = [m for m in model.modules() if isinstance(m, ReftLayer)]
    return [edit.rotation().detach().clone() for layer in layers for edit in layer.edits(adapter).values()]


def error(model: Any) -> float:
    """Of the rows of both together."""
    both = zip(rotations(model, "a"), rotations(model, "b"), strict=True)
    return max(float(orthonormality_error(torch.cat(parts))) for parts in both)


def train(model: Any, names: list[str], optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> None:
    """Every row for an adapter of its own."""
    model.base_model.set_adapter(sorted(set(names)))
    steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    ids = torch.randint(3, VOCAB, (len(names), 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone().index_fill_(1, torch.arange(5), -100)
    for _ in range(3):
        steps.zero_grad()
        model(input_ids=ids, labels=labels, adapter_names=names).loss.backward()
        steps.step()


@pytest.mark.parametrize("method", ["loreft", "consreft", "lobireft", "direft_orthonormal"])
@pytest.mark.parametrize("tied", [True, False])
def test_learnt_at_once_they_stay_apart(method: str, tied: bool) -> None:
    model = two(method=method, tied=tied)
    assert error(model) > 0.01
    before = rotations(model, "a")
    share_rotation(model, ["a", "b"])
    assert error(model) <= TOLERANCE
    assert all(torch.equal(*pair) for pair in zip(before, rotations(model, "a"), strict=True))
    for optimizer in (torch.optim.AdamW, torch.optim.SGD):
        train(model, ["a", "b", "a"], optimizer)
        assert error(model) <= TOLERANCE
    assert all(not torch.equal(*pair) for pair in zip(before, rotations(model, "a"), strict=True))


def test_a_fresh_one_still_changes_nothing() -> None:
    model, base = two(), outputs_of(tiny("llama"), "llama")
    share_rotation(model, ["a", "b"])
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        torch.testing.assert_close(outputs_of(model, "llama"), base, rtol=1e-5, atol=1e-6)


def test_the_second_keeps_away_from_the_first_which_stays_as_it_is(tmp_path: Path) -> None:
    model = two()
    train(model, ["a"])
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path / "a", adapter_name="a", is_trainable=False)
    first, alone = rotations(model, "a"), outputs_of(model.eval(), "llama")
    model.add_adapter("b", ReftConfig(task_type="CAUSAL_LM", r=3, positions="f2+l2", layers=[0, 2]))
    share_rotation(model, ["a", "b"])
    train(model.train(), ["b"])
    assert error(model) <= TOLERANCE
    model.set_adapter("a")
    assert torch.equal(outputs_of(model.eval(), "llama"), alone)
    assert all(torch.equal(*pair) for pair in zip(first, rotations(model, "a"), strict=True))


def test_both_are_one_adapter_of_the_ranks_together(tmp_path: Path) -> None:
    """As the paper has it: h + Rᵀ(W h + b - R h), with the rows of both in R, W and b."""
    model = two()
    share_rotation(model, ["a", "b"])
    train(model, ["a", "b"])
    model.save_pretrained(tmp_path)
    compose([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "both", parallel=True)
    composed = PeftModel.from_pretrained(tiny("llama"), tmp_path / "both").eval()
    config = ReftConfig(task_type="CAUSAL_LM", r=5, positions="f2+l2", layers=[0, 2])
    whole = get_peft_model(tiny("llama"), config).eval()
    layers, own_layers = ([m for m in x.modules() if isinstance(m, ReftLayer)] for x in (whole, model))
    with torch.no_grad():
        for layer, own in zip(layers, own_layers, strict=True):
            edit: Any = layer.edits("default")["edit"]
            a, b = (own.edits(name)["edit"] for name in ("a", "b"))
            edit.rotation.set(torch.cat([a.rotation(), b.rotation()]))
            edit.weight.copy_(torch.cat([a.weight, b.weight]))
            edit.bias.copy_(torch.cat([a.bias, b.bias]))
    torch.testing.assert_close(outputs_of(composed, "llama"), outputs_of(whole, "llama"), rtol=1e-4, atol=2e-5)


def test_adapters_of_other_places_cannot_share() -> None:
    model = two()
    model.add_adapter("c", ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2", layers=[1]))
    with pytest.raises(ValueError, match=r"not all of them edit model\.layers\.\d alike"):
        share_rotation(model, ["a", "c"])


@pytest.mark.parametrize(
    ("fields", "names", "message"),
    [
        ({}, ["a", "c"], "give at least two that the model has"),
        ({}, [], "give at least two that the model has"),
        ({}, ["a", "nobody"], "give at least two that the model has"),
        ({}, ["a", "a"], "give at least two that the model has"),
        ({"method": "noreft"}, ["a", "b"], "one has no rotation"),
        ({"r": 20}, ["a", "b"], "ranks of 40 in all, for a width of 32"),
    ],
)
def test_what_cannot_share(fields: dict[str, Any], names: list[str], message: str) -> None:
    model = two(**fields)
    with pytest.raises(ValueError, match=message):
        share_rotation(model, names)
