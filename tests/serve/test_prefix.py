"""Every answer is that of plain `generate`: alone or among others, in chunks of any size, with any cached prefix."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import VOCAB, tiny
from serve.mixes import Asked, Served, drive, mismatches
from transformers import AutoModelForCausalLM

import trimtab.serve.rows as rows


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tiny("llama"), tmp_path_factory.mktemp("adapters"), strength=3)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("share", [True, False])
def test_answers_are_those_of_generate(served: Served, chunk: int, share: bool) -> None:
    engine = served.engine(chunk=chunk, prefix_bytes=1 << 20 if share else 0)
    asked = served.mixes(20 if chunk > 1 else 8, seed=0, longest=40, vocabulary=VOCAB)
    assert mismatches(served, engine, asked) == []
    assert mismatches(served, engine, asked[::-1], each=20) == []  # all caches warm, all at once
    assert (engine.stats().cached_tokens > 0) == share
    assert engine.stats().running == engine.stats().pinned_adapters == 0
    engine.close()


def test_a_prefix_that_another_prompt_has_as_suffix(served: Served) -> None:
    """Of an untied adapter: both prompts are edited everywhere in their first block, but not by the same edits."""
    engine = served.engine()
    for start in range(3, 9):
        for n in (4, 5):
            assert mismatches(served, engine, [Asked(tuple(range(start, start + n)), (("untied1", 1.0),))]) == []
    engine.close()


def _whole(tokens: Any, edits: Any, prompt: int, block: int, salt: bytes, mark: Any) -> Iterator[bytes]:
    key = hashlib.sha256(salt).digest()
    for start in range(0, len(tokens) - block + 1, block):
        key = hashlib.sha256(key + struct.pack(f"<{block}q", *tokens[start : start + block]) + mark(edits)).digest()
        yield key


MUTANTS = {
    "none": lambda edits: b"",
    "adapter only": lambda edits: b"".join(edit.digest + struct.pack("<d", edit.scale) for edit in edits),
}
"""Wrong keys: of the tokens alone; of the tokens and the adapters, not of which tokens they edit."""


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_keys_give_wrong_answers(served: Served, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "block_keys", lambda *args: _whole(*args, mark=MUTANTS[name]))
    engine = served.engine()
    mixes = served.mixes(40, seed=0, longest=40, vocabulary=VOCAB, names=["plain1", "suffix1", "random1"])
    wrong = mismatches(served, engine, mixes)
    engine.close()
    assert wrong
    if name == "none":
        assert any(not asked.adapters for asked in wrong)  # the base model's answers too


def test_many_adapters_share_a_prompt_up_to_its_edited_end(served: Served) -> None:
    """Adapters that edit only the end take all before it from the store, whoever computed it, at once or later."""
    prompt = tuple(range(5, 45))
    engine = served.engine(chunk=16)
    asked = [Asked(prompt, ((name, 1.0),)) for name in ("suffix1", "suffix2")] + [Asked(prompt)]
    inbox = drive(engine, [served.request(str(i), one) for i, one in enumerate(asked)], each=3)
    assert [inbox.last(str(i)).cached_tokens for i in range(3)] == [0, 32, 32]  # 35 to 39 are edited
    assert [inbox.tokens(str(i)) for i in range(3)] == [served.truth(one) for one in asked]
    engine.close()


def test_tenants_share_nothing(served: Served) -> None:
    engine = served.engine()
    asked = Asked(tuple(range(5, 35)))
    for id, salt in (("a", b"a"), ("b", b"b"), ("c", b"a")):
        inbox = drive(engine, [dataclasses.replace(served.request(id, asked), salt=salt)])
        assert inbox.last(id).cached_tokens == (28 if id == "c" else 0)
    engine.close()


def test_the_store_keeps_to_its_bytes(served: Served) -> None:
    engine = served.engine(prefix_bytes=20_000)
    assert mismatches(served, engine, served.mixes(30, seed=3, longest=40, vocabulary=VOCAB)) == []
    assert 0 < engine.stats().prefix_bytes <= 20_000
    engine.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Served:
    model: Any = AutoModelForCausalLM.from_pretrained("models/tiny-llama", dtype=torch.float32)
    return Served(model.eval(), tmp_path_factory.mktemp("trained"))


WHOLE = 128


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [WHOLE, 64, 7, 1])
@pytest.mark.parametrize("share", [True, False])
def test_five_hundred_mixes_on_a_trained_model(
    trained: Served, chunk: int, share: bool, pytestconfig: pytest.Config
) -> None:
    """As many as `--mixes` says: cold, then in another order with all caches warm, with fewer entries than adapters."""
    asked = trained.mixes(pytestconfig.getoption("mixes"), seed=0, longest=100, vocabulary=4096)
    engine = trained.engine(chunk=chunk, slots=16, prefix_bytes=1 << 28 if share else 0, entries=8)
    assert mismatches(trained, engine, asked, each=4) == []
    if share:
        cold = engine.stats().cached_tokens
        assert mismatches(trained, engine, asked[::-1], each=32) == []
        assert engine.stats().cached_tokens > 2 * cold
    assert engine.stats().table_evictions > 0
    engine.close()
