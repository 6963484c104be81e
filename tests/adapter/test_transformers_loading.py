"""Adapters on a plain model, as users of transformers load them: the answers of PEFT, and the same checks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batch_for, outputs_of, tiny
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import trimtab
from trimtab import ReftConfig
from trimtab.adapter.weights import WEIGHTS

TINY = str(Path(__file__).parents[2] / "models/tiny-llama")


def config(**fields: Any) -> ReftConfig:
    return ReftConfig(
        **{"task_type": "CAUSAL_LM", "r": 2, "positions": "f2+l2", "tied": False, "init_weights": "paper", **fields}
    )


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base model's folder, and that of an adapter trained on it."""
    tiny("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    model.save_pretrained(tmp_path / "emoji")
    return tmp_path / "base", tmp_path / "emoji"


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def through_peft(base: Path, adapter: Path) -> torch.Tensor:
    return outputs_of(PeftModel.from_pretrained(load(base), adapter).eval(), "llama")


def by_load_adapter(base: Path, adapter: Path) -> nn.Module:
    model = load(base)
    model.load_adapter(str(adapter))
    return model  # type: ignore[no-any-return]


def by_weights(base: Path, adapter: Path) -> nn.Module:
    model = load(base)
    model.load_adapter(peft_config=config(), adapter_state_dict=load_file(adapter / WEIGHTS))
    return model  # type: ignore[no-any-return]


WAYS = {
    "from_pretrained": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter).eval(),
    "load_adapter": by_load_adapter,
    "adapter_state_dict": by_weights,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_answers_as_through_peft(way: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    model: Any = WAYS[way](*folders)
    expected = through_peft(*folders)
    assert not torch.equal(expected, outputs_of(load(folders[0]), "llama"))
    assert torch.equal(outputs_of(model, "llama"), expected)
    model.save_pretrained(tmp_path / "again")  # by transformers, with PEFT's names and R whole
    ours, theirs = load_file(tmp_path / "again" / WEIGHTS), load_file(folders[1] / WEIGHTS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    model.delete_adapter("default")
    assert torch.equal(outputs_of(model, "llama"), outputs_of(load(folders[0]), "llama"))


def test_generate_counts_the_prompt_without_a_wrapper(folders: tuple[Path, Path]) -> None:
    batch = batch_for("llama")
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    expected = PeftModel.from_pretrained(load(folders[0]), folders[1]).generate(**batch, **kwargs)
    assert torch.equal(by_load_adapter(*folders).generate(**batch, **kwargs), expected)  # type: ignore[operator]


def test_a_pipeline_of_the_adapters_folder(tmp_path: Path) -> None:
    """What TRL's model cards tell people to type, after `import trimtab`."""
    base = AutoModelForCausalLM.from_pretrained(TINY)
    tuned = get_peft_model(base, config()).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("bias"):
                parameter.add_(50)
    tuned.save_pretrained(tmp_path)
    text = pipeline("text-generation", model=str(tmp_path))("hello there", max_new_tokens=5, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    out = tuned.generate(**tokenizer("hello there", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert text[0]["generated_text"] == tokenizer.decode(out[0], skip_special_tokens=True)
    with tuned.disable_adapter():
        plain = base.generate(**tokenizer("hello there", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert not torch.equal(out, plain)


def test_beside_an_active_lora(folders: tuple[Path, Path], tmp_path: Path) -> None:
    lora = get_peft_model(load(folders[0]), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    model: Any = by_load_adapter(*folders)
    model.load_adapter(str(tmp_path / "lora"), adapter_name="other")
    model.set_adapter(["default", "other"])
    both = outputs_of(model, "llama")
    wrapped = PeftModel.from_pretrained(load(folders[0]), tmp_path / "lora").eval()
    inject_adapter_in_model(config(), wrapped.base_model.model, "default")
    for module in wrapped.modules():
        if hasattr(module, "reft_edit"):
            module.set_adapter("default")
    own = {k: v for k, v in model.state_dict().items() if "reft" in k}
    wrapped.base_model.model.load_state_dict(own, strict=False)
    assert torch.equal(outputs_of(wrapped, "llama"), both)


def test_a_second_adapter_shares_the_record_of_forwards(folders: tuple[Path, Path]) -> None:
    model: Any = by_load_adapter(*folders)
    model.add_adapter(config(r=3, layers=[0]), adapter_name="second")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    model.set_adapter("default")
    assert torch.equal(outputs_of(model, "llama"), through_peft(*folders))
    inject_adapter_in_model(config(layers=[0]), model, "third")
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_file_that_is_not_its_own_is_refused_and_leaves_nothing(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(96, 32)
    save_file(tensors, adapter / WEIGHTS)
    model = load(base)
    before = outputs_of(model, "llama")
    with pytest.raises(ValueError, match=r"Without a place here: .*lm_head\.weight"):
        model.load_adapter(str(adapter))
    assert torch.equal(outputs_of(model, "llama"), before)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="not a pickle of tensors alone"):
        model.load_adapter(str(adapter))
    assert torch.equal(outputs_of(model, "llama"), before)


def test_wrapping_twice_adopts_and_unload_leaves_nothing() -> None:
    base: Any = tiny("llama")
    plain, names = outputs_of(base, "llama"), set(vars(base))
    first = get_peft_model(base, config())
    trimtab.set_scale(first, "default", 0.5)
    with pytest.warns(UserWarning, match="second time"):
        model = get_peft_model(base, config())
    once = get_peft_model(tiny("llama"), config())
    once.load_state_dict(model.state_dict())
    assert torch.equal(outputs_of(model.eval(), "llama"), outputs_of(once.eval(), "llama"))
    with torch.no_grad():
        rows = model(**batch_for("llama"), adapter_names=["default", "__base__"]).logits
    assert (rows[1] - plain[1])[:7].abs().max() < 1e-5 and (rows[0] - plain[0]).abs().max() > 1e-3
    unloaded: Any = model.unload()
    assert torch.equal(outputs_of(unloaded, "llama"), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())
    assert not any("reft" in name for name, _ in unloaded.named_modules()) and set(vars(unloaded)) == names


def test_averages_say_what_to_use_instead() -> None:
    model = get_peft_model(tiny("llama"), config())
    with pytest.raises(NotImplementedError, match=r"set_adapter\(\[first, second\]\) and trimtab\.set_scale"):
        model.add_weighted_adapter(["default"], [1.0], "mean")


@pytest.mark.parametrize("name", ["bert_seq_cls", "llama_seq_cls"])
def test_heads_are_loaded_too(name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny(name), config(task_type="SEQ_CLS", positions="f1+l1"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.3)
    model.eval().save_pretrained(tmp_path)
    loaded = tiny(name)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(outputs_of(loaded.eval(), name), outputs_of(model, name))


def test_a_lora_at_positions_is_loaded_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    made = trimtab.LoraAtConfig(
        task_type="CAUSAL_LM", r=2, positions="l2", target_modules=["q_proj"], init_lora_weights=False
    )
    model = get_peft_model(load(folders[0]), made).eval()
    model.save_pretrained(tmp_path / "at")
    expected = outputs_of(model, "llama")
    assert not torch.equal(expected, outputs_of(load(folders[0]), "llama"))
    assert torch.equal(outputs_of(by_load_adapter(folders[0], tmp_path / "at"), "llama"), expected)
    assert torch.equal(outputs_of(AutoModelForCausalLM.from_pretrained(tmp_path / "at").eval(), "llama"), expected)


def test_two_with_a_lora_beside_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        made = get_peft_model(load(folders[0]), config(lora={"r": 2, "target_modules": ["q_proj"]}), adapter_name=name)
        for key, parameter in made.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(0, 0.3)
        made.save_pretrained(tmp_path)
    model = load(folders[0])
    for name in ("a", "b"):
        model.load_adapter(str(tmp_path / name), name)
        peft = PeftModel.from_pretrained(load(folders[0]), tmp_path / name, adapter_name=name).eval()
        model.set_adapter(name)
        assert torch.allclose(outputs_of(model, "llama"), outputs_of(peft, "llama"), atol=1e-6)
