"""Batch invariance: whatever the padding, the cache, the search or the neighbours, a row gets what it gets alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import CLASSIFIERS, DECODERS, ENCODERS, PAD, VOCAB, batch_for, logits_of, outputs_of, tiny
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationMixin,
    LongformerConfig,
    LongformerModel,
    XLNetConfig,
    XLNetModel,
)

from trimtab import ReftConfig, set_scale
from trimtab import prompts as prompts_told
from trimtab.adapter.tuner import ReftLayer

LENGTHS = [21, 4, 13]  # beyond the sliding windows of 16, shorter than f3+l4, and in between
NAMES = ["a", "b", "__base__"]
NEW = 6
CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "positions": "f3+l4", "tied": False},
    "b": {"r": 3, "positions": "l1", "method": "direft", "layers": [0, -1]},
}
TOLERANCE = 1e-5


def adapted(name: str = "llama", task_type: str | None = "CAUSAL_LM", **configs: dict[str, Any]) -> PeftModel:
    """A tiny model with adapters `a` and `b` (or those given), whose edits are large enough to be seen."""
    configs = configs or CONFIGS
    torch.manual_seed(0)
    model = None
    for adapter, config in configs.items():
        full = ReftConfig(task_type=task_type, init_weights="paper", **config)
        if model is None:
            same_depth = {"num_layers": 3} if name == "t5" else {}  # transformers' own cache needs it to generate
            model = get_peft_model(tiny(name, **same_depth), full, adapter_name=adapter)
        else:
            model.add_adapter(adapter, full)
    assert model is not None
    with torch.no_grad():
        for layer in layers_of(model):
            for adapter in layer.positions:
                for edit in layer.edits(adapter).values():
                    edit.bias.mul_(8)
    return model.eval()


def layers_of(model: torch.nn.Module) -> list[ReftLayer]:
    return [m for m in model.modules() if isinstance(m, ReftLayer)]


def prompts(lengths: list[int] = LENGTHS, seed: int = 3) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=random) for n in lengths]


def padded(rows: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    """Rows as one batch, with position_ids as generate gives them."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, columns], mask[i, columns] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def without_positions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != "position_ids"}


@contextmanager
def only(model: PeftModel, adapter: str) -> Iterator[None]:
    """One adapter at a time, or the base model."""
    if adapter == "__base__":
        with model.disable_adapter():
            yield
        return
    before = model.active_adapter
    model.set_adapter(adapter)
    yield
    model.set_adapter(before)


@torch.no_grad()
def forward_alone(model: PeftModel, row: Tensor, adapter: str, **kwargs: Any) -> Tensor:
    """Logits (T, V) of one unpadded row."""
    with only(model, adapter):
        return model(input_ids=row.unsqueeze(0), attention_mask=torch.ones(1, len(row)).long(), **kwargs).logits[0]


def search(**kwargs: Any) -> dict[str, Any]:
    greedy = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    kept = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    return {**greedy, **kept, **kwargs}


def check_generated(model: PeftModel, out: Any, rows: list[Tensor], names: list[str], times: int = 1) -> None:
    """Every sequence, fed to the whole model alone and without cache, gives the logits it was drawn from."""
    new = out.sequences[:, -NEW:]
    logits = torch.stack(out.logits, 1)
    assert len(new) == len(logits) == len(rows) * times
    for i in range(len(new)):
        row = rows[i // times]
        whole = torch.cat([row, new[i]])
        expected = forward_alone(model, whole, names[i // times], prompt_lengths=[len(row)], use_cache=False)
        assert (logits[i] - expected[len(row) - 1 : -1]).abs().max() < TOLERANCE


# ---- one forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_forward(name: str, side: str) -> None:
    model, rows = adapted(name), prompts()
    batch = padded(rows, side)
    with torch.no_grad():
        logits = model(**batch, adapter_names=NAMES).logits
    for i, (row, adapter) in enumerate(zip(rows, NAMES, strict=True)):
        alone = forward_alone(model, row, adapter)
        assert (logits[i][batch["attention_mask"][i].bool()] - alone).abs().max() < TOLERANCE
        if adapter != "__base__":
            assert (forward_alone(model, row, "__base__") - alone).abs().max() > 1e-3  # the edits are there to be seen


def test_holes_in_the_middle() -> None:
    model, (row,) = adapted(), prompts([12])
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0]])
    ids = torch.full_like(mask, PAD)
    ids[mask == 1] = row
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert (logits[mask == 1] - forward_alone(model, row, "a")).abs().max() < TOLERANCE


