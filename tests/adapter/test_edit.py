"""An edit of one's own does what an adapter of the same does, only within, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WIDTH, outputs_of, tiny
from peft import PeftModel
from test_batches import adapted, padded, prompts, search
from test_config import anatomy
from torch import Tensor

import trimtab
from trimtab import ReftConfig, adapter_from
from trimtab.adapter.folder import inspect_adapter

ROWS = prompts([9, 5, 3])


def tensors(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"projection": (2, WIDTH), "weight": (2, WIDTH), "bias": (2,)}
    return {name: torch.randn(shape, generator=random) / 3 for name, shape in shapes.items()}


def function(own: dict[str, Tensor]) -> Any:
    return lambda h: h + (h @ own["weight"].mT + own["bias"]) @ own["projection"]


def generated(model: Any, **kwargs: Any) -> Tensor:
    batch = padded(ROWS)
    del batch["position_ids"]
    return torch.stack(model.generate(**batch, **search(**kwargs)).logits, 1)


def random_ids(seed: int) -> Tensor:
    return prompts([8], seed)[0][None]


@torch.no_grad()
def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **kwargs).logits
    return found


@pytest.mark.parametrize("positions", ["f2+l1", "l2", "prompt", "generated", "all"])
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_an_edit_is_what_an_adapter_of_the_same_is(positions: str, how: dict[str, Any], tmp_path: Path) -> None:
    """Left-padded, with a cache or without, in beams; the adapter is made from the tensors."""
    base, layers = tiny("llama"), [0, 2]
    config = ReftConfig(task_type="CAUSAL_LM", method="direft", r=2, positions=positions)
    saved = adapter_from({i: tensors(i) for i in layers}, config, base, tmp_path / "it")
    assert (saved.layers, inspect_adapter(tmp_path / "it").parameters) == (layers, 2 * (4 * WIDTH + 2))
    with (
        trimtab.edit(base, function(tensors(0)), layers=[0], positions=positions),
        trimtab.edit(base, function(tensors(2)), layers=[2], positions=positions),
    ):
        found = generated(base, **how)
    assert (found - generated(base, **how)).abs().max() > 0.01
    expected = generated(PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "it")).eval(), **how)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "site"),
    [("gpt2", "mlp"), ("bert", "block"), ("t5", "block"), ("mixtral", "attention")],
)
def test_on_other_architectures(name: str, site: str, tmp_path: Path) -> None:
    base = tiny(name)
    config = ReftConfig(method="direft", r=2, positions="all", site=site)
    adapter_from({1: tensors()}, config, base, tmp_path / "it")
    with trimtab.edit(base, function(tensors()), layers=[1], site=site):
        found = outputs_of(base, name)
    assert (found - outputs_of(base, name)).abs().max() > 1e-3
    expected = outputs_of(PeftModel.from_pretrained(tiny(name), str(tmp_path / "it")).eval(), name)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_matrix_a_vector_a_scale_and_their_order() -> None:
    model, ids = tiny("llama"), random_ids(0)
    matrix, vector = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    for change, same in ((matrix, lambda h: h @ matrix.mT), (vector, lambda h: h + vector)):
        with trimtab.edit(model, change, layers=[1]):
            found = logits(model, ids)
        with trimtab.edit(model, same, layers=[1]):
            assert torch.equal(found, logits(model, ids))
    with trimtab.edit(model, vector, layers=[1], scale=-0.5):
        found = logits(model, ids)
    with trimtab.edit(model, vector * -0.5, layers=[1]):
        torch.testing.assert_close(found, logits(model, ids))
    with trimtab.edit(model, matrix, layers=[1]), trimtab.edit(model, vector, layers=[1]):
        found = logits(model, ids)
    with trimtab.edit(model, lambda h: h @ matrix.mT + vector, layers=[1]):
        torch.testing.assert_close(found, logits(model, ids))


def test_behind_the_edits_of_adapters_in_every_row() -> None:
    """Adapters by row, and recorded hidden states, which are what the next block reads."""
    model, rows = adapted(), {"input_ids": torch.stack(prompts([6, 6]))}
    seen: list[Tensor] = []

    def look(h: Tensor) -> Tensor:
        seen.append(h)
        return h * 0 + 1

    names = ["a", "__base__"]
    plain = model(**rows, adapter_names=names, output_hidden_states=True).hidden_states
    with trimtab.edit(model, look, layers=[0], positions="f1"):
        states = model(**rows, adapter_names=names, output_hidden_states=True).hidden_states
    assert torch.equal(seen[0], plain[1][:, 0]) and torch.equal(states[1][:, 0], torch.ones(2, WIDTH))
    assert torch.equal(states[1][:, 1:], plain[1][:, 1:])


def test_only_the_edited_tokens_are_seen_and_may_be_written_to() -> None:
    """A row too short for all its positions, padding, and decode steps that edit nothing."""
    model, shapes = tiny("llama"), []

    def ones(h: Tensor) -> Tensor:
        shapes.append(tuple(h.shape))
        return h.fill_(1.0)

    with trimtab.edit(model, ones, layers=[0], positions="f3+l3"):
        changed = generated(model)
    assert shapes == [(6 + 5 + 3, WIDTH)] and (changed - generated(model)).abs().max() > 0.01


@pytest.mark.parametrize("wrapped", [False, True])
def test_two_threads_each_its_own(wrapped: bool) -> None:
    model: Any = adapted() if wrapped else tiny("llama")
    barrier = threading.Barrier(3, timeout=20)
    vectors = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def own(vector: Tensor | None) -> Tensor:
        if vector is None:
            barrier.wait()
            found = generated(model)
            barrier.wait()
            return found
        with trimtab.edit(model, vector, layers=[1], positions="l1"):
            barrier.wait()  # all three are within, or without, at once
            found = generated(model)
            barrier.wait()
            return found

    alone, before = [generated(model)], anatomy(model)
    for vector in vectors:
        with trimtab.edit(model, vector, layers=[1], positions="l1"):
            alone.append(generated(model))
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(own, [None, *vectors]))
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert len({float(each.sum()) for each in alone}) == 3
    assert anatomy(model) == before


def test_a_thread_started_within_edits_with_the_context_alone() -> None:
    model, ids = tiny("llama"), random_ids(0)
    plain = logits(model, ids)
    with ThreadPoolExecutor(1) as thread, trimtab.edit(model, torch.ones(WIDTH)):
        own = logits(model, ids)
        assert torch.equal(thread.submit(logits, model, ids).result(), plain)
        assert torch.equal(thread.submit(contextvars.copy_context().run, logits, model, ids).result(), own)


def test_asyncio_tasks_each_their_own() -> None:
    model, ids = tiny("llama"), random_ids(0)

    async def one(vector: Tensor) -> Tensor:
        with trimtab.edit(model, vector):
            await asyncio.sleep(0)
            return logits(model, ids)

    async def both() -> list[Tensor]:
        return list(await asyncio.gather(one(torch.ones(WIDTH)), one(-torch.ones(WIDTH))))

    first, second = asyncio.run(both())
    with trimtab.edit(model, torch.ones(WIDTH)):
        assert torch.equal(first, logits(model, ids))
    assert not torch.equal(first, second)


def fails(h: Tensor) -> Tensor:
    raise KeyError("mine")


BAD_CHANGES: list[tuple[Any, type[Exception], str]] = [
    (fails, KeyError, "mine"),
    (lambda h: h[0], ValueError, r"change: gave torch.float32 \(32,\) at model.layers.0 .* \(8, 32\)"),
    (lambda h: None, ValueError, "change: gave NoneType"),
    (lambda h: h.long(), ValueError, "change: gave torch.int64"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CHANGES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_function_that_fails_leaves_nothing_behind(name: str, change: Any, error: Any, message: str) -> None:
    model, ids = tiny(name), random_ids(0)
    before, plain = anatomy(model), logits(model, ids)
    with pytest.raises(error, match=message.replace("model.layers.0", ".*0")), trimtab.edit(model, change):
        logits(model, ids)
    assert anatomy(model) == before and torch.equal(logits(model, ids), plain)
    with pytest.raises(error), trimtab.edit(model, change):
        model.generate(ids)
    assert anatomy(model) == before and torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"change": torch.ones(WIDTH + 1)}, r"change: of shape \(33,\), but .* model.layers.0 have the width 32"),
        ({"change": torch.ones(WIDTH).long()}, "change: a tensor of torch.int64"),
        ({"change": torch.full((WIDTH,), torch.nan)}, "without NaN"),
        ({"change": "up"}, "change='up': must be a function of h, a matrix"),
        ({"positions": "x7"}, "positions='x7'"),
        ({"layers": [9]}, r"layers=\[9\]"),
        ({"scale": float("inf")}, "scale=inf: must be a finite number"),
    ],
)
def test_bad_fields_before_anything_is_touched(fields: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    before = anatomy(model)
    with pytest.raises(ValueError, match=message), trimtab.edit(model, **{"change": torch.ones(WIDTH), **fields}):
        pass
    assert anatomy(model) == before


def test_compiled_and_checkpointed_models_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="edit: the model is compiled"),
        trimtab.edit(torch.compile(tiny("llama"), backend="eager"), torch.ones(WIDTH)),
    ):
        pass
    model: Any = tiny("llama").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpoints its gradients"), trimtab.edit(model, torch.ones(WIDTH)):
        pass


def test_low_precision_computes_in_float32() -> None:
    model, seen = tiny("llama").bfloat16(), []
    with trimtab.edit(model, lambda h: (seen.append(h.dtype), h + 1)[1]):
        assert logits(model, random_ids(0)).dtype == torch.bfloat16
    assert set(seen) == {torch.float32}


def test_gradients_go_through() -> None:
    model = tiny("llama")
    vector = torch.zeros(WIDTH, requires_grad=True)
    with trimtab.edit(model, vector, positions="f1"):
        model(input_ids=random_ids(0)).logits.sum().backward()
    assert vector.grad is not None and vector.grad.abs().max() > 0


def test_an_adapter_that_is_put_on_and_taken_off_within() -> None:
    model, ids = tiny("llama"), random_ids(0)
    from peft import get_peft_model

    before = anatomy(model)
    with trimtab.edit(model, torch.ones(WIDTH), layers=[0]):
        found = logits(model, ids)
        wrapped = get_peft_model(model, ReftConfig(task_type="CAUSAL_LM", positions="all"))
        assert torch.equal(logits(wrapped, ids), found)
    assert not torch.equal(logits(wrapped, ids), found)
    wrapped.unload()
    assert {name for name, *_ in anatomy(model)} == {name for name, *_ in before}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({7: {"vector": torch.ones(WIDTH), "strength": torch.ones(1)}}, "tensors of 7: the model has .* 0 to 2"),
        ({"model.layers.9": {}}, "tensors of 'model.layers.9'"),
        ({0: {"vector": torch.ones(WIDTH)}}, "model.layers.0/edit holds vector, but"),
        ({0: {"vector": torch.ones(5), "strength": torch.ones(1)}}, r"vector has shape \(5,\)"),
    ],
)
def test_tensors_that_make_no_adapter(own: Any, message: str, tmp_path: Path) -> None:
    config = ReftConfig(task_type="CAUSAL_LM", method="vector", positions="all")
    with pytest.raises(ValueError, match=message):
        adapter_from(own, config, tiny("llama"), tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_an_untied_adapter_by_module_names(tmp_path: Path) -> None:
    base = tiny("llama")
    config = ReftConfig(task_type="CAUSAL_LM", method="vector", positions="f1+l1", tied=False)
    own = {
        part: {"vector": torch.ones(WIDTH), "strength": torch.full((1,), s)}
        for part, s in (("prefix", 1.0), ("suffix", -1.0))
    }
    adapter_from({"model.layers.1": own}, config, base, tmp_path / "it")
    ids = random_ids(0)
    with (
        trimtab.edit(base, torch.ones(WIDTH), layers=[1], positions="f1"),
        trimtab.edit(base, torch.ones(WIDTH), layers=[1], positions="l1", scale=-1),
    ):
        found = logits(base, ids)
    model = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "it"))
    torch.testing.assert_close(logits(model, ids), found)
