"""Training: where the prompt ends, and that gradients are the same however they are computed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import DECODERS, PAD, VOCAB, tiny
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.func import functional_call, grad, jvp

from trimtab import ReftConfig
from trimtab.adapter.tuner import ReftLayer
from trimtab.edits.orthonormal import Rotation, orthonormality_error

PROMPTS, WIDTH = [9, 2, 13], 18
ANSWERS = [6, 16, 3]
TOLERANCE = 1e-5


def adapted(name: str = "llama", **config: Any) -> PeftModel:
    """In training mode, with edits large enough to be seen."""
    torch.manual_seed(0)
    config = {"task_type": "CAUSAL_LM", "r": 2, "positions": "f3+l4", "init_weights": "paper", **config}
    model = get_peft_model(tiny(name), ReftConfig(**config))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "bias" in parameter_name:
                parameter.mul_(8)
    return model.train()


def examples(seed: int = 1) -> list[dict[str, Tensor]]:
    """Rows of token ids with labels, prompts of `PROMPTS` tokens."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for n, m in zip(PROMPTS, ANSWERS, strict=True):
        ids = torch.randint(3, VOCAB, (n + m,), generator=random)
        rows.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(n + m) < n, -100)})
    return rows


def padded(rows: list[dict[str, Tensor]], side: str = "right") -> dict[str, Tensor]:
    batch = {
        "input_ids": torch.full((len(rows), WIDTH), PAD),
        "labels": torch.full((len(rows), WIDTH), -100),
        "attention_mask": torch.zeros(len(rows), WIDTH, dtype=torch.long),
    }
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        columns = slice(n) if side == "right" else slice(WIDTH - n, None)
        batch["attention_mask"][i, columns] = 1
        for name in ("input_ids", "labels"):
            batch[name][i, columns] = row[name]
    return batch


def packed(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One row, as TRL's padding-free collator makes it: no mask, positions that start anew, first labels ignored."""
    labels = [row["labels"].clone().index_fill(0, torch.tensor(0), -100) for row in rows]
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
    }


def gradients(model: PeftModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = TOLERANCE) -> bool:
    assert a.keys() == b.keys() and a
    assert any(value.abs().max() > 1e-4 for value in a.values())
    return all((a[name] - b[name]).abs().max() <= tolerance for name in a)


def logits_alone(model: PeftModel, row: dict[str, Tensor], prompt_length: int) -> Tensor:
    return model(input_ids=row["input_ids"][None], prompt_lengths=[prompt_length]).logits[0]


# ---- where the prompt ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["labels", "prompt_lengths", "both"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["f3+l4", "prompt", "generated", "l1"])
def test_the_end_of_the_prompt(positions: str, side: str, told: str) -> None:
    model, rows = adapted(positions=positions), examples()
    batch = padded(rows, side)
    mask = batch["attention_mask"].bool()
    lengths = torch.tensor(PROMPTS)
    if told == "prompt_lengths":
        del batch["labels"]
    elif told == "both":  # what is said outright goes before what labels imply
        batch["labels"] = batch["labels"].masked_fill(mask, 7)
    with torch.no_grad():
        logits = model(**batch, **({} if told == "labels" else {"prompt_lengths": lengths})).logits
        for i, row in enumerate(rows):
            assert (logits[i][mask[i]] - logits_alone(model, row, PROMPTS[i])).abs().max() < TOLERANCE


def test_several_turns_and_no_turn() -> None:
    """The prompt ends before the first supervised token; a row without any is all prompt."""
    model, rows = adapted(), examples()
    rows[0]["labels"][11:13] = -100  # a second question within the answer
    rows[2]["labels"][:] = -100
    batch = padded(rows)
    with torch.no_grad():
        logits = model(**batch).logits
        for i, n in enumerate([9, 2, 16]):
            real = batch["attention_mask"][i].bool()
            assert (logits[i][real] - logits_alone(model, rows[i], n)).abs().max() < TOLERANCE


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_what_is_said_once(how: str) -> None:
    """Several supervised turns in a row; some prompts empty, as packing that cuts anywhere leaves them."""
    collate = padded if how == "padded" else packed
    turns, cut, clean = examples(), examples(), examples()
    turns[1]["labels"][8:10] = -100
    cut[2]["labels"] = cut[2]["input_ids"].clone()
    for rows, text in ((turns, "a row of its own"), (cut, "1 of the 3 prompts"), (clean, None)):
        model = adapted()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                model(**collate(rows), use_cache=False)
        assert [text in str(w.message) for w in said if "Said once" in str(w.message)] == ([True] if text else [])


def test_labels_on_padding_are_no_answer() -> None:
    model, rows = adapted(), examples()
    clean, careless = padded(rows, "left"), padded(rows, "left")
    careless["labels"][careless["attention_mask"] == 0] = PAD
    with torch.no_grad():
        assert torch.equal(model(**clean).logits, model(**careless).logits)