@pytest.mark.parametrize("mask_of", ["4-d bool", "4-d additive", "dict"])
def test_masks_that_models_make_themselves(mask_of: str) -> None:
    model, rows = adapted(), prompts()
    batch = padded(rows)
    width = batch["input_ids"].shape[1]
    allowed = torch.ones(width, width).tril().bool() & batch["attention_mask"].bool()[:, None, None, :]
    mask: Any = allowed
    if mask_of != "4-d bool":
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    if mask_of == "dict":
        mask = {"full_attention": mask, "sliding_attention": mask}
        model.get_base_model().model.forward = with_first_mask(model.get_base_model().model.forward)
    with torch.no_grad():
        logits = model(**{**batch, "attention_mask": mask}).logits
    for i, row in enumerate(rows):
        assert (logits[i][batch["attention_mask"][i].bool()] - forward_alone(model, row, "a")).abs().max() < TOLERANCE


def with_first_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Llama takes no masks by layer type; what matters here is that our hooks read them."""

    def call(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        mask = attention_mask["full_attention"] if isinstance(attention_mask, dict) else attention_mask
        return forward(*args, attention_mask=mask, **kwargs)

    return call


@pytest.mark.parametrize("name", [*ENCODERS, *CLASSIFIERS])
def test_encoders_and_classifiers(name: str) -> None:
    model = adapted(name, {"seq_cls": "SEQ_CLS", "token_cls": "TOKEN_CLS"}.get(name.partition("_")[2]))
    rows = prompts()
    batch = without_positions(padded(rows, "right"))
    with torch.no_grad():
        together = logits_of(model(**batch, adapter_names=NAMES))
    for i, (row, adapter) in enumerate(zip(rows, NAMES, strict=True)):
        with torch.no_grad(), only(model, adapter):
            alone = logits_of(model(input_ids=row[None], attention_mask=torch.ones_like(row[None])))[0]
        row_together = together[i] if together.dim() == 2 else together[i, : len(row)]
        assert (row_together - alone).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("positions", ["f2+l1", "all"])
def test_a_model_that_pads_by_itself(positions: str) -> None:
    """Longformer, to a multiple of its window."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    base = LongformerModel(LongformerConfig(vocab_size=VOCAB, attention_window=8, pad_token_id=PAD, **sizes))
    model = get_peft_model(base.eval(), ReftConfig(r=2, positions=positions, init_weights="paper")).eval()
    rows = prompts()
    together = logits_of(model(**without_positions(padded(rows, "right"))))
    for row, states in zip(rows, together, strict=True):
        alone = logits_of(model(input_ids=row[None], attention_mask=torch.ones(1, len(row)).long()))[0]
        assert (states[: len(row)] - alone).abs().max() < TOLERANCE


