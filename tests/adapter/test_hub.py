"""Pushed to the Hub and had back by name, against a stand-in for its HTTP API."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import hub as standin
import pytest
import torch
from helpers import tiny
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

from trimtab import ReftConfig
from trimtab.adapter.hub import local, push
from trimtab.cli import app
from trimtab.errors import AdapterError
from trimtab.runs.generate import find_adapters

IDS = torch.arange(3, 12)[None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[standin.Hub]:
    with standin.running() as running:
        for name in ("constants.ENDPOINT", "hf_api.api.endpoint"):
            monkeypatch.setattr(f"huggingface_hub.{name}", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made once, with its endpoint
        monkeypatch.setenv("HF_TOKEN", running.token)
        yield running


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(0)
    config = ReftConfig(task_type="CAUSAL_LM", r=2, positions="f1+l2", init_weights="paper")
    return get_peft_model(tiny("llama"), config).eval()


def test_pefts_own_push(hub: standin.Hub, model: PeftModel) -> None:
    """Its card is transformers' template, whatever the method; `trimtab push` takes the adapter's own."""
    model.push_to_hub("me/words")
    assert set(hub.repositories["me/words"]) >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    loaded = PeftModel.from_pretrained(tiny("llama"), "me/words").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_push_and_use_by_name(hub: standin.Hub, model: PeftModel, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    (folder / "predictions.json").write_text('["what customers wrote"]')
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/optimizer.pt").write_bytes(b"big")
    result = CliRunner().invoke(app, ["push", str(folder), "me/words", "--private"])
    assert result.exit_code == 0, result.exception
    assert result.output.strip() == f"{hub.endpoint}/me/words: use it with --adapter me/words"
    assert set(hub.repositories["me/words"]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert b"import trimtab" in hub.repositories["me/words"]["README.md"]
    found = find_adapters(["me/words", str(folder)])
    assert list(found) == ["words", "run"] and found["run"] == folder
    loaded = PeftModel.from_pretrained(tiny("llama"), found["words"]).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    push(folder, "me/words")  # again: a new version of the same


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("me/nothing", "me/nothing: no such folder here, and not to be had from the Hub: it has no such repository"),
        ("me/words@v9", "me/words@v9: no such folder here"),
    ],
)
def test_what_is_not_there(hub: standin.Hub, name: str, said: str) -> None:
    with pytest.raises(AdapterError) as error:
        local(name)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_nothing_is_asked_of_the_hub_for_a_slip(
    hub: standin.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    hub.shutdown()
    assert local("runs/wrods") == Path("runs/wrods")
    assert local("a b/c") == Path("a b/c") and local("a/b/c") == Path("a/b/c")


def test_a_push_that_fails_says_why(
    hub: standin.Hub, model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json there"):
        push(tmp_path, "me/words")
    with pytest.raises(AdapterError, match=r"'words' is no name on the Hub; give user/name"):
        push(tmp_path / "run", "words")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AdapterError, match=r"me/words: not pushed: .*401.*token"):
        push(tmp_path / "run", "me/words")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match=r"not pushed: .* Unset HF_HUB_OFFLINE"):
        push(tmp_path / "run", "me/words")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterError, match=r"not pushed: .* Is the network up"):
        push(tmp_path / "run", "me/words")
    shutil.rmtree(tmp_path / "run")


def test_two_folders_of_one_name(model: PeftModel, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        model.save_pretrained(tmp_path / parent / "words")
    a, b = (str(tmp_path / parent / "words") for parent in ("a", "b"))
    assert list(find_adapters([a, f"other={b}"])) == ["words", "other"]
    with pytest.raises(AdapterError, match=r"two adapters are called 'words'.*name one, as in other="):
        find_adapters([a, b])
    with pytest.raises(AdapterError, match=r"give one name and the folder of one adapter"):
        find_adapters([f"={b}"])
