"""What is said of an adapter is what its tensors do."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from peft import PeftModel, get_peft_model
from test_batches import adapted
from test_config import anatomy
from torch import Tensor

from trimtab import ReftConfig, adapter_from
from trimtab.adapter.explain import explain, page

IDS = torch.arange(3, 10)


@torch.no_grad()
def after(model: Any) -> Tensor:
    whole: Tensor = model(input_ids=IDS[None], prompt_lengths=[len(IDS)]).logits[0, -1].log_softmax(-1)
    return whole


@pytest.mark.parametrize(("site", "within"), [("block", ""), ("heads", ".self_attn.o_proj")])
def test_tokens_distances_and_layers(site: str, within: str) -> None:
    model = adapted(a={"r": 2, "positions": "f2+l1", "layers": [0, 2], "site": site})
    before = anatomy(model)
    found = explain(model, IDS)
    assert anatomy(model) == before
    assert [place.module for place in found.places] == [f"model.layers.{i}{within}" for i in (0, 2)]
    for place in found.places:
        assert [value is not None for value in place.moved] == [i in (0, 1, len(IDS) - 1) for i in range(len(IDS))]
    assert torch.equal(found.edited, after(model))
    with model.disable_adapter():
        assert torch.equal(found.base, after(model))
    layers = model.base_model.model.model.layers
    for place, i in zip(found.places, (0, 2), strict=True):
        reft = layers[i].get_submodule(f"{within[1:]}.reft".lstrip("."))
        reft.scaling["a"] = 0.0
        torch.testing.assert_close(place.without, after(model))
        reft.scaling["a"] = 1.0
        assert place.matters > 0
    assert set(found.top(3)) >= {int(found.edited.argmax()), int(found.base.argmax())}


def test_how_far(tmp_path: Path) -> None:
    """A vector as long as the state is moves it by its own length."""
    base = tiny("llama")
    state = base(input_ids=IDS[None], output_hidden_states=True).hidden_states[2][0, 0].detach()
    config = ReftConfig(task_type="CAUSAL_LM", method="vector", positions="f1")
    adapter_from({1: {"vector": state, "strength": torch.tensor([-0.5])}}, config, base, tmp_path / "it")
    found = explain(PeftModel.from_pretrained(base, str(tmp_path / "it")).eval(), IDS)
    assert found.places[0].moved[0] == pytest.approx(0.5, rel=1e-4) and set(found.places[0].moved[1:]) == {None}


def test_a_fresh_adapter_and_none() -> None:
    model = get_peft_model(tiny("llama"), ReftConfig(task_type="CAUSAL_LM", positions="all")).eval()
    found = explain(model, IDS)
    assert all(set(place.moved) == {None} and place.matters == 0 for place in found.places)
    assert "NaN" not in page(found, "fresh", ["x"] * len(IDS), {1: "y"})
    with pytest.raises(ValueError, match="explain: the model has no ReFT adapter"):
        explain(tiny("llama"), IDS)  # type: ignore[arg-type]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}, "needs something else"
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_obeys_no_markup() -> None:
    found = explain(adapted(a={"r": 2, "positions": "f1"}), IDS)
    html = page(found, "<b>&", ["<script>", " a", "\n", "", "é", "x", "y"], {1: "</td>", 2: "b"})
    reader = Tags()
    reader.feed(html)
    assert not reader.open and "script" not in reader.seen and "&lt;b&gt;&amp;" in html
    assert reader.seen.count("tr") == 1 + 3 + 1 + 2 + 3


def test_the_command(tmp_path: Path, trimtab: Any) -> None:
    from transformers import AutoModelForCausalLM

    model_name = str(Path(__file__).parents[2] / "models/tiny-llama")
    base = AutoModelForCausalLM.from_pretrained(model_name)
    config = ReftConfig(task_type="CAUSAL_LM", method="vector", positions="l1")
    width = base.config.hidden_size
    adapter_from({7: {"vector": torch.ones(width), "strength": torch.ones(1)}}, config, base, tmp_path / "it")
    code, said = trimtab("explain", tmp_path / "it", "cat", "-o", tmp_path / "it.html")
    assert code == 0 and "[<|assistant|>]" in said and "model.layers.7" in said
    assert "What comes next" in (tmp_path / "it.html").read_text()
    code, said = trimtab("explain", tmp_path / "it", "cat", "-o", tmp_path / "it.html")
    assert code == 2 and "is there already" in said
    code, said = trimtab("explain", tmp_path, "cat")
    assert code == 0, "a folder that holds one adapter"
