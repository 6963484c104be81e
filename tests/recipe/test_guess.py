"""What `init` takes a file for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from trimtab.errors import DataError
from trimtab.recipe.guess import guess
from trimtab.recipe.load import load_recipe
from trimtab.tasks.files import read_rows

MODEL = Path(__file__).parents[2] / "models/tiny-llama"
PAGE = MODEL.parents[1] / "docs/your-own-file.md"
Rows = list[dict[str, Any]]


def of(count: int = 24, **columns: Any) -> Rows:
    """Rows whose fields are functions of their number, or always the same."""
    return [{name: c(i) if callable(c) else c for name, c in columns.items()} for i in range(count)]


def sentence(i: int) -> str:
    return f"{'a rather long ' * (i % 3)}sentence of its own, {'xyz' * (i + 1)}"


def talk(*roles: str, name: str = "role", text: str = "content") -> Any:
    return lambda i: [{name: role, text: f"{role} says {i}"} for role in roles]


TICKETS: dict[str, Any] = {
    "Ticket ID": lambda i: f"TCK-{i:05}",
    "opened": lambda i: f"2026-03-{i + 1:02}",
    "channel": "mail",
    "title": lambda i: f"title {chr(97 + i)}",
    "body": sentence,
    "queue": lambda i: ["billing", "returns"][i // 12],
}
ALPACA: dict[str, Any] = {"instruction": sentence, "input": lambda i: "" if i % 2 else "this", "output": sentence}
# What a file holds, then the type and keys that are made of it.
FILES: dict[str, tuple[Rows, str, dict[str, Any]]] = {
    "tickets": (of(**TICKETS), "classification", {"text": "body", "label": "queue"}),
    "alpaca": (
        of(**ALPACA),
        "generation",
        {"prompt": ["{instruction}\n\n{input}", "{instruction}"], "answer": "{output}", "score": "overlap"},
    ),
    "alpaca without input": (of(**{**ALPACA, "input": ""}), "generation", {"prompt": "{instruction}"}),
    "prompt, completion": (
        of(id=lambda i: i, prompt=sentence, completion=lambda i: "yes" if i % 2 else "no"),
        "generation",
        {"prompt": "{prompt}", "answer": "{completion}", "score": "exact_match", "max_new_tokens": 16},
    ),
    "worked sums": (
        of(question=sentence, answer=lambda i: f"{'One more is one more, and so on. ' * 2}\n#### {1000 + i:,}"),
        "generation",
        {"prompt": "{question}", "answer": "{answer}", "score": "number"},
    ),
    "question, answer": (of(answer=sentence, question=sentence), "generation", {"prompt": "{question}"}),
    "text, label": (of(label=lambda i: i % 3, text=sentence), "classification", {"text": "text", "label": "label"}),
    "a pair": (
        of(idx=lambda i: i, premise=sentence, hypothesis=sentence, label=lambda i: ["yes", "no"][i % 2]),
        "classification",
        {"text": ["premise", "hypothesis"]},
    ),
    "a pair by number": (
        of(**{"#1 ID": lambda i: i, "Line 1": sentence, "Line 2": sentence, "ok": lambda i: i % 2}),
        "classification",
        {"text": ["Line 1", "Line 2"], "label": "ok"},
    ),
    "a pair by letter": (
        of(text_a=sentence, text_b=sentence, label=lambda i: i % 2),
        "classification",
        {"text": ["text_a", "text_b"]},
    ),
    "numbers": (of(text=sentence, score=lambda i: f"{i / 7:.3f}"), "regression", {"text": "text", "label": "score"}),
    "numbers of any name": (
        of(Nr=lambda i: i, text=sentence, price=lambda i: f"{i / 7:.3f}".replace(".", ",")),
        "regression",
        {"text": "text", "label": "price"},
    ),
    "preferences": (
        of(prompt=sentence, chosen=sentence, rejected=sentence),
        "generation",
        {"prompt": "{prompt}", "answer": "{chosen}"},
    ),
    "many numbered classes": (
        of(300, text=sentence, label=lambda i: i * 5 % 77),
        "classification",
        {"text": "text", "label": "label"},
    ),
    "many whole numbers": (
        of(300, text=sentence, label=lambda i: i * 5 % 77 * 2),
        "regression",
        {"text": "text", "label": "label"},
    ),
    "points": (of(300, text=sentence, score=lambda i: i * 5 % 77), "regression", {"text": "text", "label": "score"}),
    "sorted by class": (
        of(4400, text=lambda i: f"{chr(97 + i % 26)} text of its own, {i}", label=lambda i: i // 2200),
        "classification",
        {"text": "text", "label": "label"},
    ),
    "two texts": (of(id=lambda i: i, french=sentence, english=sentence), "generation", {"prompt": "{french}"}),
    "words and tags": (
        of(id=lambda i: str(i), tokens=lambda i: ["Al", "met", f"Bo{i}"], ner_tags=["B-PER", "O", "B-PER"]),
        "token_classification",
        {"text": "tokens", "label": "ner_tags", "score": "f1", "adapter": {"positions": "all"}},
    ),
    "words and numbers": (
        of(words=lambda i: ["Al", f"met{i}"], pos=[3, 1], ner=[1, 0]),
        "token_classification",
        {"text": "words", "label": "ner", "score": "accuracy"},
    ),
    "text, several labels": (
        of(text=sentence, about=lambda i: ["war", "art", "tax"][i % 2 : 1 + i % 3]),
        "multi_label_classification",
        {"text": "text", "label": "about", "score": "f1"},
    ),
    "messages": (
        of(messages=talk("user", "assistant")),
        "generation",
        {"prompt": "{user}", "answer": "{assistant}"},
    ),
    "sharegpt": (of(conversations=talk("human", "gpt", name="from", text="value")), "generation", {"prompt": "{user}"}),
}


def write(folder: Path, rows: Rows) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_taken_for_what_people_mean(name: str, tmp_path: Path) -> None:
    rows, kind, keys = FILES[name]
    found = guess(write(tmp_path, rows), generates=True)
    assert (found.type, {key: found.keys[key] for key in keys}) == (kind, keys)


def test_turns_of_a_system_are_kept_and_several_turns_are_a_conversation(tmp_path: Path) -> None:
    one, more = talk("user", "assistant"), talk("user", "assistant", "user", "assistant")
    same = of(messages=lambda i: [{"role": "system", "content": "Be brief."}, *one(i)])
    found = guess(write(tmp_path, same), generates=True)
    assert found.keys["system"] == "Be brief." and found.keys["prompt"] == "{user}"
    assert found.data == {"conversation": "messages"}
    differing = of(messages=lambda i: [{"role": "system", "content": f"Be {i}."}, *one(i)])
    assert guess(write(tmp_path, differing), generates=True).keys["prompt"] == ["{system}\n\n{user}", "{user}"]
    mixed = of(messages=lambda i: one(i)[:1] if i == 3 else one(i) if i else more(i))
    found = guess(write(tmp_path, mixed), generates=True)
    assert (found.type, found.keys["train_turns"], found.keys["edit_turns"]) == ("conversation", "all", "each")
    assert found.data == {"conversation": "messages", "skip_bad_rows": True}
    assert found.said.startswith("1 of 24 rows are no conversation with an answer")


def test_columns_that_a_prompt_leaves_out_are_named(tmp_path: Path) -> None:
    choices = of(question=sentence, choice0=sentence, choice1=sentence, answer=lambda i: i % 2)
    found = guess(write(tmp_path, choices), True)
    assert found.keys["prompt"] == "{question}"
    assert found.said == "choice0, choice1 might belong in the prompt too, each in braces"
    seeds = of(task=sentence, instances=lambda i: [{"input": "", "output": "x"}], label=lambda i: i % 2)
    assert guess(write(tmp_path, seeds), True).said == "instances: lists or objects, which are not used"


def test_fields_that_could_be_read_too_are_named(tmp_path: Path) -> None:
    news = of(title=lambda i: f"{sentence(i)[:9]} {chr(97 + i)}", body=sentence, label=lambda i: ["a", "b"][i % 2])
    assert guess(write(tmp_path, news), False).said == "title could be read too: text: [title, body]"
    numbered = of(text=sentence, label=lambda i: i % 2, label_text=lambda i: ["no", "yes"][i % 2])
    assert guess(write(tmp_path, numbered), False).said == "label_text could stand at label: instead of label"


@pytest.mark.parametrize("nothing", ["NaN", "NA", "n/a", "null"])
def test_what_programs_write_for_no_number_is_no_class(tmp_path: Path, nothing: str) -> None:
    rows = of(40, text=sentence, rating=lambda i: nothing if i % 3 == 0 else f"{i % 7 + 0.5}")
    assert guess(write(tmp_path, rows), False).type == "regression"


def test_pairs_of_preference_and_columns_of_labels_are_named(tmp_path: Path) -> None:
    found = guess(write(tmp_path, of(prompt=sentence, chosen=sentence, rejected=sentence)), True)
    assert "rejected is not read; training on preferences: docs/guides/trl.md" in found.said
    marks: Rows = [
        {"comment_text": sentence(i), "toxic": str(i % 2), "insult": str(int(i % 3 == 0))} for i in range(24)
    ]
    found = guess(write(tmp_path, marks), False)
    assert "of several labels at once make one field, a list" in found.said


def test_names_that_are_known_come_before_what_looks_alike(tmp_path: Path) -> None:
    """SNLI's and XNLI's files, where the annotators' marks and a match have few values too."""
    nli = of(
        sentence1=sentence,
        sentence1_parse=lambda i: f"(ROOT {sentence(i)})",
        sentence2=lambda i: f"it {sentence(i)}",
        gold_label=lambda i: ["neutral", "entailment"][i % 2],
        annotator_labels=lambda i: [["neutral", "entailment"][i % 2]] * 3,
        match=lambda i: str(i % 3 == 0),
    )
    found = guess(write(tmp_path, nli), False)
    assert found.keys == {"text": ["sentence1", "sentence2"], "label": "gold_label", "score": "accuracy"}
    assert "sentence1_parse not read" in found.said


