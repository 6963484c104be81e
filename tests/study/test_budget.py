"""Equal budgets: the most that fits, by parameters counted on the real model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from trimtab.recipe.load import load_recipe
from trimtab.runs.models import Base
from trimtab.runs.trial import trained_parameters
from trimtab.runs.ways import as_way
from trimtab.study.budget import fitted, spread

ROOT = Path(__file__).parents[2]


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(ROOT)
    return load_recipe(ROOT / "recipes/words.yaml", settings=["dtype=float32"]).experiments()["plural"]


@pytest.mark.parametrize(
    ("name", "budget", "settings"),
    [
        ("loreft", 12_320, {"r": 4, "layers": "all"}),
        ("loreft", 12_319, {"r": 3}),
        ("loreft", 2_000, {"r": 1, "layers": [1, 3, 4, 6, 7]}),
        ("lora-qv", 41_000, {"r": 8, "lora_alpha": 16}),
        ("lora", 12_320, {"r": 1, "lora_alpha": 2}),
        ({"mine": {"peft_type": "LORA", "r": 64, "target_modules": "all-linear"}}, 12_320, {"r": 1, "lora_alpha": 2}),
        ({"at": {"peft_type": "LORA_AT", "r": 8, "lora_alpha": 16}}, 41_000, {"r": 8, "positions": "f1+l2"}),
        ("prompt", 12_320, {"num_virtual_tokens": 64}),
        ("loreft", 1_000_000, {"r": 192}),  # the model's width
    ],
)
def test_a_method_gets_the_most_that_fits(name: Any, budget: int, settings: dict[str, Any], experiment: Any) -> None:
    found = fitted(experiment, as_way(name, experiment.adapter), budget)
    assert {key: found.way.settings[key] for key in settings} == settings, found
    base = Base(experiment.source)
    adapted = found.way.build(base.load(experiment.task.head, 0).model, "CAUSAL_LM")
    assert found.parameters == trained_parameters(adapted) <= budget
    assert f"{found.parameters:,} of {budget:,} parameters" in found.said


@pytest.mark.parametrize(
    ("name", "budget", "said"),
    [
        ("ia3", 12_320, "5,120 parameters, with nothing to choose"),
        ("full", 12_320, "3,935,424 parameters, with nothing to choose"),
        ("loreft", 100, "the fewest it can have; the budget is 100"),
        ("bitfit", 100, "the model has no biases"),
        ({"ada": {"peft_type": "ADALORA", "total_step": 9}}, 12_320, "of which r makes no more"),
    ],
)
def test_what_cannot_be_fitted_is_said(name: str, budget: int, said: str, experiment: Any) -> None:
    assert said in fitted(experiment, as_way(name, experiment.adapter), budget).said


def test_a_new_head_is_told_and_not_counted(trimtab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the console says is the number in the report."""
    (tmp_path / "mood.csv").write_text("text,label\n" + "a fine day,good\na bad day,ill\n" * 8)
    spec = {
        "type": "classification",
        "text": "text",
        "label": "label",
        "data": dict.fromkeys(["train", "test"], "mood.csv"),
    }
    compare = {"methods": ["loreft", "lora-qv"], "seeds": 1, "learning_rates": [1e-3], "reach": 0, "budget": 3_000}
    recipe = {
        "model": str(ROOT / "models/tiny-llama"),
        "output": "out",
        "dtype": "float32",
        "training": {"max_steps": 1},
        "tasks": {"mood": spec},
        "compare": compare,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.chdir(tmp_path)
    code, text = trimtab("compare", "recipe.yaml", "--jobs", 1)
    assert code == 0, text
    report = json.loads((tmp_path / "out/compare/report.json").read_text())
    lines = {line["name"]: line["parameters"] for line in report["tasks"]["mood"]["methods"]}
    for name in ("loreft", "lora-qv"):
        told = rf"mood, {name}: [^:]* gives ([\d,]+) of 3,000 parameters, ([\d,]+) with the new head"
        (said,) = re.findall(told, " ".join(text.split()))
        own, whole = (int(number.replace(",", "")) for number in said)
        assert lines[name] == whole == own + 2 * 192


def test_layers_are_spread() -> None:
    assert [spread(8, n) for n in (1, 2, 3, 8)] == [[7], [3, 7], [2, 5, 7], list(range(8))]
