"""Each row by its own settings, its own random numbers, and nothing of its neighbours'."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.generation import logits_process as hf

from trimtab.serve.engine import BadRequest, Sampling
from trimtab.serve.sampling import Sampler, choose, logprobs
from trimtab.serve.text import AnswerText

V = 50
PROMPT = [3, 4, 4, 5]


def drawn(settings: dict[str, Any], logits: torch.Tensor, times: int = 3000) -> Counter[int]:
    samplers = [Sampler(Sampling(seed=i, **settings), PROMPT) for i in range(times)]
    return Counter(choose(logits.expand(times, -1), samplers))


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({}, []),
        ({"temperature": 0.5}, [hf.TemperatureLogitsWarper(0.5)]),
        ({"top_k": 4}, [hf.TopKLogitsWarper(4)]),
        ({"top_p": 0.6}, [hf.TopPLogitsWarper(0.6)]),
        ({"min_p": 0.3}, [hf.MinPLogitsWarper(0.3)]),
        ({"top_k": 6, "top_p": 0.7, "temperature": 1.5}, [
            hf.TemperatureLogitsWarper(1.5), hf.TopKLogitsWarper(6), hf.TopPLogitsWarper(0.7)]),
        ({"repetition_penalty": 3.0}, [hf.RepetitionPenaltyLogitsProcessor(3.0)]),
        ({"logit_bias": {7: 5.0, 8: -100}}, [
            hf.SequenceBiasLogitsProcessor({(7,): 5.0, (8,): -100.0})]),
    ],
)  # fmt: skip
def test_draws_follow_the_distribution_of_transformers(settings: dict[str, Any], processors: list[Any]) -> None:
    logits = torch.randn(V) * 1.5
    expected = logits.unsqueeze(0)
    for processor in processors:
        expected = processor(torch.tensor([PROMPT]), expected)
    probabilities, n = expected[0].softmax(-1), 3000
    found = drawn(settings, logits, n)
    assert all(probabilities[token] > 0 for token in found)
    for token, p in enumerate(probabilities.tolist()):
        assert abs(found[token] - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1, token


def test_penalties_are_of_generated_tokens() -> None:
    logits = torch.zeros(1, V)
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25), PROMPT)
    for token in (7, 7, 9):
        sampler.saw(token)
    expected = torch.zeros(V)
    expected[7], expected[9] = -1.0, -0.75
    assert torch.equal(sampler.adjusted(logits[0]), expected)


def test_a_seed_gives_the_same_alone_and_among_others() -> None:
    logits = torch.randn(20, V)
    settings = [
        Sampling(seed=5, top_p=0.9),
        Sampling(seed=5),
        Sampling(seed=5, temperature=0),
        Sampling(seed=6, top_k=3, repetition_penalty=1.3, logit_bias={2: 3.0}),
        Sampling(),
    ]
    together = [Sampler(s, PROMPT) for s in settings]
    rows = [choose(step.expand(len(settings), -1), together) for step in logits]
    for i, own in enumerate(settings[:-1]):
        alone = Sampler(own, PROMPT)
        assert [choose(step.unsqueeze(0), [alone])[0] for step in logits] == [row[i] for row in rows]
    assert len({tuple(row[i] for row in rows) for i in range(5)}) == 5


def test_numbers_at_the_ends_of_what_can_be_asked_for() -> None:
    logits = torch.randn(8, V) * 30
    every, cold = Sampler(Sampling(seed=1, top_k=2**63), PROMPT), Sampler(Sampling(temperature=1e-40), PROMPT)
    plain = Sampler(Sampling(seed=1, top_k=V), PROMPT)
    for step in logits.unsqueeze(1):
        assert choose(step, [every]) == choose(step, [plain])
        assert choose(step, [cold]) == [step.argmax().item()]


def test_log_probabilities_are_the_model_own() -> None:
    logits = torch.randn(2, V)
    one, other = logprobs(logits, [4, 5], 3)
    truth = logits.log_softmax(-1)
    assert one.token == 4 and math.isclose(one.logprob, truth[0, 4], rel_tol=1e-5)
    assert [token for token, _ in other.top] == truth[1].topk(3).indices.tolist()
    assert logprobs(logits, [4, 5], 0)[0].top == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("temperature", -1), ("temperature", math.nan), ("top_p", 0), ("top_p", 1.1), ("top_k", -1),
        ("min_p", 2), ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0), ("logprobs", -1),
        ("logit_bias", {1: 200}), ("logit_bias", {1: math.nan}), ("stop", ("",)),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=name) as raised:
        Sampling(**{name: value})
    assert raised.value.field == name


TOKENIZER = AutoTokenizer.from_pretrained("models/tiny-llama")


@pytest.mark.parametrize(
    "text", ["A plain sentence, and more.", "naïve café", "😀 日本語 🤷🏽‍♀️", "  two  spaces\n\nlines", "ü"]
)
def test_text_comes_in_whole_characters(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    answer, pieces = AnswerText(TOKENIZER), []
    for token in ids:
        piece, stop = answer.add(token)
        pieces.append(piece)
        assert stop is None
    pieces.append(answer.end())
    assert "".join(pieces) == TOKENIZER.decode(ids)
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_half_a_character_at_the_end_is_shown() -> None:
    ids = TOKENIZER("x😀", add_special_tokens=False).input_ids[:-1]
    answer = AnswerText(TOKENIZER)
    assert "".join(answer.add(token)[0] for token in ids) + answer.end() == TOKENIZER.decode(ids)


@pytest.mark.parametrize("stop", [("sat",), ("at on",), ("mat", "cat s"), ("the mat.",), ("zebra",), ("t o", "cat")])
def test_text_ends_before_a_stop_string_and_nothing_of_it_is_said(stop: tuple[str, ...]) -> None:
    text = "The cat sat on the mat."
    found = min(((text.find(s), s) for s in stop if s in text), default=None)
    answer, said, reached = AnswerText(TOKENIZER, stop), "", None
    for token in TOKENIZER(text, add_special_tokens=False).input_ids:
        piece, reached = answer.add(token)
        said += piece
        assert text.startswith(said) and not any(s in said for s in stop)
        if reached:
            break
    said += answer.end()
    assert (said, reached) == ((text[: found[0]], found[1]) if found else (text, None))
