"""Many adapters beside one model: what a row of the pool answers is what the adapter answers under PEFT."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, outputs_of, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from serve.mixes import RANK, Asked, Served
from torch import Tensor

from trimtab import ReftConfig
from trimtab.errors import AdapterError
from trimtab.serve.pool import AdapterPool
from trimtab.serve.registry import NameTaken, UnknownAdapter

PROMPTS = [tuple(range(5 + i, 5 + i + 6 + 2 * i)) for i in range(8)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tiny("llama"), tmp_path_factory.mktemp("adapters"), strength=3)


@pytest.fixture
def pool(served: Served) -> Iterator[AdapterPool]:
    made = AdapterPool(served.model, entries=9, max_rank=RANK)
    for name in served.names:
        made.add(name, served.folder / name)
    yield made
    made.close()
    assert not any(site.module._forward_hooks for site in served.sites) and "_reft_forwards" not in vars(served.model)


def padded(prompts: list[tuple[int, ...]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(own)) + list(own) for own in prompts])
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, prompts: list[tuple[int, ...]], **kwargs: Any) -> list[list[int]]:
    batch = padded(prompts)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs)
    tokens: list[list[int]] = out[:, batch["input_ids"].shape[1] :].tolist()
    return tokens


def test_an_adapter_that_is_taken_off_the_model_leaves_the_pool(served: Served, pool: AdapterPool) -> None:
    name = served.names[0]
    with pool.rows([name]):
        before = served.model(**padded(PROMPTS[:1])).logits
    get_peft_model(served.model, ReftConfig(task_type="CAUSAL_LM", r=2, layers=[0])).base_model.unload()
    with pool.rows([name]):
        assert torch.equal(served.model(**padded(PROMPTS[:1])).logits, before)


def test_a_padded_batch_of_many_kinds_and_more_adapters_than_entries(served: Served, pool: AdapterPool) -> None:
    for first in range(0, len(served.names), 7):
        names = [*served.names[first : first + 7], None][-8:]
        prompts = PROMPTS[: len(names)]
        with pool.rows(names):
            found = generated(served.model, prompts)
        truth = [served.truth(Asked(p, ((n, 1.0),) if n else ())) for n, p in zip(names, prompts, strict=True)]
        assert found == truth


def test_beams_and_samples_have_the_adapter_of_their_prompt(served: Served, pool: AdapterPool) -> None:
    names, prompts = ["untied1", "all1"], [PROMPTS[3]] * 2
    alone = []
    for name, prompt in zip(names, prompts, strict=True):
        with pool.rows([name]):
            alone += generated(served.model, [prompt], num_beams=3)
    with pool.rows(names):
        assert generated(served.model, prompts, num_beams=3) == alone
    assert alone[0] != alone[1]


@torch.no_grad()
def test_logits_are_those_of_peft_but_for_the_order_of_the_products(served: Served, pool: AdapterPool) -> None:
    """The table computes (W - R) h in a batched product, so the last bits differ."""
    ids = torch.tensor([PROMPTS[5]])
    for name in served.names:
        served.peft.base_model.set_adapter([name])
        truth = served.peft(input_ids=ids, prompt_lengths=[ids.shape[1]]).logits
        with pool.rows([name]):
            found = served.model(input_ids=ids, prompt_lengths=[ids.shape[1]]).logits
        assert (found - truth).abs().max() <= 1e-6 * truth.abs().max(), name


def test_outside_and_in_other_threads_nothing_is_edited(served: Served, pool: AdapterPool) -> None:
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[5]])
        before, others = served.model(input_ids=ids).logits, []
        with pool.rows(["all1"]):
            thread = threading.Thread(target=lambda: others.append(served.model(input_ids=ids).logits))
            thread.start()
            thread.join()
            assert not torch.equal(served.model(input_ids=ids).logits, before)
            with pool.rows([None]):
                assert torch.equal(served.model(input_ids=ids).logits, before)
        assert torch.equal(served.model(input_ids=ids).logits, before) and torch.equal(others[0], before)


@torch.no_grad()
def test_a_cache_is_continued_by_the_adapters_that_filled_it(served: Served, pool: AdapterPool) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with pool.rows(["prefix1"]):
        cache = served.model(input_ids=ids[:, :-1], prompt_lengths=[ids.shape[1]], use_cache=True).past_key_values
        served.model.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=1)
    for names in ([None], ["prefix2"]):
        with pool.rows(names), pytest.raises(ValueError, match="filled with adapter 'prefix1"):
            served.model.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=1)


def test_the_model_s_own_adapter_edits_first(served: Served, tmp_path: Path) -> None:
    both = get_peft_model(copy.deepcopy(served.model), ReftConfig(task_type="CAUSAL_LM", init_weights="paper", r=2))
    both.eval().save_pretrained(str(tmp_path))
    pool = AdapterPool(both, max_rank=RANK)
    pool.add("all1", served.folder / "all1")
    with pool.rows(["all1"]):
        found = generated(both, PROMPTS[:1])
    expected = PeftModel.from_pretrained(copy.deepcopy(served.model), str(tmp_path), adapter_name="own").eval()
    expected.load_adapter(str(served.folder / "all1"), adapter_name="all1")
    expected.base_model.set_adapter(["own", "all1"])
    assert found == generated(expected, PROMPTS[:1])
    pool.close()
    assert outputs_of(both, "llama").isfinite().all()  # whose own hooks are still there


def test_what_does_not_belong_in_the_pool_is_refused(served: Served, pool: AdapterPool, tmp_path: Path) -> None:
    with pytest.raises(NameTaken):
        pool.add("plain1", served.folder / "plain2")
    get_peft_model(tiny("llama", hidden_size=16), ReftConfig(task_type="CAUSAL_LM")).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="other weights"):
        pool.add("other", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(served.folder / "plain1" / file.name)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, file)
    (tmp_path / "adapter_config.json").write_text((served.folder / "plain1/adapter_config.json").read_text())
    with pytest.raises(AdapterError, match="NaN"):
        pool.add("bad", tmp_path)
    pool.remove("plain2")
    with pytest.raises(UnknownAdapter), pool.rows(["plain2"]):
        pass
    with (
        pytest.raises(ValueError, match="table of 9 are needed, and not so many are free"),
        pool.rows(served.names[4:]),
    ):
        pass
    for rows in (3, 4):
        with pool.rows(["plain1", "all1"]), pytest.raises(ValueError, match=f"2 for a batch of {rows} rows"):
            served.model(input_ids=torch.randint(3, VOCAB, (rows, 9)))
