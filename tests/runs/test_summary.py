"""What is said, and checked, before the first step; and of a result afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from transformers import AutoTokenizer

from trimtab.cli.tables import result_remarks
from trimtab.errors import DataError, MemoryFull, RunError, TrimtabError
from trimtab.recipe.load import load_recipe
from trimtab.runs.experiment import Experiment
from trimtab.runs.forecast import forecast, steps_of, told
from trimtab.runs.models import Base
from trimtab.runs.summary import checked_summary, marked
from trimtab.runs.train import train
from trimtab.runs.trainer import TrainingSpec
from trimtab.tasks.scores import interval
from trimtab.tasks.tokens import encode

MODEL = Path(__file__).parents[2] / "models/tiny-llama"
MOOD = {"type": "classification", "text": "text", "label": "label"}
PLURAL = {"type": "generation", "prompt": "{text}", "answer": "{label}"}
SIZE = {"type": "regression", "text": "text", "label": "label"}
Rows = list[dict[str, Any]]
Make = Callable[..., Experiment]


def rows(*labels: Any, text: str = "a day") -> Rows:
    return [{"text": f"{text} {i}", "label": label} for i, label in enumerate(labels)]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(task: dict[str, Any], train: Rows, data: dict[str, Any] | None = None, **sections: Any) -> Experiment:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
        entry = {**task, "data": {"train": "train.jsonl", **(data or {})}}
        recipe = {"model": str(MODEL), "output": str(tmp_path / "runs"), "tasks": {"a": entry}, **sections}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        return load_recipe(tmp_path / "recipe.yaml").experiments()["a"]

    return build


def said(experiment: Experiment) -> str:
    return checked_summary(experiment, AutoTokenizer.from_pretrained(MODEL))


def test_rows_are_counted_and_told_from_where(make: Make) -> None:
    text = said(make(MOOD, rows(*["Refund", "late"] * 10)))
    assert "18 rows of " in text and ": Refund (9), late (9)" in text
    assert "2 rows drawn from train" in text and "the rows of validation, since no test data" in text
    assert "the model reads 512" in text and "!" not in text
    given = said(make(MOOD, rows("x", "y"), {"validation": "train.jsonl", "test": {"b": "train.jsonl"}}))
    assert "2 rows in 1 set, b" in given and "validation 2 rows of" in given
    assert "0 to 9, 4.5 on average" in said(make(SIZE, rows(*range(10)), {"validation": "train.jsonl"}))


@pytest.mark.parametrize(
    ("task", "train", "sections", "remark"),
    [
        (MOOD, rows(*["Refund", "refund", "late"] * 8), {}, "'Refund' and 'refund' are classes apart"),
        (MOOD, rows(*[0, 1, -1] * 8), {}, "'-1' is a class too; if it marks rows without a label, remove them"),
        (
            MOOD,
            rows(*["a", "b"] * 8),
            {"training": {"max_length": 2}},
            "15 of 15 rows are longer than 2 tokens and cut",
        ),
        (MOOD, rows(*["a", "b"] * 8), {"training": {"learning_rate": 0.5}}, "0.5 is above the usual 9e-05 to 0.02"),
        (MOOD, rows(*["a", "b"] * 8), {"training": {"learning_rate": 1e-6}}, "1e-06 is below the usual"),
        (
            PLURAL,
            [*rows(*"ab" * 8), *rows(*"cd" * 8, text="word " * 60)],
            {"training": {"max_length": 40}},
            " rows are longer than 40 tokens and left out; more fit with a larger training: max_length:",
        ),
    ],
)
def test_what_is_odd_is_remarked(make: Make, task: Any, train: Rows, sections: Any, remark: str) -> None:
    assert remark in said(make(task, train, **sections)).split("  ! ", 1)[1]


@pytest.mark.parametrize(
    ("data", "remarks"),
    [
        ({"test": "train.jsonl"}, ["15 of 16 rows of test are in train too", "1 of 16 rows of test are in validation"]),
        ({"validation": "train.jsonl"}, ["all 16 rows of validation are in train too, so their score is partly"]),
        ({"test": "other.jsonl", "group": "who"}, ["1 of test's whos are in train too"]),
        (
            {"test": "turned.jsonl"},
            ["15 of 16 rows of test are in train too", "1 of 16 rows of test are in validation"],
        ),
        ({"test": "other.jsonl"}, []),
        ({"test": "bs.jsonl"}, ["'a' is 8 of 15 rows of train and none of test"]),
    ],
)
def test_rows_of_train_that_are_scored_too_are_counted(
    make: Make, tmp_path: Path, data: dict[str, Any], remarks: list[str]
) -> None:
    train = [{**row, "who": i % 8 + 1} for i, row in enumerate(rows(*["a", "b"] * 8))]
    other = [{**row, "who": i + 8} for i, row in enumerate(rows(*"ab", text="another day"))]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    turned = [{**row, "label": "ba"[i % 2]} for i, row in enumerate(train)]
    (tmp_path / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    alone = rows(*"b" * 60, text="night")
    (tmp_path / "bs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    _, *found = said(make(MOOD, train, data)).split("  ! ")
    assert len(found) >= len(remarks) and all(any(one in text for text in found) for one in remarks)
    assert bool(found) == bool(remarks)


def test_classes_that_are_numbers_are_not_spellings_of_one(make: Make) -> None:
    assert "!" not in said(make(MOOD, rows(*[1, -1] * 8)))
    assert "-> warm" in said(make(MOOD | {"labels": ["warm", "cold"]}, rows(*[0, 0] * 8, 1, 1)))


def test_rows_left_out_say_why(make: Make) -> None:
    bad = [*rows(*"ab" * 8), {"text": "", "label": "a"}]
    text = said(make(PLURAL, bad, {"skip_bad_rows": True, "validation": "train.jsonl", "limit": {"validation": 4}}))
    assert "! 1 rows cannot be used and are left out, first " in text and "row 17: the prompt" in text


def test_edited_tokens_are_marked() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    encoded = encode(tokenizer, "cat dog")
    assert marked(tokenizer, encoded, "f1+l2") == "«<|bos|>»<|user|>cat« dog<|assistant|>»"
    assert marked(tokenizer, encoded, "prompt") == "«<|bos|><|user|>cat dog<|assistant|>»"
    assert marked(tokenizer, encoded, "generated") == "<|bos|><|user|>cat dog<|assistant|>"
    assert " ... " in marked(tokenizer, encode(tokenizer, "cat " * 99), "l1")


@pytest.mark.parametrize(
    ("sections", "train", "kind", "message"),
    [
        ({"adapter": {"layers": [9]}}, rows(*"ab" * 4), RunError, r"a: adapter: layers"),
        ({"adapter": {"r": 500}}, rows(*"ab" * 4), RunError, r"a: adapter: r=500: larger than the width 192"),
        ({"adapter": {"site": "nowhere"}}, rows(*"ab" * 4), RunError, r"a: adapter: site='nowhere'"),
        (
            {"training": {"max_length": 900}},
            rows(*"ab" * 4, text="word " * 600),
            DataError,
            r"the model reads 512 in all; set training: max_length: 512 \(it is 900\)",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(
    make: Make, sections: Any, train: Rows, kind: type[TrimtabError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        said(make(MOOD, train, **sections))


def test_prompts_that_leave_no_room_for_an_answer_are_refused(make: Make) -> None:
    with pytest.raises(DataError, match=r"a row to be scored: .* up to 510 new ones, but the model reads 512"):
        said(make({**PLURAL, "max_new_tokens": 510}, rows(*"ab" * 4)))


def test_a_dry_run_does_nothing_else(make: Make, trimtab: Command, tmp_path: Path) -> None:
    make(MOOD, rows(*["x", "y"] * 8))
    code, text = trimtab("train", tmp_path / "recipe.yaml", "--dry-run")
    assert (code == 0 and "x (7), y (8)" in text) or "y (7), x (8)" in text or "(8)" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", [MOOD, PLURAL], ids=["classification", "generation"])
def test_a_run_worth_it_is_measured_beforehand(
    make: Make, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    experiment = make(task, rows(*["x", "y"] * 8), training={"max_steps": 50, "batch_size": 2}, adapter={"r": 2})
    base = Base(experiment.source)
    found = forecast(experiment, base)
    assert found is not None and found.steps == 50 and found.epoch == 8
    assert found.memory > 0 and found.model > 7e6 and found.later > 0 and found.scoring > 0
    assert found.training == pytest.approx(8 * found.first + 42 * found.later)
    assert found.first == found.later  # nothing is reused under f1
    assert "a takes about " in told("a", found) and "50 steps of" in told("a", found)
    shared = base.load(experiment.task.head, 0).model
    assert not any("reft" in name for name, _ in shared.named_modules())  # as if there had been none
    monkeypatch.setattr("trimtab.runs.predict._batches", full)
    with pytest.raises(MemoryFull, match=r"answering 1 row at a time does not fit into the GPU's memory; shorten"):
        forecast(experiment, base)
    short = make(task, rows(*["x", "y"] * 8), training={"max_steps": 30})
    assert forecast(short, base) is None


@pytest.mark.parametrize(
    ("training", "examples", "steps"),
    [
        ({"max_steps": 9}, 100, 9),
        ({"epochs": 2, "batch_size": 16}, 33, 6),
        ({"epochs": 2.5, "batch_size": 4, "gradient_accumulation": 2}, 20, 8),
    ],
)
def test_steps_are_those_that_are_made(training: dict[str, Any], examples: int, steps: int) -> None:
    assert steps_of(TrainingSpec(**training), examples) == steps


def test_a_dry_run_says_what_is_done_already(make: Make, trimtab: Command, tmp_path: Path) -> None:
    experiment = make(MOOD, rows(*["x", "y"] * 8), training={"max_steps": 1})
    train({"a": experiment}, tmp_path / "runs")
    code, text = trimtab("train", tmp_path / "recipe.yaml", "--dry-run")
    assert code == 0 and "a is done already" in text and "--no-resume --task a" in text.replace("\n", " ")
    code, text = trimtab("train", tmp_path / "recipe.yaml", "--dry-run", "--set", "seed=4")
    assert code == 2 and "holds a run with other settings (seed)" in text


def test_a_bad_result_is_remarked() -> None:
    good = {"score": "f1", "untuned": {"f1": 0.4}, "tuned": {"f1": 0.6}, "loss_at_start": 2.0, "loss_at_end": 1.0}
    assert result_remarks(good) == []
    assert result_remarks({key: value for key, value in good.items() if "loss" not in key}) == []
    (worse,) = result_remarks({**good, "tuned": {"f1": 0.3}})
    assert "0.300 is worse than untuned, 0.400" in worse and "learning_rate" in worse
    (nothing,) = result_remarks({**good, "tuned": {"f1": 0.0}})
    assert "no row's class was found" in nothing and "another learning_rate" in nothing
    (guess,) = result_remarks({**good, "majority": {"answer": "late", "score": 0.6}})
    assert "0.600 is no better" in guess and "always answering 'late' would score 0.600" in guess
    assert result_remarks({**good, "majority": {"answer": "late", "score": 0.5}}) == []
    both = result_remarks({**good, "tuned": {"f1": 0.3}, "majority": {"answer": "late", "score": 0.6}})
    assert len(both) == 2 and "lower training: learning_rate:" in both[0] and "higher" not in both[1]  # one remedy
    few = {"examples": 7, "split": "validation"}
    (wide,) = result_remarks({**good, **few, "interval": interval(0.6, 7)})
    assert "of 7 validation rows: on new ones it may be anything from 0.27 to 0.86" in wide
    assert result_remarks({**good, **few, "interval": interval(0.6, 700)}) == []
    assert interval(1.0, 7) == pytest.approx((0.6457, 1.0), abs=1e-4)
    (risen,) = result_remarks({**good, "loss_at_end": 3.0})
    assert "rose from 2.000 to 3.000" in risen
