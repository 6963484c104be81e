"""Recipes trained for real on the bundled model: what a run leaves, skips, resumes and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from trimtab.errors import DataError, RunError
from trimtab.recipe.load import load_recipe
from trimtab.runs.folder import RunFolder
from trimtab.runs.models import Base
from trimtab.runs.predict import predict
from trimtab.runs.train import evaluate_runs, train

ROOT = Path(__file__).parents[2]


def train_recipe(recipe: Any, only: list[str] | None = None, **how: Any) -> dict[str, dict[str, Any]]:
    return train(recipe.experiments(only), recipe.output, **how)


WORDS = [("cat", "cats"), ("dog", "dogs"), ("box", "boxes"), ("city", "cities"), ("man", "men"), ("leaf", "leaves")]


def write_recipe(folder: Path, positions: str = "f1+l2", **training: object) -> Path:
    rows = [{"input": a, "output": b} for a, b in WORDS]
    for split, some in (("train", rows), ("test", rows[:3])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    settings = {"learning_rate": 0.004, "max_steps": 6, "batch_size": 2, "checkpoint_every": 2, **training}
    recipe = {
        "model": str(ROOT / "models/tiny-llama"),
        "output": str(folder / "runs"),
        "dtype": "float32",
        "adapter": {"r": 2, "positions": positions, "dropout": 0.1},
        "training": settings,
        "tasks": {
            "plural": {
                "type": "generation",
                "data": {"train": "train.jsonl", "validation": "test.jsonl", "test": "test.jsonl"},
                "prompt": "{input}",
                "answer": "{output}",
                "max_new_tokens": 4,
            }
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def test_a_run_leaves_an_adapter_that_peft_loads_and_its_scores(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    seen: list[str] = []
    metrics = train_recipe(recipe, watch=lambda p: seen.append(p.state))["plural"]
    folder = tmp_path / "runs/plural"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
        "predictions.json",
        "run.json",
        "training.png",
    ]
    assert (
        metrics["parameters"]
        == 8 * (2 * 2 * 192 + 2)
        == sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values())
    )
    assert metrics["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert {"untuned score", "training", "tuned score", "done"} <= set(seen)
    assert evaluate_runs(recipe.experiments(), recipe.output)["plural"]["tuned"] == metrics["tuned"]["exact_match"]
    run = json.loads((folder / "run.json").read_text())
    builds = torch.__version__, torch.__version__.partition("+")[0]  # some wheels' own version says no +cu130
    assert run["run"]["seed"] == 0 and run["versions"]["torch"] in builds
    base = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    assert isinstance(PeftModel.from_pretrained(base, str(folder)), PeftModel)


def test_a_finished_run_is_skipped_and_other_settings_are_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    train_recipe(load_recipe(path))
    adapter = tmp_path / "runs/plural/adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    train_recipe(load_recipe(path))
    assert adapter.stat().st_mtime_ns == before
    other = load_recipe(write_recipe(tmp_path, learning_rate=0.002))
    with pytest.raises(RunError, match=r"other settings \(task.training.learning_rate\).*--no-resume --task plural"):
        train_recipe(other)
    assert adapter.stat().st_mtime_ns == before
    train_recipe(other, resume=False)
    assert adapter.stat().st_mtime_ns != before


def test_eval_refuses_an_adapter_that_is_not_the_recipes(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    metrics = train_recipe(load_recipe(path))["plural"]
    for settings in (["adapter.r=4", "adapter.positions=l1"], ["tasks.plural.prompt='{input}!'"], ["seed=1"]):
        other = load_recipe(path, settings)
        with pytest.raises(RunError, match="trained under other settings"):
            evaluate_runs(other.experiments(), other.output)
    scored = ["training.eval_batch_size=2", "tasks.plural.data.test=train.jsonl", "tasks.plural.score=overlap"]
    other = load_recipe(path, scored)
    result = evaluate_runs(other.experiments(), other.output)["plural"]
    assert (result["score"], result["split"], result["examples"]) == ("overlap", "test", 6)
    (tmp_path / "runs/plural/run.json").unlink()  # an adapter from elsewhere says nothing of its training
    assert (
        evaluate_runs(load_recipe(path).experiments(), other.output)["plural"]["tuned"]
        == metrics["tuned"]["exact_match"]
    )


def test_predictions_stand_beside_what_was_asked(tmp_path: Path) -> None:
    train_recipe(load_recipe(write_recipe(tmp_path)))
    left = json.loads((tmp_path / "runs/plural/predictions.json").read_text())
    assert (left["input"], left["expected"]) == (["cat", "dog", "box"], ["cats", "dogs", "boxes"])
    assert {len(answers) for answers in left.values()} == {3}


def test_no_task_starts_when_another_cannot(tmp_path: Path) -> None:
    """And what was mended is not held against the run, of which there is nothing yet."""
    path = write_recipe(tmp_path)
    recipe = json.loads(path.read_text())
    recipe["tasks"]["long"] = {**recipe["tasks"]["plural"], "training": {"max_length": 2}}
    path.write_text(json.dumps(recipe))
    earlier = tmp_path / "runs/plural/run.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"run": {"seed": 5}}')
    for resume in (True, False):
        with pytest.raises(DataError, match="long: none of 6 training examples fits in max_length 2"):
            train_recipe(load_recipe(path), resume=resume)
        assert list(earlier.parent.iterdir()) == [earlier]
    recipe["tasks"]["long"]["training"] = {}
    path.write_text(json.dumps(recipe))
    assert train_recipe(load_recipe(path), ["plural"])["plural"]["steps"] == 6


def test_a_base_in_four_bits_is_not_trained_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers marks one; bitsandbytes itself is not installed."""
    monkeypatch.setattr(LlamaForCausalLM, "is_loaded_in_4bit", True, raising=False)
    with pytest.raises(RunError, match="4 bits is not trained on a CPU"):
        train_recipe(load_recipe(write_recipe(tmp_path)))
    assert not (tmp_path / "runs/plural/adapter_model.safetensors").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs/plural").mkdir(parents=True)
    (tmp_path / "runs/plural/thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not left by trimtab"):
        train_recipe(load_recipe(write_recipe(tmp_path)))
    with pytest.raises(RunError, match="not left by trimtab"):
        train_recipe(load_recipe(write_recipe(tmp_path)), resume=False)
    assert (tmp_path / "runs/plural/thesis.txt").read_text() == "mine"


