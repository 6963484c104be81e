"""What is said of an adapter is what its tensors do."""

from __future__ import annotations

import math
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
from trimtab.adapter.explain import Explanation, Outcome, Words, explain, page

IDS = torch.arange(3, 10)


@torch.no_grad()
def after(model: Any, answer: Tensor) -> tuple[Tensor, float]:
    """Log-probabilities of the next token, and of an answer, token after token."""
    says = []
    for n in range(len(answer)):
        ids = torch.cat([IDS, answer[:n]])
        says.append(model(input_ids=ids[None], prompt_lengths=[len(IDS)]).logits[0, -1].log_softmax(-1))
    return says[0], float(sum(own[token] for own, token in zip(says, answer, strict=True)))


def same(found: Outcome, wanted: tuple[Tensor, float]) -> None:
    torch.testing.assert_close(found.next, wanted[0])
    assert found.answer == pytest.approx(wanted[1], rel=1e-4)


@pytest.mark.parametrize("wanted", [None, torch.tensor([5, 4, 9, 30])])
@pytest.mark.parametrize(("site", "within"), [("block", ""), ("heads", ".self_attn.o_proj")])
def test_answers_distances_and_layers(site: str, within: str, wanted: Tensor | None) -> None:
    model = adapted(a={"r": 2, "positions": "f2+l1", "layers": [0, 2], "site": site})

    def says() -> list[int]:
        return list(model.generate(IDS[None], max_new_tokens=4, do_sample=False)[0, len(IDS) :].tolist())

    with model.disable_adapter():
        base_says = says()  # PEFT leaves a mark of each
    before = anatomy(model)
    found = explain(model, IDS, wanted, max_new_tokens=4)
    assert anatomy(model) == before
    assert [place.module for place in found.places] == [f"model.layers.{i}{within}" for i in (0, 2)]
    assert [place.label for place in found.places] == [f"layer {i}{within.replace('.', ' ', 1)}" for i in (0, 2)]
    for place in found.places:
        assert [value is not None for value in place.moved] == [i in (0, 1, 6) for i in range(len(IDS) + 3)]
    assert found.answer.tolist() == (says() if wanted is None else wanted.tolist())
    assert found.edited.says.tolist() == says() and found.base.says.tolist() == base_says
    same(found.edited, after(model, found.answer))
    with model.disable_adapter():
        same(found.base, after(model, found.answer))
    layers = model.base_model.model.model.layers
    for place, i in zip(found.places, (0, 2), strict=True):
        reft = layers[i].get_submodule(f"{within[1:]}.reft".lstrip("."))
        reft.scaling["a"] = 0.0
        same(place.without, after(model, found.answer))
        assert place.without.says.tolist() == says()
        reft.scaling["a"] = 1.0
        assert place.without.answer != found.edited.answer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (0.001, "the same"),
        (math.log(1.5), "1.50× more"),
        (-math.log(27), "27× less"),
        (-1e4, "over a million× less"),
    ],
)
def test_times(change: float, words: str) -> None:
    none = torch.zeros(1)
    found = Explanation(none, Outcome(none, none, -1.0), Outcome(none, none, -1.0 + change), ())
    assert found.times(found.base) == words


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
    assert all(set(place.moved) == {None} for place in found.places)
    assert {found.times(own) for _, own in found.rows} == {"the same"}
    assert torch.equal(found.answer, found.base.says)
    assert "nan" not in page(found, words(["x"] * (len(IDS) + len(found.answer) - 1))).lower()
    with pytest.raises(ValueError, match="explain: the model has no ReFT adapter"):
        explain(tiny("llama"), IDS)  # type: ignore[arg-type]


def words(tokens: list[str]) -> Words:
    return Words("<b>&", "<i>", tokens, "&", "x < y", lambda ids: "<u>", lambda i: "</td>")


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


@pytest.mark.parametrize(("positions", "answer"), [("f1", False), ("all", True)])
def test_the_page_is_whole_and_obeys_no_markup(positions: str, answer: bool) -> None:
    found = explain(adapted(a={"r": 2, "positions": positions}), IDS, max_new_tokens=3)
    tokens = ["<script>", " a", "\n", "", "é", "x", "y", "1st", "2nd"]
    html = page(found, words(tokens))
    reader = Tags()
    reader.feed(html)
    assert (
        not reader.open
        and "script" not in reader.seen
        and "&lt;b&gt;&amp;" in html
        and "x &lt; y" in html
        and "&lt;/td&gt;" in html
    )
    assert reader.seen.count("tr") == (1 + 2 + 3) + (1 + 3)
    assert ("1st" in html, "not shown" in html) == ((True, False) if answer else (False, True))


def test_the_command(tmp_path: Path, trimtab: Any) -> None:
    from transformers import AutoModelForCausalLM

    model_name = str(Path(__file__).parents[2] / "models/tiny-llama")
    base = AutoModelForCausalLM.from_pretrained(model_name)
    config = ReftConfig(task_type="CAUSAL_LM", method="vector", positions="l1")
    width = base.config.hidden_size
    adapter_from({7: {"vector": torch.ones(width), "strength": torch.ones(1)}}, config, base, tmp_path / "it")
    code, said = trimtab("explain", tmp_path / "it", "cat", "-o", tmp_path / "it.html")
    assert (
        code == 0 and "[<|assistant|>]" in said and "without layer 7" in said and "the last token of the prompt" in said
    )
    assert "How far each token is moved" in (tmp_path / "it.html").read_text()
    code, said = trimtab("explain", tmp_path / "it", "cat", "--answer", "cats")
    assert code == 0 and "'cats'" in said
    code, said = trimtab("explain", tmp_path / "it", "cat", "-o", tmp_path / "it.html")
    assert code == 2 and "is there already" in said
    code, said = trimtab("explain", tmp_path / "it", "cat", "--max-new-tokens", 5000)
    assert code != 0 and "PROMPT: 5 tokens and up to 5000 new ones" in said and "lower --max-new-tokens" in said
    code, said = trimtab("explain", tmp_path, "cat")
    assert code == 0, "a folder that holds one adapter"
