"""Caches that people keep: cut into chunks, copied, cropped, continued by a turn. Right, or refused.

What the prompt is, in a run without a cache: what the caller said (`prompt_lengths`), which holds for the cache until
it is said anew; else all that was given before single tokens follow; `generate` takes all of its input.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PAD, VOCAB, tiny
from peft import PeftModel
from test_batches import adapted, prompts, search
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.continuous_batching import PagedAttentionCache

from trimtab import edit, set_scale
from trimtab.adapter.cache import CACHE, cache_of

POSITIONS = ["f2+l2", "l1", "f3", "prompt", "generated", "all", "random3"]


class History:
    """A batch of left-padded rows as they grow, the cache that holds them, and what their prompt is."""

    def __init__(self, model: PeftModel, draw: random.Random) -> None:
        self.model, self.draw = model, draw
        rows = draw.choice([1, 1, 3])
        self.ids = torch.zeros(rows, 0, dtype=torch.long)
        self.mask = self.ids.clone()
        self.lead = [0] + [draw.randrange(4) for _ in range(rows - 1)]
        config = model.get_base_model().config
        self.cache: Any = DynamicCache(config=config)
        if draw.random() < 0.3:
            self.cache = StaticCache(config=config, max_cache_len=64)
        self.ends: list[int] | None = None
        self.told = False

    def grow(self, columns: int) -> None:
        new = torch.tensor([[self.draw.randrange(3, VOCAB) for _ in range(columns)] for _ in self.ids])
        width = self.ids.shape[1]
        real = torch.tensor([[int(width + i >= lead) for i in range(columns)] for lead in self.lead])
        self.ids = torch.cat([self.ids, new.masked_fill(real == 0, PAD)], 1)
        self.mask = torch.cat([self.mask, real], 1)

    @property
    def held(self) -> int:
        return int(self.cache.get_seq_length())

    @property
    def real(self) -> list[int]:
        return self.mask.sum(1).tolist()

    def forward(self, columns: int, tell: list[int] | None = None) -> float:
        """How far the logits are from those of a run without a cache."""
        before = self.ids.shape[1]
        cut = self.ends is not None and any(n > now for n, now in zip(self.ends, self.real, strict=True))
        self.grow(columns)
        if tell is not None:
            self.ends, self.told = tell, True
        elif self.ends is None or (not self.told and (columns > 1 or cut)):
            self.ends = self.real
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        got = self.model(
            input_ids=self.ids[:, before:],
            attention_mask=self.mask,
            position_ids=positions[:, before:],
            past_key_values=self.cache,
            **({} if tell is None else {"prompt_lengths": tell}),
        ).logits
        return self.off(got, before)

    def generate(self, tell: list[int] | None) -> float:
        before = self.ids.shape[1]
        told = {} if tell is None else {"prompt_lengths": tell}
        self.ends, self.told = (self.real, False) if tell is None else (tell, True)
        out = self.model.generate(
            self.ids, attention_mask=self.mask, past_key_values=self.cache, **told, **search(max_new_tokens=3)
        )
        self.ids = out.sequences[:, :-1]  # the cache has yet to see the last one
        self.mask = torch.cat([self.mask, torch.ones(len(self.ids), self.ids.shape[1] - before).long()], 1)
        return self.off(torch.stack(out.logits, 1), before - 1)

    def off(self, got: Tensor, start: int) -> float:
        assert self.ends is not None
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        whole = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=positions,
            prompt_lengths=self.ends,
            use_cache=True,
        ).logits[:, start:]
        return float((got - whole)[self.mask[:, start:].bool()].abs().max())

    def crop(self, columns: int) -> None:
        self.cache.crop(-columns)
        self.ids, self.mask = self.ids[:, :-columns], self.mask[:, :-columns]


@torch.no_grad()
def play(model: PeftModel, seed: int) -> tuple[float, int, bool]:
    """A history of up to six events: the largest difference, the forwards compared, and whether it was refused."""
    draw = random.Random(seed)
    history, worst, compared = History(model, draw), 0.0, 0
    whole = draw.randrange(6, 14)
    tell = [whole - lead for lead in history.lead] if draw.random() < 0.5 else None
    chunks = draw.choice([[whole], [whole], [4, whole - 4]])
    branches = []
    try:
        for columns in chunks:
            worst, compared = max(worst, history.forward(columns, tell)), compared + 1
        for _ in range(draw.randrange(1, 6)):
            event = draw.choice(["token", "token", "turn", "generate", "crop", "copy", "back"])
            again = history.ends if draw.random() < 0.5 else None
            if event == "token":
                worst = max(worst, history.forward(1))
            elif event == "turn":
                worst = max(worst, history.forward(draw.randrange(2, 5), again))
            elif event == "generate":
                history.grow(draw.randrange(1, 5))
                worst = max(worst, history.generate(again))
            elif event == "crop" and type(history.cache) is DynamicCache:
                history.crop(draw.randrange(1, min(5, history.held - 4)))
            elif event == "copy":
                branches.append(copy.copy(history))
                history.cache = copy.deepcopy(history.cache)
            elif event == "back" and branches:
                history = branches.pop()
            compared += event in ("token", "turn", "generate")
    except ValueError as refused:
        # Or the history was cropped to less than the prompt that is told.
        assert "eave the cache out" in str(refused) or "were given" in str(refused), refused
        return worst, compared, True
    return worst, compared, False


@pytest.mark.parametrize("positions", POSITIONS)
def test_histories(positions: str) -> None:
    model = adapted(a={"r": 2, "positions": positions})
    played = [play(model, seed) for seed in range(8)]
    assert max(worst for worst, _, _ in played) < 1e-4
    assert sum(compared for _, compared, _ in played) > 8
    assert positions != "all" or not any(refused for *_, refused in played)


@pytest.mark.slow
@pytest.mark.parametrize("positions", POSITIONS)
def test_many_histories(positions: str) -> None:
    model = adapted(a={"r": 2, "positions": positions})
    assert max(play(model, seed)[0] for seed in range(100, 200)) < 1e-4


NAMED = [name for name in ("past_key_values", "cache") if name == CACHE or CACHE == "cache"]
"""What transformers calls it: from 5.24 on both names."""


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("positions", ["f2+l2", "generated"])
@torch.no_grad()
def test_by_every_name_that_transformers_has(name: str, positions: str) -> None:
    """A cache by either name continues its own prompt; one of unknown prompt is refused, never edited somewhere."""
    model, rows = adapted(a={"r": 2, "positions": positions}), torch.arange(5, 17)[None]
    whole = model(input_ids=rows, prompt_lengths=[9]).logits[:, 9:]
    cache = DynamicCache()
    model(input_ids=rows[:, :9], use_cache=True, **{name: cache})
    steps = [model(input_ids=rows[:, i : i + 1], use_cache=True, **{name: cache}).logits for i in range(9, 12)]
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-4
    unknown = cache_of(model.get_base_model()(input_ids=rows[:, :9], use_cache=True))
    del unknown._reft_prompt
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"continues a cache .* Pass prompt_lengths"):
            call(input_ids=rows if call == model.generate else rows[:, 9:10], **{name: unknown})


class Pages(PagedAttentionCache):
    """Pages as a block's attention meets them, of which nothing is stored."""

    def __init__(self) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def test_pages_of_continuous_batching_are_refused() -> None:
    """They come under the name that a cache has from transformers 5.24 on."""
    ids, mask = torch.arange(5, 9)[None], torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="continuous batching"):
        adapted()(input_ids=ids, attention_mask=mask, position_ids=ids - 5, cache=Pages())