def test_states_that_do_not_stand_one_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a model that nobody knows to be (tokens, batch, width), which a batch of one would hide."""
    monkeypatch.setattr("trimtab.where.sites.TIME_FIRST", ())
    base = XLNetModel(XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48))
    model = get_peft_model(base, ReftConfig(r=2, positions="l1"))
    with pytest.raises(RuntimeError, match=r"shape \(13, 1, 32\) for 13 tokens a row"):
        model(input_ids=prompts()[2][None])


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str, use_cache: bool) -> None:
    model, rows = adapted(name), prompts()
    out = model.generate(**without_positions(padded(rows)), adapter_names=NAMES, **search(use_cache=use_cache))
    check_generated(model, out, rows, NAMES)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("kind", ["num_beams", "beams_returned", "returned", "sampling"])
def test_beams_and_samples(name: str, kind: str) -> None:
    model, rows = adapted(name), prompts()
    kwargs: dict[str, Any] = {
        "num_beams": {"num_beams": 3},
        "beams_returned": {"num_beams": 3, "num_return_sequences": 2, "use_cache": False},
        "returned": {"num_return_sequences": 3, "do_sample": True},
        "sampling": {"do_sample": True, "use_cache": False},
    }[kind]
    torch.manual_seed(5)
    out = model.generate(**without_positions(padded(rows)), adapter_names=NAMES, **search(**kwargs))
    times = kwargs.get("num_return_sequences", 1)
    if "num_beams" not in kwargs:
        check_generated(model, out, rows, NAMES, times)
        return
    for i, (row, adapter) in enumerate(zip(rows, NAMES, strict=True)):
        with only(model, adapter):
            alone = model.generate(**without_positions(padded([row])), **search(**kwargs))
        mine = slice(i * times, (i + 1) * times)
        assert torch.equal(out.sequences[mine, -NEW:], alone.sequences[:, -NEW:])
        assert (out.sequences_scores[mine] - alone.sequences_scores).abs().max() < TOLERANCE


@pytest.mark.parametrize("positions", ["f3+l4", "generated", "all", "prompt"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize(
    "special",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
    ],
    ids=["static", "chunked", "no_cache"],
)
def test_caches_and_chunked_prefill(name: str, positions: str, special: dict[str, Any]) -> None:
    model, rows = adapted(name, a={"r": 2, "positions": positions}), prompts()
    out = model.generate(**without_positions(padded(rows)), **search(**special))
    check_generated(model, out, rows, ["a"] * 3)


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_a_mask_over_the_free_places_of_a_static_cache(positions: str) -> None:
    """Bloom's, which its ALiBi is worked out from."""
    torch.manual_seed(0)
    base = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=PAD))
    model = get_peft_model(base.eval(), ReftConfig(r=2, positions=positions, init_weights="paper")).eval()
    rows = prompts()
    out = model.generate(**without_positions(padded(rows)), **search(cache_implementation="static"))
    check_generated(model, out, rows, ["default"] * 3)


@pytest.mark.parametrize("assistant", ["lookup", "model", "itself"])
def test_assisted_generation(assistant: str) -> None:
    model, (row, *_) = adapted(), prompts()
    row = row[:5].repeat(4)  # something to look up
    batch = without_positions(padded([row]))
    plain = model.generate(**batch, **search())
    special: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if assistant != "lookup":
        special = {
            "assistant_model": model.get_base_model() if assistant == "itself" else tiny("llama", num_hidden_layers=1)
        }
    out = model.generate(**batch, **search(**special))
    assert torch.equal(out.sequences, plain.sequences)
    check_generated(model, out, [row], ["a"])


def test_inputs_embeds() -> None:
    model, rows = adapted(), prompts()
    batch = padded(rows)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    out = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], adapter_names=NAMES, **search())
    check_generated(model, out, rows, NAMES)


@pytest.mark.parametrize("through", ["peft_model", "base_model", "no_mask", "inputs", "task", "config"])
def test_ways_to_call_generate(through: str) -> None:
    """All know where the prompt ends, also where PEFT does not tell its tuner that generation starts."""
    model, rows = adapted(task_type=None if through == "peft_model" else "CAUSAL_LM"), prompts()
    batch = without_positions(padded(rows))
    call: Callable[..., Any] = model.generate
    arguments: tuple[Any, ...] = ()
    if through == "base_model":
        call = model.get_base_model().generate
    if through in ("no_mask", "inputs"):
        del batch["attention_mask"]
    if through == "inputs":
        arguments = (batch.pop("input_ids"),)
    if through == "config":
        call, arguments = model.get_base_model().generate, (None, model.generation_config)
    out = call(*arguments, **batch, **search(num_beams=1, use_cache=False))
    check_generated(model, out, rows, ["a"] * 3)


def test_generate_past_the_models_own() -> None:
    model, rows = adapted(), prompts()
    batch = without_positions(padded(rows))
    out = GenerationMixin.generate(model.get_base_model(), **batch, **search())
    check_generated(model, out, rows, ["a"] * 3)
    with pytest.raises(ValueError, match="past the model's own"):
        GenerationMixin.generate(model.get_base_model(), **batch, **search(use_cache=False))
    with model.disable_adapter():
        GenerationMixin.generate(model.get_base_model(), **batch, **search(use_cache=False))


def test_chunked_prefill_without_mask_is_refused() -> None:
    model, rows = adapted(), prompts()
    with pytest.raises(ValueError, match="prefill_chunk_size: pass attention_mask"):
        model.generate(padded(rows)["input_ids"], **search(prefill_chunk_size=5))


