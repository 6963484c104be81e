"""The openai client against a real server: every answer is plain `generate`'s."""

import asyncio
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from served import ADAPTERS, BASE, MODEL, Served, serving, user

from trimtab.adapter.explain import explain
from trimtab.serve.rows import Limits

MODELS = [BASE, *ADAPTERS]
PROMPT = "The cat and the dog went"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("adapters")) as server:
        yield server


@pytest.mark.parametrize("model", MODELS)
def test_a_completion_is_what_generate_says(served: Served, model: str) -> None:
    answer = served.openai.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == served.expected_text(served.ids(PROMPT), model)
    assert answer.model == model and answer.object == "text_completion"


@pytest.mark.parametrize("model", MODELS)
def test_a_chat_completion_is_edited_to_the_end_of_its_template(served: Served, model: str) -> None:
    answer = served.openai.chat.completions.create(model=model, messages=[user("cat")], max_tokens=8, temperature=0)  # type: ignore[list-item]
    ids = served.chat_ids("cat")
    assert served.service.tokens.tokenizer.decode(ids) == "<|bos|><|user|>cat<|assistant|>"
    assert answer.choices[0].message.content == served.expected_text(ids, model)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)


def test_an_assistants_last_message_goes_on(served: Served) -> None:
    said: Any = [user("cat"), {"role": "assistant", "content": "ca"}]
    answer = served.openai.chat.completions.create(model="ends", messages=said, max_tokens=6, temperature=0)
    ids = served.service.tokens.tokenizer("<|bos|><|user|>cat<|assistant|>ca", add_special_tokens=False)["input_ids"]
    wanted = served.expected(ids, "ends", 6, prompt=len(served.chat_ids("cat")))  # its words are no prompt
    assert answer.choices[0].message.content == served.text(wanted) != served.expected_text(ids, "ends", 6)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.4, 2.0])
def test_the_scale_of_a_request(served: Served, scale: float) -> None:
    answer = served.openai.completions.create(
        model=f"{BASE}:ends", prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"reft_scale": scale}
    )
    assert answer.choices[0].text == served.expected_text(served.ids(PROMPT), "ends", scale=scale)


@pytest.mark.parametrize("prompt", ["texts", "ids", "one"])
def test_several_prompts_and_token_ids(served: Served, prompt: str) -> None:
    texts = [PROMPT, "A river", "She said that"]
    ids = [served.ids(text) for text in texts]
    given: Any = {"texts": texts, "ids": ids, "one": ids[0]}[prompt]
    answer = served.openai.completions.create(model="all", prompt=given, max_tokens=5, temperature=0)
    wanted = ids if prompt != "one" else ids[:1]
    assert [c.text for c in answer.choices] == [served.expected_text(one, "all", 5) for one in wanted]
    assert [c.index for c in answer.choices] == list(range(len(wanted)))
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, wanted))


