"""Base models whose folder brings code: it is never run, nobody is asked, and the error is one clear line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from transformers import AutoTokenizer

from trimtab.errors import ModelError
from trimtab.interop.base import Base as ConversionBase
from trimtab.recipe.init import look_at
from trimtab.runs.models import Base, ModelSource, load_model, load_tokenizer
from trimtab.tasks import Head

MODEL = Path(__file__).parents[2] / "models/tiny-llama"


def bring_code(folder: Path, file: str, **fields: Any) -> None:
    """Let a JSON file of the folder point to a class in `hostile.py`, which leaves a file when it is run."""
    (folder / "hostile.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def model_code(folder: Path, model_type: str) -> None:
    names = ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
    auto = {"AutoConfig": "hostile.Config", **dict.fromkeys(names, "hostile.Model")}
    bring_code(folder, "config.json", model_type=model_type, auto_map=auto)


def tokenizer_code(folder: Path) -> None:
    bring_code(
        folder,
        "tokenizer_config.json",
        tokenizer_class="Hostile",
        auto_map={"AutoTokenizer": ["hostile.Model", "hostile.Model"]},
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    return tmp_path


WAYS: dict[str, Callable[[str], Any]] = {
    "load_model": lambda name: load_model(ModelSource(name)),
    "load_tokenizer": load_tokenizer,
    "new_head": lambda name: Base(ModelSource(name)).load(
        Head("AutoModelForSequenceClassification", {"num_labels": 2}), 0
    ),
    "init": look_at,
    "convert": lambda name: ConversionBase(name).load(),
}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "load_tokenizer"])
def test_code_that_a_model_needs_is_not_run(way: str, folder: Path) -> None:
    model_code(folder, "hostile")
    with pytest.raises(ModelError, match=r"brings code of its own .* was not run") as error:
        WAYS[way](str(folder))
    assert not (folder / "ran").exists() and str(error.value).count("\n") == 0 and str(folder) in str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_code_that_a_model_does_not_need_is_left_alone(way: str, folder: Path) -> None:
    model_code(folder, "llama")
    WAYS[way](str(folder))
    assert not (folder / "ran").exists()


def test_code_of_a_tokenizer(folder: Path) -> None:
    tokenizer_code(folder)
    with pytest.raises(ModelError, match="brings code of its own"):
        load_tokenizer(str(folder))
    assert not (folder / "ran").exists()
