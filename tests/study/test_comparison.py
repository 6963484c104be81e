"""`compare`: every method for real on tiny models, the same budget for all, what is kept, chosen and reported."""

from __future__ import annotations

import gc
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from trimtab.errors import DataError, DivergedError, NotPossible, RecipeError, RunError
from trimtab.recipe.load import load_recipe
from trimtab.runs import experiment as asked
from trimtab.runs import kept, measures
from trimtab.runs import trial as trials
from trimtab.runs.experiment import Trial, fingerprints
from trimtab.runs.fit import TOO_LARGE
from trimtab.runs.measures import thinned, windows
from trimtab.runs.models import Base
from trimtab.runs.predict import mean_loss, predict
from trimtab.runs.summary import odd_data
from trimtab.runs.trial import Outcome, drawn, run_trial
from trimtab.runs.ways import WAYS, AdapterSpec, as_way
from trimtab.study import compare as comparison
from trimtab.study.ablations import adapter_variants
from trimtab.study.compare import Group, Study, by_worth, choose_ways
from trimtab.study.pages import write_report
from trimtab.study.plots import draw
from trimtab.study.report import Items, Line, TaskReport, _step, late_move, still_falling, summarise
from trimtab.study.tables import as_markdown
from trimtab.tasks.tokens import encode

ROOT = Path(__file__).parents[2]
QUICK = ("loreft", "lora", "prefix", "prompt", "bitfit", "ln", "head", "full", "untuned")
"""One method of each kind; the others are slow tests, which differ in PEFT's code alone or have tests of theirs."""
WORDS = [("cat", "cats"), ("dog", "dogs"), ("box", "boxes"), ("city", "cities"), ("man", "men"), ("leaf", "leaves")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a BERT with random weights and the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/tiny-llama")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(
        LlamaConfig(**sizes, **ids, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    ).save_pretrained(folder / "llama")
    BertModel(BertConfig(**sizes, **ids)).save_pretrained(folder / "bert")
    for name in ("llama", "bert"):
        tokenizer.save_pretrained(folder / name)
    return folder


def write_recipe(models: Path, folder: Path, kind: str = "generation", **compare: Any) -> Path:
    rows = [
        {"input": a, "output": b, "long": len(b) > 4, "size": len(b), "ends": [b[-1], b[-2]], "kinds": ["B-A", "O"]}
        for a, b in WORDS * 3
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": "rows.jsonl", "validation": "rows.jsonl", "test": "rows.jsonl", "limit": {"test": 8}}
    tasks: dict[str, dict[str, Any]] = {
        "generation": {"prompt": "{input}", "answer": "{output}", "max_new_tokens": 3},
        "classification": {"text": "input", "label": "long"},
        "regression": {"text": ["input", "output"], "label": "size"},
        "multi_label_classification": {"text": "input", "label": "ends"},
        "token_classification": {"text": "ends", "label": "kinds", "score": "f1"},
    }
    recipe = {
        "model": str(models / ("llama" if kind == "generation" else "bert")),
        "output": str(folder / "runs"),
        "dtype": "float32",
        "adapter": {"r": 2, "positions": "f1+l2" if kind == "generation" else "f2"},
        "training": {"max_steps": 2, "batch_size": 4, "warmup": 0.0},
        "compare": {"learning_rates": [1e-3, 1e-2], "reach": 0, "seeds": 2, **compare},
        "tasks": {"words": {"type": kind, "data": data, **tasks[kind]}},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def trial(recipe: Any, name: Any, rate: float = 1e-2, seed: int = 0) -> Trial:
    experiment = recipe.experiments()["words"]
    way = as_way(name, experiment.adapter)
    return Trial(experiment, way, rate if way.trains else None, seed, held_out=recipe.compare.held_out)


def study(
    recipe: Any, folder: Path, sizes: Any = (None,), jobs: int = 1, watch: Any = lambda group: None
) -> list[Group]:
    experiments = recipe.experiments()
    made = Study(experiments, choose_ways(experiments, recipe.compare), recipe.compare, folder, sizes)
    return made.run(jobs, watch)


@pytest.mark.parametrize(
    "name", [n if n in (*QUICK, "few-shot") else pytest.param(n, marks=pytest.mark.slow) for n in WAYS]
)
def test_every_method_trains_a_decoder_or_says_why_not(name: str, models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path))
    result = run_trial(trial(recipe, name), tmp_path / "trials")
    if name in ("head", "bitfit"):
        assert "no " in (result.impossible or "")
        return
    assert len(result.predictions) == 8
    if name in ("untuned", "few-shot"):
        assert result.parameters == 0 and result.seconds is None
        return
    assert (result.steps, result.tokens) == (2, expected_tokens(recipe))
    assert result.parameters > 0 and result.memory > 12 * result.parameters
    assert all(loss > 0 for _, loss in result.curve)


def expected_tokens(recipe: Any) -> int:
    """Of two batches in the order that the seed gives: the same for every method."""
    loreft = run_trial(trial(recipe, "loreft"), Path(recipe.output) / "again")
    return int(loreft.tokens)


@pytest.mark.parametrize("kind", ["generation", "classification"])
def test_a_lora_at_positions_is_a_lora_but_for_those(kind: str, models: Path, tmp_path: Path) -> None:
    """As many parameters, another result; at all tokens the same one, to rounding; positions are the adapter's own."""
    recipe = load_recipe(write_recipe(models, tmp_path, kind))
    targets = ["q_proj", "down_proj"] if kind == "generation" else ["query", "value"]
    lora = {"r": 2, "lora_alpha": 4, "target_modules": targets}
    settings = {
        "plain": {"peft_type": "LORA"},
        "here": {"peft_type": "LORA_AT"},
        "all": {"peft_type": "LORA_AT", "positions": "all"},
    }
    found = {
        name: run_trial(trial(recipe, {name: {**lora, **own}}), tmp_path / "trials") for name, own in settings.items()
    }
    plain, here, everywhere = found.values()
    assert here.run["settings"]["positions"] == recipe.adapter.positions
    assert plain.parameters == here.parameters == everywhere.parameters
    assert plain.validation_loss == pytest.approx(everywhere.validation_loss, rel=1e-5)
    assert plain.validation_loss != pytest.approx(here.validation_loss, rel=1e-5)
    assert plain.curve[0][1] == pytest.approx(here.curve[0][1], rel=1e-5)
    assert (plain.steps, plain.tokens) == (here.steps, here.tokens)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((n, "classification") for n in QUICK),
        *(pytest.param(n, "classification", marks=pytest.mark.slow) for n in WAYS if n not in QUICK),
        *((n, "regression") for n in ("loreft", "head")),
        *((n, "multi_label_classification") for n in ("loreft", "lora", "head", "full")),
        *((n, "token_classification") for n in ("loreft", "lora", "head", "full", "prompt", "prefix")),
    ],
)
def test_every_method_trains_an_encoder(name: str, kind: str, models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path, kind))
    result = run_trial(trial(recipe, name), tmp_path / "trials")
    if name == "few-shot" or (name, kind) == ("prompt", "token_classification"):
        assert result.impossible
        return
    assert len(result.predictions) == 8
    experiment = recipe.experiments()["words"]
    head = 65 * experiment.task.head.config["num_labels"]
    assert result.parameters == {"untuned": 0, "head": head}.get(name, result.parameters)
    if name not in ("untuned", "head"):
        assert result.parameters > head