@pytest.mark.parametrize("positions", ["f2", "prompt", "all"])
@torch.no_grad()
def test_a_cache_that_was_filled_under_other_edits_is_refused(positions: str) -> None:
    """By the base model, another adapter or at another scale; none of it matters to what edits nothing in it."""
    model = adapted(a={"r": 2, "positions": positions}, b={"r": 2, "positions": "generated"})
    ids, base = torch.arange(5, 17)[None], model.get_base_model()

    def goes_on(cache: Any) -> Any:
        model(input_ids=ids[:, 9:], past_key_values=copy.deepcopy(cache))
        return model.generate(ids, past_key_values=copy.deepcopy(cache), **search(max_new_tokens=1))

    model.set_adapter("a")
    filled = model(input_ids=ids[:, :9], prompt_lengths=[12], use_cache=True).past_key_values
    goes_on(filled)
    set_scale(model, "a", 0.5)
    with pytest.raises(ValueError, match=r"adapter 'a' at scale 1 and is now .* 'a' at scale 0\.5"):
        goes_on(filled)
    with pytest.raises(ValueError, match="continued with no adapter"), model.disable_adapter():
        goes_on(filled)
    model.set_adapter("b")
    with pytest.raises(ValueError, match="filled with adapter 'a' at scale 1 and is now continued with adapter 'b'"):
        goes_on(filled)
    with model.disable_adapter():
        filled = base(input_ids=ids[:, :9], prompt_lengths=[12], use_cache=True).past_key_values
    goes_on(filled)
    model.set_adapter("a")
    with pytest.raises(ValueError, match="filled with no adapter"):
        goes_on(filled)


