"""The silent defects measured in pyreft, pyvene and adapters, one test each: here the same situation is right, or said.

The numbers are those of the list they were collected in; each docstring says what the peer does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_batches import check_generated, padded, prompts, search, without_positions
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trimtab import ReftConfig, parse_positions
from trimtab.adapter.tuner import ReftLayer
from trimtab.edits.orthonormal import orthonormality_error

BASE = Path(__file__).parents[1] / "golden" / "model"


def adapted(name: str = "llama", **config: Any) -> PeftModel:
    config = {"task_type": "CAUSAL_LM", "r": 2, "positions": "f2+l3", "init_weights": "paper", **config}
    return get_peft_model(tiny(name), ReftConfig(**config))


def edits_of(model: nn.Module) -> list[nn.Module]:
    layers = [m for m in model.modules() if isinstance(m, ReftLayer)]
    return [edit for layer in layers for name in layer.positions for edit in layer.edits(name).values()]


def worst_rotation(model: nn.Module) -> float:
    return max(float(orthonormality_error(edit.rotation().detach())) for edit in edits_of(model))


def train(model: nn.Module, steps: int = 5, **optimizer: Any) -> list[float]:
    ids = torch.stack(prompts([12, 12, 12]))
    labels = ids.masked_fill(torch.arange(12) < 8, -100)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **optimizer)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=labels).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module, row: Tensor | None = None, **kwargs: Any) -> Tensor:
    return model(input_ids=prompts([12])[0][None] if row is None else row[None], **kwargs).logits[0]


def block_outputs(model: PeftModel, block: int = 0, **batch: Any) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_base_model().model.layers[block].register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


def edited_tokens(model: PeftModel, **batch: Any) -> list[list[int]]:
    """Where the output of the first block differs from the base model's, by row."""
    edited = block_outputs(model, **batch)
    with model.disable_adapter():
        base = block_outputs(model, **batch)
    return [row.nonzero().flatten().tolist() for row in (edited != base).any(-1)]


@pytest.mark.parametrize("weight_decay", [0.01, 1.0, 50.0])
def test_defect_01_weight_decay_keeps_r(weight_decay: float) -> None:
    """Theirs: any weight decay makes R exactly 0 after one step, and the loss is the base model's."""
    model = adapted()
    train(model, 1, weight_decay=weight_decay)
    assert worst_rotation(model) < 1e-6
    assert edited_tokens(model, input_ids=prompts([12])[0][None]) == [[0, 1, 9, 10, 11]]
    if weight_decay < 50:  # which shrinks W and b, as weight decay does
        losses = train(model, 15, weight_decay=weight_decay)
        assert losses[-1] < losses[0]


def test_defect_02_training_on_after_a_load(tmp_path: Path) -> None:
    """Theirs: orthonormality is off by 0.22 after one step from a loaded adapter."""
    model = adapted()
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    assert train(model) == train(loaded)
    assert worst_rotation(loaded) < 1e-6


def test_defect_03_a_load_keeps_activation_dropout_and_dtype(tmp_path: Path) -> None:
    """Theirs: all three are lost, and a float32 W is rounded to bfloat16."""
    model = adapted(activation="gelu", dropout=0.25)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model))
    for edit in edits_of(loaded):
        assert edit.activation is torch.nn.functional.gelu and edit.dropout.p == 0.25
        assert {p.dtype for p in edit.parameters()} == {torch.float32}
    half = PeftModel.from_pretrained(tiny("llama").to(torch.bfloat16), tmp_path)
    for a, b in zip(edits_of(half), edits_of(model), strict=True):
        assert torch.equal(a.weight, b.weight) and a.weight.dtype == torch.float32


def test_defect_04_eval_reaches_the_dropout() -> None:
    """Theirs: dropout stays on after model.eval()."""
    model = adapted(dropout=0.5).eval()
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model, prompt_lengths=[12]), logits(model, prompt_lengths=[12]))


def test_defect_05_left_padding() -> None:
    """Theirs: the wrong tokens are edited unless the caller shifts every location (logits off by 2.6)."""
    model, rows = adapted().eval(), prompts([12, 5])
    batch = padded(rows)
    together = model(**batch).logits[1, -5:]
    assert (together - logits(model, rows[1])).abs().max() < 1e-5
    assert edited_tokens(model, **batch)[1] == [7, 8, 9, 10, 11]


def test_defect_06_locations_left_out() -> None:
    """Theirs: every token is edited. Here there are none to give: the default is f7+l7."""
    model = get_peft_model(tiny("llama"), ReftConfig(task_type="CAUSAL_LM", init_weights="paper")).eval()
    tokens = edited_tokens(model, input_ids=prompts([20])[0][None])
    assert tokens == [[*range(7), *range(13, 20)]]


