"""What the training loop leaves out changes nothing: reuse, supervised-only logits, length-grouped order."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import names_of, tiny
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab import ReftConfig
from trimtab.runs.predict import predict
from trimtab.runs.reuse import (
    ATTENTION,
    LowerBlocksReuse,
    PrefixReuse,
    Reuse,
    Store,
    UnlikeAttention,
    _attend,
    choose_reuse,
)
from trimtab.runs.trainer import (
    LengthGrouped,
    NumberedCollator,
    ReftTrainer,
    TrainingSpec,
    pack,
    supervised_only,
    training_arguments,
    with_supervised,
)
from trimtab.tasks.tokens import IGNORED, Collator, Encoded

TOKENIZER = AutoTokenizer.from_pretrained("models/tiny-llama")


def examples(count: int = 5) -> list[Encoded]:
    """Prompts of 1 to 20 tokens and answers of 1 to 6."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        n, m = (1, 2, 9, 20, 14)[i % 5], 1 + i % 6
        ids = torch.randint(3, 90, (n + m,), generator=generator).tolist()
        made.append(Encoded(ids, n, [IGNORED] * n + ids[n:]))
    return made


def adapted(name: str, positions: str, layers: Any = "all", site: str = "block") -> tuple[PeftModel, ReftConfig]:
    config = ReftConfig(task_type="CAUSAL_LM", positions=positions, layers=layers, site=site, init_weights="paper", r=2)
    torch.manual_seed(4)
    base = tiny(name)  # in eval mode, where dropout rests; the config is asked about it all the same
    for attribute in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout", "dropout"):
        if hasattr(base.config, attribute):
            setattr(base.config, attribute, 0.0)
    return get_peft_model(base, config), config