def test_what_is_left_of_a_multiple_choice_is_said(tmp_path: Path) -> None:
    rows = of(sentence=sentence, option1=lambda i: f"a{sentence(i)}", option2=lambda i: f"b{sentence(i)}", answer="1")
    rows = [{**row, "answer": str(i % 2 + 1)} for i, row in enumerate(rows)]
    assert "sentence not read: a text is of one field or two" in guess(write(tmp_path, rows), False).said


def test_several_labels_in_numbers_or_in_one_cell(tmp_path: Path) -> None:
    """GoEmotions, as lists and as its own files have them."""
    rows = of(60, text=sentence, labels=lambda i: [i % 5, 7] if i % 3 else [i % 5])
    found = guess(write(tmp_path, rows), False)
    assert (found.type, found.keys["label"]) == ("multi_label_classification", "labels")
    for cells in (lambda i: f"{i % 5},7,9" if i % 3 else str(i % 5), lambda i: "joy, anger" if i % 3 else "joy"):
        rows = of(60, text=sentence, labels=cells, other=lambda i: i * 7)
        found = guess(write(tmp_path, rows), False)
        assert found.type == "classification" and "cells of labels name several at once" in found.said
    rows = of(60, text=sentence, label=lambda i: f"{i % 9},5")
    assert guess(write(tmp_path, rows), False).type == "regression"