def test_a_method_that_trains_changes_what_it_should_and_nothing_else(models: Path) -> None:
    for name, part in (
        ("full", ""),
        ("lora", "lora_"),
        ("beft", "beft_"),
        ("ln", "norm"),
        ("loreft", "reft_"),
        ("joint", "reft_|lora_"),
    ):
        model = LlamaForCausalLM.from_pretrained(models / "llama")
        adapted = as_way(name, AdapterSpec()).build(model, "CAUSAL_LM")
        trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
        assert trained and all(re.search(part, n) for n in trained), (name, trained)
        if name == "full":
            assert len(trained) == len(list(model.parameters()))


def test_a_study_runs_what_is_missing_and_nothing_twice(
    models: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["loreft", "lora", "untuned", "few-shot", "bitfit"]))
    seen: list[str] = []

    def run_all(recipe: Any) -> list[Group]:
        return study(recipe, tmp_path / "trials", watch=lambda group: seen.append(group.way.name))

    groups = {g.way.name: g for g in run_all(recipe)}
    assert sorted(seen) == sorted(groups)
    assert {seed: sorted(tried) for seed, tried in groups["lora"].tried.items()} == {0: [1e-3, 1e-2], 1: [1e-3, 1e-2]}
    assert [len(groups[n].seeds) for n in ("loreft", "lora", "untuned", "few-shot")] == [2, 2, 1, 2]
    assert groups["bitfit"].impossible == "the model has no biases"
    for name in ("loreft", "lora"):
        assert [r.validation for r in groups[name].seeds] == [
            max(r.validation for r in tried.values()) for tried in groups[name].tried.values()
        ]
        assert [r.seed for r in groups[name].seeds] == [0, 1]
    files = sorted((tmp_path / "trials").rglob("*.json"))
    more = recipe.model_copy(update={"compare": recipe.compare.model_copy(update={"seeds": 3})})
    run_all(more)
    added = set((tmp_path / "trials").rglob("*.json")) - set(files)
    assert sorted(f.parent.name for f in added) == ["few-shot", "lora", "lora", "loreft", "loreft"]
    tried: list[Trial] = []

    def run(trial: Trial) -> Outcome:
        tried.append(trial)
        raise NotPossible("the model has no biases")

    monkeypatch.setattr(trials, "_run", run)
    run_all(more)
    assert {t.way.name for t in tried} == {"bitfit"}  # what is not possible is asked again


def test_another_setting_or_other_data_is_another_trial(models: Path, tmp_path: Path) -> None:
    path = write_recipe(models, tmp_path)
    recipe = load_recipe(path)
    run_trial(trial(recipe, "loreft"), tmp_path / "trials")
    run_trial(trial(load_recipe(path), "loreft"), tmp_path / "trials")
    folder = tmp_path / "trials/words/loreft"
    assert len(list(folder.iterdir())) == 1
    raw = json.loads(path.read_text())
    raw["training"]["max_steps"] = 3
    path.write_text(json.dumps(raw))
    run_trial(trial(load_recipe(path), "loreft"), tmp_path / "trials")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("leaves", "leafs"))
    run_trial(trial(load_recipe(path), "loreft"), tmp_path / "trials")
    assert len(list(folder.iterdir())) == 3
    assert str(tmp_path) not in "".join(f.read_text() for f in folder.iterdir())  # results can be shared


def outcome(rate: float, validation: float | None, loss: float | None = None, **more: Any) -> Outcome:
    return Outcome(run={"learning_rate": rate}, validation=validation, validation_loss=loss, **more)


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        ([outcome(1e-3, 0.5, test={"exact_match": 0.9}), outcome(1e-2, 0.7), outcome(1e-1, 0.6)], 1e-2),
        ([outcome(1e-3, 0.7, 0.3), outcome(1e-2, 0.7, 0.2), outcome(1e-1, 0.7, 0.4)], 1e-2),  # ties: by the loss
        ([outcome(1e-4, 0.7), outcome(1e-3, 0.7), outcome(1e-2, 0.7)], 1e-3),  # of an earlier version: the middle one
        ([outcome(1e-3, None, failed="NaN"), outcome(1e-2, 0.0)], 1e-2),
    ],
)
def test_a_seed_takes_the_rate_best_on_validation(trials: list[Outcome], chosen: float) -> None:
    assert by_worth({one.learning_rate: one for one in trials})[0].learning_rate == chosen


