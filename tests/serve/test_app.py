"""The HTTP server: what it refuses and how it says so, who may do what, and its other routes."""

import base64
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Command
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans
from served import ADAPTERS, BASE, MODEL, Served, listening, serving, user

from trimtab.cli.serve import _named
from trimtab.serve.app import create_app
from trimtab.serve.engine import Event
from trimtab.serve.guard import Access
from trimtab.serve.metrics import Metrics
from trimtab.serve.rows import Limits
from trimtab.serve.server import check_exposure
from trimtab.serve.service import Service

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [user("cat")]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("adapters"), Limits(max_len=64), body_bytes=100_000) as server:
        yield server


def text(**fields: Any) -> tuple[str, Any]:
    return TEXT, {"model": "ends", "prompt": "cat", "max_tokens": 1} | fields


def chat(**fields: Any) -> tuple[str, Any]:
    return CHAT, {"model": "ends", "messages": MESSAGES, "max_tokens": 1} | fields


UNSUPPORTED = {
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "audio": {"voice": "alloy", "format": "wav"},
    "modalities": ["audio"],
    "prediction": {"type": "content", "content": "a"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
    "best_of": 2,
    "suffix": "a",
    "guided_json": {},
    "structured_outputs": {"json": {}},
    "chat_template_kwargs": {"a": 1},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
@pytest.mark.parametrize("make", [text, chat])
def test_what_is_not_done_is_refused_by_name(served: Served, field: str, make: Any) -> None:
    path, body = make(**{field: UNSUPPORTED[field]})
    answer = served.client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", field)
    assert field in error["message"] and error["type"] == "invalid_request_error"


HARMLESS: dict[str, Any] = {
    **dict.fromkeys(UNSUPPORTED),
    "tools": [],
    "tool_choice": "none",
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "safety_identifier": "me",
    "prompt_cache_key": "k",
    "response_format": {"type": "text"},
    "best_of": 1,
    "temperature": None,
    "stop": None,
    "stream_options": None,
    "seed": None,
}


def test_what_changes_nothing_is_taken(served: Served) -> None:
    for path, body in (text(**HARMLESS), chat(**HARMLESS)):
        answer = served.client.post(path, json=body)
        assert answer.status_code == 200, answer.text


def test_a_whole_number_is_an_integer_however_json_writes_it(served: Served) -> None:
    path, body = text(max_tokens=3.0, seed=7.0, temperature=1.0)
    answer = served.client.post(path, json=body)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3, answer.text


TOOLS = [{"type": "function", "function": {"name": "f"}}]
WRONG: dict[str, tuple[tuple[str, Any], str | None, str]] = {
    "unknown": (text(temprature=1), "temprature", "unknown_parameter"),
    "unknown inside": (chat(messages=[{"role": "user", "contents": "a"}]), "messages.0.contents", "unknown_parameter"),
    "missing": ((TEXT, {"prompt": "a"}), "model", "missing_required_parameter"),
    "null model": (text(model=None), "model", "missing_required_parameter"),
    "no prompt": ((TEXT, {"model": "ends"}), "prompt", "missing_required_parameter"),
    "empty prompt": (text(prompt=""), "prompt", "invalid_value"),
    "empty list": (text(prompt=[]), "prompt", "invalid_value"),
    "empty ids": (text(prompt=[[]]), "prompt", "invalid_value"),
    "mixed prompt": (text(prompt=["a", 1]), "prompt", "invalid_value"),
    "number prompt": (text(prompt=3), "prompt", "invalid_value"),
    "negative id": (text(prompt=[-1]), "prompt", "invalid_value"),
    "id outside": (text(prompt=[4096]), "prompt", "invalid_value"),
    "half a character": (text(prompt="a\ud800"), "prompt", "invalid_value"),
    "a text for a number": (text(temperature="1"), "temperature", "invalid_value"),
    "too hot": (text(temperature=3), "temperature", "invalid_value"),
    "no top_p": (text(top_p=0), "top_p", "invalid_value"),
    "half a token": (text(max_tokens=1.5), "max_tokens", "invalid_value"),
    "no tokens": (text(max_tokens=0), "max_tokens", "invalid_value"),
    "too many tokens": (text(max_tokens=64), "prompt", "context_length_exceeded"),
    "too long": (text(prompt=[5] * 65), "prompt", "context_length_exceeded"),
    "n": (text(n=0), "n", "invalid_value"),
    "n by prompts": (text(n=100, prompt=["a", "b"]), "n", "invalid_value"),
    "bias of a word": (text(logit_bias={"cat": 1}), "logit_bias.cat", "invalid_value"),
    "bias outside": (text(logit_bias={"4096": 1}), "logit_bias", "invalid_value"),
    "bias too large": (text(logit_bias={"5": 101}), "logit_bias.5", "invalid_value"),
    "logprobs": (text(logprobs=21), "logprobs", "invalid_value"),
    "empty stop": (text(stop=""), "stop", "invalid_value"),
    "scale": (text(reft_scale=1e9), "reft_scale", "invalid_value"),
    "no messages": (chat(messages=[]), "messages", "invalid_value"),
    "a text for messages": (chat(messages="cat"), "messages", "invalid_value"),
    "role": (chat(messages=[{"role": "cat", "content": "a"}]), "messages.0.role", "invalid_value"),
    "image": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "messages.0.content",
        "invalid_value",
    ),
    "tool calls": (
        chat(messages=[{"role": "assistant", "content": "a", "tool_calls": [{}]}]),
        "messages",
        "invalid_value",
    ),
    "says nothing": (chat(messages=[{"role": "user"}]), "messages.0", "missing_required_parameter"),
    "tools of a text": (text(tools=TOOLS), "tools", "unsupported_parameter"),
    "a choice of a text": (text(tool_choice="required"), "tool_choice", "unsupported_parameter"),
    "a choice of nothing": (chat(tool_choice="required"), "tool_choice", "invalid_value"),
    "tools without a place": (chat(tools=TOOLS), "messages", "invalid_value"),
    "no object": ((TEXT, [1]), None, "invalid_json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_told_what_is_wrong(served: Served, name: str) -> None:
    (path, body), param, code = WRONG[name]
    answer = served.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code), error
    assert error["param"] == param, error
    assert error["message"].endswith((".", "?")) and "Traceback" not in error["message"]


def test_the_nearest_parameter_is_named(served: Served) -> None:
    path, body = chat(max_token=3)
    said = served.client.post(path, json=body).json()["error"]["message"]
    assert said == "max_token: not a parameter of this request; did you mean 'max_tokens'?"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 20_000, "application/json", 400),
        (json.dumps(text()[1]).encode(), "text/plain", 400),  # what a foreign page may send unasked
        (b" " * 100_001, "application/json", 413),
    ],
)
def test_a_body_that_is_no_request(served: Served, content: bytes, kind: str, status: int) -> None:
    answer = served.client.post(TEXT, content=content, headers={"content-type": kind})
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_of_unknown_length_is_cut_off(served: Served) -> None:
    answer = served.client.post(TEXT, content=(b" " * 1000 for _ in range(200)))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/v2", 404, "not_found"), ("DELETE", "/v1/models", 405, "method_not_allowed"), ("GET", TEXT, 405, None)],
)
def test_no_such_route(served: Served, method: str, path: str, status: int, code: str | None) -> None:
    answer = served.client.request(method, path)
    assert answer.status_code == status and (code is None or answer.json()["error"]["code"] == code)


