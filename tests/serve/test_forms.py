"""Answers held to a form: always of the schema, by the real client, and nobody else's answer changed."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
import torch
from pydantic import BaseModel
from served import ADAPTERS, BASE, Served, serving, user

from trimtab.serve.engine import BadRequest, Sampling
from trimtab.serve.grammar import LARGEST, Form, Grammars, json_rule
from trimtab.serve.sampling import Sampler, choose


class Animal(BaseModel):
    """What the answers say."""

    kind: Literal["cat", "dog", "fish"]
    legs: int
    tame: bool


SCHEMA = {**Animal.model_json_schema(), "additionalProperties": False}
GRAMMAR = f"start: {json_rule(SCHEMA)}"
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
MODELS = [BASE, *ADAPTERS]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("adapters")) as server:
        yield server


@pytest.fixture(scope="module")
def grammars(served: Served) -> Grammars:
    tokenizer = served.service.tokens.tokenizer
    return Grammars(tokenizer, len(tokenizer) + 7, {tokenizer.eos_token_id})  # as of a model with some rows to spare


def ask(served: Served, model: str, **fields: Any) -> Any:
    fields = {"messages": [user("cat")], "max_tokens": 120, "response_format": FORMAT, **fields}
    return served.openai.chat.completions.create(model=model, **fields)


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("model", MODELS)
def test_an_answer_is_of_the_schema(served: Served, model: str, temperature: float) -> None:
    answers = ask(served, model, temperature=temperature, n=4, seed=3).choices
    whole = [one for one in answers if one.finish_reason == "stop"]
    assert len(whole) >= 2  # an integer has no end of its own
    for one in whole:
        assert Animal.model_validate_json(one.message.content)
    if temperature:
        assert len({one.message.content for one in answers}) > 1


def test_the_client_parses_it_and_streams_it(served: Served) -> None:
    how: Any = {"model": "ends", "messages": [user("dog")], "max_tokens": 120, "temperature": 0}
    parsed = served.openai.chat.completions.parse(response_format=Animal, **how).choices[0].message
    assert isinstance(parsed.parsed, Animal)
    parts = served.openai.chat.completions.create(response_format=FORMAT, stream=True, **how)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == parsed.content


def test_any_object_with_stop_and_logprobs(served: Served) -> None:
    how: Any = {"response_format": {"type": "json_object"}, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = ask(served, "all", **how).choices[0]
    assert answer.message.content.lstrip().startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    said = "".join(one.token for one in answer.logprobs.content)
    assert answer.message.content == said.replace("<|end|>", "")
    cut = ask(served, "all", **how, stop=["{"]).choices[0]
    assert (cut.finish_reason, cut.message.content.strip()) == ("stop", "")


def test_the_same_seed_is_the_same_answer(served: Served) -> None:
    first, again = (ask(served, "ends", temperature=1.0, seed=5).choices[0].message.content for _ in range(2))
    assert first == again


def test_of_completions_too(served: Served) -> None:
    answer = served.openai.completions.create(
        model=BASE, prompt="A cat", max_tokens=120, temperature=0, extra_body={"response_format": FORMAT}
    )
    assert Animal.model_validate_json(answer.choices[0].text)


def test_neighbours_without_a_form_say_what_they_say_alone(served: Served) -> None:
    async def every() -> list[Any]:
        async with served.async_openai as client:
            fields: Any = {"max_tokens": 8, "temperature": 0, "messages": [user("cat")]}
            free = [client.chat.completions.create(model=model, **fields) for model in MODELS * 2]
            held = [client.chat.completions.create(model=m, response_format=FORMAT, **fields) for m in MODELS * 2]
            return await asyncio.gather(*(one for pair in zip(free, held, strict=True) for one in pair))

    answers = asyncio.run(every())[::2]
    wanted = [served.expected_text(served.chat_ids("cat"), model) for model in MODELS * 2]
    assert [one.choices[0].message.content for one in answers] == wanted


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "creature"}, "creature"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "object", "not": {"type": "null"}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-a"),
        ({"enum": ["x" * LARGEST]}, str(LARGEST)),
    ],
)
def test_what_cannot_be_held_to_is_refused_by_name(served: Served, schema: Any, said: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=said) as error:
        ask(served, BASE, response_format=form)
    assert error.value.param == "response_format"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
        ({"response_format": FORMAT, "extra_body": {"ignore_eos": True}}, "ignore_eos"),
    ],
)
def test_mistakes(served: Served, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(served, BASE, **fields)
    assert error.value.param == param


def test_whatever_is_drawn_is_valid(grammars: Grammars, served: Served) -> None:
    """From logits that want anything else, a model's with more rows than the tokenizer has tokens."""
    tokenizer = served.service.tokens.tokenizer
    draw = torch.Generator().manual_seed(0)
    form = grammars.form(GRAMMAR, "response_format")
    for seed in range(12):
        own: Form = form.copy()
        sampler, ids = Sampler(Sampling(seed=seed, top_k=50), [], own), list[int]()
        while not ids or ids[-1] != tokenizer.eos_token_id:
            assert len(ids) < 400
            ids += choose(torch.randn(1, len(tokenizer) + 7, generator=draw) * 3, [sampler])
        assert Animal.model_validate_json(tokenizer.decode(ids[:-1]))
        assert not own.failed


def test_a_model_whose_answers_cannot_end_has_no_forms(served: Served) -> None:
    with pytest.raises(BadRequest, match="end token"):
        Grammars(served.service.tokens.tokenizer, 4096, ()).form(GRAMMAR, "response_format")


def test_a_token_against_the_form_is_a_failure(grammars: Grammars, served: Served) -> None:
    form = grammars.form(GRAMMAR, "response_format")
    form.saw(served.service.tokens.tokenizer("cat", add_special_tokens=False)["input_ids"][0])
    assert form.failed
