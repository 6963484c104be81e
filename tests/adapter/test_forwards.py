"""Forwards that are not alone: in threads, within one another, interrupted. Each edits what it edits alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from helpers import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from test_batches import adapted, layers_of, prompts, search
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from trimtab import ReftConfig
from trimtab import prompts as told

SETTINGS = ["f2+l2", "generated"]
ROW, OTHER = prompts([9, 5])


def build(positions: str) -> PeftModel:
    """Adapters `a` and `b`; positions "lora" make two of LoRA's, to see that it passes the same test."""
    if positions != "lora":
        config = {"r": 2, "positions": positions}
        return adapted(a=config, b={**config, "method": "direft"})
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny("llama"), lora, adapter_name="a")
    model.add_adapter("b", lora)
    return model.eval()


@pytest.fixture(params=[*SETTINGS, "lora"])
def model(request: pytest.FixtureRequest) -> PeftModel:
    return build(request.param)


def generated(model: Any, row: Tensor = ROW, **kwargs: Any) -> Tensor:
    """Logits (NEW, V)."""
    ids = row[None]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **search(**kwargs))
    return torch.stack(out.logits, 1)[0]


@torch.no_grad()
def logits(model: Any, row: Tensor = OTHER, **kwargs: Any) -> Tensor:
    out = model(input_ids=row[None], **kwargs)
    whole: Tensor = (out.logits if hasattr(out, "logits") else out.last_hidden_state)[0]
    return whole


def ends(model: PeftModel, length: int) -> dict[str, Any]:
    """Where the prompt ends, for a method that asks."""
    return {"prompt_lengths": [length]} if layers_of(model) else {}


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5)


# ---- threads and tasks -----------------------------------------------------------------------------------------------

JOBS: list[Callable[[PeftModel], Tensor]] = [
    lambda m: generated(m, ROW),
    lambda m: generated(m, OTHER, adapter_names=["b"]),
    lambda m: generated(m, OTHER, use_cache=False),
    lambda m: generated(m, ROW, adapter_names=["__base__"]),
    lambda m: logits(m, OTHER),
    lambda m: logits(m, ROW, adapter_names=["b"]),
    lambda m: logits(m.get_base_model(), ROW),
    lambda m: logits(m.get_base_model().model, OTHER),
]


def test_threads(model: PeftModel) -> None:
    alone = [job(model) for job in JOBS]
    drawn = range(len(JOBS)) if layers_of(model) else (0, 2, 4, 6)  # LoRA's adapter_names reach other threads
    with ThreadPoolExecutor(4) as threads:
        results = [(i, threads.submit(JOBS[i], model)) for i in [*drawn] * 3]
        assert all(close(future.result(), alone[i]) for i, future in results)
    assert all(close(job(model), before) for job, before in zip(JOBS, alone, strict=True))


def test_asyncio_tasks(model: PeftModel) -> None:
    """What a task says with `prompts` is not heard by another that runs while it waits."""
    expected = [logits(model, ROW, **ends(model, n)) for n in (3, 6)]

    async def one(length: int) -> Tensor:
        with told(model, [length]) if layers_of(model) else nullcontext():
            await asyncio.sleep(0)
            return logits(model, ROW)

    async def both() -> list[Tensor]:
        return list(await asyncio.gather(one(3), asyncio.to_thread(logits, model), one(6)))

    first, alone, second = asyncio.run(both())
    assert close(first, expected[0]) and close(second, expected[1]) and close(alone, logits(model))