def test_tokenize(served: Served) -> None:
    assert served.client.post("/tokenize", json={"prompt": "cat"}).json()["tokens"] == served.ids("cat")
    assert served.client.post("/tokenize", json={"messages": MESSAGES, "model": "ends"}).json()["count"] == 5
    for body in ({}, {"prompt": "a", "messages": MESSAGES}):
        assert served.client.post("/tokenize", json=body).json()["error"]["param"] == "prompt"
    assert served.client.post("/tokenize", json={"prompt": "a", "model": "nobody"}).status_code == 404


# Several adapters on one request.


@pytest.mark.parametrize("order", [("ends", "all"), ("all", "ends"), ("apart", "new", "ends")])
def test_several_adapters_edit_as_in_peft(served: Served, order: tuple[str, ...]) -> None:
    scales = dict(zip(order, (1.0, -0.5, 2.0), strict=False))
    ids = served.ids("the cat sat on the mat")
    asked = [name if scale == 1 else {"name": name, "scale": scale} for name, scale in scales.items()]
    body = {"model": BASE, "prompt": ids, "max_tokens": 8, "temperature": 0}
    answer = served.client.post(TEXT, json=body | {"reft_adapters": asked}).json()
    wanted = served.expected_text(ids, model=order, scale=tuple(scales.values()))
    assert answer["choices"][0]["text"] == wanted
    assert wanted not in [served.expected_text(ids, model) for model in (BASE, *order)]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "ends", "reft_adapters": ["all"]}, 400, "model"),
        ({"reft_adapters": ["all", "nobody"]}, 404, "reft_adapters"),
        ({"reft_adapters": [BASE]}, 404, "reft_adapters"),
        ({"reft_adapters": ["all", {"name": "all"}]}, 400, "reft_adapters"),
        ({"reft_adapters": ["all"], "reft_scale": 2}, 400, "reft_adapters"),
        ({"reft_adapters": ["all"] * 9}, 400, "reft_adapters"),
        ({"reft_adapters": [{"name": "all", "scale": 101}]}, 400, None),
    ],
)
def test_wrong_adapters_of_a_request(served: Served, fields: Any, status: int, param: str | None) -> None:
    answer = served.client.post(TEXT, json={"model": BASE, "prompt": "cat"} | fields)
    assert answer.status_code == status, answer.text
    assert param in (None, answer.json()["error"]["param"])