def test_names_that_are_given_for_a_file_with_a_header(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("review,mood\n" + "".join(f'"{sentence(i)}",{"ab"[i % 2]}\n' for i in range(24)))
    assert "'review, mood' is a header" in guess(str(file), False, ["text", "label"]).said
    file.write_text("".join(f'"{sentence(i)}",{"ab"[i % 2]}\n' for i in range(24)))
    assert guess(str(file), False, ["text", "label"]).said == ""


def test_halves_are_no_classes(tmp_path: Path) -> None:
    """However few different ones there are; whole numbers with a point are."""
    for value, kind in ((lambda i: i % 11 / 2, "regression"), (lambda i: f"{i % 5},5", "regression")):
        assert guess(write(tmp_path, of(60, text=sentence, score=value)), False).type == kind
    assert guess(write(tmp_path, of(60, text=sentence, stars=lambda i: float(i % 5))), False).type == "classification"


def test_a_separator_that_is_not_found_can_be_named(tmp_path: Path, trimtab: Command) -> None:
    lines = (f"at {i}, day:{'fine' if i % 2 else 'bad'}" for i in range(12))
    (tmp_path / "mood.csv").write_text("\n".join(["text:label", *lines]))
    with pytest.raises(DataError, match="init's --separator"):
        guess(str(tmp_path / "mood.csv"), True)
    command = ["init", MODEL, "--task", tmp_path / "mood.csv", "-o", tmp_path / "recipe.yaml"]
    assert trimtab(*command, "--separator", ":")[0] == 0
    task = load_recipe(tmp_path / "recipe.yaml").experiments()["mood"].task
    assert all(one.texts[0].startswith("at ") for one in task.examples("train"))


@pytest.mark.parametrize(
    ("name", "lines", "columns"),
    [
        ("news.csv", ['"{n}","A title {i}","A story that is told at length, {i}"'], ["label", "title", "text"]),
        ("moods.csv", ["i feel this or that, {i} times over;joy", "i feel it {i} times;fear"], ["text", "label"]),
        ("moods.TSV", ["joy\ti feel this or that, {i} times over", "fear\ti feel it {i} times"], ["label", "text"]),
    ],
)
def test_a_first_line_that_is_a_row_is_no_header(
    tmp_path: Path, name: str, lines: list[str], columns: list[str]
) -> None:
    rows = [lines[i % len(lines)].format(i=i, n=i % 4 + 1) for i in range(24)]
    (tmp_path / name).write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"line 1: '(1|joy)' heads a column and is a value in it too.*init --columns"):
        guess(str(tmp_path / name), False)
    found = guess(str(tmp_path / name), False, columns)
    assert (found.type, found.keys["text"], found.keys["label"]) == ("classification", "text", "label")


