"""Trials that are trained in one batch come out as each does by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trimtab.runs import together, trainer, trial
from trimtab.runs.experiment import Experiment, Trial
from trimtab.runs.models import ModelSource
from trimtab.runs.reuse import _runs
from trimtab.runs.together import joins, run_trials, train_together
from trimtab.runs.trainer import TrainingSpec
from trimtab.runs.trial import Outcome, run_trial
from trimtab.runs.ways import AdapterSpec, as_way
from trimtab.study.compare import CompareSpec, Study
from trimtab.study.report import summarise
from trimtab.study.search import TuneSpec, tune
from trimtab.tasks import TASKS

ROOT = Path(__file__).parents[2]
WORDS = [("the cat", "cats"), ("dog", "dogs"), ("a big old box", "boxes"), ("city", "cities"), ("man", "men")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, and data."""
    folder = tmp_path_factory.mktemp("together")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/tiny-llama")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **ids, num_key_value_heads=2, bos_token_id=None, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"input": a, "output": b, "long": len(b) > 4} for a, b in WORDS * 2]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def experiment(folder: Path, kind: str = "generation", **training: Any) -> Experiment:
    task = {
        "generation": {"prompt": "{input}", "answer": "{output}", "max_new_tokens": 3},
        "classification": {"text": "input", "label": "long"},
    }[kind]
    data = dict.fromkeys(("train", "validation", "test"), str(folder / "rows.jsonl"))
    spec = TASKS[kind].spec_class.model_validate({"type": kind, "data": data, **task})
    # Ten examples, so that each of the two epochs has a last batch that is not whole.
    settings = TrainingSpec(**{"epochs": 2.0, "batch_size": 4, **training})
    return Experiment("words", ModelSource(str(folder / "model")), spec, AdapterSpec(r=2, positions="l2"), settings)


def made(of: Experiment, rate: float = 1e-2, seed: int = 0, splits: Any = ("validation",), **settings: Any) -> Trial:
    return Trial(of, as_way({"tried": settings}, of.adapter), rate, seed, splits=splits)


