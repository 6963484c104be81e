"""The openai client against `trimtab serve --engine vllm`, a process of its own. Run by `make vllm`."""

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from served import ADAPTERS, BASE, MODEL, Served, is_ready, make_adapters, until, user

from trimtab.runs.models import load_tokenizer
from trimtab.serve.answers import Tokens

pytestmark = pytest.mark.vllm
PORT = 8377
MODELS = [BASE, *ADAPTERS]
PROMPT = "The cat and the dog went"
LONG = PROMPT + " down to the river and over the hills, where the old man had lived for a long time, far from us."


class _Reference(Served):
    """The served answers' truth, without the service, which is in another process."""

    def ids(self, prompt: str) -> list[int]:
        return Tokens(load_tokenizer(MODEL)).of_text(prompt)

    def text(self, ids: list[int]) -> str:
        return str(load_tokenizer(MODEL).decode(ids, skip_special_tokens=True))


@contextmanager
def serving(folder: Path, port: int, *vllm: str, **popen: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready."""
    options = ["kv_cache_memory_bytes=67108864", "enforce_eager=true", *vllm]
    command = [sys.executable, "-m", "trimtab.cli", "serve", MODEL, "--adapters", str(folder), "--engine", "vllm"]
    command += ["--dtype", "float32", "--max-len", "512", "--slots", "8", "--port", str(port)]
    process = subprocess.Popen([*command, *(part for one in options for part in ("--vllm", one))], **popen)
    try:
        until(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{port}"), 600)
        assert process.poll() is None
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters")
    make_adapters(folder)
    with serving(folder, PORT) as process:
        yield _Reference(None, f"http://127.0.0.1:{PORT}", folder)  # type: ignore[arg-type]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_the_answers_to_compare_differ(served: Served) -> None:
    texts = [served.expected_text(served.ids(PROMPT), model) for model in MODELS]
    assert all(texts) and len(set(texts)) == len(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_answers_are_what_generate_says(served: Served, model: str) -> None:
    answer = served.openai.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == served.expected_text(served.ids(PROMPT), model)
    chat: Any = {"model": model, "messages": [user("cat")], "max_tokens": 8, "temperature": 0}
    ids = served.chat_ids("cat")
    assert served.openai.chat.completions.create(**chat).choices[0].message.content == served.expected_text(ids, model)
    parts = served.openai.chat.completions.create(stream=True, **chat)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == served.expected_text(ids, model)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.4])
def test_the_scale_of_a_request(served: Served, scale: float) -> None:
    answer = served.openai.completions.create(
        model="ends", prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"reft_scale": scale}
    )
    assert answer.choices[0].text == served.expected_text(served.ids(PROMPT), "ends", scale=scale)


def test_several_adapters_edit_one_request(served: Served) -> None:
    """In the order that they are named in, on a prompt whose answer tells."""
    orders = [(("ends", "all"), (1.0, 0.5)), (("all", "ends"), (0.5, 1.0))]

    def wanted(ids: list[int]) -> list[str]:
        return [served.expected_text(ids, names, 8, scales) for names, scales in orders]

    words = served.ids(LONG)
    ids = next(words[:n] for n in range(3, len(words)) if len(set(wanted(words[:n]))) == 2)
    for (names, scales), text in zip(orders, wanted(ids), strict=True):
        asked = [n if s == 1 else {"name": n, "scale": s} for n, s in zip(names, scales, strict=True)]
        answer = served.openai.completions.create(
            model=BASE, prompt=ids, max_tokens=8, temperature=0, extra_body={"reft_adapters": asked}
        )
        assert answer.choices[0].text == text


def test_what_this_engine_does_not_do_is_said(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="--engine transformers") as caught:
        served.openai.completions.create(
            model=BASE, prompt=PROMPT, extra_body={"response_format": {"type": "json_object"}}
        )
    assert caught.value.param == "response_format"


def test_many_at_once_by_the_async_client(served: Served) -> None:
    words, draw = served.ids(LONG), random.Random(0)
    jobs = [(draw.choice(MODELS), words[: draw.randint(3, len(words))], draw.random() < 0.5) for _ in range(33)]

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


def test_an_unknown_name_is_refused_and_the_engine_lives(served: Served) -> None:
    for _ in range(3):
        with pytest.raises(openai.NotFoundError) as caught:
            served.openai.completions.create(model="nobody", prompt=PROMPT)
        assert caught.value.code == "model_not_found"
    for field in ("vllm_xargs", "extra_args", "trimtab"):
        with pytest.raises(openai.BadRequestError):
            served.openai.completions.create(model=BASE, prompt=PROMPT, extra_body={field: {"trimtab": {}}})
    assert served.client.get("/ready").status_code == 200
    test_answers_are_what_generate_says(served, "ends")


def test_adapters_come_and_go_while_it_runs(served: Served) -> None:
    def ask(name: str) -> str:
        return served.openai.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text

    def post(route: str, **body: Any) -> None:
        served.client.post(f"/v1/{route}_lora_adapter", json=body).raise_for_status()

    post("load", lora_name="other", lora_path="ends")
    assert ask("other") == served.expected_text(served.ids(PROMPT), "ends")
    post("load", lora_name="other", lora_path="all", load_inplace=True)
    assert ask("other") == served.expected_text(served.ids(PROMPT), "all")
    post("unload", lora_name="other")
    with pytest.raises(openai.NotFoundError):
        ask("other")


def test_stop_strings_and_logprobs(served: Served) -> None:
    ids = served.ids(PROMPT)
    whole = served.expected_text(ids, "ends", 8)
    stop = whole[len(whole) // 2 :][:2]
    answer = served.openai.completions.create(
        model="ends", prompt=PROMPT, max_tokens=8, temperature=0, stop=[stop], logprobs=3
    )
    assert answer.choices[0].text == whole[: whole.index(stop)] and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None and len(answer.choices[0].logprobs.top_logprobs[0]) == 3  # type: ignore[index,arg-type]


@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_is_left_of_a_server_that_was_killed(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if processes > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with serving(tmp_path, PORT + processes, f"tensor_parallel_size={processes}", stdout=subprocess.PIPE) as server:
        server.kill()
        server.communicate(timeout=60)  # to the end of what all its processes write to