@pytest.mark.parametrize("model", [BASE, "ends"])
def test_a_stream_is_the_whole_answer_in_parts(served: Served, model: str) -> None:
    parts = list(
        served.openai.chat.completions.create(
            model=model,
            messages=[user("dog")],  # type: ignore[list-item]
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts[:-1])
    assert text == served.expected_text(served.chat_ids("dog"), model)
    assert parts[0].choices[0].delta.role == "assistant" and parts[1].choices[0].delta.role is None
    assert [p.choices[0].finish_reason for p in parts[:-2]] == [None] * (len(parts) - 2)
    assert parts[-2].choices[0].finish_reason in ("stop", "length")
    assert parts[-1].choices == [] and parts[-1].usage is not None
    assert parts[-1].usage.total_tokens == parts[-1].usage.prompt_tokens + parts[-1].usage.completion_tokens


def test_many_at_once_by_the_async_client(served: Served) -> None:
    """Streams and whole answers of all adapters side by side, on prompts that share beginnings."""
    words = served.ids(PROMPT + " down to the river and over the hills, where the old man had lived for a long time.")
    draw = random.Random(0)
    jobs = [(draw.choice(MODELS), words[: draw.randint(3, len(words))], draw.random() < 0.5) for _ in range(32)]

    async def ask(client: openai.AsyncOpenAI, model: str, ids: list[int], stream: bool) -> str:
        fields: Any = {"model": model, "prompt": ids, "max_tokens": 6, "temperature": 0}
        if not stream:
            return (await client.completions.create(**fields)).choices[0].text
        return "".join([part.choices[0].text async for part in await client.completions.create(stream=True, **fields)])

    async def every() -> list[str]:
        async with served.async_openai as client:
            return await asyncio.gather(*(ask(client, *job) for job in jobs))

    for (model, ids, _), text in zip(jobs, asyncio.run(every()), strict=True):
        assert text == served.expected_text(ids, model, 6), (model, len(ids))


def test_a_seed_gives_the_same_answers_whatever_runs_beside(served: Served) -> None:
    def ask(seed: int) -> list[str]:
        answer = served.openai.completions.create(model="ends", prompt=PROMPT, n=3, seed=seed, max_tokens=8)
        return [choice.text for choice in answer.choices]

    alone = ask(7)
    assert len(set(alone)) > 1 and ask(8) != alone
    with served.openai.completions.create(model="all", prompt=PROMPT, max_tokens=200, stream=True):
        assert ask(7) == alone


def test_stop_strings_end_the_text_before_them(served: Served) -> None:
    whole = served.expected_text(served.ids(PROMPT), most=12)
    stop = whole[3:6]
    for stream in (False, True):
        fields: Any = {"model": BASE, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stop": [stop, "never"]}
        answer: Any = served.openai.completions.create(stream=stream, **fields)
        parts = list(answer) if stream else [answer]
        assert "".join(part.choices[0].text for part in parts) == whole[: whole.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_logprobs_are_the_models(served: Served) -> None:
    ids = served.ids(PROMPT)
    answer = served.openai.completions.create(
        model="ends", prompt=ids, max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.token_logprobs is not None
    every = ids + served.expected(ids, "ends", 3)
    with torch.no_grad(), served._reference("ends", 1.0) as model:
        logits = model(input_ids=torch.tensor([every]), prompt_lengths=torch.tensor([len(ids)])).logits[0]
    wanted = logits.log_softmax(-1)[torch.arange(len(every) - 1), every[1:]]
    assert logprobs.token_logprobs[0] is None
    assert torch.allclose(torch.tensor(logprobs.token_logprobs[1:]), wanted, atol=1e-4)
    assert choice.text == served.text(ids) + served.text(every[len(ids) :])
    assert logprobs.text_offset is not None and logprobs.top_logprobs is not None
    assert [choice.text[i : i + len(t)] for i, t in zip(logprobs.text_offset, logprobs.tokens, strict=True)] == (
        logprobs.tokens
    )
    assert all(top is None or 2 <= len(top) <= 3 for top in logprobs.top_logprobs)


def test_a_likelier_token_of_the_same_text_is_not_hidden(served: Served) -> None:
    """Tokens of half a character all read alike; lm-eval tells by the likeliest whether a text is the model's own."""
    prompt = [*served.ids("The cat and the dog went"), 110, 99]  # where another half, 228, is likelier than 99
    answer = served.openai.completions.create(model=BASE, prompt=prompt, max_tokens=0, logprobs=1, echo=True)
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    (text, likeliest), *rest = (found.top_logprobs[-1] or {}).items()
    assert text == "\ufffd" and not rest and likeliest > found.token_logprobs[-1]


def test_a_prompt_is_scored_without_an_answer(served: Served) -> None:
    answer = served.openai.completions.create(model="ends", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert answer.choices[0].text == PROMPT and len(logprobs.token_logprobs) == len(served.ids(PROMPT))


def test_chat_logprobs(served: Served) -> None:
    answer = served.openai.chat.completions.create(
        model="all",
        messages=[user("cat")],  # type: ignore[list-item]
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    for one in logprobs.content:
        assert len(one.top_logprobs) == 3 and one.top_logprobs[0].logprob == max(t.logprob for t in one.top_logprobs)
        assert one.token == one.top_logprobs[0].token and math.isclose(one.logprob, one.top_logprobs[0].logprob)


def test_what_the_prefix_store_gave_is_counted(served: Served) -> None:
    prompt = " ".join(str(i) for i in range(40))
    used = [
        served.openai.completions.create(model=m, prompt=prompt, max_tokens=1).usage for m in (BASE, "all", "new", BASE)
    ]
    cached = [u.prompt_tokens_details.cached_tokens for u in used if u is not None and u.prompt_tokens_details]
    assert cached[0] == cached[1] == 0  # `all` edits from the first token on
    assert cached[2] == cached[3] and cached[2] is not None and cached[2] > 30  # `new` edits no token of a prompt


def test_models(served: Served) -> None:
    found = served.openai.models.list().data
    assert [model.id for model in found] == [BASE, *sorted(ADAPTERS)]
    assert [getattr(model, "parent", 0) for model in found] == [None] + [BASE] * len(ADAPTERS)
    assert served.openai.models.retrieve("ends").id == "ends"
    assert served.openai.models.retrieve(BASE).id == BASE
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("nobody")


@pytest.mark.parametrize("model", ["nobody", f"{BASE}:nobody", "ends:", f"{BASE}:", "nobody:ends", "../ends", ""])
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_never_the_base(served: Served, model: str, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.openai.completions.create(model=model, prompt=PROMPT, stream=stream)  # type: ignore[call-overload]
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_the_base_model_has_no_edit_to_scale(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.completions.create(model=BASE, prompt=PROMPT, extra_body={"reft_scale": 0.5})
    assert caught.value.param == "reft_scale"


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_docs_run(served: Served, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(MODEL).parents[1] / page).read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "127.0.0.1:8000" in block)
    served.client.post("/v1/load_lora_adapter", json={"lora_name": "plural", "lora_path": "ends", "load_inplace": True})
    exec("import openai\n" + code.replace("http://127.0.0.1:8000", served.url), {})
    served.client.post("/v1/unload_lora_adapter", json={"lora_name": "plural"})
    if "print" in code:
        assert capsys.readouterr().out.strip() == served.expected_text(served.chat_ids("cat"), "ends", 64).strip()


@pytest.mark.parametrize("chunk", [7, 512])
def test_how_far_each_token_of_a_prompt_is_moved(tmp_path: Path, chunk: int) -> None:
    """Against the hidden states of a model of its own, before and behind each edit; asking changes no answer."""
    with serving(tmp_path, Limits(chunk=chunk)) as served:
        ids, said = served.ids(PROMPT + " down to the river"), {"temperature": 0, "max_tokens": 4}
        for model, scale in (("ends", 1.0), ("apart", -0.5), ("all", 1.0), ("new", 1.0), (BASE, 1.0)):
            body: Any = {"model": model, "prompt": [ids, ids[:5]], "extra_body": {"reft_moves": True}, **said}
            if scale != 1:
                body["extra_body"]["reft_scale"] = scale
            for _ in range(2):  # the second time the store has the prompt
                choices = served.openai.completions.create(**body).choices
                for choice, prompt in zip(choices, (ids, ids[:5]), strict=True):
                    assert choice.text == served.expected_text(prompt, model, 4, scale)
                    told = choice.reft_moves  # type: ignore[attr-defined]
                    assert told["tokens"] == [served.service.tokens.text(token) for token in prompt]
                    wanted = moved(served, model, scale, prompt)
                    torch.testing.assert_close(torch.tensor(told["moves"]), wanted, atol=2e-4, rtol=1e-3)
        stream = served.openai.chat.completions.create(
            model="ends", messages=[user("cat")], stream=True, extra_body={"reft_moves": True}, **said
        )  # type: ignore[call-overload]
        told = [part.choices[0].model_extra.get("reft_moves") for part in stream if part.choices]
        assert told[0]["moves"] and not any(told[1:])


def moved(served: Served, model: str, scale: float, ids: list[int]) -> torch.Tensor:
    """(tokens,) as `explain` finds it by hooks on a model of its own, summed over blocks."""
    if model == BASE:
        return torch.zeros(len(ids))
    with torch.no_grad(), served._reference(model, scale) as reference:
        places = explain(reference, torch.tensor(ids), max_new_tokens=1).places
    return torch.tensor([[move or 0.0 for move in place.moved] for place in places]).sum(0)
