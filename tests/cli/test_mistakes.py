"""What a newcomer does wrong, each told in a line or two: where it is, what to do, no traceback."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

MODEL = Path(__file__).parents[2] / "models/tiny-llama"
RECIPE = """\
model: MODEL
output: out
adapter: {r: 2, positions: f1+l2}
training: {max_steps: 1, batch_size: 4}
tasks:
  mood:
    type: classification
    data: {train: mood.csv}
    text: text
    label: label
  words:
    type: generation
    data: {train: words.jsonl}
    prompt: "{input}"
    answer: "{output}"
"""
MOODS = "id;text;label\n" + "".join(f"{i};a {mood} day;{mood}\n" for i, mood in enumerate(["fine", "bad"] * 6))
WORDS = "".join(json.dumps({"input": word, "output": f"{word}s"}) + "\n" for word in ["cat", "dog", "hat"] * 4)
Change = tuple[str, str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mood.csv").write_text(MOODS)
    (tmp_path / "words.jsonl").write_text(WORDS)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(MODEL)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(folder: Path, name: str, *changes: Change) -> None:
    text = (folder / name).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / name).write_text(text)


# A change to the recipe, then the place and the remedy.
IN_RECIPE: dict[str, tuple[Change, str, str]] = {
    "tab": (("  words:", "\twords:"), "line 11", "YAML is indented with spaces"),
    "model that is not there": (("tiny-llama", "tiny-lama"), "line 1, model", "no folder"),
    "file misspelt": (("mood.csv", "moods.csv"), "line 8, tasks.mood.data.train", "did you mean mood.csv?"),
    "folder instead of a file": (
        ("mood.csv", "."),
        "tasks.mood.data.train: '.' is a folder",
        "name a file of rows in it",
    ),
    "field misspelt": (("text: text", "text: txt"), "mood.csv, row 1: no field 'txt'", "did you mean 'text'?"),
    "label misspelt": (("label: label", "label: lable"), "no field 'lable'", "did you mean 'label'?"),
    "field in capitals": (
        ('"{input}"', '"{Input}"'),
        "words.jsonl, row 1, for '{Input}': no field 'Input'",
        "did you mean 'input'?",
    ),
    "brace open": (('"{input}"', '"{input"'), "line 14, tasks.words.prompt", "a field is written {name}"),
    "braces without quotes": (('"{input}"', "{input}"), "tasks.words.prompt", 'write "{input}" with them'),
    "type": (("generation", "generate"), "line 11, tasks.words", "type must be generation"),
    "positions": (("f1+l2", "first1"), "line 3, adapter.positions", "Allowed: fN"),
    "method": (("{r: 2", "{method: lorefd, r: 2"), "adapter.method", "loreft"),
    "rank": (("r: 2", "r: 500"), "mood: adapter: r=500", "use a rank well below it"),
    "rank of nothing": (("r: 2", "r: 0"), "line 3, adapter.r", "r=0"),
    "layers": (("{r: 2", "{layers: [8], r: 2"), "mood: adapter: layers=[8]", "blocks 0 to 7"),
    "layers of the second task": (
        ("    prompt", "    adapter: {layers: [9]}\n    prompt"),
        "words: adapter: layers=[9]",
        "blocks 0 to 7",
    ),
    "site": (("{r: 2", "{site: attn, r: 2"), "mood: adapter: site='attn'", "it is block, attention, mlp"),
    "site of the second task": (
        ("    prompt", "    adapter: {site: q_proj}\n    prompt"),
        "words: adapter: site='q_proj'",
        "'.*q_proj'",
    ),
    "decimal comma": (("max_steps: 1", "learning_rate: 1,5e-3"), "line 4, training", "decimals take a point"),
    "epochs and steps": (("max_steps: 1", "max_steps: 1, epochs: 2"), "line 4, training", "keep one"),
    "no steps": (("max_steps: 1", "max_steps: 0"), "line 4, training.max_steps", "greater than 0"),
    "length": (("max_steps: 1", "max_steps: 1, max_length: 2"), "words: none of", "Raise training: max_length:"),
    "attention": (("output: out", "attention: flash_attention_2"), "cannot load the model", "set attention: auto"),
    "dtype": (("output: out", "dtype: fp16"), "line 2, dtype", "'float16'"),
    "key": (("    answer:", "    answr:"), "line 15, tasks.words.answr", "did you mean 'answer'"),
    "score": (('"{output}"', '"{output}"\n    score: bleu'), "line 16, tasks.words.score", "'exact_match'"),
    "limit": (("words.jsonl}", "words.jsonl, limit: 5}"), "line 13, tasks.words.data.limit", "must be a mapping"),
    "key twice": (("output: out", "output: out\noutput: o"), "line 3", "keep one of them"),
    "key of a task at the top": (("output: out", 'prompt: "{input}"'), "line 2, prompt", "belongs to a task"),
    "section left out": (("training: {max_steps", "learning_rate: 1e-3\ntraining: {max_steps"), "line 4", "training:"),
    "file of another task": (
        ("words.jsonl", "mood.csv"),
        "mood.csv, row 1, for '{input}': no field 'input'",
        "id, text, label",
    ),
    "separator": (("mood.csv", "mood.csv, separator: ','"), "id;text;label", "is data: separator: right?"),
    "one class": (("label: label", "label: label\n    labels: [fine]"), "tasks.mood.labels", "at least 2"),
    "task's name": (("  words:", "  my words:"), "tasks.my words", "letters, digits"),
    "adapter that methods take over": (
        ("{r: 2, positions: f1+l2}", "{positions: x1}\ncompare: {methods: [loreft, {more: {r: 8}}]}"),
        "has 1 problem",
        "line 3, adapter.positions",
    ),
    "method's own": (
        ("{r: 2, positions: f1+l2}", "{r: 2}\ncompare: {methods: [loreft, {more: {positions: x1}}]}"),
        "has 1 problem",
        "line 4, compare.methods.1: positions='x1'",
    ),
    "no tasks": (("tasks:", "task:"), "line 5, task", "did you mean 'tasks'?"),
}
# Keys of other tools, then what this one calls them.
KEYS = {
    "num_train_epochs": "epochs:",
    "per_device_train_batch_size": "batch_size:",
    "save_steps": "checkpoint_every:",
    "logging_steps": "remove it",
    "warmup_ratio": "warmup:",
    "lora_r": "adapter: r:",
    "target_modules": "site:",
    "output_dir": "output:",
    "bf16": "dtype:",
    "fp32": "dtype:",
    "device": "CUDA_VISIBLE_DEVICES",
    "lr": "learning_rate:",
    "lora_alpha": "set_scale",
    "gradient_accumulation_steps": "gradient_accumulation:",
    "eval_steps": "remove it",
}
# A change to a data file, then the place and the remedy.
IN_DATA: dict[str, tuple[str, Callable[[str], bytes], str, str]] = {
    "utf-16": ("mood.csv", lambda text: text.encode("utf-16"), "mood.csv", "iconv -f UTF-16"),
    "latin-1": ("mood.csv", lambda text: text.replace("day", "dé").encode("latin-1"), "line 2", "iconv -f WINDOWS"),
    "empty": ("mood.csv", lambda text: b"", "mood.csv", "the file is empty"),
    "header alone": ("mood.csv", lambda text: b"id;text;label\n", "mood.csv", "holds no rows"),
    "cells": ("mood.csv", lambda text: (text + "1;2\n").encode(), "mood.csv, line 14: 2 cells", "quote cells"),
    "json cut": ("words.jsonl", lambda text: text[:-9].encode(), "words.jsonl, line 12", "Repair or remove the line"),
    "no answer": ("words.jsonl", lambda text: f'{text}{{"input": "a", "output": ""}}'.encode(), "row 13", "fill it"),
    "always one class": ("mood.csv", lambda text: text.replace("bad", "fine").encode(), "mood.csv", "two classes"),
    "label empty": (
        "mood.csv",
        lambda text: text.replace(";bad", ";").encode(),
        "mood.csv, row 2",
        "fill it or remove the row",
    ),
    "colons": ("mood.csv", lambda t: t.replace(";", ":").replace("day", ",").encode(), "2 cells where", "--separator)"),
    "spreadsheet": ("mood.csv", lambda text: b"PK\x03\x04" + text.encode(), "mood.csv", "export the rows as"),
}
COMMANDS: dict[str, tuple[list[str], str, str]] = {
    "recipe misspelt": (["train", "recipe.yml"], "cannot read the recipe recipe.yml", "go by a name"),
    "task misspelt": (["train", "recipe.yaml", "--task", "mod"], "task 'mod'", "it has mood, words"),
    "setting misspelt": (["train", "recipe.yaml", "--set", "training.epoch=3"], "training.epoch", "mean 'epochs'"),
    "setting of nothing": (["train", "recipe.yaml", "--set", "seed"], "'seed' is no setting", "write key.path=value"),
    "not trained yet": (["eval", "recipe.yaml"], "out/mood", "train it first"),
    "no rows there": (["init", str(MODEL), "--task", "mod.csv", "-o", "x.yaml"], "no file 'mod.csv'", "did you mean"),
    "recipe there": (["init", str(MODEL), "-o", "recipe.yaml"], "recipe.yaml is there already", "name another output"),
    "data is the recipe": (["init", str(MODEL), "--task", "recipe.yaml", "-o", "x.yaml"], "'.yaml'", "use one of"),
    "compare without test": (["compare", "recipe.yaml"], "mood", "give test data"),
    "setting of a task misspelt": (
        ["train", "recipe.yaml", "--set", "tasks.word.score=number"],
        "command line, tasks.word",
        "is the task's name right?",
    ),
    "output below a file": (["train", "recipe.yaml", "-o", "mood.csv/runs"], "mood.csv/runs", "give another place"),
    "picture's kind": (["explain", "out/mood", "cat", "-o", "dog.png"], "-o dog.png", "call it dog.html"),
    "answers' kind": (["outputs", "out/mood", "-o", "dog.txt"], "-o dog.txt", "call it dog.json"),
    "long separator": (
        ["init", str(MODEL), "--task", "mood.csv", "--separator", "::", "-o", "x.yaml"],
        "mood.csv: separator: '::'",
        "one character",
    ),
    "data folder": (["train", "recipe.yaml", "--data", "nowhere"], "'nowhere'", "no folder"),
}


def told(answer: tuple[int, str], place: str, remedy: str) -> None:
    code, text = answer
    flat = " ".join(text.split())
    assert code == 2 and "Traceback" not in text, text
    assert place in flat and remedy in flat and len(text) < 1500, text


@pytest.mark.parametrize("name", IN_RECIPE)
def test_in_the_recipe(name: str, folder: Path, trimtab: Command) -> None:
    change, place, remedy = IN_RECIPE[name]
    changed(folder, "recipe.yaml", change)
    told(trimtab("train", "recipe.yaml"), place, remedy)
    assert not list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_another_tool(key: str, folder: Path, trimtab: Command) -> None:
    changed(folder, "recipe.yaml", ("max_steps: 1", f"max_steps: 1, {key}: 3"))
    told(trimtab("train", "recipe.yaml"), f"line 4, training.{key}", KEYS[key])


@pytest.mark.parametrize("name", IN_DATA)
def test_in_the_data(name: str, folder: Path, trimtab: Command) -> None:
    file, damage, place, remedy = IN_DATA[name]
    (folder / file).write_bytes(damage((folder / file).read_text()))
    told(trimtab("train", "recipe.yaml"), place, remedy)


@pytest.mark.parametrize("name", COMMANDS)
def test_on_the_command_line(name: str, folder: Path, trimtab: Command) -> None:
    arguments, place, remedy = COMMANDS[name]
    told(trimtab(*arguments), place, remedy)
    assert not (folder / "out").exists()


@contextmanager
def files_of(most: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize(
    ("every", "place", "remedy"),
    [("1", "out/words/checkpoints: a checkpoint cannot be written", "make room"), ("null", "out/words", "disk full?")],
)
def test_a_full_disk(every: str, place: str, remedy: str, folder: Path, trimtab: Command) -> None:
    command = ["train", "recipe.yaml", "--task", "words", "--set", f"training.checkpoint_every={every}"]
    with files_of(16_000):
        answer = trimtab(*command)
    assert answer[0] == 2 and "Traceback" not in answer[1] and place in answer[1] and remedy in answer[1], answer[1]
    assert every == "null" or trimtab(*command)[0] == 0  # once there is room


def test_rows_that_are_one_object(folder: Path, trimtab: Command) -> None:
    (folder / "one.json").write_text('{"input": "a", "output": "b"}')
    changed(folder, "recipe.yaml", ("words.jsonl", "one.json"))
    told(trimtab("train", "recipe.yaml"), "one.json: expected a list of rows, not one object", "write [{...}, {...}]")


def test_checkpoints_that_are_all_cut(folder: Path, trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole by their looks, and yet not to be read: named, with what starts over."""
    from trimtab.runs.folder import RunFolder

    place = folder / "out/words/checkpoints/checkpoint-1"

    def cut(self: Any) -> str:
        place.mkdir(parents=True, exist_ok=True)
        (place / "trainer_state.json").write_text("{}")
        for name in ("adapter_model.safetensors", "optimizer.pt"):
            (place / name).write_bytes(b"PK")
        return str(place)

    monkeypatch.setattr(RunFolder, "last_checkpoint", cut)
    code, text = trimtab("train", "recipe.yaml", "--task", "words")
    assert code == 2 and "checkpoint-1: this checkpoint cannot be read" in text and "--no-resume --task words" in text