@pytest.mark.parametrize(
    ("best", "reach", "tried"),
    [
        (4e-3, 3, [1e-3, 4e-3, 1.6e-2]),  # inside
        (6.4e-2, 3, [1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256]),  # until it is inside
        (1e-9, 2, [6.25e-5, 2.5e-4, 1e-3, 4e-3, 1.6e-2]),  # or the limit
        (1e-9, 0, [1e-3, 4e-3, 1.6e-2]),
    ],
)
def test_a_seed_goes_on_past_an_edge_that_is_best(
    best: float, reach: int, tried: list[float], models: Path, tmp_path: Path, inline: None, monkeypatch: Any
) -> None:
    def run(trial: Trial) -> Outcome:
        rate = trial.learning_rate or 0.0
        return outcome(rate, -abs(np.log(rate / best)), 0.0, test={"exact_match": 0.5}, predictions=["x"] * 8)

    monkeypatch.setattr(comparison, "run_trials", lambda some, *_: [run(one) for one in some])
    recipe = load_recipe(
        write_recipe(models, tmp_path, methods=["loreft", "full"], learning_rates=[1.6e-2, 1e-3, 4e-3], reach=reach)
    )
    groups = study(recipe, tmp_path / "trials")
    for group in groups:
        assert all(sorted(rates) == pytest.approx(tried) for rates in group.tried.values())
        assert group.at_edge(0) == (best < 1e-3)
    edge = "(2/2 edge)"
    assert (edge in as_markdown(summarise(groups, recipe.compare), {})) == (best < 1e-3)


def test_a_plan_knows_that_of_two_rates_one_is_at_the_edge(models: Path, tmp_path: Path, inline: None) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["loreft", "untuned"], reach=1))
    experiments = recipe.experiments()
    made = Study(experiments, choose_ways(experiments, recipe.compare), recipe.compare, tmp_path / "trials")
    assert made.plan().runs == 2 * 3 + 1
    made.run(1)
    assert (made.plan().runs, made.plan().done) == (7, 7)


def test_methods_have_rates_of_their_own(models: Path, tmp_path: Path) -> None:
    path = write_recipe(
        models, tmp_path, methods=["loreft", "full", "lora", "ia3", {"mine": {"peft_type": "LORA", "r": 2}}]
    )
    raw = json.loads(path.read_text())
    del raw["compare"]["learning_rates"]
    raw["compare"]["methods"].append({"same": {"peft_type": "LORA", "r": 2, "learning_rates": [0.5, 0.1]}})
    path.write_text(json.dumps(raw))
    recipe = load_recipe(path)
    experiments = recipe.experiments()
    made = Study(experiments, choose_ways(experiments, recipe.compare), recipe.compare, tmp_path)
    rates = {group.way.name: group.rates for group in made.groups}
    assert max(rates["full"]) < min(rates["loreft"]) < max(rates["loreft"]) < max(rates["ia3"])
    assert rates["mine"] == rates["lora"] and rates["lora"][1] / rates["lora"][0] == 2 and rates["same"] == (0.1, 0.5)
    settings = recipe.compare.model_copy(update={"learning_rates": [0.3]})
    of_all = Study(experiments, choose_ways(experiments, settings), settings, tmp_path)
    assert [g.rates for g in of_all.groups] == [(0.3,)] * 5 + [(0.1, 0.5)]  # a method's own come first
    assert as_way({"x": {"peft_type": "LORA", "learning_rates": [1]}}, AdapterSpec()).learning_rates == (1.0,)
    assert made.groups[-1].way.settings == made.groups[-2].way.settings  # the rates are no part of the method
    with pytest.raises(ValueError, match="learning_rates: 'high' is no list of positive numbers"):
        as_way({"x": {"peft_type": "LORA", "learning_rates": "high"}}, AdapterSpec())


def test_a_classifiers_report_has_the_head_alone(models: Path, tmp_path: Path) -> None:
    for kind, methods, expected in (
        ("classification", ["loreft", "lora"], ["loreft", "lora", "head"]),
        ("regression", ["head", "lora"], ["head", "lora"]),
        ("generation", ["loreft", "lora"], ["loreft", "lora"]),
    ):
        recipe = load_recipe(write_recipe(models, tmp_path, kind, methods=methods))
        found = choose_ways(recipe.experiments(), recipe.compare)["words"]
        assert [way.name for way in found] == expected
        assert [way.name for way in choose_ways(recipe.experiments(), recipe.compare, ["lora"])["words"]] == ["lora"]


def test_a_misspelt_method_of_the_command_gets_the_nearest(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["loreft", "lora"]))
    with pytest.raises(ValueError, match="--method 'lorra' is no method; did you mean lora"):
        choose_ways(recipe.experiments(), recipe.compare, ["lorra"])


def test_what_fails_counts_as_the_worst_and_is_said(
    models: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = trials._run

    def diverging(trial: Trial) -> Outcome:
        if trial.learning_rate == 1 or (trial.way.name, trial.seed) == ("lora", 1):
            raise RunError("the loss is NaN")
        return train(trial)

    monkeypatch.setattr(trials, "_run", diverging)
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["full", "lora"], learning_rates=[1e-3, 1]))
    full, lora = study(recipe, tmp_path / "trials")
    assert [run.learning_rate for run in full.seeds] == [1e-3, 1e-3]
    assert lora.scores[1] == 0.0 and lora.seeds[1].failed == "the loss is NaN"
    report = summarise([full, lora], recipe.compare)
    line = next(line for line in report.tasks["words"].methods if line.name == "lora")
    assert line.mean == pytest.approx(lora.scores[0] / 2) and line.failed_seeds == 1
    said = as_markdown(report, {})
    assert "(1/2 failed)" in said and "lora: failed: the loss is NaN" in said
    only = load_recipe(write_recipe(models, tmp_path, methods=["full", "untuned"], learning_rates=[1]))
    report = summarise(study(only, tmp_path / "trials"), only.compare)
    assert next(line for line in report.tasks["words"].finished if line.name == "full").mean == 0.0


def test_a_model_whose_loss_is_no_number_after_training_has_failed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "mean_loss", lambda *_, **__: float("nan"))
    result = run_trial(trial(load_recipe(write_recipe(models, tmp_path)), "loreft"), tmp_path / "trials")
    assert result.failed == "words: after training the loss on validation is nan" and result.validation is None


