"""Damaged, foreign and misfit adapters: each an error that names the place and the remedy, never a silent load."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WIDTH, outputs_of, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab import METHODS, ReftConfig
from trimtab.adapter.folder import inspect_adapter
from trimtab.adapter.weights import PICKLE, WEIGHTS
from trimtab.errors import AdapterError

EDIT = "base_model.model.model.layers.1.reft.reft_edit"


def adapter(folder: Path, base: str = "llama", **fields: Any) -> Path:
    config = ReftConfig(**{"task_type": "CAUSAL_LM", "r": 2, "positions": "f2", "init_weights": "paper", **fields})
    get_peft_model(tiny(base), config).save_pretrained(folder)
    return folder


def rewritten(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def setting(key: str, value: Any) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(key, value)


def cast(key: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: tensors[key].to(dtype)})


def dropping(part: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key]


def reconfigured(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def bytes_instead(make: Callable[[bytes], bytes], name: str = WEIGHTS, before: str = WEIGHTS) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / before).read_bytes()
        (folder / before).unlink()
        (folder / name).write_bytes(make(data))

    return damage


def pickled(change: Callable[[dict[str, Any]], Any] = lambda t: None, new: bool = True) -> Callable[[Path], None]:
    """The tensors as PEFT pickles them, changed, or what the change gives instead."""

    def damage(folder: Path) -> None:
        tensors: dict[str, Any] = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(change(tensors) or tensors, folder / PICKLE, _use_new_zipfile_serialization=new)

    return damage


def compressed(folder: Path) -> None:
    with zipfile.ZipFile(folder / PICKLE) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)


def then(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def piped(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def with_lora_weights(folder: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(tiny("llama"), lora).save_pretrained(folder / "lora")
    shutil.move(folder / "lora" / WEIGHTS, folder / WEIGHTS)


class Trap:
    """What a hostile pickle does when it is opened."""

    def __reduce__(self) -> Any:
        return (open, ("/tmp/trimtab-trap-was-sprung", "w"))


NAN = torch.full((2, WIDTH), torch.nan)
TOGETHER = "do not belong together. Copy both from one save"
RENAMED = "a pickle.* which can run code when opened; it was not opened. Ask for safetensors"
NO_TENSORS = f"{PICKLE}: not a pickle of tensors alone, or not whole.* No code in it was run"

# What is wrong, what `inspect_adapter` says, and what PEFT's loader says (None: another method's, so out of our reach).
DAMAGES: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "truncated": (bytes_instead(lambda b: b[:300]), f"{WEIGHTS}: not a whole safetensors file", "header"),
    "cut_short": (
        bytes_instead(lambda b: b[:-40]),
        "not a whole safetensors file; copy or save",
        "buffer|incomplete|size",
    ),
    "empty_file": (bytes_instead(lambda b: b""), "not a whole safetensors file", "header"),
    "lfs_pointer": (
        bytes_instead(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "a Git LFS pointer, not the weights; run `git lfs pull`",
        "header",
    ),
    "nan": (
        rewritten(setting(f"{EDIT}.weight", NAN)),
        r"layers.1.reft.reft_edit.weight holds NaN .* Use an earlier",
        "NaN",
    ),
    "wide": (
        rewritten(setting(f"{EDIT}.weight", torch.zeros(2, 33))),
        r"weight has shape \(2, 33\), but the config's r=2 asks for \(2, 32\): .* another base model",
        r"weight has shape \(2, 33\), but the config's r=2 asks for \(2, 32\): .* another base model",
    ),
    "scalar": (
        rewritten(setting(f"{EDIT}.rotation", torch.zeros(()))),
        r"rotation has shape \(\)",
        r"rotation has shape \(\)",
    ),
    "missing": (
        rewritten(dropping("layers.1.reft.reft_edit.bias")),
        "layers.1.* holds rotation, weight, .* asks for .*bias",
        "Missing: .*bias",
    ),
    "left_over": (
        rewritten(setting(EDIT.replace("1", "9") + ".bias", torch.zeros(2))),
        "layers.9.* holds bias",
        "Without a place here: .*layers.9",
    ),
    "not_orthonormal": (
        rewritten(lambda t: t[f"{EDIT}.rotation"].mul_(2)),
        r"layers.1.reft.reft_edit.rotation: the rows are not orthonormal \(off by 3\): the file is damaged",
        "rows are not orthonormal",
    ),
    "rank": (
        reconfigured(r=3),
        f"but the config's r=3 asks for .* {TOGETHER}",
        r"has shape \(2, 32\).* \(3, 32\)",
    ),
    "method": (
        reconfigured(method="direft"),
        f"method DiReFT.* asks for .*projection.* {TOGETHER}",
        "Missing: .*projection",
    ),
    "untied": (
        reconfigured(tied=False, positions="f2+l2"),
        f"has the edits edit, but .* prefix and suffix.* {TOGETHER}",
        "Missing: .*prefix",
    ),
    "layers": (
        reconfigured(layers=[0]),
        rf"edits 3 modules .* lists layers \[0\].* {TOGETHER}",
        "Without a place here: .*layers.1",
    ),
    "no_such_method": (
        reconfigured(method="quantum"),
        r"adapter_config.json: method='quantum': must be one of",
        "method='quantum'",
    ),
    "bad_rank": (reconfigured(r=-1), "adapter_config.json: r=-1: must be a whole number", "r=-1"),
    "other_method": (
        reconfigured(peft_type="LOHA"),
        "an adapter of method LOHA, not ReFT; load it with PEFT alone",
        None,
    ),
    "lora_weights": (
        with_lora_weights,
        "lora_A.weight is no part of this ReFT adapter.* Copy both",
        "Without a place here: .*lora_A",
    ),
    "pickle_as_safetensors": (bytes_instead(lambda b: pickle.dumps(Trap())), RENAMED, "header"),
    "pickle": (bytes_instead(lambda b: pickle.dumps(Trap()), PICKLE), NO_TENSORS, NO_TENSORS),
    "pickle_of_code": (pickled(lambda t: t.update(more=Trap())), NO_TENSORS, NO_TENSORS),
    "pickle_of_old": (pickled(lambda t: t.update(more=Trap()), new=False), NO_TENSORS, NO_TENSORS),
    "pickle_cut": (then(pickled(), bytes_instead(lambda b: b[:-900], PICKLE, PICKLE)), NO_TENSORS, NO_TENSORS),
    "pickle_bomb": (then(pickled(setting(f"{EDIT}.weight", torch.zeros(10**7))), compressed), NO_TENSORS, NO_TENSORS),
    "pickle_pointer": (
        bytes_instead(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", PICKLE),
        f"{PICKLE}: a Git LFS pointer, not the weights; run `git lfs pull`",
        f"{PICKLE}: a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "pickle_pipe": (then(pickled(), piped(PICKLE)), f"{PICKLE}: a pipe, folder", f"{PICKLE}: a pipe, folder"),
    "pickle_of_a_list": (pickled(list), "it holds a list", "it holds a list"),
    "no_weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}: missing; .* Copy the file", ""),
    "no_edit": (rewritten(dropping("reft")), "holds no edit .* Save the adapter again", "Missing: "),
    "empty_folder": (emptied, "no adapter_config.json there; give the folder", "adapter_config.json"),
    "broken_json": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "adapter_config.json: not the JSON",
        "",
    ),
    "json_list": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        "adapter_config.json: not the JSON",
        "",
    ),
    "pipe": (
        piped(WEIGHTS),
        f"{WEIGHTS}: a pipe, folder or device, not a file",
        f"{WEIGHTS}: a pipe, folder or device, not a file",
    ),
    "pipe_for_config": (piped("adapter_config.json"), "adapter_config.json: a pipe, folder or device", "Can't find"),
    "deep_json": (
        lambda folder: (folder / "adapter_config.json").write_text("[" * 200_000 + "]" * 200_000),
        "adapter_config.json: not the JSON",
        "recursion",
    ),
    "base_model": (
        reconfigured(base_model_name_or_path=["a"]),
        r"base_model_name_or_path=\['a'\]: must be null, a folder",
        r"base_model_name_or_path=\['a'\]: must be null, a folder",
    ),
    "stray": (
        rewritten(setting("base_model.model.model.layers.0.stray", torch.zeros(2))),
        "layers.0.stray is no part of this ReFT adapter",
        "Without a place here: .*stray",
    ),
}
NOT_WHOLE: dict[str, Any] = {
    "word": "a word",
    "number": 3,
    "table": {"a": torch.zeros(2)},
    "expanded": torch.zeros(1).expand(10**6, 10**6),
    "sparse": torch.eye(2).to_sparse(),
    "without_numbers": torch.zeros(2, device="meta"),
    "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
}
DAMAGES |= {
    f"pickle_of_{name}": (
        pickled(setting(f"{EDIT}.weight", value)),
        rf"{PICKLE}: .*reft_edit\.weight is a \w+ that safetensors could not hold",
        rf"{PICKLE}: .*reft_edit\.weight is a \w+ that safetensors could not hold",
    )
    for name, value in NOT_WHOLE.items()
}
ODD_TYPES = ("int8", "uint8", "int64", "bool", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
DAMAGES |= {
    f"{part}_{name}": (
        rewritten(
            lambda t, part=part, name=name: t.update({f"{EDIT}.{part}": t[f"{EDIT}.{part}"].to(getattr(torch, name))})
        ),
        f"reft_edit.{part} holds torch.{name}, not floats of at least 16 bits. Save the adapter again",
        f"reft_edit.{part} holds torch.{name}, not floats of at least 16 bits. Save the adapter again",
    )
    for part in ("rotation", "weight", "bias")
    for name in ODD_TYPES
    if hasattr(torch, name)  # torch 2.6 has not all of them
}
AS_PICKLE = ("nan", "wide", "scalar", "missing", "left_over", "not_orthonormal", "rank", "method", "untied", "layers")
AS_PICKLE += ("no_such_method", "lora_weights", "no_edit", "stray", "weight_int8", "rotation_complex64")
DAMAGES |= {f"{name}_pickled": (then(DAMAGES[name][0], pickled()), *DAMAGES[name][1:]) for name in AS_PICKLE}


@pytest.mark.parametrize("name", DAMAGES)
def test_inspecting(name: str, tmp_path: Path) -> None:
    damage, message, _ = DAMAGES[name]
    folder = adapter(tmp_path / "emoji")
    inspect_adapter(folder)
    damage(folder)
    with pytest.raises(AdapterError, match=message) as caught:
        inspect_adapter(folder)
    text = str(caught.value)
    assert str(folder) in text and len(text.replace(str(tmp_path), "")) < 500 and text.count("\n") < 3
    assert not Path("/tmp/trimtab-trap-was-sprung").exists()


LOADED = [name for name, (_, _, message) in DAMAGES.items() if message is not None]


@pytest.mark.parametrize("name", LOADED)
def test_loading_never_succeeds_silently(name: str, tmp_path: Path) -> None:
    damage, _, message = DAMAGES[name]
    folder = adapter(tmp_path / "emoji")
    damage(folder)
    with pytest.raises(Exception, match=f"(?is){message}"):
        PeftModel.from_pretrained(tiny("llama"), str(folder))
    assert not Path("/tmp/trimtab-trap-was-sprung").exists()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    ("base", "overrides", "message"),
    [
        (
            "llama",
            {"hidden_size": 64},
            r"has shape \(2, 32\), but the config's r=2 asks for \(2, 64\): .* another base model",
        ),
        (
            "llama",
            {"num_hidden_layers": 4},
            "does not fit this model and config. Missing: .*layers.3.* another base model",
        ),
        ("llama", {"num_hidden_layers": 2}, "Missing: nothing. Without a place here: .*layers.2.* another base model"),
        ("gpt2", {}, "Missing: .*transformer.h.0.* and 6 more. Without a place here: .*model.layers.0"),
    ],
)
def test_another_base_model(base: str, overrides: dict[str, Any], message: str, lean: bool, tmp_path: Path) -> None:
    adapter(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny(base, **overrides), tmp_path, low_cpu_mem_usage=lean)


def test_a_failed_second_adapter_leaves_the_first_working(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny("llama"), adapter(tmp_path / "good"))
    expected = outputs_of(model, "llama")
    bad = adapter(tmp_path / "bad")
    rewritten(dropping("layers.1"))(bad)
    with pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(bad, "second")
    assert model.active_adapter == "default"
    assert torch.equal(outputs_of(model, "llama"), expected)


def test_half_an_untied_edit(tmp_path: Path) -> None:
    folder = adapter(tmp_path, tied=False, positions="f1+l1")
    rewritten(dropping("layers.2.reft.reft_suffix"))(folder)
    with pytest.raises(AdapterError, match=r"model.layers.2 has the edits prefix, but .* prefix and suffix"):
        inspect_adapter(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_said_of_a_good_adapter(method: str, tied: bool, tmp_path: Path) -> None:
    folder = adapter(tmp_path, method=method, tied=tied, positions="f2+l1", layers=[0, -1])
    info = inspect_adapter(folder)
    tensors = load_file(folder / WEIGHTS)
    assert info.config.method == method and info.base_model == info.config.base_model_name_or_path
    assert info.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert info.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert info.bytes_on_disk == (folder / WEIGHTS).stat().st_size
    parts = {"edit": ""} if tied else {"prefix": "/prefix", "suffix": "/suffix"}
    assert set(info.edit_norms) == {f"model.layers.{i}{end}" for i in (0, 2) for end in parts.values()}
    for part, end in parts.items():  # against the map itself: Φ(h) - h at h = 0 and at each basis vector
        own = {k.rpartition(".")[2]: t for k, t in tensors.items() if f"layers.2.reft.reft_{part}." in k}
        edit = METHODS[method](WIDTH, 2, init_weights="paper")
        edit.load_state_dict(own)
        constant = edit(torch.zeros(1, WIDTH))
        matrix = edit(torch.eye(WIDTH)) - constant
        assert info.edit_norms[f"model.layers.2{end}"] == pytest.approx(
            float(torch.cat([matrix, constant]).norm().detach()), rel=1e-4
        )


def test_a_fresh_adapter_has_norm_zero(tmp_path: Path) -> None:
    assert set(inspect_adapter(adapter(tmp_path, init_weights=True)).edit_norms.values()) == {0.0}


def test_a_head_of_an_odd_type(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "bert_seq_cls", task_type="SEQ_CLS")
    rewritten(lambda t: t.update({key: t[key].to(torch.complex64) for key in t if "classifier" in key}))(folder)
    for read in (inspect_adapter, lambda path: PeftModel.from_pretrained(tiny("bert_seq_cls"), path)):
        with pytest.raises(ValueError, match=r"classifier.* holds torch\.complex64"):
            read(folder)


@pytest.mark.parametrize("base", ["bert_seq_cls", "llama_seq_cls", "roberta_token_cls"])
def test_heads_are_part_of_an_adapter(base: str, tmp_path: Path) -> None:
    task = "TOKEN_CLS" if "token" in base else "SEQ_CLS"
    info = inspect_adapter(adapter(tmp_path, base, task_type=task))
    assert any("classifier" in key or "score" in key for key in info.shapes)
    assert len(info.edit_norms) == 3


def test_an_adapter_in_low_precision_is_whole(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    rewritten(lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))(folder)
    assert len(inspect_adapter(folder).edit_norms) == 3
    assert bool(outputs_of(PeftModel.from_pretrained(tiny("llama"), folder), "llama").isfinite().all())
