"""Finished runs of earlier versions, which knew fewer keys: they are read, not orphaned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.recipe.load import load_recipe
from trimtab.runs import trial as trials
from trimtab.runs.apply import Applied
from trimtab.runs.earlier import completed, completed_trial
from trimtab.runs.experiment import Trial
from trimtab.runs.train import evaluate_runs, train
from trimtab.runs.trial import Outcome, run_trial
from trimtab.runs.ways import as_way

MODEL = Path(__file__).parents[2] / "models/tiny-llama"
KEYS = [
    ("dtype",),
    ("attention",),
    ("task", "score"),
    ("task", "data", "separator"),
    ("task", "data", "limit", "test"),
    ("task", "adapter", "tied"),
    ("task", "training", "too_long"),
    ("task", "training", "gradient_accumulation"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    rows = [{"text": f"a {word}", "mood": mood} for word, mood in [("cat", "tame"), ("wolf", "wild")] * 4]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"type": "classification", "text": "text", "label": "mood", "data": {"train": "rows.jsonl"}}
    made = {"model": str(MODEL), "output": str(folder / "runs"), "training": {"max_steps": 1}, "tasks": {"mood": task}}
    (folder / "recipe.yaml").write_text(json.dumps(made))
    return folder / "recipe.yaml"


def without(described: dict[str, Any], key: tuple[str, ...]) -> dict[str, Any]:
    """A copy that lacks a key."""
    copy: dict[str, Any] = json.loads(json.dumps(described))
    inner = copy
    for part in key[:-1]:
        inner = inner[part]
    del inner[key[-1]]
    return copy


def test_a_run_whose_file_lacks_keys_is_done_scored_and_used(recipe: Path) -> None:
    settings = load_recipe(recipe)
    train(settings.experiments(), settings.output)
    file, adapter = (Path(settings.output) / "mood" / name for name in ("run.json", "adapter_model.safetensors"))
    said, made = json.loads(file.read_text()), adapter.stat().st_mtime_ns
    for key in KEYS:
        said["run"] = without(said["run"], key)
    file.write_text(json.dumps(said))
    train(settings.experiments(), settings.output)
    assert adapter.stat().st_mtime_ns == made
    assert evaluate_runs(settings.experiments(), settings.output)["mood"]["examples"] == 1
    assert Applied(file.parent).experiment.training.too_long == "leave_out"


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_a_key_that_is_missing_is_at_its_default(recipe: Path, key: tuple[str, ...]) -> None:
    from trimtab.runs.train import described

    now = described(load_recipe(recipe).experiments()["mood"])
    assert completed(without(now, key)) == now
    other = described(load_recipe(recipe, ["adapter.tied=false", "dtype=float32"]).experiments()["mood"])
    assert completed(now) != other and completed(other) == other


def test_what_is_no_description_stays_as_it_is() -> None:
    for said in ({}, {"task": {"type": "divination"}}, {"task": {"type": "regression", "gone": 1}}):
        assert completed(said) == completed_trial(said) == said


def test_a_trial_of_fewer_keys_is_not_run_again(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_recipe(recipe).experiments()["mood"]
    runs: list[Trial] = []

    def scored(one: Trial) -> Outcome:
        runs.append(one)
        return Outcome(validation=0.5)

    monkeypatch.setattr(trials, "_run", scored)
    one = Trial(experiment, as_way("loreft", experiment.adapter), 1e-3, 0)
    run_trial(one, tmp_path)
    (file,) = tmp_path.rglob("*.json")
    said = json.loads(file.read_text())
    for key in (("attention",), ("examples",), ("task", "training", "too_long"), ("settings", "tied")):
        said["run"] = without(said["run"], key)
    file.unlink()
    file.with_stem("named-by-fewer").write_text(json.dumps(said))
    assert run_trial(one, tmp_path).validation == 0.5 and len(runs) == 1
    run_trial(Trial(experiment, as_way("loreft", experiment.adapter), 2e-3, 0), tmp_path)
    assert len(runs) == 2