# Who may do what.

KEYS = Access(keys=("first", "second"), admin_key="chief")
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(served: Served) -> Iterator[httpx.Client]:
    """The same service behind keys."""
    with listening(create_app(served.service, KEYS)) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    ("key", "path", "status"),
    [
        ("first", "/v1/models", 200),
        ("second", "/v1/models", 200),
        ("chief", "/v1/models", 200),
        ("third", "/v1/models", 401),
        ("", "/v1/models", 401),
        ("firs", "/v1/models", 401),
        ("first", LOAD, 401),
        ("chief", LOAD, 400),
        ("", "/metrics", 401),
        ("", "/openapi.json", 401),
        ("", "/nowhere", 401),
        ("", "/health", 200),
        ("", "/ready", 200),
        ("", "/", 200),
    ],
)
def test_keys(guarded: httpx.Client, key: str, path: str, status: int) -> None:
    send = guarded.post if path == LOAD else guarded.get
    answer = send(path, headers=bearer(key) if key else {}, **({"json": {}} if path == LOAD else {}))
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_keys_are_asked_for_below_a_mount_too(served: Served) -> None:
    whole = FastAPI()
    whole.mount("/llm", create_app(served.service, KEYS))
    with listening(whole) as url:
        for route in (LOAD, UNLOAD):
            assert (
                httpx.post(f"{url}/llm{route}", json={"lora_name": "ends"}, headers=bearer("first")).status_code == 401
            )
        answer = httpx.post(f"{url}/llm{UNLOAD}", json={"lora_name": "nobody"}, headers=bearer("chief"))
        assert answer.status_code == 404 and answer.json()["error"]["param"] == "lora_name"
        assert httpx.get(f"{url}/llm/health").status_code == 200
        assert httpx.get(f"{url}/llm/v1/models").status_code == 401


def test_probes_may_ask_for_the_head_alone(guarded: httpx.Client) -> None:
    for path in ("/", "/health", "/ready"):
        answer = guarded.head(path)
        assert answer.status_code == 200 and not answer.content