def test_a_stream_that_nobody_reads(model: PeftModel) -> None:
    class Tokenizer:
        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(map(str, ids)) + " "

    alone, started, go_on = generated(model), threading.Event(), threading.Event()

    class Waiting(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            started.set()
            go_on.wait(10)
            return scores

    streamer = TextIteratorStreamer(Tokenizer())  # type: ignore[arg-type]
    thread = threading.Thread(
        target=generated, args=(model, OTHER), kwargs={"streamer": streamer, "logits_processor": [Waiting()]}
    )
    thread.start()
    started.wait(10)
    assert close(generated(model), alone)  # while the other one waits in the middle
    go_on.set()
    thread.join()
    assert close(generated(model), alone)


# ---- within generate -------------------------------------------------------------------------------------------------


class Calls:
    """What calls the model at each step, and keeps what it says."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call = call
        self.seen: list[Tensor] = []


class Processor(Calls, LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(self.call())
        return scores


class Criterion(Calls, StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append(self.call())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Streamer(Calls, BaseStreamer):
    def put(self, value: Any) -> None:
        self.seen.append(self.call())

    def end(self) -> None:
        pass


PLACES: dict[str, Callable[..., Any]] = {
    "logits_processor": Processor,
    "stopping_criteria": Criterion,
    "streamer": Streamer,
}


@pytest.mark.parametrize("job", [0, 1, 4, 7])
@pytest.mark.parametrize("place", PLACES)
def test_calls_within_generate(place: str, job: int, model: PeftModel) -> None:
    use_cache = place != "streamer"
    alone, inner = generated(model, use_cache=use_cache), JOBS[job](model)
    calls = PLACES[place](lambda: JOBS[job](model))
    given = calls if place == "streamer" else [calls]
    assert close(generated(model, use_cache=use_cache, **{place: given}), alone)
    assert calls.seen and all(close(seen, inner) for seen in calls.seen)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [None, OTHER])
def test_guidance(model: PeftModel, negative: Tensor | None, use_cache: bool, within: bool) -> None:
    """The negative prompt is edited as it is alone, and what follows it as an answer to it, also `within` a block that
    says where the other one ends."""
    away = {} if negative is None else {"negative_prompt_ids": negative[None]}
    with told(model, [len(ROW)]) if within and layers_of(model) else nullcontext():
        out = model.generate(ROW[None], guidance_scale=1.7, use_cache=use_cache, **away, **search())
    sides = [ROW, ROW[-1:] if negative is None else negative]
    new = out.sequences[0, len(ROW) :]
    for step, scores in enumerate(out.scores):
        wanted, unwanted = (
            logits(model, torch.cat([ids, new[:step]]), **ends(model, len(ids)))[-1].log_softmax(-1) for ids in sides
        )
        expected = (1.7 * (wanted - unwanted) + unwanted).where(scores[0].isfinite(), scores[0])
        assert close(scores[0].nan_to_num(), expected.nan_to_num())


def test_the_model_assists_itself(model: PeftModel) -> None:
    assert close(generated(model, assistant_model=model.get_base_model()), generated(model))


def test_the_model_assists_another(model: PeftModel) -> None:
    """It is given all that was accepted again and again; its prompt is that of the first time."""
    other = tiny("llama", num_hidden_layers=1)
    assert close(generated(other, assistant_model=model), generated(other))
    proposed = []
    handle = model.get_base_model().lm_head.register_forward_hook(lambda _, args, out: proposed.append(out[0, -1]))
    generated(other, assistant_model=model, max_new_tokens=3, min_new_tokens=3)
    handle.remove()
    assert close(proposed[0], logits(model, ROW, **ends(model, len(ROW)))[-1])


# ---- within one another, and interrupted -----------------------------------------------------------------------------


@pytest.mark.parametrize("job", range(len(JOBS)))
@pytest.mark.parametrize("place", ["model", "model.layers.1", "lm_head"])
def test_a_forward_in_another(place: str, job: int, model: PeftModel) -> None:
    alone, inner, seen = logits(model), JOBS[job](model), []
    running = [False]

    def call(*_: Any) -> None:
        if not running[0]:
            running[0] = True
            seen.append(JOBS[job](model))

    with removed(model.get_base_model().get_submodule(place).register_forward_hook(call)):
        assert close(logits(model), alone)
    assert close(seen[0], inner)


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    """Takes a hook away at the end."""
    try:
        yield
    finally:
        handle.remove()


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["", "model", "model.layers.1"])
@pytest.mark.parametrize("when", ["forward", "base", "generate"])
def test_an_interrupt(when: str, place: str, model: PeftModel) -> None:
    """As from the keyboard: it passes by the hooks that torch runs after an error."""
    base = model.get_base_model()
    before = [job(model) for job in JOBS]
    hook = base.get_submodule(place).register_forward_hook(interrupt)
    with removed(hook), pytest.raises(KeyboardInterrupt) as kept:  # its traceback keeps the frames, as a notebook does
        generated(model) if when == "generate" else logits(model if when == "forward" else base, ROW)
    assert close(logits(base.model, OTHER), before[-1])
    assert all(close(job(model), expected) for job, expected in zip(JOBS, before, strict=True))
    if layers_of(model):
        with pytest.raises(RuntimeError, match="ran outside a forward"):
            base.model.layers[0](torch.zeros(1, 3, 32), position_embeddings=(torch.ones(1, 3, 8), torch.zeros(1, 3, 8)))
    assert kept.type is KeyboardInterrupt


@pytest.mark.parametrize("positions", SETTINGS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_in_another_thread(positions: str, use_reentrant: bool) -> None:
    """As autograd does for a GPU, in whose threads nothing is known of the forward."""
    model = build(positions).train()
    ids = torch.stack(prompts([8, 8]))
    labels = ids.masked_fill(torch.arange(8) < 5, -100)

    def gradient(loss: Tensor, threads: bool) -> list[Tensor]:
        model.zero_grad()
        if threads:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        else:
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradient(model(input_ids=ids, labels=labels).loss, False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    again = gradient(loss, True)
    assert plain and all(close(a, b) for a, b in zip(plain, again, strict=True))


def test_data_parallel_is_refused() -> None:
    for layer in (m for m in build("f2+l2").modules() if type(m).__name__ == "ReftLayer"):
        with pytest.raises(RuntimeError, match=r"nn\.DataParallel .* Use DistributedDataParallel"):
            layer._replicate_for_data_parallel()


@pytest.mark.parametrize("asked_before", [True, False])
def test_hidden_states_are_what_the_next_block_reads(asked_before: bool) -> None:
    base = tiny("llama")
    if asked_before:
        base(input_ids=ROW[None], output_hidden_states=True)
    config = ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights="paper")
    model = get_peft_model(base, config).eval()
    read: list[Tensor] = []
    for block in base.model.layers:
        block.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        states = model(input_ids=ROW[None], output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(states, read, strict=False))
    with model.disable_adapter(), torch.no_grad():
        plain = model(input_ids=ROW[None], output_hidden_states=True).hidden_states
    assert not torch.equal(plain[1], states[1])


def test_generate_batch_is_refused() -> None:
    model = build("f2+l2")
    with pytest.raises(ValueError, match=r"continuous batching.*Use generate on a padded batch"):
        model.generate_batch([ROW.tolist()])


@pytest.mark.slow
@pytest.mark.parametrize("positions", SETTINGS)
def test_many_mixes_of_threads(positions: str) -> None:
    """250 rounds each of 2 to 6 threads with jobs drawn at random."""
    model = build(positions)
    alone = [job(model) for job in JOBS]
    random = torch.Generator().manual_seed(0)
    for _ in range(250):
        count = int(torch.randint(2, 7, (), generator=random))
        drawn = torch.randint(len(JOBS), (count,), generator=random).tolist()
        with ThreadPoolExecutor(count) as threads:
            results = list(threads.map(lambda i: (i, JOBS[i](model)), drawn))
        assert all(close(result, alone[i]) for i, result in results)
