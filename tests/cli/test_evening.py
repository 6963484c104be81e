"""Files as people have them, from `init` to `predict`, no recipe edited."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command

pytestmark = pytest.mark.slow
MODEL = Path(__file__).parents[2] / "models/tiny-llama"
NOUNS = ["cat", "dog", "horse", "river", "tree", "house", "road", "bird", "stone", "boat", "hand", "day", "year"]
NOUNS += ["friend", "school", "book", "table", "chair"]
WORDS = {
    "billing": "invoice charge payment refund card",
    "delivery": "parcel courier address box van",
    "account": "password login email profile username",
}
FRAMES = [
    "My {} is wrong",
    "A question about the {}",
    "The {} is not right",
    "Can you check the {}?",
    "Where is the {}?",
]


def tickets(path: Path, frames: list[str] = FRAMES) -> None:
    """A CSV with semicolons and ids, sorted by what is to be told."""
    rows = [(team, frame.format(word)) for team, words in WORDS.items() for word in words.split() for frame in frames]
    lines = [f"T-{1000 + i};2026-03-{1 + i % 28:02};mail;{text};{team}" for i, (team, text) in enumerate(sorted(rows))]
    path.write_text("ticket_id;opened;channel;message;team\n" + "\n".join(lines))


def alpaca(path: Path) -> None:
    plural = [{"instruction": "Give the plural.", "input": noun, "output": f"{noun}s"} for noun in NOUNS]
    whole = [{"instruction": f"Give the plural of {noun}.", "input": "", "output": f"{noun}s"} for noun in NOUNS]
    path.write_text(json.dumps(plural + whole, indent=1))


def sharegpt(path: Path) -> None:
    turns = [[("human", f"What is the plural of {noun}?"), ("gpt", f"{noun}s")] for noun in NOUNS * 2]
    talks = [[{"from": who, "value": text} for who, text in turn] for turn in turns]
    path.write_text(json.dumps([{"id": f"c{i}", "conversations": talk} for i, talk in enumerate(talks)]))


def reviews(path: Path) -> None:
    draw = random.Random(0)
    kinds = {"positive": ["wonderful", "great", "lovely"], "negative": ["awful", "boring", "terrible"]}
    things = ["The film", "This book", "The meal", "That song"]
    rows = [
        f"{draw.choice(things)} was {draw.choice(kinds[kind])}\t{kind}" for kind in sorted(kinds) for _ in range(40)
    ]
    path.write_text("text\tlabel\n" + "\n".join(rows), encoding="utf-8-sig")


def questions(path: Path) -> None:
    rows = [{"question": f"One {noun}, two what?", "answer": f"{noun}s"} for noun in NOUNS * 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# The file, its maker, the column that `predict` is right about, and what tells a row from another.
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "tickets.csv": (tickets, "team"),
    "alpaca.json": (alpaca, "output"),
    "sharegpt.json": (sharegpt, ""),
    "reviews.tsv": (reviews, "label"),
    "questions.jsonl": (questions, "answer"),
}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("file", FILES)
def test_from_a_file_to_answers(file: str, trimtab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, wanted = FILES[file]
    name = Path(file).stem
    monkeypatch.chdir(tmp_path)
    make(Path(file))
    for command in (["init", MODEL, "--task", file], ["train", "recipe.yaml"], ["eval", "recipe.yaml"]):
        code, text = trimtab(*command)
        assert code == 0, text
    metrics = json.loads((tmp_path / "runs" / name / "metrics.json").read_text())
    score = metrics["score"]
    assert metrics["tuned"][score] >= metrics["untuned"][score]
    code, text = trimtab("predict", file, "-a", f"runs/{name}", "-o", "out.csv")
    assert code == 0, text
    answers = rows_of(tmp_path / "out.csv")
    expected = [row[wanted] if wanted else f"{NOUNS[i % len(NOUNS)]}s" for i, row in enumerate(answers)]
    right = [row["prediction"].strip() == answer for row, answer in zip(answers, expected, strict=True)]
    assert sum(right) / len(right) > 0.7


def test_the_score_of_a_sorted_file_is_that_of_new_rows(
    trimtab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On validation, which the sorted file gives of itself, and on rows of another file, within chance."""
    monkeypatch.chdir(tmp_path)
    tickets(Path("tickets.csv"))
    tickets(Path("new.csv"), ["Is my {} all right?", "The {} again"])
    assert trimtab("init", MODEL, "--task", "tickets.csv")[0] == 0
    assert trimtab("train", "recipe.yaml")[0] == 0
    metrics = json.loads(Path("runs/tickets/metrics.json").read_text())
    assert trimtab("predict", "new.csv", "-a", "runs/tickets", "-o", "out.csv")[0] == 0
    answers = rows_of(Path("out.csv"))
    new = sum(row["prediction"] == row["team"] for row in answers) / len(answers)
    low, high = metrics["interval"]
    assert low <= new <= high
