"""What users know of every PEFT method, on a decoder, encoders, classifiers and an encoder-decoder."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MODELS, VOCAB, WIDTH, batch_for, outputs_of, tiny
from huggingface_hub import ModelCard
from peft import (
    IA3Config,
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from test_config import anatomy
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trimtab import ReftConfig, ReftModel, set_scale
from trimtab.adapter.tuner import ReftLayer

KINDS = ["llama", "gpt2", "bert", "bert_seq_cls", "llama_seq_cls", "roberta_token_cls", "t5", "vit", "plain"]


def config_for(name: str, **fields: Any) -> ReftConfig:
    return ReftConfig(
        **{"task_type": MODELS[name].task_type, "r": 2, "positions": "f2", "init_weights": "paper", **fields}
    )


def peft_model(name: str, adapter_name: str = "default", **fields: Any) -> PeftModel:
    return get_peft_model(tiny(name), config_for(name, **fields), adapter_name=adapter_name).eval()


def randomized(model: nn.Module) -> nn.Module:
    """What is trainable, moved somewhere else, as after training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def one_step(model: nn.Module, name: str) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    output = model(**batch_for(name))
    tensor = output if isinstance(output, Tensor) else next(v for v in output.values() if isinstance(v, Tensor))
    tensor.float().square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", KINDS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = peft_model(name)
    one_step(model, name)
    expected = outputs_of(model, name)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    for adapter_name in ("default", "other"):
        loaded = PeftModel.from_pretrained(tiny(name), tmp_path, adapter_name=adapter_name)
        assert isinstance(loaded.base_model, ReftModel)
        assert torch.equal(outputs_of(loaded, name), expected)
        with loaded.disable_adapter():
            assert torch.equal(outputs_of(loaded, name), outputs_of(tiny(name), name))
    lean = PeftModel.from_pretrained(tiny(name), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in lean.parameters())
    assert torch.equal(outputs_of(lean, name), expected)


@pytest.mark.parametrize("name", KINDS)
def test_trained_under_another_name(name: str, tmp_path: Path) -> None:
    model = peft_model(name, adapter_name="mine")
    one_step(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(name), tmp_path / "mine")
    assert torch.equal(outputs_of(loaded, name), outputs_of(model, name))


@pytest.mark.parametrize(
    ("fields", "edits"),
    [
        ({}, {"edit": "rotation weight bias"}),
        ({"tied": False, "positions": "f2+l2"}, {"prefix": "rotation weight bias", "suffix": "rotation weight bias"}),
        ({"method": "direft"}, {"edit": "projection weight bias"}),
        ({"method": "lobireft"}, {"edit": "rotation bias"}),
    ],
)
def test_saved_names(fields: dict[str, Any], edits: dict[str, str], tmp_path: Path) -> None:
    peft_model("llama", **fields).save_pretrained(tmp_path)
    names = {
        f"base_model.model.model.layers.{layer}.reft.reft_{edit}.{tensor}"
        for layer in range(3)
        for edit, tensors in edits.items()
        for tensor in tensors.split()
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == names
    assert {tuple(t.shape) for k, t in saved.items()} == {(2, WIDTH), (2,)} and {t.dtype for t in saved.values()} == {
        torch.float32
    }


@pytest.mark.parametrize("name", KINDS)
def test_only_the_adapter_is_trainable(name: str) -> None:
    model = peft_model(name)
    own = [n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n]
    assert own and all(".reft.reft_" in n for n in own)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".reft_" in n)
    heads = {n for n, p in model.named_parameters() if p.requires_grad} - set(own)
    assert bool(heads) == (name in ("bert_seq_cls", "llama_seq_cls", "roberta_token_cls"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    one_step(model, name)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if not p.requires_grad)
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in own)


@pytest.mark.parametrize("name", KINDS)
def test_unload_gives_the_base_back(name: str) -> None:
    base = tiny(name)
    before = anatomy(base)
    trainable = {n: p.requires_grad for n, p in base.named_parameters()}
    model = get_peft_model(base, config_for(name))
    model.add_adapter("second", config_for(name, r=3, positions="all"))
    one_step(model, name)
    unloaded = model.unload()
    assert unloaded is base
    assert [n for n, _ in base.named_modules()] == [row[0] for row in before]
    assert not [key for _, _, keys, _, _ in anatomy(base) for key in keys if "reft" in key or "peft" in key]
    for (name_, _, keys, hooks, _), (_, _, keys_before, hooks_before, _) in zip(anatomy(base), before, strict=True):
        assert hooks == hooks_before, name_
        assert set(keys) - set(keys_before) <= {"_peft_is_frozen"}, name_
    assert set(trainable) == {n for n, _ in base.named_parameters()}
    assert torch.equal(outputs_of(base, name), outputs_of(tiny(name), name))
    again = get_peft_model(base, config_for(name, init_weights=True)).eval()
    assert torch.equal(outputs_of(again, name), outputs_of(tiny(name), name))


