"""What every method keeps, old or new, and what stands beside methods: a site, a LoRA. One table."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, outputs_of, tiny
from peft import get_peft_model
from torch import Tensor, nn

from trimtab import METHODS, ReftConfig
from trimtab.adapter.steering import ACTIONS
from trimtab.runs.ways import WAYS

KINDS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    **{f"{name} at heads": {"method": name, "site": "heads"} for name in ("loreft", "red", "vector")},
    "loreft with tanh": {"method": "loreft", "activation": "tanh"},
    "untied": {"method": "loreft", "tied": False},
    "joint": {"method": "loreft", "lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}},
}
CANNOT_START_AT_IDENTITY = {"consreft", "loreft with tanh"}
IDS = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
PROMPT = 5


def config(kind: str) -> ReftConfig:
    return ReftConfig(task_type="CAUSAL_LM", **{"r": 2, "positions": "f2+l2", **KINDS[kind]})


def fresh(kind: str) -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(tiny("llama"), config(kind), adapter_name="it")


def loss_of(model: Any) -> Tensor:
    """Of the answers, in float64, unlike that of the model itself."""
    logits = model(input_ids=IDS, prompt_lengths=[PROMPT] * len(IDS)).logits[:, PROMPT - 1 : -1].double()
    return nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, PROMPT:].flatten())


def learning(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained(kind: str) -> Any:
    model = fresh(kind)
    optimizer = torch.optim.AdamW(learning(model).values(), lr=0.02)
    losses = []
    for _ in range(3):
        losses.append(loss_of(model))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert loss_of(model) < losses[0]
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_one_changes_nothing(kind: str) -> None:
    same = torch.equal(outputs_of(fresh(kind).eval(), "llama"), outputs_of(tiny("llama"), "llama"))
    assert same == (kind not in CANNOT_START_AT_IDENTITY)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_each_parameter_is_the_slope_of_the_loss(kind: str) -> None:
    """Through the whole model, against differences along the gradient; of R along the manifold it is projected on."""
    model = trained(kind)
    model.zero_grad()
    loss_of(model).backward()
    for name, parameter in learning(model).items():
        assert parameter.grad is not None, name
        slope, before, ends = parameter.grad.clone(), parameter.detach().clone(), []
        step = 3e-3 / max(float(slope.norm()), 1e-6)  # 0 of a prefix at the last block, which nobody reads
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(before + sign * step * slope)
            ends.append(float(loss_of(model)))
        with torch.no_grad():
            parameter.copy_(before)
        expected = float(slope.square().sum())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=0.01, abs=2e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_loaded_and_mixed_with_others_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    expected = outputs_of(model, "llama")
    model.save_pretrained(tmp_path)
    plain = get_peft_model(tiny("llama"), ReftConfig(task_type="CAUSAL_LM", r=1, positions="l1", init_weights="paper"))
    alone = outputs_of(plain.eval(), "llama")
    plain.load_adapter(tmp_path / "it", "it")
    assert torch.equal(outputs_of(plain.eval(), "llama"), alone)
    plain.set_adapter("it")
    assert torch.equal(outputs_of(plain, "llama"), expected)
    names, how = ["it", "default", "__base__"], {"max_new_tokens": 2, "do_sample": False, "num_beams": 2}
    mixed = plain.generate(IDS, adapter_names=names, **how)
    for i, name in enumerate(names):
        assert torch.equal(mixed[i], plain.generate(IDS[i : i + 1], adapter_names=[name], **how)[0])


def test_every_method_is_a_row_in_compare() -> None:
    assert {*METHODS, "joint"} <= WAYS.keys()
    assert {action.fields["method"] for action in ACTIONS.values()} <= METHODS.keys()
