"""Two adapters side by side: against itself, against its own LoRA, at known angles, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trimtab import ReftConfig
from trimtab.adapter import compared
from trimtab.errors import AdapterError
from trimtab.interop.convert import convert
from trimtab.study.sidebyside import compare_adapters
from trimtab.study.sidebyside_page import in_short, page

MODEL = str(Path(__file__).parents[2] / "models/tiny-llama")
PROMPTS = ("a cat is", "the word dog in the plural")


def saved(folder: Path, config: Any) -> str:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(str(folder))
    return str(folder)


def reft(**fields: Any) -> ReftConfig:
    return ReftConfig(**{"task_type": "CAUSAL_LM", "r": 2, "init_weights": "paper", **fields})


def test_an_adapter_beside_itself(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", reft(positions="f1+l2"))
    found = compare_adapters(one, one, PROMPTS, model=MODEL)
    assert all(line.values[0] == line.values[1] for line in found.settings)
    assert all(block.prompt[0] == block.prompt[1] for block in found.blocks)
    assert all(block.overlap == pytest.approx(1) and block.cka == pytest.approx(1) for block in found.blocks)
    assert all(angle < 0.1 for block in found.blocks for angle in block.angles)
    assert found.total.parameters[0] == 8 * 2 * (2 * 192) + 8 * 2
    assert all(text.prompt < len(text.tokens) for text in found.texts)


def test_an_edit_beside_the_lora_that_it_is(tmp_path: Path) -> None:
    ours = saved(tmp_path / "ours", reft(positions="all", site="mlp"))
    convert(Path(ours), tmp_path / "lora", "lora")
    found = compare_adapters(ours, tmp_path / "lora", PROMPTS, model=MODEL)
    for block in found.blocks:
        # The bundled model is stored in bf16, in which the two round apart.
        assert block.prompt[0] == pytest.approx(block.prompt[1], rel=0.05) and (block.cka or 0) > 0.99
        assert (block.overlap or 0) > 0.8
    assert {line.name: line.values for line in found.settings}["tokens"] == ("every token", "every token")


def test_known_angles() -> None:
    plane = torch.eye(6, dtype=torch.double)[:2]
    turned = plane.clone()
    turned[1] = math.cos(0.5) * plane[1] + math.sin(0.5) * torch.eye(6, dtype=torch.double)[2]
    assert compared.overlap(plane, turned) == pytest.approx((1 + math.cos(0.5) ** 2) / 2)
    assert compared.overlap(plane, torch.eye(6, dtype=torch.double)[3:5]) == pytest.approx(0)
    assert compared.overlap(plane, plane[:0]) is None
    states = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    assert compared.cka(states, 3 * states @ rotation + 1) == pytest.approx(1)
    assert (compared.cka(states, torch.randn(30, 6, generator=torch.Generator().manual_seed(2))) or 0) < 0.6


def test_the_command(tmp_path: Path, trimtab: Command) -> None:
    ours = saved(tmp_path / "loreft", reft(positions="f1+l2"))
    lora = saved(tmp_path / "lora", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    html = tmp_path / "both.html"
    code, said = trimtab("show", ours, lora, "--prompt", "a cat is", "--model", MODEL, "-o", html)
    assert code == 0, said
    for words in (
        "α/r = 8/4 = 2",
        "(f1+l2)",
        "can be merged",
        "target_modules",
    ):
        assert words in " ".join(said.split()), said
    assert page.__name__ == "page" and html.read_text().count("<svg") == 2 and "http" not in html.read_text()
    assert trimtab("show", ours, lora, "-o", html)[0] == 2  # nothing is written over
    assert "go with two adapters" in trimtab("show", ours, "--prompt", "x")[1]
    flat = " ".join(said.split())
    assert all(words in flat for words in ("CKA, ", "A: loreft", "B: lora", "kB"))
    assert "the first token and the last 2 tokens of the prompt (f1+l2)" in html.read_text()
    for line in in_short(compare_adapters(ours, lora, ["a cat is"], model=MODEL)):
        assert line in flat and escape(line) in html.read_text()
    assert "A (loreft) has 6,160 parameters (24.6 kB), B (lora)" in flat


def test_the_figures_as_json(tmp_path: Path, trimtab: Command) -> None:
    one = saved(tmp_path / "one", reft(positions="f1+l2"))
    (tmp_path / "prompts.txt").write_text("a cat is\n\nthe word dog in the plural\n")
    code, said = trimtab("show", one, one, "--prompts", tmp_path / "prompts.txt", "--json", "--model", MODEL)
    found = json.loads(said)
    assert code == 0 and len(found["texts"]) == 2 and len(found["blocks"]) == 8
    plain = asdict(compare_adapters(one, one, PROMPTS, model=MODEL))
    assert found == json.loads(json.dumps(plain))
    (tmp_path / "prompts.txt").write_text("\n")
    code, said = trimtab("show", one, one, "--prompts", tmp_path / "prompts.txt")
    assert code == 2 and "holds no text" in said


def test_what_is_refused(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", reft(positions="f1+l2"))
    other = saved(tmp_path / "other", reft(positions="f1+l2"))
    config = Path(other) / "adapter_config.json"
    config.write_text(config.read_text().replace(MODEL, "someone/else"))
    with pytest.raises(AdapterError, match=r"only adapters of one base model are compared"):
        compare_adapters(one, other)
    with pytest.raises(AdapterError, match=r"a file; give the folder"):
        compare_adapters(one, f"{other}/adapter_model.safetensors")