def test_the_validation_loss_is_the_models_own(models: Path, tmp_path: Path) -> None:
    """What single examples, unpadded, come to; virtual tokens take no part."""
    recipe = load_recipe(write_recipe(models, tmp_path))
    experiment = recipe.experiments()["words"]
    encoded: Any
    for name in ("loreft", "prompt", "lora"):
        base, way = Base(experiment.source), as_way(name, experiment.adapter)
        encoded, _ = experiment.encode(base.tokenizer, experiment.task.examples("validation")[:6], training=True)
        model: Any = way.build(base.load(experiment.task.head, 0).model, "CAUSAL_LM")
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        how = {"takes_prompts": way.takes_prompts, "equal_lengths": way.adds_tokens}
        alone = [mean_loss(model, base.tokenizer, [one], **how) for one in encoded]
        tokens = [sum(label >= 0 for label in one.labels) for one in encoded]
        expected = np.average(alone, weights=tokens)
        assert mean_loss(model, base.tokenizer, encoded, 4, **how) == pytest.approx(expected, rel=1e-4)


def test_a_report_is_whole(models: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "HELD_OUT_WINDOWS", 2)
    text = tmp_path / "text.txt"
    text.write_text("All is well that ends well, and nothing ends. " * 400)
    methods = ["loreft", "lora", "untuned", {"lora r1": {"peft_type": "lora", "r": 1}}, "bitfit"]
    recipe = load_recipe(write_recipe(models, tmp_path, methods=methods, learning_rates=[1e-2], held_out=str(text)))
    groups = study(recipe, tmp_path / "trials")
    report = write_report(groups, recipe.compare, tmp_path / "out", "report", "trimtab compare recipe.yaml")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "report-words.png",
    }
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(asdict(report)))
    task = report.tasks["words"]
    assert (task.reference, task.test_items, task.earlier) == ("loreft", 8, {})
    lines = {line.name: line for line in task.methods}
    found = lines["lora"].against_reference
    assert found is not None and found.verdict in ("better", "worse", "not told apart")
    assert "8 test items, 2 against 2 seeds" in (lines["lora"].sentence or "")
    assert lines["lora r1"].parameters < lines["lora"].parameters
    assert lines["untuned"].forgetting == 0 and lines["lora"].forgetting != 0
    page = (tmp_path / "out/report.html").read_text()
    assert "http" not in page and page.count("data:image/png;base64,") == 2  # wide and narrow
    for name in ("lora r1", "the model has no biases", "95% interval", "All trained at a learning rate of 0.01. "):
        assert name in page and name in (tmp_path / "out/report.md").read_text()


def answering(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any]) -> None:
    """Trials that answer the eight test items as told by the method's name."""

    def run(trial: Trial) -> Outcome:
        said = answers[trial.way.name]
        right = [a == e.answer for a, e in zip(said, trial.experiment.task.examples("test"), strict=True)]
        return outcome(
            trial.learning_rate or 0.0, 0.5, 0.1, test={"exact_match": float(np.mean(right))}, predictions=said
        )

    monkeypatch.setattr(comparison, "run_trials", lambda some, *_: [run(one) for one in some])


def test_a_task_on_which_nothing_beats_one_answer_tells_nothing(
    models: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [b for _, b in WORDS] + [b for _, b in WORDS[:2]]
    constant, half = ["cats"] * 8, [*right[:3], "cats", "dogs", "?", "?", "?"]
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["loreft", "lora"]))
    for answers, telling, seeds in (((right, constant), True, [0, 2]), ((half, constant), False, [0, 2])):
        answering(monkeypatch, dict(zip(("loreft", "lora"), answers, strict=True)))
        report = summarise(study(recipe, tmp_path / "trials"), recipe.compare)
        task = report.tasks["words"]
        assert (task.telling, task.constant) == (telling, 2 / 8)  # "cats" is right twice
        assert [line.constant_seeds for line in task.methods] == seeds
        assert [total.tasks for total in report.overall] == [int(telling)] * 2
        said = as_markdown(report, {})
        assert task.earlier == {"loreft": 4, "lora": 4}  # these know no predictions
        assert "kept neither loss nor predictions on validation: 4 of loreft, 4 of lora." in said
        assert ("tells nothing of methods" in said) != telling and "25.0 ± 0.0 (2/2 constant)" in said


