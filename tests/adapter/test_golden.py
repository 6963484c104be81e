"""Parity with pyreft 0.1.0: its logits, gradients, greedy tokens and loss curves (tests/golden/meta.json)."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trimtab import ReftConfig
from trimtab.adapter.tuner import ReftLayer

GOLDEN = Path(__file__).parents[1] / "golden"
META = json.loads((GOLDEN / "meta.json").read_text())
METHOD_OF = {"direft": "direft_orthonormal", "nodireft": "direft"}  # pyreft's names: its "direft" keeps R orthonormal
CASES = sorted(META["cases"])


def golden_model(case: str) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Our adapter with the parameters of pyreft's, and what pyreft computed."""
    name, tying = case.rsplit("_", 1)
    golden = load_file(GOLDEN / f"{case}.safetensors")
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32)
    config = ReftConfig(
        task_type="CAUSAL_LM",
        method=METHOD_OF.get(name, name),
        r=META["r"],
        positions=META["positions"],
        tied=tying == "tied",
        init_weights="paper",
    )
    model = get_peft_model(base, config)
    parts = ["edit"] if tying == "tied" else ["prefix", "suffix"]
    state = {}
    for p, part in enumerate(parts):
        for layer in range(META["layers"]):
            i = p * META["layers"] + layer
            key = f"base_model.model.model.layers.{layer}.reft.reft_{part}.default."
            if f"{i}.rotate" in golden:
                state[key + "rotation"] = golden[f"{i}.rotate"].T.contiguous()
            else:
                state[key + "projection"] = golden[f"{i}.proj"]
            state[key + "bias"] = golden[f"{i}.bias"].reshape(-1)
            if f"{i}.weight" in golden:
                state[key + "weight"] = golden[f"{i}.weight"]
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "reft" in k]
    return model, golden


def edits_in_golden_order(model: PeftModel, tied: bool) -> list[torch.nn.Module]:
    layers = [m for m in model.modules() if isinstance(m, ReftLayer)]
    return [layer.edits("default")[part] for part in (["edit"] if tied else ["prefix", "suffix"]) for layer in layers]


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "batch.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str, batch: dict[str, torch.Tensor]) -> None:
    model, golden = golden_model(case)
    output = model(**batch)
    assert (output.logits - golden["logits"]).abs().max() < 1e-5
    output.loss.backward()
    for i, edit in enumerate(edits_in_golden_order(model, case.endswith("_tied"))):
        for key in (k for k in golden if k.startswith(f"{i}.grad.")):
            name = key.rpartition(".")[2]
            parameter = edit.projection if name == "proj" else getattr(edit, name)
            assert (parameter.grad - golden[key].reshape(parameter.shape)).abs().max() < 1e-5, key


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case: str, batch: dict[str, torch.Tensor]) -> None:
    model, _ = golden_model(case)
    for row, n in enumerate(META["prompt_lengths"]):
        prompt = batch["input_ids"][row : row + 1, :n]
        expected = META["cases"][case]["greedy"][row]
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(expected),
            min_new_tokens=len(expected),
            do_sample=False,
        )
        assert out[0, n:].tolist() == expected


@pytest.mark.parametrize("case", CASES)
def test_loss_curve(case: str, batch: dict[str, torch.Tensor]) -> None:
    """The methods without R step by step; those with one end no higher, since their R moves along another path."""
    model, _ = golden_model(case)
    expected = META["cases"][case]["loss_curve_adamw_lr4e-3_wd0"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, weight_decay=0.0)
    losses = []
    for _ in expected:
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if case.startswith(("noreft", "nodireft")):
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-4
    else:
        assert abs(losses[0] - expected[0]) < 1e-4
        assert losses[-1] <= expected[-1]