@pytest.mark.parametrize(
    ("rows", "generates", "said"),
    [
        (of(chosen=sentence, rejected=sentence), True, "chosen and rejected are two answers of which one is better"),
        (of(a=lambda i: i, b="x"), True, "no columns look like a prompt and an answer, or a text and a label"),
        (of(text=sentence, label="x"), True, r"the fields are text, label \(label with one value in all rows"),
        (
            of(excerpt=sentence, ease=lambda i: f"{i / 7:.3f}", cost=lambda i: f"{i / 9:.3f}"),
            False,
            "Call them text and label, or write the task by hand",
        ),
        (
            of(question=sentence, answer=sentence),
            False,
            "the model writes no text, and no columns look like a text and",
        ),
        (of(messages=talk("user", "assistant")), False, "the model writes no text"),
        (of(messages=talk("user", "user")), True, "no conversation has an answer"),
        (of(text=sentence, labels="['a', 'b']"), False, "labels: lists written as text: write the file as .jsonl"),
        (of(chosen=talk("user", "assistant"), rejected=talk("user")), True, "chosen and rejected are two answers"),
        (of(**{"a:b": sentence, "c": sentence}), True, "the field 'a:b' cannot stand in a template; rename it"),
    ],
)
def test_what_no_task_can_be_made_of(rows: Rows, generates: bool, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        guess(write(tmp_path, rows), generates)


def test_init_shows_a_row_and_what_is_wrong(trimtab: Command, tmp_path: Path) -> None:
    file, out = tmp_path / "Jo's tickets (März).csv", tmp_path / "recipe.yaml"
    rows = of(**TICKETS)
    file.write_text("\ufeff" + "\n".join(";".join(line) for line in [rows[0], *(row.values() for row in rows)]))
    code, text = trimtab("init", MODEL, "--task", file, "-o", out)
    assert code == 0 and "«s»entence of its own" in text and "-> billing" in text, text
    ((name, task),) = load_recipe(out).tasks.items()
    assert (name, task.type) == ("Jo_s_tickets_M_rz_", "classification")
    code, text = trimtab("init", MODEL, "--task", f"a={tmp_path / 'rows.csv'}", "-o", tmp_path / "other.yaml")
    assert code == 2 and "no file" in text and not (tmp_path / "other.yaml").exists()


def test_a_file_without_a_header_is_given_one(trimtab: Command, tmp_path: Path) -> None:
    """As CoLA comes: the label is not the column that most rows leave empty."""
    file, out = tmp_path / "rows.tsv", tmp_path / "recipe.yaml"
    marks = ("", "", "", "*", "**")
    file.write_text("".join(f"s{i}\t{i % 2}\t{marks[i % 5]}\tA sentence {'so ' * i}much its own\n" for i in range(40)))
    code, text = trimtab("init", MODEL, "--task", file, "-o", out)
    assert code == 2 and "--columns" in text and not out.exists(), text
    code, text = trimtab("init", MODEL, "--task", file, "-o", out, "--columns", "source,acceptable, mark,sentence")
    assert code == 0, text
    (task,) = load_recipe(out).tasks.values()
    assert (task.text, task.label) == (["sentence"], "acceptable")
    assert task.data.columns == ["source", "acceptable", "mark", "sentence"]


def test_files_that_are_no_table_become_rows_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quote.tok.gt9.5000", "plot.tok.gt9.5000"):
        Path(name).write_bytes("".join(f"a clich\u00e9 of {name} , {i} times\n" for i in range(20)).encode("latin-1"))
    questions = [f"{'DESC:manner' if i % 2 else 'HUM:ind'} What did Pel\u00e9 do : {i} ?\n" for i in range(24)]
    Path("train_5500.label").write_bytes("".join(questions).encode("latin-1"))
    with pytest.raises(DataError, match=r"a file a class.*your-own-file\.md; .*a copy called train_5500\.csv"):
        guess("train_5500.label", False)
    for label in ("pos", "neg"):
        Path("aclImdb/train", label).mkdir(parents=True)
        Path("aclImdb/train", label, "0_9.txt").write_text(f"A {label} film.")
    Path("aclImdb/train/unsup").mkdir()
    Path("aclImdb/train/unsup/0_0.txt").write_text("A film.")
    Path("comments.csv").write_text('id,comment_text,toxic,obscene,insult\n1,fool,1,0,1\n2,"well, no",0,0,0\n')
    Path("eng.train").write_text("-DOCSTART- -X- O\n\nJohn NNP B-PER\nsings VBZ O\n\nParis NNP B-LOC\n\n")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, {})
    assert read_rows("subj.jsonl")[0] == {
        "text": "a clich\u00e9 of quote.tok.gt9.5000 , 0 times",
        "label": "subjective",
    }
    assert {"text": "A pos film.", "label": "pos"} in read_rows("imdb.jsonl")
    assert [row["labels"] for row in read_rows("comments.jsonl")] == [["toxic", "insult"], []]
    assert read_rows("conll.jsonl")[0] == {"words": ["John", "sings"], "tags": ["B-PER", "O"]}
    assert read_rows("trec.jsonl")[1] == {"label": "DESC:manner", "text": "What did Pel\u00e9 do : 1 ?"}
    assert {guess(f"{name}.jsonl", True).keys["label"] for name in ("subj", "trec")} == {"label"}