@pytest.mark.parametrize("positions", ["l1", "f3+l4", "prompt", "generated"])
def test_training_without_the_end_is_an_error(positions: str) -> None:
    model, batch = adapted(positions=positions), padded(examples())
    del batch["labels"]
    with pytest.raises(
        ValueError, match=f"positions='{positions.replace('+', '.')}'.*Pass labels .* or prompt_lengths"
    ):
        model(**batch)
    with model.disable_adapter():  # the reference pass of a preference trainer
        assert model(**batch).logits.isfinite().all()
    with torch.no_grad(), model.disable_adapter():
        assert model(**batch).logits.isfinite().all()
    assert model.eval()(**batch).logits.isfinite().all()  # as a prompt to generate from


@pytest.mark.parametrize("positions", ["f3", "all"])
def test_what_needs_no_end(positions: str) -> None:
    model, batch = adapted(positions=positions), padded(examples())
    del batch["labels"]
    assert same(*[gradients(model, model(**batch).logits.square().mean()) for _ in range(2)])


@pytest.mark.parametrize("positions", ["l1", "f3", "f3+l4", "prompt"])
def test_empty_prompts_are_an_error(positions: str) -> None:
    model, batch = adapted(positions=positions), padded(examples())
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with pytest.raises(ValueError, match=r"every prompt in the batch is empty.*prompt-completion"):
        model(**batch)
    batch["labels"][0, :4] = -100  # one prompt is enough
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_plain_text_trains_what_edits_it(positions: str) -> None:
    model, batch = adapted(positions=positions), padded(examples())
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert all(g.abs().max() > 0 for g in gradients(model, model(**batch).loss).values())


def test_classifier_labels_are_no_prompt() -> None:
    model = get_peft_model(
        tiny("llama_seq_cls"), ReftConfig(task_type="SEQ_CLS", positions="f3+l4", init_weights="paper")
    )
    batch = padded(examples())
    batch["labels"] = torch.tensor([0, 2, 1])
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert (model.train()(**batch).logits - expected).abs().max() < TOLERANCE
    assert model(**batch).loss.requires_grad


# ---- gradients, however computed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("site", ["block", "attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_gradient_checkpointing(name: str, site: str, use_reentrant: bool) -> None:
    model, batch = adapted(name, site=site), padded(examples())
    drop_dropout(model)
    plain = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert same(gradients(model, model(**batch, use_cache=False).loss), plain)
    model.gradient_checkpointing_disable()
    assert same(gradients(model, model(**batch).loss), plain)


