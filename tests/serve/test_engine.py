"""The slots engine from outside: events, limits, cancelling, faults; nothing is left behind by anything."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, tiny
from serve.mixes import Asked, Inbox, Served, drive, mismatches
from transformers import AutoTokenizer

from trimtab.serve.engine import BadRequest, Event, QueueFull, QueueTimeout, Request, Sampling, StepFailed, Unavailable
from trimtab.serve.model import NotServed
from trimtab.serve.slots import Limits, SlotsEngine
from trimtab.serve.table import AdapterTable, Layout
from trimtab.where.sites import find_sites

PROMPT = tuple(range(5, 25))
EDITED = Asked(PROMPT, (("plain1", 1.0),))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tiny("llama"), tmp_path_factory.mktemp("adapters"), strength=3)


def assert_nothing_left(engine: SlotsEngine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pinned_adapters) == (0, 0, 0)
    assert not engine._ids and not engine._cancelled


# ---- answers


def test_a_request_says_its_tokens_and_how_it_ended(served: Served) -> None:
    engine = served.engine()
    inbox = drive(engine, [served.request("a", EDITED)])
    last = inbox.last("a")
    assert inbox.tokens("a") == served.truth(EDITED)
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens, last.cached_tokens) == ("length", 20, 8, 0)
    assert all(len(event.tokens) == 1 for event in inbox.events["a"])
    assert drive(engine, [served.request("b", EDITED)]).last("b").cached_tokens == 16  # the last token is run again
    engine.close()


def test_end_tokens_end_an_answer(served: Served) -> None:
    engine, truth = served.engine(), served.truth(EDITED)
    at = next(i for i, token in enumerate(truth) if token not in truth[:i] and i > 0)
    inbox = drive(engine, [served.request("a", EDITED, stop_token_ids=(truth[at],))])
    assert inbox.tokens("a") == truth[: at + 1]
    assert (inbox.last("a").finish_reason, inbox.last("a").stop) == ("stop", truth[at])
    engine._ends = frozenset({truth[at]})
    inbox = drive(engine, [served.request("a", EDITED), served.request("b", EDITED, ignore_eos=True)])
    assert (inbox.tokens("a"), inbox.tokens("b")) == (truth[: at + 1], truth)
    engine.close()


def test_prompts_are_scored(served: Served) -> None:
    """By chunks, beside requests that are not scored; max_tokens=0 for the scores alone."""
    engine = served.engine(chunk=16)
    requests = [
        served.request("a", EDITED, prompt_logprobs=2, max_tokens=0),
        served.request("b", EDITED, prompt_logprobs=0, logprobs=1),
        served.request("c", EDITED),
    ]
    inbox = drive(engine, requests, each=3)
    served.peft.base_model.set_adapter(["plain1"])
    with torch.no_grad():
        truth = served.peft(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    for id in ("a", "b"):
        scores = inbox.events[id][0].prompt_logprobs
        assert scores[0] is None and [score.token for score in scores[1:] if score] == list(PROMPT[1:])
        found = torch.tensor([score.logprob for score in scores[1:] if score])
        torch.testing.assert_close(found, truth[range(19), PROMPT[1:]], atol=1e-4, rtol=1e-4)
    assert inbox.tokens("a") == [] and inbox.last("a").finish_reason == "length"
    assert inbox.tokens("b") == inbox.tokens("c") == served.truth(EDITED)
    first = inbox.events["b"][0].logprobs[0]
    assert first.token == inbox.tokens("b")[0] and first.top == ((first.token, first.logprob),)
    engine.close()


def test_a_seed_gives_the_same_alone_and_among_others(served: Served) -> None:
    engine = served.engine()
    own = served.request("own", EDITED, temperature=1.0, seed=3, top_p=0.95)
    alone = drive(engine, [own]).tokens("own")
    others = [served.request(f"o{i}", one) for i, one in enumerate(served.mixes(8, 2, 30, VOCAB))]
    assert drive(engine, [*others[:4], own, *others[4:]]).tokens("own") == alone
    other_seed = served.request("other", EDITED, temperature=1.0, seed=4, top_p=0.95)
    assert drive(engine, [other_seed]).tokens("other") != alone
    engine.close()


def test_text_and_stop_strings(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("models/tiny-llama")
    model: Any = tiny("llama", vocab_size=len(tokenizer))
    served = Served(model, tmp_path)
    engine = served.engine(tokenizer=tokenizer)
    inbox = drive(engine, [served.request("a", EDITED)])
    text = inbox.text("a")
    assert text == tokenizer.decode(served.truth(EDITED), skip_special_tokens=True)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    inbox = drive(engine, [served.request("b", EDITED, stop=(stop,))])
    assert inbox.text("b") == text[: text.find(stop)]
    assert (inbox.last("b").finish_reason, inbox.last("b").stop) == ("stop", stop)
    engine.close()


def test_prompts_of_like_length_run_together_behind_the_one_that_came_first(served: Served) -> None:
    engine = served.engine(chunk=48)
    for i, length in enumerate((12, 40, 11, 41, 10)):
        engine.submit(served.request(str(i), Asked(tuple(range(5 + 7 * i, 5 + 7 * i + length)))), print)
    engine._admit()
    batch = engine._next_prompts()
    assert {row.request.id: length for row, length in batch.items()} == {"0": 12, "2": 11, "4": 10}
    engine.close()


# ---- limits


def test_what_can_never_be_served_is_refused_at_once(served: Served) -> None:
    engine = served.engine(entries=1)
    bad = {
        "prompt": Request("x", ()),
        "max_tokens": Request("x", PROMPT, Sampling(max_tokens=200)),
        "logit_bias": Request("x", PROMPT, Sampling(logit_bias={VOCAB: 1})),
        "model": served.request("x", Asked(PROMPT, (("untied1", 1.0),))),
    }
    for field, request in {**bad, " prompt": Request("x", (VOCAB,))}.items():
        with pytest.raises(BadRequest) as raised:
            engine.submit(request, print)
        assert raised.value.field == field.strip()
    engine.submit(Request("x", PROMPT), print)
    with pytest.raises(BadRequest, match="running"):
        engine.submit(Request("x", PROMPT), print)
    engine.close()


def test_the_queue_is_bounded_in_length_and_time(served: Served) -> None:
    engine, inbox = served.engine(slots=1, max_queue=2, queue_seconds=0.0), Inbox()
    for id in ("a", "b", "c"):  # one for the row, which is given at a step, and two that wait
        engine.submit(served.request(id, EDITED), inbox.of(id))
    with pytest.raises(QueueFull, match="3 requests run or wait") as raised:
        engine.submit(served.request("d", EDITED), inbox.of("d"))
    assert raised.value.retry_after > 0
    time.sleep(0.01)
    engine.step()
    assert isinstance(inbox.last("a").error, QueueTimeout)
    assert_nothing_left(engine)
    engine.close()


def test_a_request_waits_for_room_in_the_table_and_others_pass_it(served: Served) -> None:
    engine = served.engine(entries=2)
    asked = [Asked(PROMPT, ((name, 1.0),), 6) for name in ("plain1", "suffix1", "prompt1", "plain1", "all1")]
    assert mismatches(served, engine, [*asked, Asked(PROMPT)], each=6) == []
    assert engine.stats().table_evictions > 0
    engine.close()


# ---- faults


def test_cancelling_at_any_moment_gives_one_last_event(served: Served) -> None:
    engine, inbox, rng = served.engine(slots=3, chunk=8, entries=4), Inbox(), random.Random(0)
    asked = served.mixes(40, seed=5, longest=40, vocabulary=VOCAB)
    for i, one in enumerate(asked):
        engine.submit(served.request(str(i), one), inbox.of(str(i)))
    cancelled = set()
    while engine.stats().running or engine.stats().waiting:
        for id in rng.sample(range(len(asked)), 2):
            if rng.random() < 0.3:
                engine.cancel(str(id))
                cancelled.add(str(id))
        engine.step()
    engine.cancel("never there")
    for i, one in enumerate(asked):
        last, truth = inbox.last(str(i)), served.truth(one)
        if last.finish_reason == "abort":
            assert str(i) in cancelled and inbox.tokens(str(i)) == truth[: last.completion_tokens]
        else:
            assert inbox.tokens(str(i)) == truth
    assert_nothing_left(engine)
    engine.close()


def test_adapters_come_and_go_under_load(served: Served, tmp_path: Path) -> None:
    """A request keeps what its name stood for when it came, whatever the name stands for later."""
    engine, inbox = served.engine(slots=3, entries=3), Inbox()
    registry, held = served.registry, {}
    kinds = ["plain", "suffix", "prompt", "untied"]
    for i in range(40):
        name = kinds[i % 4]
        source = f"{name}{1 + i // 4 % 2}"
        registry.load(name, source, replace=True)
        held[str(i)] = Asked(PROMPT[: 8 + i % 12], ((source, 1.0),), 4)
        request = served.request(str(i), Asked(held[str(i)].prompt, ((name, 1.0),), 4))
        engine.submit(request, inbox.of(str(i)))
        if i % 5 == 4:
            registry.unload(name)
        engine.step()
    drive(engine, [])
    assert all(inbox.tokens(id) == served.truth(one) for id, one in held.items())
    assert_nothing_left(engine)
    engine.close()


def broken(engine: SlotsEngine, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next so many forwards write half of what they should and raise."""
    left, forward = iter(range(times)), engine._runner.forward

    def fails(*args: Any, **kwargs: Any) -> Any:
        logits = forward(*args, **kwargs)
        if next(left, None) is not None:
            raise RuntimeError("out of memory")
        return logits

    monkeypatch.setattr(engine._runner, "forward", fails)


