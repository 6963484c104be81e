"""A new method is one class and one row of the table: everything else must take it from there."""

from pathlib import Path

import pytest
import torch
from helpers import outputs_of, tiny
from peft import PeftModel, get_peft_model
from torch import Tensor

from trimtab import METHODS, ReftConfig
from trimtab.adapter.folder import inspect_adapter
from trimtab.edits import Edit, Term, parameter_count
from trimtab.serve.pool import AdapterPool


class Swap(Edit):
    """h + Rᵀ(m ⊙ R h) + c: a throw-away method with a tensor name of its own, an R, and a shape without the width."""

    takes = frozenset({"r"})

    @classmethod
    def shapes(cls, width: int, r: int | None) -> dict[str, tuple[int, ...]]:
        assert r is not None
        return {"rotation": (r, width), "mixture": (r,), "shift": (width,)}

    def start(self, identity: bool) -> dict[str, Tensor]:
        scale = 0.0 if identity else 1.0
        return {"mixture": torch.full((self.r or 0,), scale), "shift": torch.full((self.width,), scale)}

    def delta(self, h: Tensor) -> Tensor:
        rotation = self.rotation()
        return (h @ rotation.mT * self.mixture) @ rotation + self.shift

    def terms(self) -> tuple[Term, ...]:
        rotation, none = self.rotation(), torch.zeros_like(self.shift[None])
        mixed = Term(rotation * self.mixture[:, None], torch.zeros_like(self.mixture), rotation)
        return mixed, Term(none, torch.ones_like(none[:, 0]), self.shift[None])


SIZES = {"swap": 98, "red": 64, "vector": 33, "postblock": 128, "gated": 64}


@pytest.mark.parametrize("method", SIZES)
def test_a_method_is_one_class_and_one_row(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "swap", Swap)
    config = ReftConfig(task_type="CAUSAL_LM", method=method, r=2, positions="f2+l2")
    untouched = outputs_of(tiny("llama"), "llama")
    model = get_peft_model(tiny("llama"), config)
    assert torch.equal(outputs_of(model, "llama"), untouched)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 3 * parameter_count(method, 32, config.r) == 3 * SIZES[method]

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.arange(3, 19).reshape(2, 8)
    losses = []
    for _ in range(5):
        losses.append(model(input_ids=ids, labels=ids.clone().index_fill_(1, torch.arange(4), -100)).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path)
    trained = outputs_of(model, "llama")
    assert not torch.equal(trained, untouched)
    assert torch.equal(outputs_of(PeftModel.from_pretrained(tiny("llama"), tmp_path), "llama"), trained)
    info = inspect_adapter(tmp_path)
    assert info.parameters == trainable and info.config.r == config.r
    edit = model.base_model.model.model.layers[0].reft.edits("default")["edit"]
    assert info.edit_norms["model.layers.0"] == pytest.approx(edit.size()) and edit.size() > 0

    pool = AdapterPool(host := tiny("llama"))
    pool.add("it", tmp_path)
    with pool.rows(["it"] * 2):
        torch.testing.assert_close(outputs_of(host, "llama"), trained, rtol=1e-6, atol=1e-6)


def test_fields_without_use_are_refused_or_gone() -> None:
    assert ReftConfig(method="red", r=7).r is None
    assert ReftConfig(method="red").method_text == "red" and ReftConfig(r=2).method_text == "loreft, rank 2"
    with pytest.raises(ValueError, match="activation='tanh': method 'red' has no"):
        ReftConfig(method="red", activation="tanh")
