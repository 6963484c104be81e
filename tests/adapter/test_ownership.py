"""A file changes only what is its own: forty attacks on a model with an adapter, by every way of loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import outputs_of, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab import ReftConfig
from trimtab.adapter.folder import inspect_adapter
from trimtab.adapter.weights import WEIGHTS
from trimtab.serve.pool import AdapterPool

PREFIXES = ("base_model.model.", "", "base_model.model.base_model.model.", "base_model.")
EDIT = "base_model.model.model.layers.0.reft.reft_edit."
BASE_KEYS = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
)
OTHERS = (
    *(f"model.layers.0.reft.reft_edit.good.{name}" for name in ("weight", "bias", "rotation", "rotation.halved")),
    "model.layers.0.reft.reft_edit.evil.weight",
    "model.layers.0.reft.reft_prefix.good.weight",
    "model.layers.0.reft.reft_edit.rotation.halved",
)
ADDED = [prefix + key for prefix in PREFIXES for key in BASE_KEYS] + [
    prefix + key for prefix in PREFIXES[:2] for key in OTHERS
]


def replaced(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(EDIT + name, value(tensors[EDIT + name]))


SAID = "Without a place here|no part of|holds|rows are not|another configuration"
VALUES = {
    "nan": replaced("weight", lambda t: t * torch.nan),
    "integers": replaced("weight", lambda t: t.long()),
    "complex": replaced("bias", lambda t: t.to(torch.complex64)),
    "not a rotation": replaced("rotation", lambda t: t * 2),
}
ATTACKS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    **{key: lambda tensors, key=key: tensors.__setitem__(key, torch.zeros(96, 32)) for key in ADDED},  # type: ignore[misc]
    **VALUES,
}


def config(**fields: Any) -> ReftConfig:
    return ReftConfig(**{"task_type": "CAUSAL_LM", "r": 2, "positions": "f2", "init_weights": "paper", **fields})


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evil")
    get_peft_model(tiny("llama"), config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def victim() -> Any:
    return get_peft_model(tiny("llama"), config(), adapter_name="good").eval()


def test_there_are_forty() -> None:
    assert len(ATTACKS) >= 40


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_else_changes(attack: str, evil: Path, victim: Any, tmp_path: Path) -> None:
    tensors = load_file(evil / WEIGHTS)
    ATTACKS[attack](tensors)
    (tmp_path / "adapter_config.json").write_text((evil / "adapter_config.json").read_text())
    save_file(tensors, tmp_path / WEIGHTS)
    before = {key: tensor.clone() for key, tensor in victim.state_dict().items()}
    answer = outputs_of(victim, "llama")
    pool = AdapterPool(tiny("llama"))
    loads: tuple[Callable[[], Any], ...] = (
        lambda: victim.load_adapter(str(tmp_path), "evil"),
        lambda: pool.add("evil", tmp_path),
        lambda: PeftModel.from_pretrained(tiny("llama"), tmp_path),
        lambda: inspect_adapter(tmp_path),
    )
    if "lm_head" in attack or "embed_tokens" in attack:  # which a resized vocabulary would explain: it is shown
        assert inspect_adapter(tmp_path).extras == (attack,)
        loads = loads[:3]
    for load in loads:
        with pytest.raises(ValueError, match=SAID) as caught:
            load()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    if "evil" in victim.peft_config:
        victim.delete_adapter("evil")
    victim.set_adapter("good")
    assert all(torch.equal(victim.state_dict()[key], tensor) for key, tensor in before.items())
    assert torch.equal(outputs_of(victim, "llama"), answer)


@pytest.mark.parametrize("name", ["layers.0", "reft", "reft_edit", "0", "model"])
def test_modules_to_save_do_not_reach_the_edits(name: str) -> None:
    base: Any = tiny("llama")
    expected = outputs_of(base, "llama")
    with pytest.raises(ValueError, match=rf"modules_to_save=\['{name}'\]: '{name}' holds model.layers.0"):
        get_peft_model(base, config(modules_to_save=[name]))
    assert torch.equal(outputs_of(base, "llama"), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_embeddings_load_where_the_vocabulary_was_resized(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    tiny("llama").save_pretrained(tmp_path / "base")

    def base(seed: int, resize: bool = True) -> Any:
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
        if resize:
            model.resize_token_embeddings(100)
        return model

    for modules in (None, ["embed_tokens", "lm_head"]):
        model = get_peft_model(base(0), config(modules_to_save=modules)).eval()
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(base(1), tmp_path / "adapter")
        assert torch.equal(outputs_of(again, "llama"), outputs_of(model, "llama"))
        assert any("embed_tokens" in key for key in inspect_adapter(tmp_path / "adapter").extras)
    file = tmp_path / "adapter" / WEIGHTS
    save_file({k: t[:96] if "embed" in k or "lm_head" in k else t for k, t in load_file(file).items()}, file)
    config().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Without a place here: .*(embed_tokens|lm_head)"):
        PeftModel.from_pretrained(base(0, resize=False), tmp_path / "adapter")