def load_over(model: PeftModel, path: Path) -> None:
    adapted(a={"r": 2, "positions": "f2"}).save_pretrained(path)
    model.load_adapter(path / "a", "a")


CHANGES: dict[str, Callable[[PeftModel, Path], Any]] = {
    "a step": lambda model, _: next(p for n, p in model.named_parameters() if "reft_edit" in n).add_(0.1),
    "a load": load_over,
    "the order": lambda model, _: model.base_model.set_adapter(["b", "a"]),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_cache_whose_edits_were_changed_since_is_refused(change: str, tmp_path: Path) -> None:
    model, ids = adapted(a={"r": 2, "positions": "f2"}, b={"r": 2, "positions": "f1"}), torch.arange(5, 17)[None]
    model.base_model.set_adapter(["a", "b"])
    cache = model(input_ids=ids[:, :9], prompt_lengths=[12], use_cache=True).past_key_values
    model.generate(ids, past_key_values=copy.deepcopy(cache), **search(max_new_tokens=1))
    CHANGES[change](model, tmp_path)
    with pytest.raises(ValueError, match="the cache was filled with adapter 'a' at scale 1, adapter 'b'"):
        model.generate(ids, past_key_values=cache, **search(max_new_tokens=1))


@pytest.mark.parametrize("positions", ["f2", "generated", "all"])
@torch.no_grad()
def test_single_tokens_under_other_adapters_are_remembered(positions: str) -> None:
    """They may change adapters on their way; what edits all tokens, or all that follow, does not go on from there."""
    model, ids = adapted(a={"r": 2, "positions": positions}), torch.arange(5, 17)[None]
    cache = model(input_ids=ids[:, :6]).past_key_values
    with model.disable_adapter():
        model(input_ids=ids[:, 6:7], past_key_values=cache)
    model(input_ids=ids[:, 7:8], past_key_values=cache)
    told = {"prompt_lengths": [6]}
    with nullcontext() if positions == "f2" else pytest.raises(ValueError, match="filled with no adapter and is now"):
        got = model(input_ids=ids[:, 8:], past_key_values=cache, **told).logits
        assert (got - model(input_ids=ids, **told).logits[:, 8:]).abs().max() < 1e-5


@torch.no_grad()
def test_edits_of_a_with_are_remembered() -> None:
    model, ids = adapted(a={"r": 2, "positions": "generated"}), torch.arange(5, 17)[None]
    plain = model(input_ids=ids[:, :9], prompt_lengths=[12], use_cache=True).past_key_values
    with edit(model, torch.ones(32), positions="f2"):
        edited = model(input_ids=ids[:, :9], prompt_lengths=[12], use_cache=True).past_key_values
        model.generate(ids, past_key_values=copy.deepcopy(edited), **search(max_new_tokens=1))
        with pytest.raises(ValueError, match=r"continued with adapter 'a' at scale 1, a trimtab\.edit at"):
            model.generate(ids, past_key_values=plain, **search(max_new_tokens=1))
    with pytest.raises(ValueError, match=r"a trimtab\.edit at scale 1 and is now continued with adapter 'a'"):
        model.generate(ids, past_key_values=edited, **search(max_new_tokens=1))


def test_a_with_opened_again_is_the_same_until_its_vector_is_written_to() -> None:
    model, ids, vector = adapted(), torch.arange(5, 17)[None], torch.ones(32)
    past = DynamicCache()
    for n in (6, 9):
        with edit(model, vector, positions="f2"):
            model.generate(ids[:, :n], prompt_lengths=[6], past_key_values=past, **search(max_new_tokens=1))
    vector.mul_(2)
    with (
        edit(model, vector, positions="f2"),
        pytest.raises(ValueError, match=r"a trimtab\.edit at scale 1 as changed since"),
    ):
        model.generate(ids, prompt_lengths=[6], past_key_values=past, **search(max_new_tokens=1))


class Along:
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def change(self, h: Tensor) -> Tensor:
        return h + self.strength


def test_a_with_of_another_objects_method_is_another() -> None:
    model, ids, own, past = adapted(), torch.arange(5, 17)[None], Along(1.0), DynamicCache()
    for n in (6, 9):
        with edit(model, own.change, positions="f2"):
            model.generate(ids[:, :n], prompt_lengths=[6], past_key_values=past, **search(max_new_tokens=1))
    with edit(model, Along(3.0).change, positions="f2"), pytest.raises(ValueError, match="as changed since"):
        model.generate(ids, prompt_lengths=[6], past_key_values=past, **search(max_new_tokens=1))


@torch.no_grad()
def test_a_loop_that_reorders_its_cache_keeps_one_record() -> None:
    model, ids = adapted(a={"r": 2, "positions": "f2"}), torch.arange(5, 17).view(2, 6)
    past = model(input_ids=ids, use_cache=True).past_key_values
    for _ in range(4):
        past.reorder_cache(torch.tensor([1, 0]))
        model(input_ids=ids[:, :1], past_key_values=past)
    assert len(past._reft_edits) == 1


def test_a_crop_keeps_rows_that_look_alike() -> None:
    model, ids = adapted(a={"r": 2, "positions": "f2+l2"}), torch.arange(5, 13).repeat(2, 1)
    past = model(input_ids=ids, prompt_lengths=[6, 8], use_cache=True).past_key_values
    past.crop(-3)
    model(input_ids=ids[:, 5:], past_key_values=past)


@pytest.mark.parametrize("positions", ["f2", "all"])
@torch.no_grad()
def test_a_cache_without_a_record_is_refused(positions: str) -> None:
    """Filled before there was an adapter, or put together by hand."""
    model, ids = adapted(a={"r": 2, "positions": positions}), torch.arange(5, 17)[None]
    before = tiny("llama")(input_ids=ids[:, :9]).past_key_values
    rows = model(input_ids=ids[:, :9].repeat(3, 1), prompt_lengths=[9, 9, 8]).past_key_values
    rows.batch_select_indices(torch.tensor([0, 2]))
    rows.layers[-1].keys = rows.layers[-1].keys + 1
    for cache, many in ((before, 1), (rows, 2)):
        batch = ids.repeat(many, 1)
        for call in (
            lambda **told: model(input_ids=batch[:, 9:], past_key_values=copy.deepcopy(cache), **told),  # noqa: B023
            lambda **told: model.generate(batch, past_key_values=copy.deepcopy(cache), **told, **search()),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"not known what was edited in it.* Pass prompt_lengths"):
                call()
            assert call(prompt_lengths=[9, 8][:many]).logits is not None


ROWS = [2, 0, 0, 1]
MOVES = {
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor(ROWS)),
    "by_layer": lambda cache: [layer.reorder_cache(torch.tensor(ROWS)) for layer in cache.layers],
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor(ROWS)),
    "then_cropped": lambda cache: (cache.batch_select_indices(torch.tensor(ROWS)), cache.crop(-1)),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("positions", ["f2+l2", "prompt", "generated"])