def drop_dropout(model: torch.nn.Module) -> None:
    """Off in the base model, which for GPT-2 has it on by default."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("several", [False, True])
def test_torchs_own_checkpointing_put_on_later(several: bool) -> None:
    """As accelerate does for FSDP; the re-entrant kind is refused, whose gradients are wrong without it too."""
    model, first = adapted(), padded(examples(1))
    second = padded(examples(2), "left")

    def loss() -> Tensor:
        found: Tensor = model(**first, use_cache=False).loss
        return found - 2 * model(**second, use_cache=False).loss if several else found

    plain = gradients(model, loss())
    blocks = {id(block) for block in model.base_model.model.model.layers}
    apply_activation_checkpointing(model, check_fn=lambda module: id(module) in blocks)
    assert any(isinstance(module, CheckpointWrapper) for module in model.modules())
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(model, loss()).items()}
    assert same(found, plain)


def test_forward_mode_goes_along_the_gradient() -> None:
    model, batch = adapted(), padded(examples())
    model.base_model.model.config._attn_implementation = "eager"
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    along = {name: torch.randn_like(p) for name, p in own.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, parameters, (), {**batch, "use_cache": False}).loss
        return found

    _, change = jvp(loss, (own,), (along,))
    gradient = grad(loss)(own)
    assert change == pytest.approx(float(sum((gradient[name] * along[name]).sum() for name in own)), rel=1e-4)


def test_a_cast_through_data_is_undone() -> None:
    """TRL casts what trains on a base of 4 or 8 bits to bfloat16 so."""
    model, batch = adapted(), padded(examples())
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    model(**batch).loss.backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained)
    rotations = [module for module in model.modules() if isinstance(module, Rotation)]
    assert rotations and all(orthonormality_error(rotation()) < 1e-6 for rotation in rotations)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_two_forwards_then_one_backward(checkpointing: bool | None) -> None:
    """The prompts of the first must still be known when it is recomputed after the second: as in DPO."""
    model = adapted()
    first = padded(examples(1))
    second = padded(
        [dict(row, labels=row["labels"].index_fill(0, torch.arange(1, 7), 5)) for row in examples(2)], "left"
    )
    one, two = (gradients(model, model(**batch).loss) for batch in (first, second))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    losses = [model(**batch, use_cache=False).loss for batch in (first, second)]
    with torch.no_grad(), model.disable_adapter():
        model(**first)
    assert same(gradients(model, losses[0] - 2 * losses[1]), {name: one[name] - 2 * two[name] for name in one})


def test_dropout_is_the_same_when_recomputed() -> None:
    model, batch = adapted(dropout=0.5), padded(examples())
    torch.manual_seed(3)
    plain = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(3)
    assert same(gradients(model, model(**batch, use_cache=False).loss), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """Edits stay in float32 under autocast, and their gradients are those without it, up to bfloat16 elsewhere."""
    torch.manual_seed(0)
    base = tiny("llama").to(dtype)
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=2, init_weights="paper")).train()
    batch = padded(examples())
    plain = gradients(model, model(**batch).loss)
    seen: list[Tensor] = []
    edit = next(m for m in model.modules() if isinstance(m, ReftLayer)).edits("default")["edit"]
    edit.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    cast = gradients(model, loss)
    assert seen[0].dtype == torch.float32
    for name in plain:
        assert cast[name].dtype == torch.float32
        assert torch.cosine_similarity(cast[name].flatten(), plain[name].flatten(), 0) > 0.98


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_not_edited_keeps_its_bits(name: str) -> None:
    """The blocks below the first edited one, its other rows, and every row's output before the first edited token."""
    model, batch = adapted(name, layers=[1, -1], positions="l2").eval(), padded(examples())
    edited = outputs_of_blocks(model, batch)
    with model.disable_adapter():
        base = outputs_of_blocks(model, batch)
    assert torch.equal(edited[0], base[0])
    for i, n in enumerate(PROMPTS):
        changed = [n - 2, n - 1]
        kept = [t for t in range(WIDTH) if t not in changed]
        assert torch.equal(edited[1][i, kept], base[1][i, kept])
        assert (edited[1][i, changed] != base[1][i, changed]).any(1).all()
        assert name == "mixtral" or torch.equal(edited[-1][i, : n - 2], base[-1][i, : n - 2])


@torch.no_grad()
def outputs_of_blocks(model: PeftModel, batch: dict[str, Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    blocks = next(m for m in model.get_base_model().modules() if isinstance(m, torch.nn.ModuleList))
    handles = [block.register_forward_hook(keep) for block in blocks]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def test_only_the_adapter_learns() -> None:
    model, batch = adapted(), padded(examples())
    found = gradients(model, model(**batch).loss)
    assert found and all("reft_" in name and value.abs().max() > 0 for name, value in found.items())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "reft_" not in name)


# ---- packed rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"tied": False}, *({"positions": p} for p in ("l1", "prompt", "generated", "all"))]
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_rows_equal_padded_ones(name: str, config: dict[str, Any]) -> None:
    """Each packed sequence has a prompt of its own."""
    model, rows = adapted(name, **config), examples()
    many, one = model(**padded(rows)), model(**packed(rows), use_cache=False)
    real = padded(rows)["attention_mask"].bool()
    assert (one.logits[0] - many.logits[real]).abs().max() < TOLERANCE
    assert same(gradients(model, one.loss), gradients(model, many.loss))


@torch.no_grad()
def test_packed_rows_told_their_lengths() -> None:
    model, rows = adapted(), examples()
    batch = packed(rows)
    expected = model(**batch, use_cache=False).logits
    del batch["labels"]
    assert torch.equal(model(**batch, use_cache=False, prompt_lengths=PROMPTS).logits, expected)
    with pytest.raises(ValueError, match="prompt_lengths: 1 given, but 3 sequences are packed"):
        model(**batch, use_cache=False, prompt_lengths=[9])


def test_several_rows_of_packed_sequences() -> None:
    model, rows = adapted(), examples()
    one, two = packed(rows[:2]), packed(rows[2:] + rows[2:])
    width = one["input_ids"].shape[1]
    both = {}
    for name, fill in (("input_ids", PAD), ("labels", -100), ("position_ids", 0)):  # as TRL pads them
        extra = torch.full((1, width - two[name].shape[1]), fill)
        both[name] = torch.cat([one[name], torch.cat([two[name], extra], 1)])
    with torch.no_grad():
        logits = model(**both, use_cache=False).logits
        assert (logits[:1] - model(**one, use_cache=False).logits).abs().max() < TOLERANCE
        whole = model(**two, use_cache=False).logits
        assert (logits[1:, : whole.shape[1]] - whole).abs().max() < TOLERANCE
        base = model(**both, use_cache=False, adapter_names=["default", "__base__"]).logits
        assert (base[:1] - logits[:1]).abs().max() < TOLERANCE and (base[1] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["cu_seq_lens_q", "of_four_axes"])
@torch.no_grad()
def test_packed_rows_that_say_it_otherwise(how: str) -> None:
    """As collators for flash attention do without positions, and models of images with text's positions first."""
    model, batch = adapted(), packed(examples())
    expected = model(**batch, use_cache=False).logits
    position_ids = batch.pop("position_ids")
    base = model.get_base_model()
    if how == "cu_seq_lens_q":
        ends = [*(position_ids[0] == 0).nonzero()[:, 0].tolist(), position_ids.shape[1]]
        batch["cu_seq_lens_q"] = torch.tensor(ends, dtype=torch.int32)
    else:
        batch["position_ids"] = position_ids.expand(4, 1, -1)
    base.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": position_ids}), with_kwargs=True
    )
    assert torch.equal(model(**batch, use_cache=False).logits, expected)


