"""Names of adapters: found, loaded, replaced, dropped; and nothing from outside the folder, nor what is no adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from trimtab import ReftConfig
from trimtab.adapter.weights import CONFIG, PICKLE, WEIGHTS
from trimtab.edits import METHODS, RED, Edit
from trimtab.errors import AdapterError
from trimtab.serve.registry import Adapter, NameTaken, Registry, UnknownAdapter
from trimtab.serve.table import Layout
from trimtab.where.sites import find_sites

LAYOUT = Layout(find_sites(tiny("llama"), "block", "all"), rank=8)


def save(folder: Path, seed: int = 0, **config: Any) -> Path:
    torch.manual_seed(seed)
    settings = ReftConfig(**{"task_type": "CAUSAL_LM", "r": 2, "init_weights": "paper", **config})
    get_peft_model(tiny("llama"), settings).save_pretrained(str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "in" / "a", seed=1)
    save(tmp_path / "in" / "b", seed=2)
    return tmp_path / "in"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_folders_are_found_when_asked_for(folder: Path) -> None:
    registry = Registry(LAYOUT, folder, reserved=["base"])
    assert registry.names() == ["a", "b"]
    assert registry.get("a") is registry.get("a")
    save(folder / "later", seed=3)
    assert registry.get("later").digest not in (registry.get("a").digest, registry.get("b").digest)
    save(folder / "base")
    assert registry.names() == ["a", "b", "later"]
    for name in ("base", "c", "", ".", "..", "../in/a", "a/../b", "a\0", "/etc"):
        with pytest.raises(UnknownAdapter):
            registry.get(name)


def test_the_digest_is_of_the_edit_and_not_of_the_name(folder: Path) -> None:
    registry = Registry(LAYOUT, folder)
    shutil.copytree(folder / "a", folder / "copy")
    digest = registry.get("a").digest
    assert registry.get("copy").digest == digest
    others = [
        registry.read(save(folder / "other", seed=1, **config)).digest
        for config in (
            {"positions": "l3"},
            {"method": "noreft"},
            {"activation": "relu"},
            {"tied": False},
            {"layers": [0]},
        )
    ]
    assert len({digest, *others}) == 6


def test_replacing_is_a_new_adapter_and_the_old_goes_on(folder: Path) -> None:
    registry = Registry(LAYOUT, folder)
    old = registry.get("a")
    with pytest.raises(NameTaken, match="'a' is loaded already"):
        registry.load("a", "b")
    new = registry.load("a", "b", replace=True)
    assert registry.get("a") is new and new.digest == registry.get("b").digest != old.digest
    assert set(old.parts) == {"edit"}


def test_what_is_unloaded_stays_away_until_it_is_loaded(folder: Path) -> None:
    registry = Registry(LAYOUT, folder)
    registry.get("a")
    for name in ("a", "b"):
        registry.unload(name)
    assert registry.names() == []
    for call in (registry.get, registry.unload):
        with pytest.raises(UnknownAdapter):
            call("a") if call == registry.get else call("c")
    registry.load("a", "a")
    assert registry.names() == ["a"] and registry.get("a").digest


def test_what_is_unloaded_while_it_is_first_read_stays_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(LAYOUT, folder)
    read = registry.read

    def slowly(place: str | Path, name: str = "") -> Adapter:
        registry.unload("a")
        return read(place, name)

    monkeypatch.setattr(registry, "read", slowly)
    with pytest.raises(UnknownAdapter):
        registry.get("a")
    monkeypatch.undo()
    with pytest.raises(UnknownAdapter):
        registry.get("a")
    assert registry.load("a", "a").name == "a"


def test_memory_is_bounded_and_what_left_it_is_read_again(folder: Path) -> None:
    registry = Registry(LAYOUT, folder, memory=LAYOUT.size * 4)
    one = registry.get("a")
    registry.get("b")
    again = registry.get("a")
    assert again is not one and again.digest == one.digest
    registry.get("b")
    shutil.copy(folder / "b" / WEIGHTS, folder / "a" / WEIGHTS)
    with pytest.raises(AdapterError, match="another adapter than when 'a' was loaded"):
        registry.get("a")


def test_what_is_replaced_or_unloaded_leaves_its_room_to_others(folder: Path) -> None:
    registry = Registry(LAYOUT, folder, memory=LAYOUT.size * 8)  # two
    first = registry.get("a")
    for _ in range(3):
        second = registry.load("b", "b", replace=True)
    assert registry.get("a") is first
    registry.unload("b")
    third = registry.load("c", "b")
    assert registry.get("a") is first and registry.get("c") is third is not second


def test_nothing_is_loaded_from_outside(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "out", seed=4)
    (folder / "link").symlink_to(tmp_path / "out")
    shutil.copytree(folder / "a", folder / "half")
    (folder / "half" / WEIGHTS).unlink()
    (folder / "half" / WEIGHTS).symlink_to(tmp_path / "out" / WEIGHTS)
    shutil.copytree(folder / "a", folder / "pickle")
    torch.save(load_file(folder / "pickle" / WEIGHTS), tmp_path / "out" / PICKLE)
    (folder / "pickle" / WEIGHTS).unlink()
    (folder / "pickle" / PICKLE).symlink_to(tmp_path / "out" / PICKLE)
    registry = Registry(LAYOUT, folder)
    for path in ("../out", str(tmp_path / "out"), "link", "half", "pickle", "nowhere", "a\0b", "/", ".." * 40):
        with pytest.raises(AdapterError, match="below the server's folder"):
            registry.load("x", path)
    for name in ("link", "half", "pickle"):
        with pytest.raises(AdapterError):
            registry.get(name)
    with pytest.raises(AdapterError, match="without a folder"):
        Registry(LAYOUT).load("x", folder / "a")
    assert registry.add("x", tmp_path / "out").digest  # the operator's word
    assert registry.load("y", folder / "a").digest == registry.load("z", "a").digest


def test_a_pickle_of_the_same_tensors_is_the_same_adapter(folder: Path) -> None:
    registry = Registry(LAYOUT, folder)
    before = registry.get("a")
    torch.save(load_file(folder / "a" / WEIGHTS), folder / "a" / PICKLE)
    (folder / "a" / WEIGHTS).unlink()
    assert registry.load("a", "a", replace=True).digest == before.digest


BAD: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "missing"),
    "a pickle": (lambda f: (f / WEIGHTS).rename(f / PICKLE), "not a pickle of tensors alone"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-40]), "not a whole safetensors"),
    "another method": (lambda f: change(f / CONFIG, peft_type="LORA"), "method LORA"),
    "modules_to_save": (lambda f: change(f / CONFIG, modules_to_save=["lm_head"]), "modules_to_save"),
    "another rank": (lambda f: change(f / CONFIG, r=3), "r=3"),
    "NaN": (lambda f: corrupt(f, lambda t: t.fill_(float("nan"))), "NaN"),
    "no rotation": (lambda f: corrupt(f, lambda t: t.fill_(1.0)), "not orthonormal"),
    "another model": (lambda f: rename(f, "layers.0", "layers.7"), "layers.7.*not served"),
    "too high a rank": (lambda f: save(f, r=9), "9 rows of a table of 8"),
    "a method of its own": (lambda f: save(f, method="cubed", r=None), "Cubed is no sum of terms"),
}


def corrupt(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    for tensor in tensors.values():
        change(tensor)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def rename(folder: Path, old: str, new: str) -> None:
    tensors = {key.replace(old, new): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


class Cubed(RED):
    """A method that no table has a form for."""

    terms = Edit.terms


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_and_changes_nothing(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "cubed", Cubed)
    spoil, said = BAD[name]
    registry = Registry(LAYOUT, folder)
    before = registry.get("a")
    spoil(folder / "b")
    with pytest.raises(AdapterError, match=said):
        registry.load("a", "b", replace=True)
    assert registry.get("a") is before


def test_an_adapter_of_another_base_is_refused(folder: Path) -> None:
    own = json.loads((folder / "a" / CONFIG).read_text())["base_digest"]
    change(folder / "b" / CONFIG, base_digest="0" * 64, base_model_name_or_path="some/model")
    registry = Registry(LAYOUT, folder, base=own)
    registry.get("a")
    with pytest.raises(AdapterError, match=r"other weights \(some/model\).*--any-base"):
        registry.get("b")
    Registry(LAYOUT, folder).get("b")
    change(folder / "b" / CONFIG, base_digest=None)
    Registry(LAYOUT, folder, base=own).get("b")