@pytest.mark.parametrize("name", ["x" * 256, "é" * 200])
def test_a_name_too_long_for_a_file_is_unknown(served: Served, name: str) -> None:
    for answer in (
        served.client.post(TEXT, json=text(model=name)[1]),
        served.client.get(f"/v1/models/{name}"),
        served.client.post(UNLOAD, json={"lora_name": name}),
    ):
        assert answer.status_code == 404, answer.text


def test_with_keys_but_no_admin_key_there_are_no_admin_routes(served: Served) -> None:
    with listening(create_app(served.service, Access(keys=("first",)))) as url:
        answer = httpx.post(f"{url}{LOAD}", json={}, headers=bearer("first"))
        assert answer.status_code == 404
        assert httpx.post(f"{url}{LOAD}", json={}).status_code == 401
        assert LOAD not in httpx.get(f"{url}/openapi.json", headers=bearer("first")).json()["paths"]


def test_callers_of_different_keys_share_no_prefix(guarded: httpx.Client) -> None:
    body = {"model": BASE, "prompt": " ".join("abcdefghijklmnopqrstuvwxy"), "max_tokens": 1}
    cached = [
        guarded.post(TEXT, json=body, headers=bearer(key)).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for key in ("first", "first", "second")
    ]
    assert cached[0] == 0 and cached[1] > 0 and cached[2] == 0


def test_callers_of_different_keys_share_prefixes_where_they_are_one_tenant(served: Served) -> None:
    body = {"model": BASE, "prompt": " ".join("zyxwvutsrqponmlkjihgfedcb"), "max_tokens": 1}
    with listening(create_app(served.service, Access(keys=("first", "second"), one_tenant=True))) as url:
        answers = [httpx.post(f"{url}{TEXT}", json=body, headers=bearer(key)).json() for key in ("first", "second")]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[0] == 0 and cached[1] > 0


