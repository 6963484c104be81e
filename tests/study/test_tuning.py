"""`tune` and `compare` as commands: what they search, write, resume and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from trimtab.errors import RunError
from trimtab.recipe.load import load_recipe
from trimtab.recipe.write import with_value, write_tuned
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
    tried = [json.loads(p.read_text())["run"] for p in (tmp_path / "runs/tune/trials").rglob("*.json")]
    assert all(rate is None or rate == float(f"{rate:.3g}") for rate in (one["learning_rate"] for one in tried))
    trials = [json.loads(p.read_text()) for p in (tmp_path / "runs/tune/trials").rglob("*.json")]
    assert len(trials) == 2 and all("validation" in t and "test" not in t for t in trials)
    code, out = trimtab("tune", recipe, "--trials", 2)
    assert code == 2 and "recipe-tuned.yaml is there already" in out
    seen: list[int] = []
    search(load_recipe(recipe), 3, lambda number, *_: seen.append(number))
    assert seen == [0, 2]  # the recipe's own is read, the second is in the journal
    drawn = [json.loads(p.read_text())["run"] for p in (tmp_path / "runs/tune/trials").rglob("*.json")]
    assert len({json.dumps([d["settings"], d["learning_rate"]]) for d in drawn}) == 3  # none drawn again
    other = load_recipe(recipe, settings=["training.max_steps=2"])
    search(other, 1, lambda number, *_: seen.append(number))
    assert seen == [0, 2, 0]  # another search
    best = search(load_recipe(recipe), 3)
    assert {"r", "positions", "layers"} == best.settings.keys() and best.learning_rate > 0


@pytest.mark.parametrize("name", ["tune", "compare"])
def test_without_validation_nothing_is_chosen(name: str, recipe: Path, trimtab: Command) -> None:
    made = json.loads(recipe.read_text())
    made["tasks"]["plural"]["data"]["validation"] = False
    recipe.write_text(json.dumps(made))
    code, out = trimtab(name, recipe)
    assert code == 2 and "validation: false" in out and "Traceback" not in out, out
    assert not list(recipe.parent.rglob("trials/**/*.json"))


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
    folder = tmp_path / "runs/compare"
    code, out = trimtab("compare", recipe, "--dry-run")
    assert code == 0 and not folder.exists(), out
    (trials,) = re.findall(r"(\d+) trials[^;]*; 0 are done", " ".join(out.split()))
    code, out = trimtab("compare", recipe, "--jobs", 1)
    assert code == 0, out
    assert {"report.html", "report.md", "report.json", "report-plural.png", "trials"} == {
        p.name for p in folder.iterdir()
    }
    assert "untuned" in out and "! plural: This task tells nothing of methods" in out
    code, out = trimtab("compare", recipe, "--dry-run")
    assert f"{trials} are done. These trained for" in " ".join(out.split())
    made = {p: p.stat().st_mtime_ns for p in (folder / "trials").rglob("*.json")}
    code, _ = trimtab("compare", recipe, "--jobs", 1)
    assert code == 0 and made == {p: p.stat().st_mtime_ns for p in (folder / "trials").rglob("*.json")}
    whole = (folder / "report.md").read_text()
    code, out = trimtab("compare", recipe, "--jobs", 1, "--method", "loreft")
    assert code == 0 and "report.md has more methods or tasks and is left as it is" in " ".join(out.split()), out
    assert whole == (folder / "report.md").read_text()
    assert "untuned" not in (folder / "report-part.md").read_text()


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


COMMENTED = """\
# my words
model: {model}          # the small one
adapter:
  r: 2                  # rank
  positions: f1+l2
training: {{max_steps: 1, batch_size: 4}} # short
tasks:
  plural:               # one -> many
    type: generation
    data: {{train: rows.jsonl, validation: rows.jsonl}}
    prompt: "{{input}}"   # as it is
    answer: "{{output}}"
"""


def test_a_tuned_recipe_keeps_its_comments_and_has_an_output_of_its_own(recipe: Path, tmp_path: Path) -> None:
    text = COMMENTED.format(model=Path(__file__).parents[2] / "models/tiny-llama")
    recipe.write_text(text)
    found = {"plural": Found({"r": 8, "positions": "f3+l3", "layers": [0, 1]}, 0.0012345, 0.5)}
    output = tmp_path / "new/tuned.yaml"
    for place in (tmp_path / "tuned.yaml", output):
        place.parent.mkdir(exist_ok=True)
        settings = [f"output={tmp_path / 'runs'}", "seed=3"]
        runs = write_tuned(place, load_recipe(recipe, settings), found, recipe, settings)
        made = load_recipe(place)
        task = made.tasks["plural"]
        assert (task.adapter.r, task.adapter.positions, task.adapter.layers) == (8, "f3+l3", [0, 1])
        assert (task.training.learning_rate, task.training.max_steps, made.seed) == (0.0012345, 1, 3)
        assert made.output == runs == str(tmp_path / "runs-tuned")
        kept = ["# my words", "# the small one", "# rank", "# short", "# one -> many", "# as it is"]
        assert [comment for comment in kept if comment not in place.read_text()] == []
    assert recipe.read_text() == text


@pytest.mark.parametrize(
    ("text", "place", "value", "expected"),
    [
        ("a: 1 # one\nb: 2\n", ["a"], 3, "a: 3 # one\nb: 2\n"),
        ("a:\n  b: 1 # x\n  c: 2\n", ["a", "d"], "y", 'a:\n  b: 1 # x\n  d: "y"\n  c: 2\n'),
        ("a: {b: 1} # x\n", ["a", "c"], [1], "a: {c: [1], b: 1} # x\n"),
        ("a: # x\nb: 2", ["a", "c"], 1, "a: {c: 1} # x\nb: 2"),
        ("a: 1\n", ["b", "c", "d"], 2, "a: 1\nb: {c: {d: 2}}\n"),
        ("a:\n  - 1 # x\n  - 2\n# end\n", ["a"], "all", 'a:\n  "all"\n# end\n'),
        ("a: |\n  text\n  more\nb: 1\n", ["b"], 2, "a: |\n  text\n  more\nb: 2\n"),
    ],
)
def test_a_value_changes_in_place(text: str, place: list[str], value: Any, expected: str) -> None:
    assert with_value(text, place, value) == expected


def test_where_one_text_stands_in_two_places_the_recipe_is_right_without_comments(recipe: Path, tmp_path: Path) -> None:
    entry = COMMENTED.format(model=Path(__file__).parents[2] / "models/tiny-llama").replace("  plural:", "  plural: &p")
    recipe.write_text(entry + "  other: *p\n")
    found = {"plural": Found({"r": 8, "positions": "f3+l3", "layers": [0, 1]}, 0.001, 0.5)}
    write_tuned(tmp_path / "tuned.yaml", load_recipe(recipe), found, recipe)
    assert [task.adapter.r for task in load_recipe(tmp_path / "tuned.yaml").tasks.values()] == [8, 2]


def test_tuning_never_returns_worse_than_the_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool, float]] = []
    scores = iter([0.5, 0.4, 0.5, 0.6])

    def scored(*_: Any) -> trial.Outcome:
        return trial.Outcome(validation=next(scores))

    monkeypatch.setattr(trial, "_run", scored)
    spec = load_recipe(recipe)
    best = search(spec, 3, lambda number, found: seen.append((number, found.own, found.validation)))
    assert seen == [(0, True, 0.5), (1, False, 0.4), (2, False, 0.5)]
    assert best.own and best.settings["r"] == spec.tasks["plural"].adapter.r
    assert not search(spec, 4).own