@pytest.mark.parametrize("name", KINDS)
def test_several_adapters(name: str, tmp_path: Path) -> None:
    """Of different rank, positions, layers and site; each gives what it gives alone."""
    second = {"r": 3, "positions": "all", "layers": [-1], "method": "direft"}
    third = {"r": 1, "positions": "f1", "layers": [0]}
    alone = {}
    for adapter, fields in {"one": {}, "two": second, "three": third}.items():
        model = randomized(peft_model(name, adapter_name=adapter, **fields))
        model.save_pretrained(tmp_path)
        alone[adapter] = outputs_of(model, name)
    model = PeftModel.from_pretrained(tiny(name), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", "two")
    model.load_adapter(tmp_path / "three", "three", low_cpu_mem_usage=True)
    for adapter in ("one", "three", "two", "one"):
        model.set_adapter(adapter)
        assert model.active_adapter == adapter
        assert torch.equal(outputs_of(model, name), alone[adapter]), adapter
    assert len({tuple(a.flatten().tolist()) for a in alone.values()}) == 3
    model.delete_adapter("two")
    assert torch.equal(outputs_of(model, name), alone["one"])
    assert not [n for n, _ in model.named_parameters() if ".two." in n]
    model.delete_adapter("one")  # the active one
    model.set_adapter("three")
    assert list(model.peft_config) == ["three"]
    assert torch.equal(outputs_of(model, name), alone["three"])


def test_a_deleted_name_can_be_used_again() -> None:
    model = peft_model("llama")
    model.add_adapter("a", config_for("llama", layers=[0]))
    model.delete_adapter("a")
    model.add_adapter("a", config_for("llama", r=3, layers=[1, 2]))
    model.set_adapter("a")
    edits = [layer.edits("a") for layer in model.modules() if isinstance(layer, ReftLayer)]
    assert [edit["edit"].r if edit else None for edit in edits] == [None, 3, 3]


def test_deleting_every_adapter_leaves_the_base() -> None:
    model = peft_model("llama")
    model.delete_adapter("default")
    assert torch.equal(outputs_of(model.base_model.model, "llama"), outputs_of(tiny("llama"), "llama"))


@pytest.mark.parametrize("fields", [{"positions": "l2"}, {"method": "direft"}, {"activation": "relu"}])
def test_other_edits_do_not_take_an_adapters_place(fields: dict[str, Any], tmp_path: Path) -> None:
    """PEFT keeps the config of the adapter that is there: the new one's tensors would edit at its positions."""
    model = randomized(peft_model("llama"))
    model.save_pretrained(tmp_path / "same")
    other = randomized(peft_model("llama", **fields))
    other.save_pretrained(tmp_path / "other")
    before = outputs_of(model, "llama")
    (name, value), *_ = fields.items()
    with pytest.raises(ValueError, match=f"saved with {name}='{value}'.* Load it under another name"):
        model.load_adapter(str(tmp_path / "other"), "default")
    randomized(model)
    model.load_adapter(tmp_path / "same", "default")
    assert torch.equal(outputs_of(model, "llama"), before)
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "other", "default")
    model.set_adapter("default")
    assert torch.equal(outputs_of(model, "llama"), outputs_of(other, "llama"))