@pytest.mark.parametrize("dims", [2, 4])
def test_masks_and_positions_that_do_not_agree(dims: int) -> None:
    model, batch = adapted(), packed(examples())
    if dims == 2:
        mask, said = torch.ones_like(batch["input_ids"]), "Leave attention_mask out"
    else:
        number = (batch.pop("position_ids") == 0).cumsum(1)[0]
        mask, said = (number[:, None] == number).tril()[None, None], "Pass position_ids"
    for positions in (None, torch.arange(mask.shape[-1])[None]) if dims == 4 else (batch["position_ids"],):
        with pytest.raises(ValueError, match=said):
            model(**{**batch, "position_ids": positions}, attention_mask=mask)


@pytest.mark.parametrize("training", [True, False])
def test_prefixes_of_prompts_whose_end_nobody_knows(training: bool) -> None:
    """Half of a prompt shorter than its prefix is edited, so its end matters: said, and refused where it must."""
    model, batch = adapted(positions="f17"), padded(examples())
    model.train(training)
    whole, short = ({k: v[rows] for k, v in batch.items() if k != "labels"} for rows in ([1], [0, 1, 2]))
    with pytest.warns(UserWarning, match="shorter than 17 tokens only half are edited"):
        guessed = model(**whole).logits
    assert not torch.allclose(guessed, model(**whole, prompt_lengths=[2]).logits, atol=1e-4)
    with pytest.raises(ValueError, match="neither labels nor") if training else nullcontext():
        model(**short)
    model(**batch)


@pytest.mark.parametrize("change", ["no_labels", "plain_text"])
def test_packed_rows_without_prompts(change: str) -> None:
    model, batch = adapted(), packed(examples())
    if change == "no_labels":
        del batch["labels"]
    else:
        batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)
    with pytest.raises(ValueError, match="neither labels nor" if change == "no_labels" else "every prompt .* is empty"):
        model(**batch, use_cache=False)


def test_positions_that_go_on_are_one_sequence() -> None:
    model, rows = adapted(), examples()[:1]
    plain = {name: row[None] for name, row in rows[0].items()}
    told = {**plain, "position_ids": torch.arange(15)[None]}
    with torch.no_grad():
        assert torch.equal(model(**plain).logits, model(**told).logits)


# ---- other people's hooks --------------------------------------------------------------------------------------------


def test_an_error_in_the_model_leaves_nothing_behind() -> None:
    model, batch = adapted(), padded(examples())
    expected = gradients(model, model(**batch).loss)

    def fail(*_: Any) -> None:
        raise KeyError("somebody's hook")

    places: list[Callable[[], torch.nn.Module]] = [
        model.get_base_model,
        lambda: model.get_base_model().model,
        lambda: model.get_base_model().model.layers[1],
    ]
    for place in places:
        for register in (place().register_forward_pre_hook, place().register_forward_hook):
            handle = register(fail)
            with pytest.raises(KeyError, match="somebody's hook"):
                model(**batch)
            handle.remove()
            assert model.base_model._passes.current() is None
            assert same(gradients(model, model(**batch).loss), expected, 0.0)


def test_a_frozen_average_keeps_orthonormal_rows() -> None:
    """As a mean teacher and TRL's SyncRefModelCallback write one: through `.data`, which leaves no trace."""
    model = get_peft_model(tiny("llama"), ReftConfig(task_type="CAUSAL_LM", r=2, positions="all"))
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    average = copy.deepcopy(model).requires_grad_(False)
    average(input_ids=ids)
    steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()
        for own, theirs in zip(average.parameters(), model.parameters(), strict=True):
            own.data.mul_(0.5).add_(theirs.data, alpha=0.5)
    average(input_ids=ids)
    rotations = [module for module in average.modules() if isinstance(module, Rotation)]
    assert all(float(orthonormality_error(rotation.halved * 2)) < 1e-5 for rotation in rotations)
