"""Bases of which accelerate keeps blocks on disk: loaded edits are those of the file, and a fresh adapter trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batch_for, outputs_of, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trimtab import ReftConfig
from trimtab.adapter.weights import WEIGHTS

PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
METHODS = {"loreft": {"positions": "f2+l2", "tied": False}, "red": {"positions": "all"}}


@pytest.fixture(params=METHODS)
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, torch.Tensor]:
    """A folder with a base, an adapter trained on it, and the logits of both together."""
    monkeypatch.chdir(tmp_path)  # PEFT writes what is on disk anew, below the working directory
    tiny("llama").save_pretrained(tmp_path / "base")
    config = ReftConfig(task_type="CAUSAL_LM", method=request.param, init_weights="paper", **METHODS[request.param])
    model = get_peft_model(tiny("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".reft_" in name and "halved" not in name:
                parameter.add_(0.3)
    model.save_pretrained(tmp_path / "emoji")
    return tmp_path, outputs_of(model.eval(), "llama")


def offloaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=PLACES, offload_folder=str(folder / "disk")
    ).eval()


def through_peft(folder: Path) -> Any:
    places = {f"base_model.model.{name}": device for name, device in PLACES.items()}
    return PeftModel.from_pretrained(
        offloaded(folder), folder / "emoji", device_map=places, offload_folder=str(folder / "again")
    )


def as_second(folder: Path) -> Any:
    model = get_peft_model(offloaded(folder), ReftConfig(task_type="CAUSAL_LM", layers=[1]))
    model.load_adapter(folder / "emoji", "emoji")
    model.set_adapter("emoji")
    return model.eval()


def by_transformers(folder: Path) -> Any:
    model = offloaded(folder)
    model.load_adapter(str(folder / "emoji"))
    return model.eval()


@pytest.mark.parametrize("load", [through_peft, as_second, by_transformers])
def test_loaded_edits_are_those_of_the_file(load: Any, saved: tuple[Path, torch.Tensor]) -> None:
    folder, expected = saved
    model = load(folder)
    assert not torch.equal(outputs_of(offloaded(folder), "llama"), expected)
    for _ in range(2):
        assert torch.equal(outputs_of(model, "llama"), expected)
    model.save_pretrained(folder / "copy")
    own = folder / "copy" / ("emoji" if load is as_second else "")
    ours, theirs = load_file(own / WEIGHTS), load_file(folder / "emoji" / WEIGHTS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_fresh_adapter_trains(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    gradients = []
    for base in (tiny("llama"), offloaded(tmp_path)):
        torch.manual_seed(0)
        model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", positions="f2+l2", init_weights="paper"))
        batch = batch_for("llama")
        model(**batch, labels=batch["input_ids"].masked_fill(torch.arange(10) < 5, -100)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 9 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]