def test_a_run_killed_before_its_first_file_was_whole_starts_again(tmp_path: Path) -> None:
    (tmp_path / "runs/plural").mkdir(parents=True)
    (tmp_path / "runs/plural/.run.json.saving").write_text("{")
    assert train_recipe(load_recipe(write_recipe(tmp_path)))["plural"]["steps"] == 6


def test_a_classifier_takes_the_attention_and_the_padding_of_the_recipe(tmp_path: Path) -> None:
    """A config that calls another token padding would have the head read at a padded column."""
    shutil.copytree(ROOT / "models/tiny-llama", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "pad_token_id": 77}))
    rows = [{"text": t, "label": i % 2} for i, t in enumerate(["a good day", "bad"] * 4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tmp_path / 'model'}\nattention: eager\ntasks:\n"
        "  mood: {type: classification, text: text, label: label, data: {train: train.jsonl}}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    experiment = recipe.experiments()["mood"]
    base, task = Base(experiment.source), experiment.task
    model: Any = base.load(task.head, 0).model
    assert model.config._attn_implementation == "eager"
    encoded, _ = task.encode(base.tokenizer, task.examples("train"), training=False)
    together = predict(model, base.tokenizer, encoded)
    alone = predict(model, base.tokenizer, encoded, batch_size=1)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone))