def test_generate_after_generate() -> None:
    """Nothing is remembered of an earlier prompt, also when generation was cut short by an error."""
    model, rows = adapted(), prompts()
    batch = without_positions(padded(rows[:1]))

    def fail(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(**batch, **search(logits_processor=[fail]))
    check_generated(model, model.generate(**without_positions(padded(rows)), **search()), rows, ["a"] * 3)
    assert (forward_alone(model, rows[1], "a") - forward_alone(adapted(), rows[1], "a")).abs().max() == 0


def test_prompt_lengths_in_generate() -> None:
    """To go on with answers already begun: what was generated earlier is no prompt."""
    model, rows = adapted(), prompts()
    batch = without_positions(padded(rows))
    first = model.generate(**batch, **search())
    begun = [torch.cat([row, new[:2]]) for row, new in zip(rows, first.sequences[:, -NEW:], strict=True)]
    lengths = torch.tensor(LENGTHS)
    for kwargs in ({}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 4}):
        out = model.generate(**without_positions(padded(begun)), **search(prompt_lengths=lengths, **kwargs))
        if not kwargs:
            assert torch.equal(out.sequences[:, -NEW:-2], first.sequences[:, -NEW + 2 :])
        if "num_beams" not in kwargs:
            whole = [torch.cat([row, new]) for row, new in zip(begun, out.sequences[:, -NEW:], strict=True)]
            for i, row in enumerate(whole):
                expected = forward_alone(model, row, "a", prompt_lengths=[LENGTHS[i]])
                assert (torch.stack(out.logits, 1)[i] - expected[-NEW - 1 : -1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("positions", ["l2", "f1+l3", "random3"])
@torch.no_grad()
def test_prompt_lengths_of_small_integers(positions: str, dtype: torch.dtype) -> None:
    """In whose own arithmetic a prompt of one token less two would be 255."""
    model, rows = adapted(a={"positions": positions}), prompts()
    one = model(**padded(rows), prompt_lengths=[1, 3, 5]).logits
    assert torch.equal(model(**padded(rows), prompt_lengths=torch.tensor([1, 3, 5], dtype=dtype)).logits, one)


@pytest.mark.parametrize("lengths", [[4], [4, 4, 4, 4, 4, 4]])
def test_prompt_lengths_of_another_number_of_rows(lengths: list[int]) -> None:
    """Rows are repeated in place by `generate` alone: a loss may as well put all chosen before all rejected."""
    model, batch = adapted(), padded(prompts())
    message = f"prompt_lengths: {len(lengths)} given for a batch of 3 rows"
    with pytest.raises(ValueError, match=message):
        model(**batch, prompt_lengths=lengths)
    with pytest.raises(ValueError, match=message), prompts_told(model, lengths):
        model(**batch)
    with pytest.raises(ValueError, match=message):
        model.generate(**without_positions(batch), **search(prompt_lengths=lengths))


@pytest.mark.parametrize("lengths", [[22, 4, 13], [-1, 4, 13], [1.0, 4.0, 13.0], [[1]], [21, 21, 21]])
def test_impossible_prompt_lengths(lengths: list[Any]) -> None:
    model, rows = adapted(), prompts()
    with pytest.raises(ValueError, match="prompt_lengths"):
        model.generate(**without_positions(padded(rows)), **search(prompt_lengths=lengths))
    model.train()
    with pytest.raises(ValueError, match="prompt_lengths"):
        model(**padded(rows), prompt_lengths=lengths)


@pytest.mark.parametrize(
    "special", [{}, {"use_cache": False}, {"use_cache": True}, {"labels": padded(prompts())["input_ids"]}]
)
def test_padding_that_is_counted_in_evaluation(special: dict[str, Any]) -> None:
    """More than the real tokens can be meant of a first chunk alone, for which a cache is asked; the width, never."""
    model, batch = adapted(), padded(prompts())
    with pytest.raises(
        ValueError, match=r"prompt_lengths=\[21, 21, 21\]: only \[21, 4, 13\] real tokens .* use_cache=True"
    ):
        model(**batch, prompt_lengths=[21, 21, 21], **special)
    more = {"prompt_lengths": [30, 13, 22], **special}
    with nullcontext() if special == {"use_cache": True} else pytest.raises(ValueError, match="real tokens"):
        model(**batch, **more)
    model(**batch, prompt_lengths=LENGTHS, **special)


def test_padding_that_is_counted_in_an_encoder() -> None:
    model, batch = adapted("t5", "SEQ_2_SEQ_LM", **SEQ2SEQ), without_positions(padded(prompts(), "right"))
    labels = torch.stack(prompts([5, 5, 5]))
    with pytest.raises(ValueError, match=r"prompt_lengths=\[21, 21, 21\]: only \[21, 4, 13\] real tokens"):
        model(**batch, labels=labels, prompt_lengths=[21, 21, 21])
    with pytest.raises(ValueError, match=r"prompt_lengths=\[9, 9, 9\]: only 5 tokens"):
        model(**batch, labels=labels, decoder_prompt_lengths=[9, 9, 9])
    assert model(**batch, labels=labels, prompt_lengths=LENGTHS, decoder_prompt_lengths=[1, 1, 1]).logits is not None


class Loop:
    """A decoding loop of one's own, which asks for no inputs; the logits are kept."""

    def __init__(self, cached: bool, text: Tensor | None = None) -> None:
        self.cached, self.text = cached, text

    def __call__(self, model: Any, input_ids: Tensor, *_: Any, **inputs: Any) -> Tensor:
        ids, mask, past, logits = input_ids, inputs["attention_mask"], None, []
        for _ in range(NEW):
            given = ids if past is None else ids[:, -1:]
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -given.shape[1] :]
            out = model(
                input_ids=given if self.text is None else self.text,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=self.cached,
            )
            past = out.past_key_values
            logits.append(out.logits[:, -1])
            ids, mask = (torch.cat([a, b], 1) for a, b in ((ids, logits[-1].argmax(1, True)), (mask, mask[:, -1:])))
        self.logits = torch.stack(logits, 1)
        return ids


@pytest.mark.parametrize("positions", ["f3+l4", "generated", "prompt", "f7"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_decoding_loop_of_ones_own(cached: bool, positions: str) -> None:
    model, batch = adapted(a={"r": 2, "positions": positions}), without_positions(padded(prompts()))
    for told in ({}, {"prompt_lengths": [17, 2, 9]}):
        expected, loop = model.generate(**batch, **told, **search()), Loop(cached)
        model.generate(**batch, **told, custom_generate=loop, max_new_tokens=NEW)
        assert (loop.logits - torch.stack(expected.logits, 1)).abs().max() < TOLERANCE
    other = Loop(cached, batch["input_ids"].flip(1))
    with pytest.raises(ValueError, match=r"within custom_generate .* Pass prompt_lengths"):
        model.generate(**batch, custom_generate=other, max_new_tokens=NEW)


@pytest.mark.parametrize("cached", [True, False])
def test_a_decoding_loop_of_a_folder(cached: bool, tmp_path: Path) -> None:
    """Which calls `generate` again, as those on the Hub do."""
    model, batch = adapted(), without_positions(padded(prompts()))
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def generate(model, loop, **kwargs):\n    return model.generate(custom_generate=loop, **kwargs)\n"
    )
    expected, loop = model.generate(**batch, prompt_lengths=[17, 2, 9], **search()), Loop(cached)
    model.generate(
        **batch,
        prompt_lengths=[17, 2, 9],
        custom_generate=str(tmp_path),
        trust_remote_code=True,
        loop=loop,
        max_new_tokens=NEW,
    )
    assert (loop.logits - torch.stack(expected.logits, 1)).abs().max() < TOLERANCE


@pytest.mark.parametrize("positions", ["f2+l2", "generated", "f2", "all"])
def test_a_conversation_in_one_cache(positions: str) -> None:
    """The second turn's prompt is all there is, or what the caller says; a cache with other edits is refused."""
    from transformers import DynamicCache

    model, (row, *_) = adapted(a={"r": 2, "positions": positions}), prompts()
    cache = DynamicCache()
    first = model.generate(row[None], **search(past_key_values=cache)).sequences
    second = torch.cat([first, torch.tensor([[11, 12, 13]])], 1)
    mask = torch.ones_like(second)
    for told in ({}, {"prompt_lengths": [len(row)]}):
        without = model.generate(second, attention_mask=mask, **told, **search())
        for given in (second, second[:, -4:]):
            turn = dict(search(past_key_values=copy.deepcopy(cache)), attention_mask=mask, **told)
            if not told and positions in ("f2+l2", "generated"):
                with pytest.raises(
                    ValueError, match=r"the cache was filled for prompts of \[21\].*prompt_lengths=\[21\]"
                ):
                    model.generate(given, **turn)
                continue
            out = model.generate(given, **turn)
            assert torch.equal(out.sequences[:, -NEW:], without.sequences[:, -NEW:])
            assert (torch.stack(out.logits) - torch.stack(without.logits)).abs().max() < TOLERANCE


# ---- decoding by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mask", "no_mask", "lengths_at_first", "chunks", "chunks_lengths_at_first"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@torch.no_grad()
def test_loops_by_hand(name: str, how: str) -> None:
    model, rows = adapted(name, a={"r": 2, "positions": "f3+l4"}), prompts([20] * 3 if how == "no_mask" else LENGTHS)
    batch, mask, answers = padded(rows), padded(rows)["attention_mask"], torch.stack(prompts([4, 4, 4], seed=9))
    lengths = torch.tensor([len(row) for row in rows])
    past, logits = None, []
    for columns in (slice(0, 8), slice(8, 21)) if "chunks" in how else (slice(0, 21),):
        told = how == "chunks" or (past is None and "lengths" in how)
        out = model(
            input_ids=batch["input_ids"][:, columns],
            position_ids=batch["position_ids"][:, columns],
            past_key_values=past,
            use_cache=True,
            **({} if how == "no_mask" else {"attention_mask": mask[:, : columns.stop]}),
            **({"prompt_lengths": lengths} if told else {}),
        )
        past = out.past_key_values
    logits.append(out.logits[:, -1])
    for step in range(4):
        mask = torch.cat([mask, torch.ones(3, 1).long()], 1)
        out = model(
            input_ids=answers[:, step : step + 1],
            position_ids=lengths[:, None] + step,
            past_key_values=past,
            use_cache=True,
            **({} if how == "no_mask" else {"attention_mask": mask}),
        )
        logits.append(out.logits[:, -1])
    for i, row in enumerate(rows):
        expected = forward_alone(model, torch.cat([row, answers[i]]), "a", prompt_lengths=[len(row)])
        assert (torch.stack(logits, 1)[i] - expected[-5:]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_cache_from_elsewhere() -> None:
    """Where its prompt ended is not known: a suffix would land anywhere, so the call says what to pass."""
    from transformers import DynamicCache

    model, (row, *_) = adapted(), prompts()
    other = tiny("llama")(input_ids=row[None, :-1], use_cache=True).past_key_values
    assert isinstance(other, DynamicCache)
    step = {"input_ids": row[None, -1:], "past_key_values": other}
    with pytest.raises(ValueError, match=r"continues a cache .* Pass prompt_lengths"):
        model(**step)
    assert model(**step, prompt_lengths=[len(row) - 1]).logits.isfinite().all()


@torch.no_grad()
def test_a_reused_static_cache() -> None:
    """A cache that is reset and filled again forgets the earlier prompt."""
    from transformers import StaticCache

    model, rows = adapted(a={"r": 2, "positions": "f1+l2"}), prompts([4, 9])
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=24)
    for row in rows:
        cache.reset()
        model(input_ids=row[None], past_key_values=cache, use_cache=True, position_ids=torch.arange(len(row))[None])
        step = model(
            input_ids=torch.tensor([[7]]),
            past_key_values=cache,
            use_cache=True,
            position_ids=torch.tensor([[len(row)]]),
        )
        expected = forward_alone(model, torch.cat([row, torch.tensor([7])]), "a", prompt_lengths=[len(row)])
        assert (step.logits[0, -1] - expected[-1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("positions", ["f3+l4", "f1", "generated", "all"])
@torch.no_grad()
def test_recurrent_models(positions: str) -> None:
    """Their state does not count the tokens it has seen; what follows the first pass follows the prompt."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3}
    config = ReftConfig(task_type="CAUSAL_LM", r=2, positions=positions, init_weights="paper")
    model = get_peft_model(MambaForCausalLM(MambaConfig(**sizes)).eval(), config).eval()
    ids = torch.stack(prompts([9, 9]))
    outs = [model.generate(ids, **search(use_cache=use_cache)) for use_cache in (True, False)]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert (torch.stack(outs[0].logits) - torch.stack(outs[1].logits)).abs().max() < TOLERANCE
    first = model(input_ids=ids, use_cache=True)
    second = model(input_ids=outs[0].sequences[:, 9:10], cache_params=first.cache_params, use_cache=True)
    assert (second.logits[:, -1] - outs[0].logits[1]).abs().max() < TOLERANCE
    with model.disable_adapter():
        base = model.generate(ids, **search())
    assert (torch.stack(base.logits) - torch.stack(outs[0].logits)).abs().max() > TOLERANCE
    more = {"cache_params": first.cache_params, **search(max_new_tokens=1, min_new_tokens=1)}
    refused = pytest.raises(ValueError, match="how many tokens it has seen")
    with nullcontext() if positions == "all" else refused:
        model.generate(ids[:, -2:], **more)
    with model.disable_adapter():
        model.generate(ids[:, -2:], **more)


# ---- encoder-decoders ------------------------------------------------------------------------------------------------

SEQ2SEQ = {"a": {"r": 2, "positions": "f3+l4", "tied": False}, "b": {"r": 3, "positions": "l1", "method": "direft"}}


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("prompt", [None, [9, 8, 7]])
def test_encoder_decoder_generate(kwargs: dict[str, Any], prompt: list[int] | None) -> None:
    model, rows = adapted("t5", "SEQ_2_SEQ_LM", **SEQ2SEQ), prompts()
    start = {} if prompt is None else {"decoder_input_ids": torch.tensor([[PAD, *prompt]])}
    batch = without_positions(padded(rows, "right"))
    several = {k: v.repeat(3, 1) for k, v in start.items()}
    out = model.generate(**batch, **several, adapter_names=NAMES, **search(**kwargs))
    times = kwargs.get("num_return_sequences", 1)
    for i, (row, adapter) in enumerate(zip(rows, NAMES, strict=True)):
        with only(model, adapter):
            alone = model.generate(**without_positions(padded([row])), **start, **search(**kwargs))
        assert torch.equal(out.sequences[i * times : (i + 1) * times], alone.sequences)
        if not times > 1 and "num_beams" not in kwargs:
            assert (torch.stack(out.logits, 1)[i] - torch.stack(alone.logits, 1)[0]).abs().max() < TOLERANCE


def test_decoder_prompts_of_unequal_length() -> None:
    """Padded on the left, they are edited where each begins and ends."""
    model, rows = adapted("t5", "SEQ_2_SEQ_LM", **SEQ2SEQ), prompts()
    batch = without_positions(padded(rows, "right"))
    starts = [[PAD, 9], [PAD, 9, 8, 7, 6], [PAD, 5, 4]]
    width = max(map(len, starts))
    start = torch.tensor([[PAD] * (width - len(one)) + one for one in starts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in starts])
    out = model.generate(**batch, decoder_input_ids=start, decoder_attention_mask=mask, adapter_names=NAMES, **search())
    for i, (row, adapter) in enumerate(zip(rows, NAMES, strict=True)):
        with only(model, adapter):
            alone = model.generate(
                **without_positions(padded([row])), decoder_input_ids=torch.tensor([starts[i]]), **search()
            )
        assert (torch.stack(out.logits, 1)[i] - torch.stack(alone.logits, 1)[0]).abs().max() < TOLERANCE


def test_states_of_an_image_before_those_of_the_text_are_refused() -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.GitConfig(
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1},
    )
    config.eos_token_id = None
    model = get_peft_model(hf.GitForCausalLM(config), ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2")).eval()
    ids = torch.arange(3, 12)[None]
    model(input_ids=ids, prompt_lengths=[9])
    with pytest.raises(RuntimeError, match="puts others beside them"):
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), prompt_lengths=[9])


def test_encoder_decoder_labels() -> None:
    """Trained with labels as it will generate: the decoder's prompt is its start token."""
    model, rows = adapted("t5", "SEQ_2_SEQ_LM", **SEQ2SEQ), prompts()
    batch = without_positions(padded(rows, "right"))
    out = model.generate(**batch, **search(eos_token_id=VOCAB + 1, suppress_tokens=[PAD]))
    labels = out.sequences[:, 1:].contiguous()
    with torch.no_grad():
        taught = model(**batch, labels=labels).logits
    assert (taught - torch.stack(out.logits, 1)).abs().max() < TOLERANCE
    model.train()
    model(**batch, labels=labels).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and ".a." in n)


# ---- on, off, scaled, composed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *CLASSIFIERS, "t5", "vit", "llava"])
def test_off_is_bit_identical(name: str) -> None:
    model = adapted(name, None)
    base = outputs_of(copy.deepcopy(model).base_model.unload(), name)
    assert name == "t5" or torch.equal(base, outputs_of(tiny(name), name))
    with model.disable_adapter():
        assert torch.equal(outputs_of(model, name), base)
    assert not torch.equal(outputs_of(model, name), base)
    set_scale(model, "a", 0)
    assert torch.equal(outputs_of(model, name), base)
    set_scale(model, "a", 1)
    rows = len(next(iter(batch_for(name).values())))
    with torch.no_grad():
        assert torch.equal(logits_of(model(**batch_for(name), adapter_names=["__base__"] * rows)), base)
    model.delete_adapter("a")
    model.delete_adapter("b")  # after the last one PEFT's own wrapper no longer runs, with any method
    assert torch.equal(outputs_of(model.base_model.model, name), base)
    assert torch.equal(outputs_of(model.base_model.unload(), name), base)


def hidden_of(model: PeftModel, row: Tensor, block: int = -1) -> Tensor:
    """What a block gives on, (T, d), edits included."""
    seen: list[Tensor] = []
    hook = (
        model.get_base_model()
        .model.layers[block]
        .register_forward_hook(
            lambda module, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
        )
    )
    with torch.no_grad():
        model(input_ids=row[None])
    hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3])
def test_scale_multiplies_the_edit(scale: float) -> None:
    model, (row, *_) = adapted(a={"r": 2, "layers": [-1], "positions": "f2+l3"}), prompts()
    full = hidden_of(model, row)
    with model.disable_adapter():
        base = hidden_of(model, row)
    set_scale(model, "a", scale)
    assert torch.allclose(hidden_of(model, row) - base, scale * (full - base), atol=1e-5)


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_active_adapters_compose_in_order(order: list[str]) -> None:
    one_block = {"r": 2, "layers": [-1], "positions": "l1"}
    model, (row, *_) = adapted(a=one_block, b=dict(one_block, method="noreft")), prompts()
    with model.disable_adapter():
        base = hidden_of(model, row)
    model.base_model.set_adapter(order)
    together = hidden_of(model, row)
    (layer,) = layers_of(model)
    state = base[-1:]
    with torch.no_grad():
        for adapter in order:
            state = state + layer.edits(adapter)["edit"](state)
    assert torch.allclose(together[-1:], state, atol=1e-6)
    assert torch.equal(together[:-1], base[:-1])
    model.base_model.set_adapter(order[::-1])
    assert not torch.allclose(hidden_of(model, row), together, atol=1e-5)


def test_adapter_names_are_checked() -> None:
    model, rows = adapted(), prompts()
    with pytest.raises(ValueError, match=r"no adapter \['c'\]; there are \['a', 'b'\]"):
        model(**padded(rows), adapter_names=["a", "c", "b"])
    with pytest.raises(ValueError, match="2 names for a batch of 3"):
        model(**padded(rows), adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="3 names for a batch of 6"):  # not one after another, nor each twice
        model(**padded(rows + rows), adapter_names=NAMES)
    with pytest.raises(ValueError, match="3 names for a batch of 6"):  # which only beams of three rows would be
        model.generate(**padded(rows + rows), adapter_names=NAMES, max_new_tokens=1)
    for wrong in ("a", []):
        with pytest.raises(ValueError, match="must be a list of names"):
            model.generate(**padded(rows), adapter_names=wrong, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"no adapter \[None, 'c'\]"):
        model(**padded(rows), adapter_names=["a", None, "c"])
    assert torch.equal(forward_alone(model, rows[0], "a"), forward_alone(adapted(), rows[0], "a"))


def test_copies_are_apart() -> None:
    """A deep copy, as trainers make for a reference model, has hooks and edits of its own."""
    model, (row, *_) = adapted(), prompts()
    before = forward_alone(model, row, "a")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    assert torch.equal(forward_alone(twin, row, "a"), before)
    out = twin.generate(row[None], **search())
    check_generated(twin, out, [row], ["a"])