@torch.no_grad()
def test_prompts_go_with_the_rows_of_a_cache(positions: str, move: str) -> None:
    """Rows that are put in another order, taken out or repeated before their prompts end keep prompts and adapters."""
    model = adapted(a={"r": 2, "positions": positions}, b={"r": 2, "positions": "l3"})
    ids = torch.stack(prompts([12, 12, 12]))
    ends, names = torch.tensor([6, 9, 12]), ["a", "b", "__base__"]
    told = {"prompt_lengths": ends, "use_cache": True}
    cache = model(input_ids=ids[:, :7], **told, adapter_names=names).past_key_values
    MOVES[move](cache)
    after, held = [names[row] for row in ROWS], cache.get_seq_length()
    whole = model(input_ids=ids[ROWS], prompt_lengths=ends[ROWS], adapter_names=after).logits[:, held:]
    for columns in (slice(held, held + 1), slice(held + 1, 12)):
        got = model(input_ids=ids[ROWS, columns], past_key_values=cache, adapter_names=after).logits
        assert (got - whole[:, columns.start - held : columns.stop - held]).abs().max() < 1e-5


@torch.no_grad()
def test_rows_that_are_alike_are_not_told_apart() -> None:
    model, row = adapted(a={"r": 2, "positions": "l2"}), torch.arange(5, 17)[None]
    cache = model(input_ids=row[:, :7].repeat(2, 1), prompt_lengths=[9, 12], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="not known what was edited in it"):
        model(input_ids=row[:, 7:].repeat(2, 1), past_key_values=cache)