@pytest.mark.parametrize("positions", [pytest.param("f1+l2", marks=pytest.mark.slow), "l2"])
def test_after_kill_9_a_resumed_run_ends_in_the_same_adapter(positions: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    uninterrupted = train_recipe(load_recipe(write_recipe(tmp_path / "whole", positions, max_steps=40)))["plural"]
    path = write_recipe(tmp_path / "killed", positions, max_steps=40)
    command = [sys.executable, "-m", "trimtab.cli", "train", str(path)]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed/runs/plural/checkpoints"
    deadline = time.monotonic() + 600  # on a machine that does other things
    while RunFolder(checkpoints.parent).last_checkpoint() is None and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/runs/plural/metrics.json").exists()
    half_written = checkpoints / "checkpoint-38"  # what a kill in the middle of a save leaves
    half_written.mkdir(exist_ok=True)
    (half_written / "trainer_state.json").write_text('{"global_st')
    state = json.loads(Path(RunFolder(checkpoints.parent).last_checkpoint() or "", "trainer_state.json").read_text())
    metrics = train_recipe(load_recipe(path))["plural"]
    assert metrics["train_loss"] == pytest.approx(uninterrupted["train_loss"])
    assert metrics["curve"] == uninterrupted["curve"] and metrics["curve"]["loss"][-1][0] == 40  # from the first step
    assert metrics["seconds"] > state["log_history"][-1]["seconds"] > 0  # what was trained before the kill counts
    assert bool(metrics["reuse"]["reused"]) == (positions == "l2")  # what is reused does not show in the bits
    file = "runs/plural/adapter_model.safetensors"
    whole, resumed = load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_packed_batches_train_as_padded_ones_do(tmp_path: Path) -> None:
    losses = {}
    for packing in (True, False):
        (folder := tmp_path / str(packing)).mkdir()
        path = write_recipe(folder, packing=packing)
        path.write_text(path.read_text().replace('"dropout": 0.1', '"dropout": 0.0'))
        losses[packing] = train_recipe(load_recipe(path))["plural"]["train_loss"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_a_classifier_saves_its_head(tmp_path: Path) -> None:
    rows = [{"text": t, "label": i % 2} for i, t in enumerate(["a good day", "a bad day", "good", "bad"] * 4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {ROOT / 'models/tiny-llama'}\noutput: {tmp_path / 'runs'}\ndtype: float32\n"
        "training: {max_steps: 20, learning_rate: 4e-3}\nadapter: {positions: l1}\n"
        "tasks:\n  mood: {type: classification, text: text, label: label,"
        " data: {train: train.jsonl, test: train.jsonl}}\n"
    )
    metrics = train_recipe(load_recipe(recipe))["mood"]
    assert any("score.weight" in key for key in load_file(tmp_path / "runs/mood/adapter_model.safetensors"))
    assert metrics["tuned"]["accuracy"] == 1.0
    assert evaluate_runs(load_recipe(recipe).experiments(), tmp_path / "runs")["mood"]["tuned"] == 1.0


def test_a_head_may_have_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    rows = [{"text": t, "label": i % 2} for i, t in enumerate(["a good day", "a bad day", "good", "bad"] * 4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = tmp_path / "recipe.yaml"

    def trained(rate: str) -> dict[str, torch.Tensor]:
        recipe.write_text(
            f"model: {ROOT / 'models/tiny-llama'}\noutput: {tmp_path / f'runs{rate}'}\ndtype: float32\n"
            "training: {max_steps: 1, warmup: 0, learning_rate: 1e-3, head_learning_rate: " + rate + "}\n"
            "adapter: {positions: l1}\ntasks:\n  mood: {type: classification, text: text, label: label,"
            " data: {train: train.jsonl, test: train.jsonl}}\n"
        )
        train_recipe(load_recipe(recipe))
        return load_file(tmp_path / f"runs{rate}/mood/adapter_model.safetensors")

    same, as_given, ten = trained("null"), trained("1e-3"), trained("1e-2")
    assert all(torch.equal(same[key], as_given[key]) for key in same)
    moved = {key for key in same if not torch.equal(same[key], ten[key])}
    assert moved == {key for key in same if "score" in key}
    # AdamW's first step is of the rate's size in each place where there is a gradient.
    apart = (same[next(iter(moved))] - ten[next(iter(moved))]).abs()
    assert apart.max() == pytest.approx(9e-3, rel=0.02)
