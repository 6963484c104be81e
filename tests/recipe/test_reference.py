"""docs/recipe.md is what the schema says, and an example of each type of task trains with any of its keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command
from pydantic import BaseModel

from trimtab.recipe.load import load_recipe
from trimtab.recipe.reference import as_yaml, example_recipe, keys, page
from trimtab.recipe.schema import ENTRIES, Recipe
from trimtab.tasks.spec import SetSpec

ROOT = Path(__file__).parents[2]
SECTIONS = [Recipe, *ENTRIES.values(), SetSpec]


def placed(section: type[BaseModel], place: str = "") -> Iterator[tuple[str, object]]:
    """Every key within, with its path and example."""
    for key in keys(section):
        if key.section is not None:
            yield from placed(key.section, f"{place}{key.name}.")
        elif key.name != "tasks":
            assert key.meaning, f"{place}{key.name} has no docstring"
            assert key.name == "type" or key.example is not None, f"{place}{key.name} has no example"
            yield f"{place}{key.name}", key.example


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/text.txt").write_text("Once upon a time.")
    return tmp_path


def write(folder: Path, kind: str) -> Path:
    rows = [json.dumps(row) for row in ENTRIES[kind].example_rows] * 4
    for split in ("train", "validation", "test"):
        (folder / f"data/{split}.jsonl").write_text("\n".join(rows))
    return folder / "example.yaml"


def test_the_page_is_the_schema() -> None:
    there = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    assert page() == there, "python -m trimtab.recipe.reference > docs/recipe.md"
    for place, _ in (one for section in SECTIONS for one in placed(section)):
        assert f"| `{place.rpartition('.')[2]}` |" in there


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_example_trains(kind: str, folder: Path, trimtab: Command) -> None:
    file = write(folder, kind)
    code, text = trimtab("init", ROOT / "models/tiny-llama", "--example", kind)
    assert code == 0, text
    file.write_text(text)
    code, said = trimtab("train", file, "--dry-run")
    assert code == 0 and "mine" in said, said


TOGETHER = {"choices": ["score=choice"], "data.config": ["data.name=some/set"]}
"""What a key cannot be without."""


@pytest.mark.parametrize("kind", ENTRIES)
def test_every_key_takes_its_example(kind: str, folder: Path) -> None:
    file = write(folder, kind)
    file.write_text(example_recipe(kind))
    found = list(placed(Recipe)) + [(f"tasks.mine.{place}", value) for place, value in placed(ENTRIES[kind])]
    for place, value in found:
        if place == "model" or place.endswith(".type"):
            continue
        bare = place.removeprefix("tasks.mine.")
        others = [f"tasks.mine.{one}" for one in TOGETHER.get(bare, [])]
        load_recipe(file, [*others, f"{place}={as_yaml(value)}"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--example", "chatting"], "there is no such type of task; there are generation, conversation"),
        (["--example", "generation", "-o", "x.yaml"], "leave out --task and --output"),
        ([], "init needs a model"),
    ],
)
def test_what_init_refuses(arguments: list[str], said: str, trimtab: Command) -> None:
    code, text = trimtab("init", *arguments)
    assert code == 2 and said in text and "Traceback" not in text
