"""`tune` and `compare` as commands: what they search, write, resume and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from trimtab.errors import RunError
from trimtab.recipe.load import load_recipe
from trimtab.runs import trial
from trimtab.study.search import Found, TuneSpec, tune
from trimtab.where.layers import layer_sets

ROWS = [("cat", "cats"), ("dog", "dogs"), ("horse", "horses"), ("river", "rivers")]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    lines = [json.dumps({"input": a, "output": b}) + "\n" for a, b in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    task = {"type": "generation", "prompt": "{input}", "answer": "{output}", "max_new_tokens": 3}
    made = {
        "model": str(Path(__file__).parents[2] / "models/tiny-llama"),
        "output": str(tmp_path / "runs"),
        "dtype": "float32",
        "training": {"max_steps": 1, "batch_size": 4},
        "compare": {"methods": ["loreft", "untuned"], "learning_rates": [1e-3], "seeds": 1},
        "tasks": {"plural": {**task, "data": dict.fromkeys(("train", "validation", "test"), "rows.jsonl")}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(made))
    return path


def search(recipe: Any, trials: int, watch: Any = lambda *_: None) -> Found:
    return tune(recipe.experiments()["plural"], recipe.tune, Path(recipe.output) / "tune", 8, trials, watch)


def test_a_search_is_resumed_and_leaves_a_recipe(recipe: Path, trimtab: Command, tmp_path: Path) -> None:
    code, out = trimtab("tune", recipe, "--trials", 2)
    assert code == 0 and out.count("validation") >= 2, out
    tuned = load_recipe(tmp_path / "recipe-tuned.yaml")
    adapter = tuned.tasks["plural"].adapter
    assert adapter.positions in TuneSpec().positions and adapter.r in TuneSpec().r
    assert tuned.tasks["plural"].training.max_steps == 1
    trials = [json.loads(p.read_text()) for p in (tmp_path / "runs/tune/trials").rglob("*.json")]
    assert len(trials) == 2 and all("validation" in t and "test" not in t for t in trials)
    code, out = trimtab("tune", recipe, "--trials", 2)
    assert code == 2 and "recipe-tuned.yaml is there already" in out
    seen: list[int] = []
    search(load_recipe(recipe), 3, lambda number, *_: seen.append(number))
    assert seen == [2]  # the first two are in the journal
    drawn = [json.loads(p.read_text())["run"] for p in (tmp_path / "runs/tune/trials").rglob("*.json")]
    assert len({json.dumps([d["settings"], d["learning_rate"]]) for d in drawn}) == 3  # none drawn again
    other = load_recipe(recipe, settings=["training.max_steps=2"])
    search(other, 1, lambda number, *_: seen.append(number))
    assert seen == [2, 0]  # another search
    best = search(load_recipe(recipe), 3)
    assert {"r", "positions", "layers"} == best.settings.keys() and best.learning_rate > 0


def test_a_search_in_which_nothing_trains_says_so(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RunError("the loss is NaN")

    monkeypatch.setattr(trial, "_run", fail)
    with pytest.raises(RunError, match="no trial trained"):
        search(load_recipe(recipe), 2)


def test_layers_of_a_small_model() -> None:
    assert layer_sets(2) == {"all": "all", "first": [0], "last": [1]}
    sets = layer_sets(8)
    assert sets["lower"] + sets["middle"] + sets["upper"] == list(range(8))


def test_compare_writes_its_report_and_reads_what_is_done(
    recipe: Path, trimtab: Command, tmp_path: Path, inline: None
) -> None:
    code, out = trimtab("compare", recipe, "--jobs", 1)
    assert code == 0, out
    folder = tmp_path / "runs/compare"
    assert {"report.html", "report.md", "report.json", "report-plural.png", "trials"} == {
        p.name for p in folder.iterdir()
    }
    assert "untuned" in out and "! plural: This task tells nothing of methods" in out
    made = {p: p.stat().st_mtime_ns for p in (folder / "trials").rglob("*.json")}
    code, _ = trimtab("compare", recipe, "--jobs", 1)
    assert code == 0 and made == {p: p.stat().st_mtime_ns for p in (folder / "trials").rglob("*.json")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--few-shot", "4,x"], "give positive numbers of examples"),
        (["--ablate", "rank"], "there are positions, layers"),
        (["--method", "nope"], "'nope' is no method"),
        (["--task", "nope"], "task 'nope' is not in the recipe"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str],
    message: str,
    recipe: Path,
    trimtab: Command,
    tmp_path: Path,
) -> None:
    code, out = trimtab("compare", recipe, *arguments)
    assert code == 2 and message in out
    assert not (tmp_path / "runs").exists()