@pytest.mark.parametrize("score", ["mcc", "f1"])
def test_constants_are_not_equal_where_one_item_tells_much(
    score: str, models: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods that always say the same of 38 and 2 items: one more found moves Matthews correlation by half."""
    rows = [{"input": f"it {i}", "long": "rare" if i % 20 == 0 else "common"} for i in range(40)]
    path = write_recipe(models, tmp_path, "classification", methods=["loreft", "lora"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = json.loads(path.read_text())
    raw["tasks"]["words"] |= {"score": score, "labels": ["common", "rare"]}
    raw["tasks"]["words"]["data"].pop("limit")
    path.write_text(json.dumps(raw))
    recipe = load_recipe(path)
    said = [0] * 40

    def run(trial: Trial) -> Outcome:
        return outcome(trial.learning_rate or 0.0, 0.0, 0.1, test={score: 0.0}, predictions=said)

    monkeypatch.setattr(comparison, "run_trials", lambda some, *_: [run(one) for one in some])
    report = summarise(study(recipe, tmp_path / "trials"), recipe.compare)
    found = report.tasks["words"].methods[1].against_reference
    assert found is not None and found.verdict == "not told apart" and found.high > 0.5
    assert report.tasks["words"].score == ("f1 of 'rare'" if score == "f1" else "mcc")


@pytest.mark.parametrize(
    ("kind", "score", "wanted", "wrong", "step"),
    [
        ("classification", "f1", [0, 0, 0, 0, 0, 0, 1, 1], None, 1 / 3),  # all right: one of two rare ones missed
        ("classification", "f1", [0, 0, 0, 0, 0, 0, 1, 1], {6: 0}, 2 / 3),  # and the other missed too
        ("multi_label_classification", None, [(0,), (), (), (), (), (), (), (0,)], {7: []}, 2 / 3),
    ],
)
def test_the_weight_of_one_item(
    kind: str,
    score: str | None,
    wanted: list[Any],
    wrong: dict[int, Any] | None,
    step: float,
    models: Path,
    tmp_path: Path,
) -> None:
    """By which the score moves most when one answer is changed, wherever it stands."""
    path = write_recipe(models, tmp_path, kind)
    names = ["no", "yes"] if kind == "classification" else ["yes", "no"]
    several = kind == "multi_label_classification"
    labels = [[names[i] for i in w] if several else names[w] for w in wanted]
    rows = [{"input": f"it {i}", "long": label, "ends": label} for i, label in enumerate(labels)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = json.loads(path.read_text())
    raw["tasks"]["words"] |= {"labels": names, **({"score": score} if score else {})}
    path.write_text(json.dumps(raw))
    task = load_recipe(path).experiments()["words"].task
    said = [(wrong or {}).get(i, list(w) if several else w) for i, w in enumerate(wanted)]
    for order in (range(8), range(7, -1, -1)):
        items = Items.of(task, "test")
        turned = Items([items.examples[i] for i in order], items.weights, [items.sources[i] for i in order])
        assert _step(task, [outcome(1.0, 1.0, predictions=[said[i] for i in order])], turned) == pytest.approx(step)


def test_the_weight_of_a_source_in_a_mean(models: Path, tmp_path: Path) -> None:
    """A document that holds half of the items moves the mean by half, and an item of a small set that set's share."""
    path = write_recipe(models, tmp_path, "classification")
    rows = [{"input": f"it {i}", "long": "yes" if i % 2 else "no", "from": min(i, 4)} for i in range(8)]
    for name, some in (("rows", rows), ("few", rows[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    raw = json.loads(path.read_text())
    whole = raw["tasks"]["words"]
    raw["tasks"] = {
        "documents": whole | {"data": whole["data"] | {"group": "from"}},
        "sets": whole | {"data": whole["data"] | {"test": {"many": "rows.jsonl", "few": "few.jsonl"}}},
        "plain": whole,
    }
    path.write_text(json.dumps(raw))
    experiments = load_recipe(path).experiments()
    weights = {name: _step(one.task, [], Items.of(one.task, "test")) for name, one in experiments.items()}
    assert weights == {
        "documents": pytest.approx(4 / 8),
        "sets": pytest.approx(1 / 2 / 2),
        "plain": pytest.approx(1 / 8),
    }


def test_what_is_odd_about_the_data_is_in_the_report(
    models: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(models, tmp_path, methods=["loreft", "lora"])
    answering(monkeypatch, dict.fromkeys(("loreft", "lora"), [b for _, b in WORDS] + [b for _, b in WORDS[:2]]))
    recipe = load_recipe(path)
    groups = study(recipe, tmp_path / "trials")
    said = as_markdown(summarise(groups, recipe.compare), {})
    assert "all 8 rows of test are in train too" in said and "on 18 validation items alone" in said
    raw = json.loads(path.read_text())
    raw["tasks"]["again"] = raw["tasks"]["words"] | {"data": {**raw["tasks"]["words"]["data"], "test": "./rows.jsonl"}}
    path.write_text(json.dumps(raw))
    recipe = load_recipe(path)
    report = summarise(study(recipe, tmp_path / "trials"), recipe.compare)
    assert all(total.against_reference is None for total in report.overall)  # the two share their test items


def test_sizes_that_nothing_was_trained_on_say_only_why(models: Path, tmp_path: Path, inline: None) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["loreft", "lora"]))
    said = as_markdown(
        summarise(study(recipe, tmp_path / "trials", (1000,)), recipe.compare), {"words": tmp_path / "a.png"}
    )
    assert "Left out: loreft: 1000 examples asked for, 18 there." in said
    assert "against None" not in said and "tells nothing" not in said and "18 training" in said


def test_a_sorted_file_that_a_limit_leaves_one_class_of_is_said(models: Path, tmp_path: Path) -> None:
    path = write_recipe(models, tmp_path, "classification")
    rows = [{"input": f"it {i}", "long": "no" if i < 10 else "yes"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_recipe(path).experiments()["words"].task
    assert odd_data(task)[0].startswith("all 8 rows of test are 'no'; limit: takes the first 8 rows, and the file is")


def test_test_items_of_one_group_count_as_one(
    models: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(models, tmp_path, methods=["loreft", "lora"])
    right = [b for _, b in WORDS] + [b for _, b in WORDS[:2]]
    answering(monkeypatch, {"loreft": right, "lora": ["?"] * 4 + right[4:]})
    errors = []
    for group in (None, "long", "nowhere"):
        raw = json.loads(path.read_text())
        raw["tasks"]["words"]["data"]["group"] = group
        path.write_text(json.dumps(raw))
        recipe = load_recipe(path)
        groups = study(recipe, tmp_path / "trials")
        if group == "nowhere":
            with pytest.raises(DataError, match="words: validation: data: group"):
                summarise(groups, recipe.compare)
            continue
        found = summarise(groups, recipe.compare).tasks["words"].methods[1].against_reference
        assert found is not None
        errors.append(found.error)
    assert errors[0] < errors[1]


def test_training_that_was_not_done_is_remarked() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(40)
    falling, done = np.exp(-steps / 40), np.exp(-steps / 3)
    for curve, moving in ((falling, True), (done, False), (0 * steps + 1.0, False), (falling[:8], False)):
        assert still_falling((curve + 0.01 * rng.normal(size=len(curve))).tolist()) == moving


@pytest.mark.parametrize(
    ("seeds", "moved"),
    [
        ([0.06, 0.03, 0.05], 0.14 / 3),
        ([-0.06, -0.04, None, -0.06], -0.16 / 3),
        ([0.01, 0.01, 0.01], None),  # within the margin
        ([0.20, -0.20, 0.15], None),  # as far as chance
        ([0.80], None),  # one seed
        ([None, None], None),  # trials of before
    ],
)
def test_a_score_that_still_moves_is_told(seeds: list[Any], moved: float | None) -> None:
    assert late_move(seeds, 0.02) == (None if moved is None else pytest.approx(moved))


def test_a_trial_knows_how_its_score_moved_in_the_last_quarter(models: Path, tmp_path: Path) -> None:
    """Which looking at it changes nothing of."""
    path = write_recipe(models, tmp_path)
    recipe = load_recipe(path, settings=["training.max_steps=8"])
    first = run_trial(trial(recipe, "lora"), tmp_path / "trials")
    early = load_recipe(path, settings=["training.max_steps=6", "training.schedule=constant"])
    late = load_recipe(path, settings=["training.max_steps=8", "training.schedule=constant"])
    alone, followed = (run_trial(trial(one, "lora", 0.1), tmp_path / "trials") for one in (early, late))
    assert first.late_move is not None and followed.late_move == followed.validation - alone.validation  # type: ignore[operator]
    unseen = run_trial(replace(trial(recipe, "lora"), splits=("validation",)), tmp_path / "search")
    assert unseen.late_move is None and unseen.validation_loss == first.validation_loss


def test_a_method_may_have_seeds_of_its_own(models: Path, tmp_path: Path, inline: None) -> None:
    methods = ["loreft", {"again": {"method": "loreft", "seed": 7}}]
    recipe = load_recipe(write_recipe(models, tmp_path, methods=methods, learning_rates=[1e-2]))
    groups = study(recipe, tmp_path / "trials")
    assert [sorted(group.tried) for group in groups] == [[0, 1], [7, 8]]
    assert groups[0].way.settings == groups[1].way.settings
    with pytest.raises(ValueError, match="again: seed: -1 is no whole number"):
        as_way({"again": {"method": "loreft", "seed": -1}}, AdapterSpec())


def test_a_report_by_an_earlier_procedure_is_kept_and_marked(models: Path, tmp_path: Path, inline: None) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["loreft", "lora"], learning_rates=[1e-2]))
    groups, out = study(recipe, tmp_path / "trials"), tmp_path / "out"
    write_report(groups, recipe.compare, out, "report", "trimtab compare")
    found = json.loads((out / "report.json").read_text())
    write_report(groups, recipe.compare, out, "report", "trimtab compare")
    assert not (out / "earlier").exists()
    (out / "report.json").write_text(json.dumps({k: v for k, v in found.items() if k not in ("margin", "procedure")}))
    write_report(groups, recipe.compare, out, "report", "trimtab compare")
    for kind in ("md", "html"):
        assert "Made by an earlier procedure" in (out / f"earlier/report.{kind}").read_text()
        assert "earlier procedure" not in (out / f"report.{kind}").read_text()
    assert json.loads((out / "report.json").read_text()) == found
    assert (out / "earlier/report-words.png").exists() and (out / "report-words.png").exists()


@pytest.mark.parametrize(
    ("kind", "score"),
    [
        ("classification", "mcc"),
        ("regression", None),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("classification", "f1"), ("regression", "pearson"))),
    ],
)
def test_scores_that_are_no_means_get_a_verdict(
    kind: str, score: str | None, models: Path, tmp_path: Path, inline: None
) -> None:
    path = write_recipe(models, tmp_path, kind, methods=["loreft", "head"], learning_rates=[1e-2])
    if score:
        raw = json.loads(path.read_text())
        raw["tasks"]["words"]["score"] = score
        path.write_text(json.dumps(raw))
    recipe = load_recipe(path)
    groups = study(recipe, tmp_path / "trials")
    line = next(r for r in summarise(groups, recipe.compare).tasks["words"].methods if r.name == "head")
    means = [sum(s.test[recipe.tasks["words"].score] for s in g.seeds) / 2 for g in groups]
    assert line.against_reference is not None
    assert line.against_reference.difference == pytest.approx(means[1] - means[0])


def test_several_test_sets_are_compared_by_the_plain_mean_of_theirs(models: Path, tmp_path: Path, inline: None) -> None:
    path = write_recipe(models, tmp_path, methods=["loreft", "lora"], learning_rates=[1e-2])
    raw = json.loads(path.read_text())
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(rows[:2]))
    raw["tasks"]["words"]["score"] = "overlap"
    raw["tasks"]["words"]["data"]["test"] = {"many": "rows.jsonl", "few": "few.jsonl"}
    path.write_text(json.dumps(raw))
    recipe = load_recipe(path)
    task = recipe.experiments()["words"].task
    examples = task.examples("test")
    assert not task.binary
    right_on_few = ["-"] * 8 + [e.answer for e in examples[8:]]  # the limit cuts the larger set to eight
    assert task.weighted(examples)(right_on_few, np.ones((1, 10))) == pytest.approx(0.5)
    groups = study(recipe, tmp_path / "trials")
    line = next(r for r in summarise(groups, recipe.compare).tasks["words"].methods if r.name == "lora")
    means = [sum(s.test["overlap"] for s in g.seeds) / 2 for g in groups]
    assert line.against_reference is not None
    assert line.against_reference.difference == pytest.approx(means[1] - means[0])


def test_another_held_out_text_is_another_trial(models: Path, tmp_path: Path) -> None:
    names = []
    for words in ("All is well. ", "Nothing ends. "):
        (tmp_path / "text.txt").write_text(words * 400)
        recipe = load_recipe(write_recipe(models, tmp_path, held_out="text.txt"))
        names.append(fingerprints(recipe.experiments()["words"], recipe.compare.held_out)["held_out"])
    assert names[0] != names[1]
    assert "held_out" not in fingerprints(load_recipe(write_recipe(models, tmp_path)).experiments()["words"])


def test_a_method_whose_every_seed_failed_is_left_out_of_the_picture() -> None:
    lines = [Line("a", {}, mean=0.5, sd=0.1, scores=[0.4, 0.6], parameters=9, memory=9, seconds=1.0, curve=[(1, 2.0)])]
    lines.append(Line("b", {}, mean=0.0, sd=0.0, scores=[0.0, 0.0], memory=0, failed_seeds=2, failure="NaN"))
    assert draw(TaskReport("accuracy", "a", 10, 10, 10, lines, 0.1), "mood").startswith(b"\x89PNG")


def test_few_shot_draws_by_the_seed_and_trains_on_those_only(
    models: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked, "SMALL_STEPS", 3)
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["loreft", "few-shot"], learning_rates=[1e-2]))
    examples = recipe.experiments()["words"].task.examples("train")
    picked = [drawn(examples, 4, seed) for seed in (0, 0, 1)]
    assert picked[0] == picked[1] != picked[2] and all(len(p) == 4 for p in picked)
    groups = study(recipe, tmp_path / "trials", (2, 4, 99))
    assert {g.examples for g in groups} == {2, 4, 99}
    assert all("99 examples asked for, 18 there" in (g.impossible or "") for g in groups if g.examples == 99)
    report = write_report(groups, recipe.compare, tmp_path / "out", "few-shot", "")
    assert [size for size, _, _ in report.by_size["words"].methods["loreft"]] == [2, 4]
    assert (tmp_path / "out/few-shot-words.png").stat().st_size > 1000