@pytest.mark.parametrize(("share", "one_tenant", "stores"), [("tenant", 0, 1), ("all", 1, 1), ("off", 0, 0)])
def test_who_shares_prefixes(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch, share: str, one_tenant: bool, stores: bool
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("trimtab.serve.server.Server.run", lambda server: seen.append(server))
    assert trimtab("serve", MODEL, "--api-key", "one", "--share-prefix", share)[0] == 0
    app = seen[0].config.app
    assert app.user_middleware[0].kwargs["access"].one_tenant == one_tenant
    assert bool(app.state.service.engine.limits.prefix_bytes) == stores


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Host": "["},
        {"Origin": "http://127.0.0.1:1"},
    ],
)
def test_without_a_key_foreign_pages_are_refused(served: Served, headers: dict[str, str]) -> None:
    answer = served.client.post(TEXT, json=text()[1], headers=headers)
    assert answer.status_code in (400, 403), answer.text  # 400: by the HTTP parser
    assert "access-control-allow-origin" not in answer.headers
    own = served.client.post(TEXT, json=text()[1], headers={"Origin": served.url})
    assert own.status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_without_a_key_only_this_machine_may_connect(host: str) -> None:
    with pytest.raises(ValueError, match="--api-key"):
        check_exposure(host, Access())
    check_exposure(host, KEYS)
    for own in ("127.0.0.1", "localhost", "::1"):
        check_exposure(own, Access())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines connect: give --api-key"),
        (["--host", "0.0.0.0", "--api-key", ""], "give --api-key"),
        (["--api-key-file", "{empty}"], "holds no key"),
        (["--engine", "vllm"], "--engine vllm: vllm is not installed"),
        (["-a", "{empty}"], "no adapter there"),
        (["-a", "one={ends}", "-a", "one={ends}"], "two adapters called 'one'"),
        (["-a", "one=nowhere"], "nowhere: no adapter_config.json there"),
        (["-a", f"{BASE}={{ends}}"], f"adapter name '{BASE}'"),
        (["--max-rank", "1", "-a", "one={ends}"], "larger max_rank"),
        (["--adapters", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments(
    trimtab: Command,
    served: Served,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is told before a port is opened."""
    monkeypatch.setattr("uvicorn.Server.run", lambda self: pytest.fail("it runs"))
    places = {"{empty}": str(tmp_path / "empty"), "{ends}": str(served.adapters / "ends")}
    (tmp_path / "empty").write_text("\n")
    given = [reduce(lambda text, place: text.replace(*place), places.items(), argument) for argument in arguments]
    code, said = trimtab("serve", MODEL, *given)
    assert code == 2 and message in said.replace("\n", " "), said
    assert "Traceback" not in said


def test_the_command_serves_what_it_was_given(
    trimtab: Command, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("trimtab.serve.server.Server.run", lambda server: seen.append(server))
    monkeypatch.setenv("TRIMTAB_API_KEY", "one two")
    (tmp_path / "keys").write_text("three\nfour\n")
    options = ["-a", f"mine={served.adapters / 'ends'}", "-a", str(served.adapters / "all"), "--host", "0.0.0.0"]
    options += [
        "--api-key-file",
        str(tmp_path / "keys"),
        "--served-model-name",
        "tiny",
        "--port",
        "1234",
        "--grace",
        "3",
    ]
    code, said = trimtab("serve", MODEL, *options)
    assert code == 0 and "tiny with 2 adapters at http://0.0.0.0:1234" in said
    server = seen[0]
    service, guard = server.config.app.state.service, server.config.app.user_middleware[0]
    assert service.base == "tiny" and service.registry.names() == ["all", "mine"] and server.grace == 3
    assert guard.kwargs["access"].keys == ("one", "two", "three", "four")
    assert service.engine.health == "dead"  # closed when the server ends


# Adapters while the server runs.


def test_adapters_come_and_go(served: Served) -> None:
    for kind in ("lora", "reft"):
        load, unload = f"/v1/load_{kind}_adapter", f"/v1/unload_{kind}_adapter"
        loaded = served.client.post(load, json={"lora_name": "again", "lora_path": "ends"})
        assert loaded.status_code == 200 and loaded.json()["id"] == "again", loaded.text
        ids = served.ids("cat")
        answer = served.openai.completions.create(model="again", prompt=ids, max_tokens=6, temperature=0)
        assert answer.choices[0].text == served.expected_text(ids, "ends", 6)
        taken = served.client.post(load, json={"lora_name": "again", "lora_path": "all"})
        assert taken.status_code == 400 and taken.json()["error"]["code"] == "name_taken"
        assert taken.json()["error"]["param"] == "lora_name"
        replaced = served.client.post(load, json={"lora_name": "again", "lora_path": "all", "load_inplace": True})
        assert replaced.status_code == 200
        answer = served.openai.completions.create(model="again", prompt=ids, max_tokens=6, temperature=0)
        assert answer.choices[0].text == served.expected_text(ids, "all", 6)
        assert served.client.post(unload, json={"lora_name": "again"}).json()["deleted"] is True
        assert served.client.post(TEXT, json=text(model="again")[1]).status_code == 404
        assert served.client.post(unload, json={"lora_name": "again"}).status_code == 404


@pytest.mark.parametrize("path", ["../outside", "{outside}", "/etc", "nowhere", "", ".", "ends/../../outside", "a\0b"])
@pytest.mark.parametrize("name", ["new-one"])
def test_paths_stay_below_the_folder(served: Served, path: str, name: str) -> None:
    outside = served.adapters.parent / "outside"
    outside.mkdir(exist_ok=True)
    for file in (served.adapters / "ends").iterdir():
        (outside / file.name).write_bytes(file.read_bytes())
    body = {"lora_name": name, "lora_path": path.replace("{outside}", str(outside))}
    answer = served.client.post(LOAD, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_path", answer.text
    assert name not in [model.id for model in served.openai.models.list()]


@pytest.mark.parametrize("name", [BASE, "", "a/b", "..", ".a", "a\0", "x" * 300])
def test_names_that_no_adapter_may_have(served: Served, name: str) -> None:
    answer = served.client.post(LOAD, json={"lora_name": name, "lora_path": "ends"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_name", answer.text
    assert served.client.post(UNLOAD, json={"lora_name": name}).json()["error"]["param"] == "lora_name"


def brought(folder: Path) -> dict[str, Any]:
    weights = base64.b64encode((folder / "adapter_model.safetensors").read_bytes()).decode()
    return {"config": json.loads((folder / "adapter_config.json").read_text()), "weights": weights}


@pytest.fixture
def generous(served: Served) -> Iterator[httpx.Client]:
    """A server that takes adapters from requests, on the same engine."""
    own = served.service
    service = Service(own.engine, own.registry, own.tokens.tokenizer, BASE, takes_adapters=True)
    with listening(create_app(service, Access())) as url, httpx.Client(base_url=url) as client:
        yield client


def test_a_request_brings_its_adapter(served: Served, generous: httpx.Client) -> None:
    ids = served.ids("cat")
    for name in ADAPTERS:
        body = {"prompt": ids, "max_tokens": 6, "temperature": 0, "reft_adapter": brought(served.adapters / name)}
        answer = generous.post(TEXT, json={"model": BASE, "reft_scale": 0.5, **body}).json()
        assert answer["choices"][0]["text"] == served.expected_text(ids, name, 6, scale=0.5)
    assert generous.post(TEXT, json={"model": "ends", **body}).json()["error"]["param"] == "model"
    refused = served.client.post(TEXT, json={"model": BASE, **body})
    assert refused.status_code == 403 and refused.json()["error"]["param"] == "reft_adapter"


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "é"},
        {"weights": "AAAA"},
        {"weights": ""},
        {"config": {}},
        {"config": {"peft_type": "LORA"}},
        {"more": 1},
    ],
)
def test_a_bad_adapter_that_a_request_brings(served: Served, generous: httpx.Client, change: dict[str, Any]) -> None:
    body = {"model": BASE, "prompt": "cat", "reft_adapter": brought(served.adapters / "ends") | change}
    answer = generous.post(TEXT, json=body)
    assert answer.status_code == 400 and "reft_adapter" in answer.json()["error"]["param"]
    assert "/tmp" not in answer.text and str(served.adapters.parent) not in answer.text


def uploads(served: Served) -> int:
    """How many are kept."""
    folder = served.service.registry._uploads
    return len(list(Path(folder.name).iterdir())) if folder is not None else 0


def test_an_adapter_is_uploaded_under_a_name(served: Served) -> None:
    ids, before = served.ids("cat"), uploads(served)

    def load(name: str, **more: Any) -> httpx.Response:
        return served.client.post(
            LOAD, json={"lora_name": "sent", "reft_adapter": brought(served.adapters / name), **more}
        )

    def said() -> str:
        body = {"model": "sent", "prompt": ids, "max_tokens": 6, "temperature": 0}
        return str(served.client.post(TEXT, json=body).json()["choices"][0]["text"])

    assert load("ends").json()["id"] == "sent"
    assert said() == served.expected_text(ids, "ends", 6)
    taken = load("all")
    assert (taken.status_code, said()) == (400, served.expected_text(ids, "ends", 6))
    assert load("all", load_inplace=True).status_code == 200
    assert said() == served.expected_text(ids, "all", 6)
    served.service.registry._held.clear()  # from memory, as many others would
    assert said() == served.expected_text(ids, "all", 6)
    assert uploads(served) == before + 1
    assert served.client.post(UNLOAD, json={"lora_name": "sent"}).status_code == 200
    assert served.client.post(TEXT, json={"model": "sent", "prompt": ids}).status_code == 404
    assert uploads(served) == before


@pytest.mark.parametrize("change", [{"weights": "é"}, {"weights": "AAAA"}, {"config": {"peft_type": "LORA"}}])
def test_a_bad_upload_leaves_nothing(served: Served, change: dict[str, Any]) -> None:
    before = uploads(served)
    body = {"lora_name": "sent", "reft_adapter": brought(served.adapters / "ends") | change}
    answer = served.client.post(LOAD, json=body)
    assert answer.status_code == 400 and "reft_adapter" in answer.json()["error"]["param"]
    assert "/tmp" not in answer.text and uploads(served) == before
    both = {"lora_name": "sent", "lora_path": "ends", "reft_adapter": brought(served.adapters / "ends")}
    for wrong in (both, {"lora_name": "sent"}):
        error = served.client.post(LOAD, json=wrong).json()["error"]
        assert error["param"] == "lora_path" and "one of the two" in error["message"]


# The other routes.


def test_the_page_runs_nothing_but_its_own(served: Served) -> None:
    answer = served.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    assert "http://" not in answer.text and "https://" not in answer.text
    assert " style=" not in answer.text and " onclick=" not in answer.text


def test_a_folder_with_an_equals_sign_is_no_name(served: Served, tmp_path: Path) -> None:
    there = shutil.copytree(served.adapters / "ends", tmp_path / "lr=0.1/ends")
    assert _named([str(there)]) == {"ends": there}
    assert _named([f"own={there}"]) == {"own": there}


def test_metrics_count(served: Served) -> None:
    def read() -> dict[str, float]:
        lines = served.client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = read()
    served.client.post(TEXT, json=text(model="apart", max_tokens=5, ignore_eos=True, temperature=0)[1])
    served.client.post(TEXT, json=text(model="nobody")[1])
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown['trimtab_requests_total{route="/v1/completions",status="200"}'] == 1
    assert grown['trimtab_requests_total{route="/v1/completions",status="404"}'] == 1
    assert grown['trimtab_adapter_tokens_total{adapter="apart"}'] == 5
    assert grown['trimtab_answers_total{adapter="apart",finish_reason="length"}'] == 1
    assert grown["trimtab_time_to_first_token_seconds_count"] == 1
    assert grown["trimtab_time_between_tokens_seconds_count"] == 4
    assert grown["trimtab_generated_tokens_total"] == 5
    assert grown["trimtab_edited_rows_total"] > 0
    assert after["trimtab_requests_running"] == after["trimtab_requests_waiting"] == 0


def test_metrics_name_so_many_adapters(served: Served) -> None:
    metrics = Metrics(served.service.engine)
    for i in range(150):
        metrics.ended([f"adapter-{i}"], Event(finish_reason="stop"))
    named = set(re.findall(r'trimtab_answers_total{adapter="(.+?)"', metrics.text().decode()))
    assert len(named) == 101 and "other" in named


def test_a_request_is_named(served: Served) -> None:
    assert len(served.client.get("/health").headers["x-request-id"]) == 32
    assert served.client.get("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


# Everything that the document says, by schemathesis.

ORDINARY: dict[str, dict[str, Any]] = {
    TEXT: {"prompt": "the cat"},
    CHAT: {"messages": [{"role": "user", "content": "the cat"}]},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_route_keeps_to_the_document(served: Served, mode: str) -> None:
    import schemathesis
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    unchecked = [CHECKS.get_one("positive_data_acceptance")]  # whether a prompt fits, no schema says
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert {operation.path for operation in operations} > {TEXT, CHAT, LOAD, UNLOAD, "/v1/models", "/tokenize", "/"}
    asked: Counter[tuple[str, int]] = Counter()
    for operation in operations:
        if mode == "negative" and not operation.body:
            continue  # nothing to be wrong

        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)), ordinary=booleans())
        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def check(case: schemathesis.Case, ordinary: bool) -> None:
            if mode == "positive" and isinstance(case.body, dict) and "model" in case.body:
                case.body |= {"model": "ends"}
                if case.path in ORDINARY and ordinary:  # of what else is drawn few are answered
                    case.body = {"model": "ends", "n": 1, "max_tokens": 1} | ORDINARY[case.path]
                elif case.path in ORDINARY:
                    case.body |= {"n": 1, "max_tokens": 1}
            status = case.call_and_validate(excluded_checks=unchecked).status_code
            asked[case.path, status] += 1

        check()
    print(f"{mode}: {len(operations)} operations, answers by status {dict(asked)}")
    assert mode == "negative" or all(asked[path, 200] >= 10 for path in ORDINARY)
