"""Many adapters beside one model: what a slot answers is what the adapter answers when PEFT loads it."""

from pathlib import Path

import pytest
import torch
from helpers import tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from trimtab import ReftConfig
from trimtab.adapter.pool import AdapterPool

CONFIG = {"task_type": "CAUSAL_LM", "positions": "f1+l2", "tied": False, "init_weights": "paper", "r": 2}


def config() -> ReftConfig:
    return ReftConfig(**CONFIG)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = []
    for i in range(5):
        torch.manual_seed(i)
        get_peft_model(tiny("llama"), config()).save_pretrained(str(tmp_path / str(i)))
        made.append(tmp_path / str(i))
    return made


def test_slots_answer_as_the_adapters_do(folders: list[Path]) -> None:
    torch.manual_seed(9)
    ids = torch.randint(3, 90, (1, 9))
    base = tiny("llama")
    expected = []
    for folder in folders:
        model = PeftModel.from_pretrained(base, str(folder))
        expected.append(model(input_ids=ids).logits.detach())
        base = model.base_model.unload()
    pool = AdapterPool(model := get_peft_model(base, config()), config(), slots=2)
    model.eval()
    for i, folder in enumerate(folders):
        pool.add(str(i), folder)
    assert len(pool) == 5 and "3" in pool
    for i in (0, 1, 0, 4, 2, 3, 0):  # more adapters than slots, so they take turns
        logits = model(input_ids=ids, adapter_names=[pool.slot(str(i))]).logits
        assert torch.equal(logits, expected[i])
    names = [pool.slot("1"), pool.slot("4")]
    logits = model(input_ids=ids.expand(2, -1), adapter_names=names).logits
    assert (logits - torch.cat([expected[1], expected[4]])).abs().max() < 1e-5
    pool.remove("4")
    with pytest.raises(KeyError):
        pool.slot("4")


def test_what_does_not_belong_in_the_pool_is_refused(folders: list[Path], tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), config())
    pool = AdapterPool(model, config(), slots=1)
    pool.add("a", folders[0])
    with pytest.raises(ValueError, match="in the pool already"):
        pool.add("a", folders[1])
    other = get_peft_model(tiny("llama"), ReftConfig(**{**CONFIG, "tied": True}))
    other.save_pretrained(str(tmp_path / "tied"))
    with pytest.raises(ValueError, match="another configuration"):
        pool.add("b", tmp_path / "tied")
    file = folders[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ValueError, match="NaN"):
        pool.add("b", folders[1])
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors"):
        pool.add("b", folders[1])
    assert len(pool) == 1


def test_a_slot_that_was_given_up_is_refused(folders: list[Path]) -> None:
    pool = AdapterPool(model := get_peft_model(tiny("llama"), config()), config(), slots=2)
    for i, folder in enumerate(folders):
        pool.add(str(i), folder)
    ids = torch.randint(3, 90, (3, 9))
    with pytest.raises(ValueError, match="no adapter"):  # three adapters in one batch, two slots
        model(input_ids=ids, adapter_names=[pool.slot(name) for name in "012"])
    removed = pool.slot("2")
    pool.remove("2")
    with pytest.raises(ValueError, match="no adapter"):
        model(input_ids=ids, adapter_names=[removed] * 3)
