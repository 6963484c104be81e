"""Trained runs of every kind of task used again: on files, by the lines of their cards, in chat."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Command

from trimtab import expect_missing
from trimtab.cli.tables import results_table
from trimtab.errors import DataError
from trimtab.recipe.load import load_recipe
from trimtab.runs.apply import Applied
from trimtab.runs.folder import RunFolder
from trimtab.runs.generate import Answerer
from trimtab.runs.train import train

MODEL = Path(__file__).parents[2] / "models/tiny-llama"
TASKS: dict[str, dict[str, Any]] = {
    "plural": {"type": "generation", "prompt": "{text} ->", "answer": "{many}", "system": "Be brief."},
    "mood": {"type": "classification", "text": "text", "label": "mood"},
    "size": {"type": "regression", "text": ["text", "many"], "label": "size"},
    "traits": {"type": "multi_label_classification", "text": "text", "label": "traits"},
    "pets": {"type": "token_classification", "text": "many", "label": "tags", "score": "f1"},
}
ROWS = [
    {
        "text": text,
        "many": f"{text}s",
        "mood": mood,
        "size": len(text),
        "traits": [mood, "big"] if len(text) > 3 else [],
        "tags": "B-PET" if mood == "tame" else "O",
    }
    for text, mood in [("cat", "tame"), ("dog", "tame"), ("wolf", "wild"), ("tiger", "wild")] * 3
]
KINDS = pytest.mark.parametrize("kind", TASKS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of each kind of task; the training data is gone since."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "recipe.yaml").write_text(
        json.dumps(
            {
                "model": str(MODEL),
                "output": str(folder / "out"),
                "dtype": "float32",
                "adapter": {"r": 2, "positions": "f1+l2"},
                "training": {"max_steps": 12, "batch_size": 4, "eval_batch_size": 2},
                "tasks": {name: {**task, "data": {"train": "train.jsonl"}} for name, task in TASKS.items()},
            }
        )
    )
    recipe = load_recipe(folder / "recipe.yaml")
    train(recipe.experiments(), recipe.output)
    data.unlink()
    return folder / "out"


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """More rows than one chunk, of different lengths, without answers."""
    file = tmp_path / "asked.csv"
    file.write_text(
        "text,many\n" + "".join(f"{'big ' * (i % 3)}cat {i},cats {'and dogs ' * (i % 4)}\n" for i in range(40))
    )
    return file


def read(output: Path) -> list[dict[str, str]]:
    with output.open(newline="") as opened:
        return list(csv.DictReader(opened))


@KINDS
def test_predictions_are_those_of_each_row_alone(kind: str, runs: Path, asked: Path, tmp_path: Path) -> None:
    output = tmp_path / "new/out.jsonl"
    applied = Applied(runs / kind)
    assert applied.write(asked, output) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 41))
    examples = applied.examples(asked)
    for at in (0, 17, 39):
        (alone,) = next(applied.lines({at + 1: examples[at + 1]}))
        assert lines[at] == pytest.approx(alone, abs=1e-4)
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


def test_a_classifier_says_names_and_probabilities(runs: Path, asked: Path, trimtab: Command, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    code, text = trimtab("predict", asked, "-a", runs / "mood", "-o", output)
    assert code == 0 and "Wrote" in text
    for line in read(output):
        shares = {name: float(line[f"p({name})"]) for name in ("tame", "wild")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert line["prediction"] == max(shares, key=shares.__getitem__)
    code, text = trimtab("predict", asked, "-a", runs / "mood", "-o", output)
    assert code == 2 and "there already" in text
    code, text = trimtab("predict", asked, "-a", runs / "mood")
    assert code == 0 and text == output.read_text()


def test_predictions_are_for_people(runs: Path, asked: Path, trimtab: Command, tmp_path: Path) -> None:
    """No more digits than float32 has; an empty one is explained."""
    Applied(runs / "size").write(asked, tmp_path / "size.csv")
    assert all(len(line["prediction"].strip("-0.").replace(".", "")) <= 6 for line in read(tmp_path / "size.csv"))
    for kind in ("csv", "jsonl"):
        code, text = trimtab("predict", asked, "-a", runs / "traits", "-o", tmp_path / f"traits.{kind}")
        assert code == 0, text
    empty = sum(line["prediction"] == "" for line in read(tmp_path / "traits.csv"))
    assert empty and f"{empty} predictions are empty: no class has a probability above a half." in text


def test_memory_that_is_full_is_said_in_a_line(
    runs: Path, asked: Path, trimtab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("transformers.LlamaModel.forward", full)
    code, text = trimtab("predict", asked, "-a", runs / "mood", "-o", tmp_path / "out.csv", "--batch-size", 7)
    said = "error: answering 7 rows at a time does not fit into the GPU's memory; lower training: eval_batch_size:"
    assert code == 2 and text.startswith(said) and text.count("\n") == 1


def test_the_files_own_columns_stand_beside_the_prediction(runs: Path, tmp_path: Path) -> None:
    rows = [{"id": "A-1", "text": "cat", "row": 7, "tags": ["a", "b"]}, {"text": "dog", "note": "x,y"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Applied(runs / "mood").write(tmp_path / "rows.jsonl", tmp_path / "out.csv")
    first, second = read(tmp_path / "out.csv")
    names = ["row", "id", "text", "row (given)", "tags", "note", "prediction", "p(tame)", "p(wild)"]
    assert list(first) == names
    assert (first["id"], first["row"], first["row (given)"], first["tags"]) == ("A-1", "1", "7", '["a", "b"]')
    assert (second["id"], second["text"], second["note"]) == ("", "dog", "x,y")


@pytest.mark.parametrize("left", ["", '{"row": 17, "inp'])
def test_an_interrupted_file_is_gone_on_with(left: str, runs: Path, asked: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    Applied(runs / "mood").write(asked, whole)

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Applied(runs / "mood").write(asked, output, stop)
    (part,) = tmp_path.glob("out.csv.*.part")
    with part.open("a") as opened:
        opened.write(left)
    assert not output.exists()
    Applied(runs / "size").write(asked, tmp_path / "other.csv")  # another run's lines are not taken for these
    assert Applied(runs / "mood").write(asked, output) == 16
    assert output.read_text() == whole.read_text()
    assert not part.exists()


def test_lines_of_another_base_are_not_gone_on_with(
    runs: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Applied(runs / "mood").write(asked, tmp_path / "out.csv", stop)
    monkeypatch.setattr("trimtab.runs.apply.hash_of_model", lambda source: "trained anew")
    assert Applied(runs / "mood").write(asked, tmp_path / "out.csv") == 0


@KINDS
def test_the_card_runs_as_printed(
    kind: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (runs / kind / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    with reports() as reported:
        exec(compile(code, "card", "exec"), {})
    assert not reported  # of a head that is missing in the base
    printed = capsys.readouterr().out.strip()
    (tmp_path / "row.jsonl").write_text(json.dumps({name: f"<{name}>" for name in ROWS[0]}))
    applied = Applied(runs / kind)
    ((line,),) = applied.lines(applied.examples("row.jsonl"))
    if kind == "plural":
        assert printed == line["prediction"].strip()
    elif kind == "size":
        assert float(printed) == pytest.approx(line["prediction"], abs=1e-4)
    elif kind == "pets":
        assert eval(printed) == line["prediction"].split()
        name = applied.experiment.spec.text[0]
        several = code.replace(f"'<{name}>'", "'a cat and two  dogs'")
        assert several != code
        exec(compile(several, "card", "exec"), {})
        (tmp_path / "row.jsonl").write_text(json.dumps({**dict.fromkeys(ROWS[0], ""), name: "a cat and two  dogs"}))
        ((line,),) = applied.lines(applied.examples("row.jsonl"))
        assert eval(capsys.readouterr().out) == line["prediction"].split()
    elif kind == "traits":
        shares = {name: line[f"p({name})"] for name in ("big", "wild")}
        assert eval(printed) == pytest.approx(shares, abs=1e-4)
        assert line["prediction"] == ", ".join(name for name, share in shares.items() if share > 0.5)
    else:
        assert eval(printed) == pytest.approx({name: line[f"p({name})"] for name in ("tame", "wild")}, abs=1e-4)


@contextmanager
def reports() -> Iterator[list[str]]:
    """What transformers reports, within, of weights that it loads."""
    said: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("transformers.modeling_utils")
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        transformers.logging.set_verbosity(verbosity)


def test_only_the_head_is_expected_to_be_missing(tmp_path: Path) -> None:
    auto = transformers.AutoModelForSequenceClassification
    with reports() as reported, expect_missing("other"):
        auto.from_pretrained(MODEL, num_labels=2)
    assert len(reported) == 1 and "score.weight" in reported[0]
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    state["model.extra.weight"] = state.pop("model.norm.weight")
    base.save_pretrained(tmp_path, state_dict=state)
    with reports() as reported, expect_missing("score"):
        auto.from_pretrained(tmp_path, num_labels=2)
    (said,) = reported
    assert "model.norm.weight" in said and "model.extra.weight" in said and "score.weight" not in said


def test_class_names_go_with_the_run(runs: Path) -> None:
    for kind, names in (("mood", ["tame", "wild"]), ("traits", ["big", "wild"]), ("pets", ["B-PET", "O"])):
        assert RunFolder(runs / kind).task.head.config["id2label"] == dict(enumerate(names))
        assert Applied(runs / kind)._model.config.id2label == dict(enumerate(names))


def test_chat_puts_each_turn_as_training_did(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer, seen = Answerer({"plural": runs / "plural"}), []
    monkeypatch.setattr(answerer, "_run", lambda encoded, *_: [seen.extend(encoded)] and ["x"])
    answerer.reply([{"role": "user", "content": "cat"}], "plural")
    answerer.answer("cat", ["plural"])
    assert seen[0].input_ids == seen[1].input_ids
    talk = [("user", "cat"), ("assistant", "cats"), ("user", "dog")]
    answerer.reply([{"role": role, "content": text} for role, text in talk], "plural")
    assert (
        answerer.tokenizer.decode(seen[2].input_ids)
        == "<|bos|><|user|>Be brief.<|user|>cat -><|assistant|>cats<|end|><|user|>dog -><|assistant|>"
    )


def test_parameters_of_a_head_are_told_apart(runs: Path, trimtab: Command) -> None:
    assert "6,544 (384 beside the edits)" in trimtab("show", runs / "mood")[1]
    metrics = json.loads((runs / "mood/metrics.json").read_text())
    assert (metrics["parameters"], metrics["head_parameters"]) == (6_544, 384)
    (column,) = [one for one in results_table({"mood": metrics}).columns if "parameters" in str(one.header)]
    assert next(iter(column.cells)).split("\n")[:2] == ["6,544", "(head 384)"]


def test_what_cannot_be_predicted_is_said_first(runs: Path, trimtab: Command, tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.csv"
    for kind, row, said in [
        ("plural", {"text": "cat " * 600}, "row 1: "),
        ("plural", {"word": "cat"}, "row 1, for '{text} ->': no field 'text'; the fields are word (rename columns"),
        ("mood", {"text": ""}, "row 1: the field 'text' is ''"),
    ]:
        rows.write_text(json.dumps(row))
        code, text = trimtab("predict", rows, "-a", runs / kind, "-o", output)
        assert code == 2 and said in text and not output.exists(), text
    for arguments, said in [
        (("-a", runs / "mood", "-o", tmp_path / "out.xlsx"), "written as .csv or .jsonl"),
        (("-a", tmp_path), "no run of trimtab there"),
        (("-a", runs), "give the folder of one task"),
    ]:
        code, text = trimtab("predict", rows, *arguments)
        assert code == 2 and said in text, text
    with pytest.raises(DataError, match="the model reads 512 in all"):
        Answerer({"plural": runs / "plural"}).answer("cat " * 600, ["plural"])


def test_rows_that_cannot_be_used_are_left_out_on_request(runs: Path, tmp_path: Path, trimtab: Command) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("cat", "", "dog")))
    with pytest.raises(DataError, match=r"row 2: .*; or leave out such rows: predict --skip-bad-rows"):
        Applied(runs / "mood").examples(tmp_path / "rows.jsonl")
    applied = Applied(runs / "mood", skip_bad_rows=True)
    applied.write(tmp_path / "rows.jsonl", tmp_path / "out.csv")
    assert [line["row"] for line in read(tmp_path / "out.csv")] == ["1", "3"]
    assert len(applied.left_out) == 1 and "row 2: the field 'text' is ''" in applied.left_out[0]
    (tmp_path / "rows.csv").write_text("text,id\ncat,1\ndog\n")
    with pytest.raises(DataError, match=r"line 3: 1 cells .*; or leave out such rows: predict --skip-bad-rows"):
        Applied(runs / "mood").examples(tmp_path / "rows.csv")
    with pytest.raises(DataError, match=r"no file .*(?<!skip-bad-rows)$"):
        Applied(runs / "mood").examples(tmp_path / "no.csv")
    code, text = trimtab("predict", tmp_path / "rows.jsonl", "-a", runs / "mood", "--skip-bad-rows")
    assert code == 0 and "1 rows cannot be used and are left out, first" in text, text


def test_two_processes_do_not_write_one_file(runs: Path, asked: Path, tmp_path: Path) -> None:
    def again(done: int, of: int) -> None:
        Applied(runs / "mood").write(asked, tmp_path / "out.csv")

    with pytest.raises(ValueError, match="another process writes it"):
        Applied(runs / "mood").write(asked, tmp_path / "out.csv", again)
    assert os.listdir(tmp_path) != ["out.csv"]