def test_an_ablation_changes_one_thing_at_a_time(models: Path, tmp_path: Path) -> None:
    spec = load_recipe(write_recipe(models, tmp_path)).experiments()["words"]
    own = spec.adapter.model_dump()
    variants = {n: s for v in adapter_variants(spec, "positions,layers,r,tied,init", 2) for n, s in v.items()}
    assert variants["as given"] == own
    assert {"positions f1", "positions l2", "positions prompt", "positions all", "positions random3"} <= variants.keys()
    assert {"layers last", "layers first", "r 16", "tied false", "init paper"} <= variants.keys()
    assert not {"positions f1+l2", "layers all", "r 2", "tied true", "init identity"} & variants.keys()
    for name, settings in variants.items():
        changed = [k for k in own if settings[k] != own[k]]
        assert len(changed) == (0 if name == "as given" else 1), name
        as_way({name: settings}, spec.adapter)
    with pytest.raises(ValueError, match="'rank': there are positions, layers"):
        adapter_variants(spec, "rank", 2)


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"methods": ["loreft", "lroa"]}, "'lroa' is no method"),
        ({"methods": ["loreft", "lorra"]}, "; did you mean lora or"),
        ({"methods": ["loreft", {"x": {"peft_type": "NOPE"}}]}, "peft_type 'NOPE' is none of"),
        ({"methods": ["loreft", {"x": {"peft_type": "LORA", "rank": 3}}]}, "rank"),
        ({"methods": ["loreft", {"x": {"r": -1}}]}, "r=-1"),
        ({"methods": ["loreft"]}, "fewer than two; name another to compare with, such as untuned"),
        ({"methods": ["loreft", {"../x": {"r": 2}}]}, "'../x' is no name for a method"),
        ({"margin": 2}, "margin: is 2; give a share between 0 and 1, of which 0.02 is 2 points"),
        ({"seeds": 0}, "seeds"),
        ({"learning_rates": []}, "learning_rates"),
        ({"held_out": "nowhere.txt"}, "no file 'nowhere.txt'"),
    ],
)
def test_a_wrong_comparison_is_refused_before_it_starts(
    compare: dict[str, Any], message: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(models, tmp_path, **compare))
    assert message in str(caught.value) and "compare" in str(caught.value)


