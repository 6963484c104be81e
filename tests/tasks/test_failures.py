"""Where predictions are wrong: worst first, classes crossed; and what always giving one answer would score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.tasks import TASKS, Task, build_task
from trimtab.tasks.failures import failures

ROWS = [{"text": f"text {i}", "label": label} for i, label in enumerate(["late", "late", "refund", "late", "lost"])]
NUMBERS = [{"text": f"text {i}", "label": i} for i in range(4)]
TEXT = {"type": "generation", "prompt": "{text}", "answer": "{label}"}
CLASS = {"type": "classification", "text": "text", "label": "label"}


def task(folder: Path, spec: dict[str, Any], rows: list[dict[str, Any]]) -> Task[Any]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict.fromkeys(("train", "validation", "test"), str(file))
    return build_task("a", TASKS[spec["type"]].spec_class.model_validate({**spec, "data": data}))


@pytest.mark.parametrize("score", ["accuracy", "f1", "mcc"])
def test_of_classes_the_kinds_of_mistake_come_before_more_of_one(tmp_path: Path, score: str) -> None:
    one = task(tmp_path, {**CLASS, "score": score}, ROWS)  # late, lost, refund
    found = failures(one, one.examples("test"), [2, 2, 2, 0, 0])
    assert [(miss.input, miss.expected, miss.got) for miss in found.worst] == [
        ("text 0", "late", "refund"),
        ("text 4", "lost", "late"),
        ("text 1", "late", "refund"),
    ]
    assert found.confusion == {"late": {"late": 1, "refund": 2}, "lost": {"late": 1}, "refund": {"refund": 1}}
    assert len(failures(one, one.examples("test"), [2, 2, 2, 0, 0], most=1).worst) == 1


def test_of_texts_and_numbers_the_furthest_come_first(tmp_path: Path) -> None:
    one = task(tmp_path, {**TEXT, "score": "overlap"}, [{"text": "q", "label": "a b"}] * 3)
    assert [miss.got for miss in failures(one, one.examples("test"), ["a c", "a b", "no"]).worst] == ["no", "a c"]
    one = task(tmp_path, {"type": "regression", "text": "text", "label": "label"}, NUMBERS)
    found = failures(one, one.examples("test"), [0.0, 1.5, 0.0, 3.1])
    assert [(miss.expected, miss.got) for miss in found.worst] == [(2.0, 0.0), (1.0, 1.5), (3.0, 3.1)]
    assert found.confusion == {}


def test_choices_are_classes(tmp_path: Path) -> None:
    one = task(tmp_path, {**TEXT, "score": "choice", "choices": ["late", "refund", "lost"]}, ROWS)
    found = failures(one, one.examples("test"), ["late", "It is lost.", "refund", "what?", "lost"])
    assert found.confusion == {
        "late": {"late": 1, "lost": 1, "none of them": 1},
        "lost": {"lost": 1},
        "refund": {"refund": 1},
    }


@pytest.mark.parametrize(("spec", "answer"), [(TEXT, "late"), (CLASS, "late")])
def test_the_commonest_answer_is_scored(tmp_path: Path, spec: dict[str, Any], answer: str) -> None:
    one = task(tmp_path, spec, ROWS)
    assert one.majority(one.examples("test")) == (answer, 0.6)


def test_with_test_sets_each_is_held_to_its_own_score(tmp_path: Path) -> None:
    one = task(tmp_path, TEXT, ROWS)
    sets = {"exact": one.spec.data.test, "near": {"file": one.spec.data.test, "score": "overlap"}}
    data = {**one.spec.data.model_dump(), "test": sets}
    both = build_task("b", TASKS["generation"].spec_class.model_validate({**TEXT, "data": data}))
    examples = both.examples("test")
    assert both.faults(["late."] * 10, examples) == [1, 1, 1, 1, 1, 0, 0, 1, 0, 1]
    assert both.majority(examples) == ("late", pytest.approx(0.6))