def test_defect_07_other_hooks_stay() -> None:
    """Theirs: every forward deletes all hooks on the model, other people's too."""
    base, calls = tiny("llama"), []
    modules = [base, base.model, base.model.layers[0], base.model.layers[0].mlp]
    for module in modules:
        module.register_forward_hook(lambda *_: calls.append("after"))
        module.register_forward_pre_hook(lambda *_: calls.append("before"))
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=2)).eval()
    row = prompts([8])[0][None]
    model(input_ids=row)
    model.generate(row, **search())
    model.add_adapter("other", ReftConfig(task_type="CAUSAL_LM", r=1))
    model.delete_adapter("other")
    model.base_model.unload()
    calls.clear()
    base(input_ids=row)
    assert calls.count("before") == calls.count("after") == 4
    assert all(len(m._forward_hooks) == len(m._forward_pre_hooks) == 1 for m in modules)


def test_defect_08_generation_without_cache() -> None:
    """Theirs: only the first step is edited."""
    model, rows = adapted().eval(), prompts([12, 5])
    batch = without_positions(padded(rows))
    outputs = [model.generate(**batch, **search(use_cache=use_cache)) for use_cache in (True, False)]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert (torch.stack(outputs[0].logits) - torch.stack(outputs[1].logits)).abs().max() < 1e-5


def test_defect_09_formula_and_positions_survive(tmp_path: Path) -> None:
    """Theirs: DiReFT reloads as NoReFT; a suffix in training is the end of the answer; decode steps are edited."""
    model = adapted(method="direft").eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert type(edits_of(loaded)[0]).__name__ == "DiReFT"
    row = prompts([12])[0][None]
    labels = row.masked_fill(torch.arange(12) < 8, -100)
    assert edited_tokens(loaded, input_ids=row, labels=labels) == [[0, 1, 5, 6, 7]]
    rows = prompts([12, 5])
    check_generated(loaded, loaded.generate(**without_positions(padded(rows)), **search()), rows, ["default"] * 2)


def test_defect_10_dropout_spares_the_hidden_state() -> None:
    """Theirs: dropout hits the whole edited hidden state. Here an edit of zero stays zero under any dropout."""
    model = adapted(dropout=0.9, init_weights=True).train()
    trained = logits(model, prompt_lengths=[12])
    with model.disable_adapter():
        assert torch.equal(trained, logits(model))


def test_defect_11_the_last_prompt_token_and_no_answer_token() -> None:
    """Theirs: the true last prompt token is missed, surplus edits hit the first answer token, 'x7' is no edit."""
    model = adapted(positions="f7+l7").eval()
    rows = prompts([12, 12, 20])
    for row, n, expected in zip(rows, (5, 8, 16), ([*range(5)], [*range(8)], [*range(7), *range(9, 16)]), strict=True):
        labels = row.masked_fill(torch.arange(len(row)) < n, -100)[None]
        assert edited_tokens(model, input_ids=row[None], labels=labels) == [expected]
    for text in ("x7", ""):
        with pytest.raises(ValueError, match="is not a position"):
            parse_positions(text)


def test_defect_12_what_is_saved(tmp_path: Path) -> None:
    """Theirs: a non-empty folder is skipped with a warning; positions, tied and base model are not stored."""
    base = AutoModelForCausalLM.from_pretrained(BASE)
    config = ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l3", tied=False, init_weights="paper")
    model = get_peft_model(base, config).eval()
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    train(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["positions"], saved["tied"], saved["base_model_name_or_path"]) == ("f2+l3", False, str(BASE))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert all(".reft.reft_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("case", ["last_layer", "ragged", "beams", "compile", "load_on_cpu", "load_noreft"])
def test_defect_13_what_raised(case: str, tmp_path: Path) -> None:
    """Theirs: each of these raises."""
    model, rows = adapted(method="noreft" if case == "load_noreft" else "loreft").eval(), prompts([12, 5, 9])
    if case == "last_layer":
        last = adapted(layers=[-1])
        assert [m.site.name for m in last.modules() if isinstance(m, ReftLayer)] == ["model.layers.2"]
    elif case == "ragged":
        together = model(**padded(rows, "right")).logits
        for i, row in enumerate(rows):
            assert (together[i, : len(row)] - logits(model, row)).abs().max() < 1e-5
    elif case == "beams":
        out = model.generate(**without_positions(padded(rows)), **search(num_beams=3))
        alone = model.generate(rows[1][None], **search(num_beams=3))
        assert torch.equal(out.sequences[1, -6:], alone.sequences[0, -6:])
    elif case == "compile":
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert (logits(compiled) - logits(model)).abs().max() < 1e-5
    else:
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, torch_device="cpu").eval()
        assert torch.equal(logits(loaded), logits(model))


def test_defect_14_the_classifier_head_is_saved(tmp_path: Path) -> None:
    """Theirs: the score collapses on reload, as the head was not saved; here that needs no word from the user."""
    model = adapted("bert_seq_cls", task_type="SEQ_CLS")
    batch = padded(prompts([12, 5, 9]), "right")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model.train()(**without_positions(batch), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert_seq_cls"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**without_positions(batch)).logits, model(**without_positions(batch)).logits)
        head = loaded.base_model.model.classifier
        assert not torch.equal(head.original_module.weight, head.modules_to_save["default"].weight)