def test_held_out_windows_and_curves() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/tiny-llama")
    assert windows(None, tokenizer) == []
    assert thinned([1.0, 2.0, 3.0]) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    curve = thinned([float(i) for i in range(1000)])
    assert len(curve) <= measures.CURVE and curve[-1][0] == 1000


@pytest.mark.slow
def test_processes_give_what_one_process_gives(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["loreft", "lora"]))
    far = study(recipe, tmp_path / "far", jobs=2)
    for group in far:
        for found in group.seeds:
            here = run_trial(Trial(group.experiment, group.way, found.learning_rate, found.seed), tmp_path / "near")
            assert here.predictions == found.predictions
            assert np.allclose(here.curve, found.curve, rtol=1e-5)  # some of them in one batch


@pytest.mark.parametrize("positions", ["f1+l2", "l2"])
def test_edits_leave_the_model_for_the_next_trial_and_weights_do_not(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: str
) -> None:
    path = write_recipe(models, tmp_path)
    raw = json.loads(path.read_text())
    raw["adapter"]["positions"] = positions
    path.write_text(json.dumps(raw))
    recipe = load_recipe(path)
    order = ["loreft", "joint", "red", "lora", "loreft", "full", "loreft", "untuned"]
    alone = []
    for place, name in enumerate(order):
        kept._bases.clear()
        alone.append(run_trial(trial(recipe, name, seed=place), tmp_path / "alone"))
    kept._bases.clear()
    loaded = []
    load = Base.load
    monkeypatch.setattr(Base, "load", lambda self, *args: (loaded.append(bool(self._shared)), load(self, *args))[1])
    for place, name in enumerate(order):
        found, by_itself = run_trial(trial(recipe, name, seed=place), tmp_path / "together"), alone[place]
        assert (found.curve, found.predictions) == (by_itself.curve, by_itself.predictions), name
        assert found.validation_loss == by_itself.validation_loss
    # Whether a model was there already: after each adapter of edits, and no weights'.
    assert loaded == [False, True, True, True, False, True, False, True]


def test_solved_examples_that_the_model_cannot_read_are_left_out(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path))
    many = trial(recipe, {"many": {"trains": "nothing", "shots": 18}})
    config = models / "llama/config.json"
    room = json.loads(config.read_text())
    try:
        config.write_text(json.dumps({**room, "max_position_embeddings": 32}))
        result = run_trial(many, tmp_path / "trials")
    finally:
        config.write_text(json.dumps(room))
    assert "18 solved examples make a prompt of" in (result.impossible or "") and "reads 32" in (
        result.impossible or ""
    )


@pytest.mark.slow
def test_a_trial_leaves_nothing_in_memory(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path))

    def alive(seed: int) -> int:
        run_trial(trial(recipe, "loreft", seed=seed), tmp_path / "trials")
        gc.collect()
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    assert alive(0) == alive(1) == alive(2)