def loss_and_gradients(model: PeftModel, batch: dict[str, Any]) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_same(model: PeftModel, reuse: Reuse, batch: dict[str, Tensor]) -> None:
    plain_loss, plain = loss_and_gradients(model, batch)
    for _ in range(2):  # computing what is kept, then taking it from the store
        model.zero_grad()
        with reuse.applied(dict(batch)) as smaller:
            loss = model(**with_supervised(smaller)).loss
            loss.backward()
        assert abs(loss.item() - plain_loss) < 1e-5
        for ours, theirs in zip((p.grad for p in model.parameters() if p.requires_grad), plain, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-8


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "mixtral", "phi3"])
@pytest.mark.parametrize("positions", ["l1", "l4"])
def test_prefix_reuse_gives_the_plain_gradients(
    name: str, positions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, config = adapted(name, positions)
    reuse = choose_reuse(model, config, Store(2000), checkpointing=False)
    assert isinstance(reuse, PrefixReuse), reuse
    for reuse.lean in (True, False):
        assert_same(model, reuse, Collator(TOKENIZER)(examples()))
    assert reuse.store.on_disk > 0  # 2 kB hold one prefix or two
    assert not list(tmp_path.iterdir())  # not even while it is in use: a killed process leaves nothing behind
    reuse.store.close()


def test_attention_that_is_more_than_ours_is_left_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `trainer`, whose first step finds out, for this run and the next."""
    store, asked = Store(10**9), []

    def capped(*args: Any, **others: Any) -> Any:
        asked.append(1)
        return _attend(*args, softcap=30.0, **others)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, ATTENTION, capped)
    with pytest.raises(UnlikeAttention, match="softcap"):
        model, config = adapted("llama", "l2")
        with choose_reuse(model, config, store, checkpointing=False).applied(Collator(TOKENIZER)(examples())) as less:  # type: ignore[union-attr]
            model(**less)
    losses = []
    for lean in (True, False):
        model, config = adapted("llama", "l2")
        reuse = choose_reuse(model, config, store, checkpointing=False)
        assert isinstance(reuse, PrefixReuse) and reuse.lean
        arguments = training_arguments(TrainingSpec(max_steps=2, batch_size=5), tmp_path, 0, 5)
        collate = NumberedCollator(TOKENIZER)
        trainer = ReftTrainer(model, arguments, examples(), reuse, data_collator=collate)
        asked.clear()
        trainer.train()
        assert not reuse.lean and trainer.reuse is reuse
        assert bool(asked) is lean
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    model, _ = adapted("llama", "l2")
    plain = ReftTrainer(model, arguments, examples(), data_collator=collate)
    plain.train()
    losses.append([log["loss"] for log in plain.state.log_history if "loss" in log])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[2]), rtol=1e-5, atol=1e-5)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "phi3"])
@pytest.mark.parametrize("positions", ["l1", "l4"])
def test_generation_goes_on_from_what_is_kept(name: str, positions: str) -> None:
    model, config = adapted(name, positions)
    reuse = choose_reuse(model.eval(), config, Store(10**9), checkpointing=False)
    assert isinstance(reuse, PrefixReuse)
    prompts = [Encoded(e.input_ids[: e.prompt_length], e.prompt_length, None) for e in examples(7)]
    how: dict[str, Any] = {"max_new_tokens": 5}
    plain = predict(model, TOKENIZER, prompts, 4, **how)
    for _ in range(2):
        assert predict(model, TOKENIZER, prompts, 4, **how, reuse=reuse) == plain
    assert reuse.store.used > 0
    assert predict(model, TOKENIZER, prompts[:1], **how, reuse=reuse) == plain[:1]  # one token: nothing to go on from
    later = [
        Encoded(e.input_ids, e.prompt_length, None) for e in examples(7)
    ]  # of a conversation: past its first answer
    plain = predict(model, TOKENIZER, later, 4, **how)
    assert predict(model, TOKENIZER, later, 4, **how, reuse=reuse) == plain


def test_a_part_is_computed_once_for_all_positions_seeds_and_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    store, computed = Store(10**9), []
    original = PrefixReuse.compute
    monkeypatch.setattr(
        PrefixReuse, "compute", lambda self, ids: (computed.append(len(ids[0])), original(self, ids))[1]
    )
    for positions in ("l4", "l1", "l7"):
        model, config = adapted("llama", positions)
        reuse = choose_reuse(model, config, store, checkpointing=False)
        assert isinstance(reuse, PrefixReuse)
        assert_same(model, reuse, Collator(TOKENIZER)(examples()))
    assert sorted(computed) == [1, 8, 13, 19]  # of prompts of 2, 9, 14 and 20 tokens all but the last, once each


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "gpt2", "gpt_neox", "opt", "mixtral", "phi3"])
@pytest.mark.parametrize("site", ["block", "attention"])
def test_lower_blocks_reuse_gives_the_plain_gradients(name: str, site: str) -> None:
    model, config = adapted(name, "f2+l3", layers=[1, -1], site=site)
    reuse = choose_reuse(model, config, Store(10**9), checkpointing=False)
    assert isinstance(reuse, LowerBlocksReuse), reuse
    assert_same(model, reuse, Collator(TOKENIZER)(examples()))
    assert not any("forward" in block.__dict__ for block in reuse.blocks)


def test_another_adapter_reads_the_hidden_states_that_one_kept() -> None:
    """Of a store that has all of them, so that nothing is computed."""
    store = Store(10**9)
    for positions in ("f2+l3", "all"):
        model, config = adapted("llama", positions, layers=[1])
        reuse = choose_reuse(model, config, store, checkpointing=False)
        assert isinstance(reuse, LowerBlocksReuse)
        assert_same(model, reuse, Collator(TOKENIZER)(examples()))


def test_where_nothing_is_frozen_it_says_why() -> None:
    store = Store(1)
    model, config = adapted("llama", "f1+l2")
    assert "lowest block" in str(choose_reuse(model, config, store, checkpointing=False))
    model, config = adapted("mistral", "l2")  # a sliding window's cache forgets
    assert isinstance(choose_reuse(model, config, store, checkpointing=False), str)
    model, config = adapted("llama", "l2")
    assert isinstance(choose_reuse(model, config, store, checkpointing=True), str)
    model.get_base_model().config.attention_dropout = 0.1
    assert "random in training" in str(choose_reuse(model, config, store, checkpointing=False))


@pytest.mark.parametrize("name", names_of("decoder"))
def test_supervised_only_gives_the_same_loss_from_fewer_logits(name: str) -> None:
    model, _ = adapted(name, "f2+l2")
    plain = Collator(TOKENIZER)
    batch = plain(examples())
    slim = supervised_only(plain)(examples())
    loss, gradients = loss_and_gradients(model, batch)
    slim_loss, slim_gradients = loss_and_gradients(model, slim)
    assert abs(loss - slim_loss) < 1e-5
    assert all((a - b).norm() <= 1e-4 * b.norm() + 1e-8 for a, b in zip(slim_gradients, gradients, strict=True))
    count = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert model(**slim).logits.shape[-2] == count


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mixtral", "phi3"])
@pytest.mark.parametrize("positions", ["f2+l3", "generated"])
def test_packed_rows_give_the_gradients_of_padded_ones(name: str, positions: str) -> None:
    model, _ = adapted(name, positions)
    loss, gradients = loss_and_gradients(model, Collator(TOKENIZER)(examples()))
    packed_loss, packed_gradients = loss_and_gradients(model, with_supervised(pack(examples())))
    assert abs(loss - packed_loss) < 1e-5
    assert all((a - b).norm() <= 1e-4 * b.norm() + 1e-8 for a, b in zip(packed_gradients, gradients, strict=True))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=400), st.integers(1, 9), st.integers(0, 3))
def test_length_grouped_order(lengths: list[int], batch_size: int, epoch: int) -> None:
    sampler = LengthGrouped(lengths, batch_size, seed=1)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert Counter(order) == Counter(range(len(lengths)))
    assert order == list(sampler)


def test_length_grouping_saves_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 300, (2000,), generator=generator).tolist()

    def padded(order: list[int]) -> int:
        return sum(16 * max(lengths[i] for i in order[at : at + 16]) for at in range(0, len(order), 16))

    sampler = LengthGrouped(lengths, 16, seed=0)
    assert padded(list(sampler)) < 1.1 * sum(lengths) < padded(torch.randperm(2000, generator=generator).tolist())
    sampler.set_epoch(1)
    assert list(sampler) != list(LengthGrouped(lengths, 16, seed=0))