def test_active_adapters_compose_in_order() -> None:
    model = peft_model("llama", adapter_name="a", layers=[1])
    model.add_adapter("b", config_for("llama", layers=[1], method="noreft"))
    block = model.base_model.model.model.layers[1]
    seen: list[Tensor] = []
    block.register_forward_hook(lambda m, i, o: seen.append(o if isinstance(o, Tensor) else o[0]))
    edits = {name: block.reft.edits(name)["edit"] for name in "ab"}
    with model.disable_adapter():
        outputs_of(model, "llama")
    h = seen[-1][:, :2].reshape(-1, WIDTH)
    for order in (["a", "b"], ["b", "a"]):
        model.base_model.set_adapter(order)
        outputs_of(model, "llama")
        expected = h
        with torch.no_grad():
            for name in order:
                expected = expected + edits[name](expected)
        assert torch.equal(seen[-1][:, :2].reshape(-1, WIDTH), expected)
        assert torch.equal(seen[-1][:, 2:], seen[0][:, 2:])
    assert not torch.equal(seen[-1], seen[-2]), "these two do not commute"


def test_several_adapters_for_one_setter_are_told_the_other() -> None:
    model = get_peft_model(tiny("llama"), ReftConfig(task_type="CAUSAL_LM"), adapter_name="a")
    model.add_adapter("b", ReftConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"takes one adapter.*model\.base_model\.set_adapter\(\['a', 'b'\]\)"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"] and list(copy.deepcopy(model).peft_config) == ["a", "b"]
    model.base_model.set_adapter(["a", "b"])
    assert model.base_model.active_adapters == ["a", "b"]


def test_set_adapter_moves_what_is_trainable() -> None:
    model = peft_model("llama", adapter_name="a")
    model.add_adapter("b", config_for("llama"))
    for name in "ba":
        model.set_adapter(name)
        assert {n.split(".reft_edit.")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {name}
    model.set_adapter("b", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("trainable", [True, False])
def test_loading_freezes_unless_trainable(trainable: bool, tmp_path: Path) -> None:
    peft_model("llama").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=trainable)
    own = {p.requires_grad for n, p in model.named_parameters() if ".reft_" in n}
    assert own == {trainable}
    assert model.peft_config["default"].inference_mode is not trainable
    if trainable:
        one_step(model, "llama")
    model.load_adapter(tmp_path, "two", is_trainable=not trainable)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_says_why_not(merge: str) -> None:
    model = peft_model("llama")
    before = outputs_of(model, "llama")
    if merge == "unmerge_adapter":  # nothing is ever merged; PEFT's own answer is a warning or nothing
        return
    with pytest.raises(NotImplementedError, match=r"not merged in place: an edit of hidden states at some tokens only"):
        getattr(model, merge)()
    assert torch.equal(outputs_of(model, "llama"), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_base_in_half_precision(dtype: torch.dtype, when: str, tmp_path: Path) -> None:
    base = tiny("llama")
    if when == "before":
        base = base.to(dtype)
    model = get_peft_model(base, config_for("llama")).eval()
    if when == "after":
        model.to(dtype)
    kinds = {p.dtype for n, p in model.named_parameters() if ".reft_" in n}
    assert kinds == {torch.float32}
    output = outputs_of(model, "llama")
    assert output.dtype == dtype and bool(output.isfinite().all())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama").to(dtype), tmp_path)
    assert torch.equal(outputs_of(loaded, "llama"), output)
    raw = PeftModel.from_pretrained(tiny("llama").to(dtype), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(outputs_of(raw, "llama"), output)
    with model.disable_adapter():
        assert torch.equal(outputs_of(model, "llama"), outputs_of(tiny("llama").to(dtype), "llama"))


def test_state_dicts() -> None:
    model, other = randomized(peft_model("llama")), peft_model("llama", adapter_name="b")
    state = get_peft_model_state_dict(model)
    assert len(state) == 9 and all(k.startswith("base_model.model.model.layers.") for k in state)
    result = set_peft_model_state_dict(other, state, adapter_name="b")
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "reft" in k]
    assert torch.equal(outputs_of(other, "llama"), outputs_of(model, "llama"))


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_the_whole_state_dict_survives_a_file(way: str, tmp_path: Path) -> None:
    model, other = randomized(peft_model("llama")), peft_model("llama")
    if way == "torch":
        torch.save(model.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        state = pickle.loads(pickle.dumps(model.state_dict()))
    other.load_state_dict(state)
    assert torch.equal(outputs_of(other, "llama"), outputs_of(model, "llama"))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["llama", "bert_seq_cls", "t5"])
def test_copies_live_apart(name: str, twin_of: Callable[[PeftModel], PeftModel]) -> None:
    model = peft_model(name)
    expected = outputs_of(model, name)
    twin = twin_of(model)
    assert torch.equal(outputs_of(twin, name), expected)
    one_step(twin, name)
    assert torch.equal(outputs_of(model, name), expected)
    assert not torch.equal(outputs_of(twin, name), expected)
    base = twin.unload()
    assert not [n for n, _ in base.named_modules() if "reft" in n]
    assert torch.equal(outputs_of(base, name), outputs_of(tiny(name), name))
    assert torch.equal(outputs_of(model, name), expected)


@pytest.mark.parametrize(("name", "head"), [("bert_seq_cls", "classifier"), ("llama_seq_cls", "score")])
def test_classifier_heads_are_saved_for_each_adapter(name: str, head: str, tmp_path: Path) -> None:
    outputs = {}
    for adapter in ("a", "b"):
        model = randomized(peft_model(name, adapter_name=adapter, positions="f1"))
        model.save_pretrained(tmp_path)
        outputs[adapter] = outputs_of(model, name)
        saved = load_file(tmp_path / adapter / "adapter_model.safetensors")
        assert [k for k in saved if "reft" not in k and head in k]
        assert head in json.loads((tmp_path / adapter / "adapter_config.json").read_text())["modules_to_save"]
    model = PeftModel.from_pretrained(tiny(name), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    for adapter in "abab":
        model.set_adapter(adapter)
        assert torch.equal(outputs_of(model, name), outputs[adapter])
    with model.disable_adapter():
        assert torch.equal(outputs_of(model, name), outputs_of(tiny(name), name))


def test_modules_to_save_beside_the_edits(tmp_path: Path) -> None:
    model = randomized(peft_model("llama", modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(outputs_of(loaded, "llama"), outputs_of(model, "llama"))
    base = loaded.unload()
    assert torch.equal(outputs_of(base, "llama"), outputs_of(tiny("llama"), "llama"))


@pytest.mark.parametrize("lean", [False, True])
def test_modules_to_save_with_buffers(lean: bool, tmp_path: Path) -> None:
    def base() -> nn.Module:
        model = tiny("plain")
        torch.manual_seed(0)
        model.head = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(WIDTH, VOCAB))
        return model.eval()

    model = randomized(get_peft_model(base(), config_for("plain", modules_to_save=["head"])).train())
    outputs_of(model, "plain")  # moves the running statistics
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=lean)
    assert torch.equal(outputs_of(loaded, "plain"), outputs_of(model, "plain"))


def test_other_hooks_are_untouched() -> None:
    base, calls = tiny("llama"), []

    def theirs(label: str) -> Callable[..., None]:
        return lambda *_: calls.append(label)

    block = base.model.layers[0]
    handles = [
        block.register_forward_hook(theirs("block")),
        block.register_forward_pre_hook(theirs("pre")),
        base.register_forward_hook(theirs("model")),
    ]
    hooks = [dict(block._forward_hooks), dict(block._forward_pre_hooks), dict(base._forward_hooks)]
    model = get_peft_model(base, config_for("llama"))
    outputs_of(model, "llama")
    assert calls == ["pre", "block", "model"]
    later = block.register_forward_hook(theirs("later"))
    model.delete_adapter("default")
    model.unload()
    assert {**hooks[0], later.id: block._forward_hooks[later.id]} == dict(block._forward_hooks)
    assert hooks[1:] == [dict(block._forward_pre_hooks), dict(base._forward_hooks)]
    calls.clear()
    outputs_of(base, "llama")
    assert calls == ["pre", "block", "later", "model"]
    for handle in (*handles, later):
        handle.remove()


def test_hotswap_refuses(tmp_path: Path) -> None:
    model = randomized(peft_model("llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?i)only .*lora|REFT"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")


def test_mixing_with_another_method_is_refused_or_apart() -> None:
    model = peft_model("llama")
    with pytest.raises(ValueError, match=r"(?i)lora"):
        model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_on_top_of_a_lora(adapter_name: str, tmp_path: Path) -> None:
    """Of the same name or not: what is trained and saved is the edits alone, and they load where they were."""

    def lora() -> PeftModel:
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(tiny("llama"), config).eval()

    model = randomized(get_peft_model(lora(), config_for("llama"), adapter_name=adapter_name)).eval()
    assert all(".reft." in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    assert all(".reft." in key for key in load_file(folder / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(lora(), folder, adapter_name=adapter_name).eval()
    assert torch.equal(outputs_of(again, "llama"), outputs_of(model, "llama"))


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_another_method_on_top_is_refused(adapter_name: str) -> None:
    """PEFT would leave the edits in training, and write them into the other one's file where the names are the same."""
    model = randomized(peft_model("llama"))
    before = outputs_of(model, "llama")
    for config in (
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    ):
        with pytest.raises(
            ValueError, match=rf"adapter '{adapter_name}': a {type(config).__name__} around .* Put ReFT"
        ):
            get_peft_model(model, config, adapter_name=adapter_name)
    assert list(model.peft_config) == ["default"] and torch.equal(outputs_of(model, "llama"), before)


@pytest.mark.parametrize("bad", ["a.b", "__base__"])
def test_bad_names_of_a_second_adapter(bad: str) -> None:
    model = peft_model("llama")
    with pytest.raises(ValueError, match="adapter name"):
        model.add_adapter(bad, config_for("llama"))
    assert list(model.peft_config) == ["default"]


def test_status_and_card(tmp_path: Path) -> None:
    model = peft_model("llama")
    status = get_model_status(model)
    assert status.active_adapters == ["default"] and status.num_adapter_layers == 3
    assert status.trainable_params == 3 * (2 * 2 * WIDTH + 2) and status.enabled
    assert repr(model)


def save_with_peft(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    model.save_pretrained(folder)  # again, which must not say everything twice


def save_with_transformers(model: Any, folder: Path) -> None:
    plain: Any = tiny("llama")
    plain.add_adapter(model.active_peft_config)
    plain.save_pretrained(folder)


def save_beside_a_users_card(model: Any, folder: Path) -> None:
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\nEmoji, and nothing but.\n")
    model.save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert "nothing but" in card.text and card.data.license == "mit"  # PEFT replaces the tags


@pytest.mark.parametrize("save", [save_with_peft, save_with_transformers, save_beside_a_users_card])
def test_the_card_says_how_to_open_the_adapter(save: Any, tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    save(peft_model("llama"), folder)
    card = ModelCard.load(folder / "README.md")
    assert {"reft", "trimtab"} <= set(card.data.tags) and card.data.library_name == "peft"
    assert card.text.count("import trimtab") == 1 and "KeyError: 'REFT'" in card.text


def test_the_base_model_is_remembered(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    get_peft_model(base, config_for("llama")).save_pretrained(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")


def test_scale() -> None:
    model = peft_model("llama", layers=[-1])
    with model.disable_adapter():
        base = outputs_of(model, "llama")
    whole = outputs_of(model, "llama")
    set_scale(model, "default", 0)
    assert torch.equal(outputs_of(model, "llama"), base)
    set_scale(model, "default", -1.0)
    negative = outputs_of(model, "llama")
    assert not torch.equal(negative, base) and not torch.equal(negative, whole)
    set_scale(model, "default", 1)
    assert torch.equal(outputs_of(model, "llama"), whole)


@pytest.mark.parametrize(
    ("adapter", "scale", "message"),
    [
        ("nobody", 1.0, r"adapter='nobody': no such ReFT adapter on this model; there are \['default'\]"),
        ("default", float("nan"), "scale=nan: must be a finite number"),
        ("default", "1", "scale='1': must be a finite number"),
        ("default", True, "scale=True: must be a finite number"),
    ],
)
def test_bad_scales(adapter: str, scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_scale(peft_model("llama"), adapter, scale)


def test_generate_with_and_without_the_adapter() -> None:
    model = peft_model("llama", positions="all")
    ids = torch.randint(3, VOCAB, (2, 5))
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    edited = model.generate(**options)
    with model.disable_adapter():
        assert torch.equal(model.generate(**options), tiny("llama").generate(**options))
    assert edited.shape[0] == 2
    assert torch.equal(model.unload().generate(**options), tiny("llama").generate(**options))


def test_print_says_what_the_adapter_is() -> None:
    model = get_peft_model(tiny("llama"), ReftConfig(task_type="CAUSAL_LM", method="loreft", r=2, positions="f1+l2"))
    assert "default: loreft, rank 2, positions f1+l2, width 32" in repr(model)
    model.delete_adapter("default")
    assert "positions f1+l2, width" not in repr(model)


def test_another_method_goes_on_where_no_edit_is_left() -> None:
    base = tiny("llama")
    get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=2, positions="f1")).delete_adapter("default")
    assert isinstance(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).base_model, LoraModel)