def test_another_model_under_the_same_name_and_other_scoring_are_other_trials(models: Path, tmp_path: Path) -> None:
    path = write_recipe(models, tmp_path)
    shutil.copytree(models / "llama", tmp_path / "llama")
    here, there = load_recipe(path), load_recipe(path, settings=[f"model={tmp_path / 'llama'}"])

    def described(recipe: Any, content: dict[str, str] | None = None) -> dict[str, Any]:
        own = trial(recipe, "loreft")
        return own.described(fingerprints(own.experiment) if content is None else content)

    first = described(here)
    assert first == described(there)
    weights = tmp_path / "llama/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert first != described(there)

    raw = json.loads(path.read_text())
    found = []
    for choices in (["cat", "dog"], ["cat", "dog", "box"]):
        raw["tasks"]["words"]["data"]["test"] = {"a": {"file": "rows.jsonl", "score": "choice", "choices": choices}}
        path.write_text(json.dumps(raw))
        found.append(described(load_recipe(path), {}))
    assert found[0] != found[1]


def test_what_one_trial_cannot_do_does_not_end_the_study(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path))
    full = f"the trial does not fit into the GPU's memory; {TOO_LARGE}"
    for error, said, seed in (
        (FloatingPointError("a rotation holds NaN"), "a rotation holds NaN", 1),
        (DataError("none fits"), "none fits", 2),
        (torch.OutOfMemoryError("on this card"), full, 3),
        (RunError("no room on the disk"), "no room on the disk", 4),
        (DivergedError("the loss is nan"), "the loss is nan", 5),
    ):

        def fail(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(trials, "_run", fail)
        assert run_trial(trial(recipe, "loreft", seed=seed), tmp_path / "trials").failed == said
    assert len(list((tmp_path / "trials").rglob("*.json"))) == 3  # another card or day may have more room


def test_a_group_of_which_one_seed_is_impossible_is_left_out(
    models: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["few-shot", "untuned"], seeds=3))
    real = trials._run

    def run(trial: Trial) -> Outcome:
        if trial.seed == 1:
            raise NotPossible("too long")
        return real(trial)

    monkeypatch.setattr(trials, "_run", run)
    group = study(recipe, tmp_path / "trials")[0]
    assert (group.impossible, group.seeds) == ("too long", []) and not group.tried


def test_two_methods_of_one_name_are_refused(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(models, tmp_path, methods=["lora", {"lora": {"peft_type": "LORA", "r": 4}}]))
    with pytest.raises(ValueError, match="2 are called 'lora'; give each a name of its own"):
        choose_ways(recipe.experiments(), recipe.compare)


def test_the_test_split_must_not_be_the_one_that_rates_are_chosen_on(models: Path, tmp_path: Path) -> None:
    path = write_recipe(models, tmp_path)
    raw = json.loads(path.read_text())
    del raw["tasks"]["words"]["data"]["test"]
    path.write_text(json.dumps(raw))
    recipe = load_recipe(path)
    with pytest.raises(DataError, match=r"words: .* give test data"):
        study(recipe, tmp_path / "trials")


def test_answers_under_virtual_tokens_do_not_depend_on_the_batch(models: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    base = LlamaForCausalLM.from_pretrained(models / "llama")
    torch.manual_seed(1)
    model = as_way({"p": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}}, AdapterSpec()).build(
        base, "CAUSAL_LM"
    )
    torch.nn.init.normal_(next(p for p in model.parameters() if p.requires_grad))
    prompts = [encode(tokenizer, text) for text in ("cat", "a much longer prompt than that", "dog", "two words")]
    together = predict(model, tokenizer, prompts, 4, max_new_tokens=6, equal_lengths=True)
    assert together == [predict(model, tokenizer, [one], max_new_tokens=6)[0] for one in prompts]


def test_contenders_that_would_train_wrongly_are_left_out(models: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(models / "llama", dtype=torch.bfloat16)
    with pytest.raises(NotPossible, match="bfloat16, in which small steps are lost"):
        as_way("ln", AdapterSpec()).build(llama, "CAUSAL_LM")
    classifier = LlamaForSequenceClassification.from_pretrained(models / "llama")
    with pytest.raises(NotPossible, match="virtual tokens move the last token"):
        as_way("prompt", AdapterSpec()).build(classifier, "SEQ_CLS", ["score"])
    built = as_way("head", AdapterSpec()).build(classifier.bfloat16(), "SEQ_CLS", ["score"])
    assert [name for name, p in built.named_parameters() if p.requires_grad] == ["score.weight"]
    for wrong, message in (
        ({"x": {"trains": "bias"}}, "'bias' is none of"),
        ({"x": {"trains": "norms", "r": 2}}, "'r' does not go with trains"),
    ):
        with pytest.raises(ValueError, match=message):
            as_way(wrong, AdapterSpec())


@pytest.mark.parametrize("name", ["distilbert", "bart", "deberta"])
def test_every_contender_trains_all_that_is_new(name: str, models: Path, tmp_path: Path) -> None:
    """Not only what is called `classifier` or `score`: BART's head, DistilBERT's two layers, DeBERTa's pooler."""
    small = {"vocab_size": 4096, "pad_token_id": 0}
    kinds: dict[str, Any] = {
        "distilbert": DistilBertModel(DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=2, **small)),
        "bart": BartModel(
            BartConfig(
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                **small,
            )
        ),
        "deberta": DebertaV2Model(
            DebertaV2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, **small)
        ),
    }
    kinds[name].save_pretrained(tmp_path / name)
    AutoTokenizer.from_pretrained(models / "llama").save_pretrained(tmp_path / name)
    expected = {
        "distilbert": {"pre_classifier", "classifier"},
        "bart": {"classification_head"},
        "deberta": {"pooler", "classifier"},
    }[name]
    recipe = load_recipe(write_recipe(models, tmp_path, "classification"), settings=[f"model={tmp_path / name}"])
    experiment = recipe.experiments()["words"]
    for method in ("loreft", "lora", "head"):
        model, new = Base(experiment.source).load(experiment.task.head, 0)
        assert set(new) == expected
        heads = {n for n, _ in model.named_parameters() if n.split(".")[0] in expected}
        adapted = as_way(method, AdapterSpec(positions="f2")).build(model, "SEQ_CLS", new)
        trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
        for head in heads:
            module, _, rest = head.partition(".")
            assert any(module in n and n.endswith(rest) for n in trained), (method, head)
        assert method != "head" or set(trained) == heads