def alone(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """The trials that are run by themselves from now on."""
    seen, run = [], trial._run
    monkeypatch.setattr(trial, "_run", lambda one: (seen.append(one), run(one))[1])
    return seen


def as_read(one: Outcome) -> Outcome:
    """As it is in its file."""
    return Outcome(**json.loads(json.dumps(one.as_dict())))


def assert_as_alone(found: Outcome, by_itself: Outcome) -> None:
    for (step, loss), (other, expected) in zip(found.curve, by_itself.curve, strict=True):
        assert step == other and loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert found.validation_loss == pytest.approx(by_itself.validation_loss, rel=1e-6)
    own = {"curve", "validation_loss", "seconds", "memory", "forgetting"}
    assert {k: v for k, v in found.as_dict().items() if k not in own} == {
        k: v for k, v in by_itself.as_dict().items() if k not in own
    }
    assert (found.seconds, found.memory) == (None, 0)


VARIED: dict[str, list[dict[str, Any]]] = {
    "the ends of prompts": [
        {"positions": "l1", "rate": 4e-3},
        {"positions": "l4", "r": 4, "layers": [0, 2]},
        {"positions": "l3", "seed": 3, "method": "noreft"},
        {"positions": "l1", "seed": 3, "method": "red"},
    ],
    "upper blocks too": [
        {"positions": "l2", "layers": [1]},
        {"positions": "l3", "layers": [1, -1], "r": 3, "rate": 4e-3},
        {"positions": "l2", "layers": [2], "seed": 1, "init_weights": "paper"},
    ],
}


@pytest.mark.parametrize("what", VARIED)
@pytest.mark.parametrize("splits", [("validation",), ("validation", "test")])
def test_each_comes_out_as_by_itself(
    what: str, splits: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = experiment(folder, schedule="cosine", weight_decay=0.1)
    trials = [made(whole, splits=splits, **settings) for settings in VARIED[what]]
    by_themselves = [run_trial(one, tmp_path / "alone") for one in trials]
    seen = alone(monkeypatch)
    found = run_trials(trials, tmp_path / "together")
    assert not seen
    for one, other in zip(found, by_themselves, strict=True):
        assert_as_alone(one, other)
        assert one.steps == 6 and (one.late_move is None) == (len(splits) == 1)
    assert len({one.curve[0][1] for one in found}) > 1
    # Under the same names, so that either is read where the other would be run.
    assert run_trials(trials, tmp_path / "alone") == [as_read(one) for one in by_themselves]
    assert [run_trial(one, tmp_path / "together").curve for one in trials] == [one.curve for one in found]
    assert not seen


def test_a_late_look_is_at_rows_from_all_over(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together as alone; validation may be sorted."""
    monkeypatch.setattr(trainer, "LOOKED_AT", 3)
    trials = [made(experiment(folder), splits=("validation", "test"), rate=rate) for rate in (1e-2, 3e-2)]
    by_themselves = [run_trial(one, tmp_path / "alone") for one in trials]
    found = run_trials(trials, tmp_path / "together")
    assert [one.late_move for one in found] == [one.late_move for one in by_themselves]
    assert trainer.looked_at(list(range(10))) == [0, 3, 6]


def test_one_that_diverges_leaves_the_others(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = experiment(folder)
    trials = [made(whole), made(whole, rate=1e30, method="direft"), made(whole, seed=1, method="direft")]
    by_themselves = [run_trial(one, tmp_path / "alone") for one in trials]
    seen = alone(monkeypatch)
    found = run_trials(trials, tmp_path / "together")
    assert seen == [trials[1]]
    assert found[1].failed and found[1].failed == by_themselves[1].failed
    assert_as_alone(found[0], by_themselves[0])
    assert_as_alone(found[2], by_themselves[2])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_no_number_of_one_gets_into_the_others(
    what: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [made(experiment(folder), seed=seed) for seed in range(3)]
    by_themselves = [run_trial(one, tmp_path / "alone") for one in trials]
    means, clip = together._means, together.JointTrainer._clip_grad_norm

    def no_loss(*told: Any) -> Any:
        return means(*told) + torch.tensor([0, torch.nan, 0])  # without a trace in its gradient

    def no_gradient(self: Any, *told: Any) -> Any:
        if self.state.global_step == 2:
            next(iter(self._own[1].values())).grad[0, 0] = torch.nan
        return clip(self, *told)

    if what == "loss":
        monkeypatch.setattr(together, "_means", no_loss)
    else:
        monkeypatch.setattr(together.JointTrainer, "_clip_grad_norm", no_gradient)
    seen = alone(monkeypatch)
    found = run_trials(trials, tmp_path / "together")
    assert seen == [trials[1]] and found[1].curve == by_themselves[1].curve
    assert_as_alone(found[0], by_themselves[0])
    assert_as_alone(found[2], by_themselves[2])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), FloatingPointError("dependent rows")], ids=["memory", "rows"]
)
def test_what_fails_for_all_is_run_one_by_one(
    error: Exception, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    trials = [made(experiment(folder), seed=seed) for seed in range(2)]
    monkeypatch.setattr(together.JointTrainer, "train", fail)
    seen = alone(monkeypatch)
    found = run_trials(trials, tmp_path)
    assert seen == trials and all(one.seconds is not None and not one.failed for one in found)


def test_what_is_there_is_read_and_no_more_than_asked_go_together(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = experiment(folder, together=3)
    trials = [made(whole, seed=seed) for seed in range(6)]
    first = run_trial(trials[1], tmp_path)
    groups, train = [], train_together
    monkeypatch.setattr(together, "train_together", lambda some: (groups.append(some), train(some))[1])
    found = run_trials([*trials, made(experiment(folder, together=3, batch_size=5))], tmp_path)
    assert [[one.seed for one in some] for some in groups] == [[0, 2, 3], [4, 5], [0]]  # the last has other batches
    assert found[1] == as_read(first) and [one.seconds is None for one in found] == [
        True,
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert [one.seed for one in found] == [0, 1, 2, 3, 4, 5, 0]


def test_some_are_only_run_by_themselves(folder: Path) -> None:
    whole = experiment(folder)
    assert joins(made(whole))
    for settings in ({"dropout": 0.1}, {"lora": {"r": 2, "target_modules": "all-linear"}}, {"peft_type": "LORA"}):
        assert not joins(made(whole, **settings))
    for training in ({"together": 1}, {"gradient_checkpointing": True}, {"gradient_accumulation": 2}):
        assert not joins(made(experiment(folder, **training)))
    assert not joins(made(experiment(folder, "classification")))
    assert made(experiment(folder, together=1)).described({}) == made(whole).described({})  # how many changes nothing
    # Nothing of the model is frozen below these, or there is no such block.
    assert train_together([made(whole, positions="f1+l1"), made(whole, positions="f2")]) == [None, None]
    assert train_together([made(whole), made(whole, layers=[9])]) == [None, None]


def test_rows_with_the_same_kept_part_are_neighbours() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(2, 3)
    found = _runs([a[:, :1], a[:, :1], b, None, None, a])
    assert [many for many, _ in found] == [2, 1, 2, 1] and found[1][1] is b and found[2][1] is None


def test_a_comparison_times_the_first_seed_alone(
    folder: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, settings = experiment(folder), CompareSpec(methods=["loreft", "untuned"], seeds=3, reach=0)
    ways = {"words": [as_way("loreft", whole.adapter), as_way("untuned", whole.adapter)]}
    seen = alone(monkeypatch)
    study = Study({"words": whole}, ways, settings, tmp_path / "trials")
    groups = study.run(1)
    assert sorted({one.seed for one in seen}) == [0]
    timed = [run.seconds for run in groups[0].seeds]
    assert timed[0] is not None and timed[1:] == [None, None]
    report = summarise(groups, settings).tasks["words"]
    line = report.methods[0]
    assert (line.seconds, line.memory) == (timed[0], groups[0].seeds[0].memory) and line.memory
    plan = study.plan()
    assert (plan.done, plan.runs) == (10, 10) and plan.seconds is not None
    by_themselves = experiment(folder, together=1)
    others = Study({"words": by_themselves}, ways, settings, tmp_path / "alone").run(1)
    for seed, tried in groups[0].tried.items():
        expected = others[0].tried[seed]
        for rate in tried:
            assert tried[rate].validation_loss == pytest.approx(expected[rate].validation_loss, rel=1e-6)
            assert tried[rate].predictions == expected[rate].predictions


def test_only_trials_of_one_batch_go_to_a_process_together(folder: Path, tmp_path: Path) -> None:
    whole = experiment(folder)
    settings = CompareSpec(methods=["loreft", "lora"], learning_rates=[1e-2], seeds=4)
    ways = {"words": [as_way(name, whole.adapter) for name in ("loreft", "lora")]}
    study = Study({"words": whole}, ways, settings, tmp_path)
    jobs = [study._jobs(group, study.wanted(group, 4), 1) for group in study.groups]
    assert [list(map(len, one)) for one in jobs] == [[1, 3], [1, 1, 1, 1]]


def test_a_search_finds_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = TuneSpec(r=[1, 2], positions=["l1", "l2", "l3"], layers=["all"])
    seen = alone(monkeypatch)
    found = {}
    for most, told in ((20, []), (1, [])):
        of = experiment(folder, together=most)
        for trials in (3, 5):  # resumed
            tune(of, space, tmp_path / str(most), 3, trials, lambda number, one, told=told: told.append((number, one)))
        found[most] = told
        assert len(seen) == (1 if most > 1 else 6)  # the recipe's own
    assert [number for number, _ in found[1]] == [0, 1, 2, 0, 3, 4]
    for (number, one), (other, expected) in zip(found[20], found[1], strict=True):
        assert (number, one) == (other, replace(expected, validation=pytest.approx(expected.validation)))


def test_a_head_that_is_all_that_is_trained_takes_the_trials_rate(folder: Path) -> None:
    of = experiment(folder, "classification", head_learning_rate=0.5)
    for way, rate in (("head", None), ("lora", 0.5)):
        assert Trial(of, as_way(way, of.adapter), 0.1, 0).training.head_learning_rate == rate
