"""What validates: of a group all rows or none; and what is in two splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import DataError
from trimtab.recipe.load import load_recipe
from trimtab.study.report import Items
from trimtab.tasks import Task

MODEL = Path(__file__).parents[2] / "models/tiny-llama"
MOOD = {"type": "classification", "text": "text", "label": "label"}
TALK = {"type": "conversation"}


def task(folder: Path, entry: dict[str, Any], rows: list[dict[str, Any]], **data: Any) -> Task[Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"model": str(MODEL), "tasks": {"a": {**entry, "data": {"train": "rows.jsonl", **data}}}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return load_recipe(folder / "recipe.yaml").experiments()["a"].task


def people(each: int, count: int) -> list[dict[str, Any]]:
    """So many rows of each of so many people, who do not stand together."""
    return [{"text": f"{i} {who}", "label": "ab"[who % 2], "who": who} for i in range(each) for who in range(count)]


@pytest.mark.parametrize("each", [1, 7, 200])
def test_no_group_is_in_both_train_and_what_validates(tmp_path: Path, each: int) -> None:
    found = task(tmp_path, MOOD, people(each, 40), group="who")
    train, validation = ([e.row["who"] for e in found.examples(split)] for split in ("train", "validation"))
    assert not {*train} & {*validation} and len(train) + len(validation) == 40 * each
    assert len(validation) == min(4, 500 // each) * each  # a tenth, and at most 500 rows
    assert len({who % 2 for who in validation}) == 2  # of both classes
    assert found.shared_groups("train", "test") == 0  # which are those of validation


def test_one_group_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows of one who cannot be split; give data: validation:"):
        task(
            tmp_path, MOOD, [{"text": str(i), "label": "ab"[i % 2], "who": 1} for i in range(9)], group="who"
        ).examples("train")


def test_answers_of_one_conversation_count_as_one(tmp_path: Path) -> None:
    turns = [m for i in range(4) for m in ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"})]
    found = task(tmp_path, TALK, [{"messages": turns} for _ in range(6)], validation="rows.jsonl", test="rows.jsonl")
    items = Items.of(found, "test")
    assert (len(items.examples), items.groups) == (24, 6)
    assert (items.weights[:, ::4] == items.weights[:, 3::4]).all()  # drawn together
    assert items.said == "24 test items of 6 sources"


def test_rows_of_two_splits_are_counted(tmp_path: Path) -> None:
    found = task(tmp_path, MOOD, people(2, 20), test="rows.jsonl", validation="rows.jsonl", group="who")
    assert (found.shared("train", "test"), found.shared_groups("train", "validation")) == (40, 20)