def test_a_step_that_raises_ends_its_requests_and_no_others(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, inbox = served.engine(slots=2), Inbox()
    for id in "abc":
        engine.submit(served.request(id, EDITED), inbox.of(id))
    engine.step()
    broken(engine, 1, monkeypatch)
    drive(engine, [])
    for id in "ab":
        assert isinstance(inbox.last(id).error, StepFailed) and "out of memory" in str(inbox.last(id).error)
        assert inbox.tokens(id) == served.truth(EDITED)[: inbox.last(id).completion_tokens]
    assert inbox.tokens("c") == served.truth(EDITED)
    assert (engine.stats().failed_steps, engine.health) == (1, "starting")
    assert_nothing_left(engine)
    engine.close()


def test_three_failing_steps_in_a_row_are_the_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, inbox = served.engine(slots=1), Inbox()
    broken(engine, 99, monkeypatch)
    for id in "abcd":
        engine.submit(served.request(id, EDITED), inbox.of(id))
    for _ in range(3):
        engine.step()
    assert engine.health == "dead"
    assert all(inbox.last(id).finish_reason == "error" for id in "abcd")
    with pytest.raises(Unavailable):
        engine.submit(served.request("e", EDITED), inbox.of("e"))
    assert_nothing_left(engine)
    engine.close()


def test_nan_ends_its_request_and_spoils_no_other(served: Served) -> None:
    """Not the neighbours, nor who gets the row later, nor who shares the prefix."""
    engine = served.engine(slots=3)
    spoiled = served.request("x", Asked(PROMPT, (("prompt1", 1e30), ("prompt2", 1e30))))
    asked = [Asked(PROMPT, (("prompt1", 1.0),)), Asked(PROMPT)]
    inbox = drive(engine, [spoiled, *(served.request(str(i), one) for i, one in enumerate(asked))], each=3)
    assert isinstance(inbox.last("x").error, StepFailed) and "NaN" in str(inbox.last("x").error)
    assert [inbox.tokens(str(i)) for i in range(2)] == [served.truth(one) for one in asked]
    assert mismatches(served, engine, served.mixes(6, 1, 40, VOCAB), each=6) == []
    engine.close()


def test_a_receiver_that_raises_loses_only_its_own(served: Served) -> None:
    engine, inbox = served.engine(), Inbox()

    def raises(event: Event) -> None:
        raise ConnectionError

    engine.submit(served.request("a", EDITED), raises)
    engine.submit(served.request("b", EDITED), inbox.of("b"))
    drive(engine, [])
    assert inbox.tokens("b") == served.truth(EDITED) and engine.stats().failed_steps == 0
    assert_nothing_left(engine)
    engine.close()


# ---- start and end


def test_threads_submit_cancel_pause_and_close(served: Served) -> None:
    engine, inbox = served.engine(slots=4, chunk=8, entries=6), Inbox()
    engine.start()
    assert engine.health == "ready"
    asked = served.mixes(24, seed=7, longest=30, vocabulary=VOCAB)
    truths = [served.truth(one) for one in asked]

    def client(first: int) -> None:
        for i in range(first, len(asked), 3):
            engine.submit(served.request(str(i), asked[i]), inbox.of(str(i)))

    clients = [threading.Thread(target=client, args=(i,)) for i in range(3)]
    for thread in clients:
        thread.start()
    with engine.pause():
        steps = engine.stats().steps
        time.sleep(0.02)
        assert engine.stats().steps == steps
    for thread in clients:
        thread.join()
    engine.close(grace=60)
    assert [inbox.tokens(str(i)) for i in range(len(asked))] == truths
    assert engine.health == "dead"
    with pytest.raises(Unavailable):
        engine.submit(served.request("late", EDITED), inbox.of("late"))


def test_closing_without_grace_aborts_and_leaves_the_model_as_it_was(served: Served) -> None:
    served.model.train()
    engine, inbox = served.engine(slots=1), Inbox()
    for id in "ab":
        engine.submit(served.request(id, EDITED), inbox.of(id))
    engine.step()
    engine.close()
    assert [inbox.last(id).finish_reason for id in "ab"] == ["abort", "abort"]
    assert served.model.training and not any(site.module._forward_hooks for site in served.sites)
    assert_nothing_left(engine)


@pytest.mark.parametrize("field", ["position_ids", "attention_mask"])
def test_a_model_that_would_answer_otherwise_is_refused_at_the_start(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny("llama")
    table = AdapterTable(Layout(find_sites(model, "block", "all"), 4), 2)
    engine = SlotsEngine(model, table, None, Limits(max_len=64))
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **kwargs: forward(**{**kwargs, field: None}))
    with pytest.raises(NotServed, match=r"LlamaForCausalLM.*differ"):
        engine.start()
    assert not any(site.module._forward_hooks for site in table.layout.sites)


def test_a_model_without_keys_and_values_is_refused_by_name() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))
    table = AdapterTable(Layout(find_sites(model, "block", "all"), 4), 2)
    with pytest.raises(NotServed, match=r"MambaForCausalLM.*keys and values"):
        SlotsEngine(model, table)
