"""Faults while the server runs: every request ends with the right answer or with an error, and nothing leaks."""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import load_file, save_file
from served import BASE, MODEL, Served, is_ready, make_adapters, serving, until, user
from torch import Tensor

from trimtab.serve.app import create_app
from trimtab.serve.guard import Access
from trimtab.serve.rows import Limits
from trimtab.serve.sampling import Sampler
from trimtab.serve.server import Server

TEXT, CHAT, LOAD, UNLOAD = "/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PROMPT = "The cat and the dog went"
LONG = [5 + i % 900 for i in range(480)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = Limits(slots=4, chunk=8, max_queue=5, queue_seconds=20)
    with serving(tmp_path_factory.mktemp("adapters"), limits) as server:
        yield server


def is_idle(served: Served) -> bool:
    stats = served.service.engine.stats()
    return stats.running == stats.waiting == stats.pinned_adapters == 0


def is_right(served: Served, model: str = "ends", prompt: str = PROMPT) -> bool:
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0}
    answer = served.client.post(TEXT, json=body).json()
    return bool(answer["choices"][0]["text"] == served.expected_text(served.ids(prompt), model, 6))


# Clients that leave.

WHERE = {
    "decoding a stream": ({"prompt": PROMPT, "stream": True}, lambda stats: stats.generated_tokens),
    "decoding": ({"prompt": PROMPT}, lambda stats: stats.generated_tokens),
    "several": ({"prompt": [PROMPT, "A cat"], "n": 2}, lambda stats: stats.generated_tokens),
    "prefilling a stream": ({"prompt": LONG, "stream": True}, lambda stats: stats.prompt_tokens),
    "prefilling": ({"prompt": LONG}, lambda stats: stats.prompt_tokens),
}


@pytest.mark.parametrize("where", WHERE)
def test_a_client_that_leaves_is_worked_for_no_more(served: Served, where: str) -> None:
    fields, count = WHERE[where]
    engine = served.service.engine
    counted, started = answered_by_metrics(served), engine.stats().generated_tokens
    before, total = count(engine.stats()), 480 if "prefilling" in where else 400
    body = {"model": "ends", "max_tokens": 20 if "prefilling" in where else 400, "ignore_eos": True, **fields}
    thread, leave = leaving(served, body)
    until(lambda: count(engine.stats()) > before)
    leave()
    thread.join(20)
    until(lambda: is_idle(served))
    assert count(engine.stats()) - before < total
    if where == "decoding a stream":  # what was made for it is not lost from the adapter's count
        missing = engine.stats().generated_tokens - started - (answered_by_metrics(served) - counted)
        assert 0 <= missing <= 3  # those made after it was found gone
    assert is_right(served)


def answered_by_metrics(served: Served) -> float:
    found = re.search(r'trimtab_adapter_tokens_total{adapter="ends"} (\S+)', served.client.get("/metrics").text)
    return float(found[1]) if found else 0


def leaving(served: Served, body: dict[str, Any]) -> tuple[threading.Thread, Callable[[], None]]:
    """A request whose client closes the connection at a call."""
    content = json.dumps(body).encode()
    host, port = served.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    head = f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    client.sendall(f"{head}\r\n\r\n".encode() + content)

    def read() -> None:
        while client.recv(4096):
            pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread, lambda: client.shutdown(socket.SHUT_RDWR)


def test_a_client_that_leaves_while_it_waits(served: Served) -> None:
    engine = served.service.engine
    before = engine.stats().prompt_tokens
    with engine.pause():
        threads = [leaving(served, {"model": "ends", "prompt": PROMPT, "stream": i % 2 == 0}) for i in range(4)]
        until(lambda: engine.stats().waiting == 4)
        for _, leave in threads:
            leave()
        until(lambda: len(engine._cancelled) == 4)  # type: ignore[attr-defined]
    until(lambda: is_idle(served))
    assert engine.stats().prompt_tokens == before


# Adapters that come and go under load.


def test_adapters_are_replaced_and_unloaded_under_load(served: Served) -> None:
    """An answer is the old adapter's or the new one's, to its last token, or a 404."""
    prompts = [PROMPT, "A river", "She said that he had"]
    wanted = {
        prompt: {served.expected_text(served.ids(prompt), model, 8) for model in ("ends", "all")} for prompt in prompts
    }
    assert all(len(texts) == 2 for texts in wanted.values())
    stop, said = threading.Event(), Counter[str]()

    def change() -> None:
        for i in range(40):
            if i % 5 == 4:
                served.client.post(UNLOAD, json={"lora_name": "swap"}).raise_for_status()
            body = {"lora_name": "swap", "lora_path": ("ends", "all")[i % 2], "load_inplace": True}
            served.client.post(LOAD, json=body).raise_for_status()
            time.sleep(0.02)
        stop.set()

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(base_url=served.url, timeout=60) as client:
            while not stop.is_set():
                prompt = draw.choice(prompts)
                body = {"model": "swap", "prompt": prompt, "max_tokens": 8, "temperature": 0}
                answer = client.post(TEXT, json=body)
                if answer.status_code == 200:
                    said["right" if answer.json()["choices"][0]["text"] in wanted[prompt] else "wrong"] += 1
                else:
                    said[answer.json()["error"]["code"]] += 1

    served.client.post(LOAD, json={"lora_name": "swap", "lora_path": "ends"}).raise_for_status()
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)] + [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert said["right"] > 10 and set(said) <= {"right", "model_not_found"}, said
    until(lambda: is_idle(served))
    print(dict(said))


# Bad adapters.


def reconfigured(**fields: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def rewritten(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def weights(make: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(make(path.read_bytes()))

    return damage


WRONG_FIELDS: list[tuple[str, Any]] = [
    *(("method", value) for value in ("lorefd", None, "direft", "consreft")),
    *(("r", value) for value in (3, 0, -1, "4", 10**9)),
    *(("positions", value) for value in ("x7", "", None, "f1+", "f-1")),
    *(("layers", value) for value in ([0], [99], "some", [0, 1, 2, 3, 4, 5, 6, -2])),
    *(("peft_type", value) for value in ("LORA", None)),
    ("site", "mlp"),
    ("tied", False),
    ("activation", "sin"),
    ("modules_to_save", ["lm_head"]),
]
EDIT = "base_model.model.model.layers.0.reft.reft_edit."
BAD: dict[str, Callable[[Path], object]] = {
    **{f"{name}={value!r}": reconfigured(**{name: value}) for name, value in WRONG_FIELDS},
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "config cut": lambda folder: (folder / "adapter_config.json").write_text('{"peft_'),
    "config a list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "config binary": lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe\x00"),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "weights cut": weights(lambda data: data[:300]),
    "weights short": weights(lambda data: data[:-1]),
    "weights long": weights(lambda data: data + b"\0"),
    "weights empty": weights(lambda data: b""),
    "weights a pickle": weights(lambda data: b"\x80\x04K\x01."),
    "weights a pointer": weights(lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
    "weights huge header": weights(lambda data: b"\xff" * 8 + data[8:]),
    "only a pickle": lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
    "nan": rewritten(lambda tensors: tensors[EDIT + "bias"].fill_(float("nan"))),
    "infinite": rewritten(lambda tensors: tensors[EDIT + "weight"].fill_(float("inf"))),
    "not orthonormal": rewritten(lambda tensors: tensors[EDIT + "rotation"].mul_(2)),
    "one missing": rewritten(lambda tensors: tensors.pop(EDIT + "weight")),
    "one too many": rewritten(lambda tensors: tensors.update({EDIT + "more": torch.ones(1)})),
    "another width": rewritten(lambda tensors: tensors.update({k: v[..., :8].clone() for k, v in tensors.items()})),
    "of LoRA": rewritten(lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.ones(1)})),
    "another model": rewritten(
        lambda tensors: [tensors.__setitem__(k.replace("layers", "blocks"), tensors.pop(k)) for k in list(tensors)]
    ),
}


def test_bad_adapters_are_refused_and_change_nothing(served: Served, tmp_path: Path) -> None:
    assert len(BAD) >= 40
    for i, (name, damage) in enumerate(BAD.items()):
        folder = served.adapters / f"bad{i}"
        shutil.copytree(served.adapters / "ends", folder)
        damage(folder)
        loaded = served.client.post(LOAD, json={"lora_name": "bad", "lora_path": folder.name})
        found = served.client.post(TEXT, json={"model": folder.name, "prompt": "cat"})
        assert loaded.status_code == 400 and loaded.json()["error"]["code"] == "invalid_adapter", (name, loaded.text)
        assert found.status_code in (400, 404), (name, found.text)
        assert served.client.post(TEXT, json={"model": "bad", "prompt": "cat"}).status_code == 404
        shutil.rmtree(folder)
    assert is_right(served)
    assert served.client.get("/health").status_code == 200


# Too much at once.


def test_ten_times_the_capacity(served: Served) -> None:
    """Four rows and four places in the queue for eighty clients: the right answer, or 429 and when to come again."""
    wanted = served.expected_text(served.ids(PROMPT), "ends", 12)
    body = {"model": "ends", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(TEXT, json=body)

    async def every() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(ask(client) for _ in range(80)))

    answers = asyncio.run(every())
    count = Counter(answer.status_code for answer in answers)
    assert set(count) == {200, 429} and count[200] >= 8, count
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == wanted
        else:
            assert answer.json()["error"]["code"] == "queue_full" and int(answer.headers["retry-after"]) >= 1
    until(lambda: is_idle(served))


def test_a_client_of_openai_comes_again(served: Served) -> None:
    """With its own retries, all of twice as many as there is room for are answered."""

    async def every() -> list[Any]:
        async with served.async_openai.with_options(max_retries=8) as client:
            create = client.completions.create
            return await asyncio.gather(*(create(model="all", prompt=PROMPT, max_tokens=4) for _ in range(16)))

    assert len(asyncio.run(every())) == 16


def test_who_waits_too_long_gets_503(tmp_path: Path) -> None:
    with serving(tmp_path, Limits(slots=1, queue_seconds=0.05)) as served:
        thread, leave = leaving(served, {"model": BASE, "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True})
        until(lambda: served.service.engine.stats().running == 1)
        answer = served.client.post(TEXT, json={"model": "ends", "prompt": PROMPT, "stream": True})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_timeout"
        assert int(answer.headers["retry-after"]) >= 1
        leave()
        thread.join()


# A step that fails.


def test_a_step_that_fails_ends_its_requests_and_no_others(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = served.service.engine
    forward, fail = engine._runner.forward, [True]

    def broken(*args: Any) -> Any:
        if fail.pop() if fail else False:
            raise RuntimeError("out of memory")
        return forward(*args)

    monkeypatch.setattr(engine._runner, "forward", broken)
    answer = served.client.post(TEXT, json={"model": "ends", "prompt": PROMPT})
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "step_failed"
    assert is_right(served) and served.client.get("/ready").status_code == 200


def test_what_cannot_be_chosen_from_ends_its_own_row(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in one request's settings is no fault of those that run beside it."""
    draw = Sampler.draw

    def drawn(self: Sampler) -> float:
        if self.sampling.seed == 13:
            raise ArithmeticError("13")
        return draw(self)

    monkeypatch.setattr(Sampler, "draw", drawn)
    many = {"model": "ends", "prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor() as pool:
        neighbour = pool.submit(served.client.post, TEXT, json=many)
        until(lambda: not is_idle(served))
        for _ in range(4):
            answer = served.client.post(TEXT, json={"model": "ends", "prompt": PROMPT, "temperature": 1, "seed": 13})
            assert answer.status_code == 500 and "13" in answer.json()["error"]["message"]
        assert neighbour.result().status_code == 200
    assert is_right(served) and served.client.get("/ready").status_code == 200


# The end.


def test_the_server_drains(tmp_path: Path) -> None:
    """At a signal: those running end well within the grace, those beyond it with an error; new ones get 503."""
    with serving(tmp_path, Limits(slots=4)) as served:
        config = uvicorn.Config(create_app(served.service, Access()), port=0, log_level="error")
        server = Server(config, served.service.engine, grace=1.0)
        thread = threading.Thread(target=server.run)
        thread.start()
        until(lambda: server.started)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        ends: dict[str, Any] = {}

        def ask(name: str, **fields: Any) -> None:
            body = {"model": "ends", "prompt": PROMPT, "ignore_eos": True, "temperature": 0, **fields}
            ends[name] = httpx.post(f"{url}{TEXT}", json=body, timeout=60)

        slow = throttled(served)
        asked = {
            "short": {"max_tokens": 12},
            "long": {"max_tokens": 480},
            "stream": {"max_tokens": 480, "stream": True},
        }
        threads = [threading.Thread(target=ask, args=(name,), kwargs=fields) for name, fields in asked.items()]
        for one in threads:
            one.start()
        until(lambda: served.service.engine.stats().generated_tokens >= 6)
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: served.service.engine.health == "draining")
        assert httpx.get(f"{url}/ready").status_code == 503 and httpx.get(f"{url}/health").status_code == 200
        late = httpx.post(f"{url}{TEXT}", json={"model": "ends", "prompt": PROMPT})
        assert late.status_code == 503 and "retry-after" in late.headers
        for one in [*threads, thread]:
            one.join(30)
        slow.undo()
        assert not thread.is_alive()
        assert ends["short"].json()["choices"][0]["finish_reason"] == "length"
        assert ends["long"].status_code == 503 and ends["long"].json()["error"]["code"] == "unavailable"
        *_, last, error = [line for line in ends["stream"].text.split("\n\n") if line]
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "unavailable"


def throttled(served: Served) -> pytest.MonkeyPatch:
    """Steps of five milliseconds at least, so that a long answer outlasts the grace on any machine."""
    engine: Any = served.service.engine
    forward, patch = engine._runner.forward, pytest.MonkeyPatch()

    def slower(*args: Any) -> Any:
        time.sleep(0.005)
        return forward(*args)

    patch.setattr(engine._runner, "forward", slower)
    return patch


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`trimtab serve` as a process of its own."""
    make_adapters(tmp_path / "adapters")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trimtab.cli", "serve", MODEL, "-a", f"mine={tmp_path / 'adapters/ends'}"]
    command += ["--adapters", str(tmp_path / "adapters"), "--port", str(port), "--dtype", "float32", "--grace", "3"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as running:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: running.poll() is not None or is_ready(url), 300)
            yield running, url
        finally:
            running.kill()


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_under_load(process: tuple[subprocess.Popen[str], str], signals: int) -> None:
    running, url = process
    said: Counter[str] = Counter()

    def ask(i: int) -> None:
        body = {"model": ("mine", "all", BASE)[i % 3], "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True}
        try:
            while True:
                # without certificates, which take longer to read than an answer
                answer = httpx.post(f"{url}{TEXT}", json=body, timeout=60, verify=False)
                said[str(answer.status_code)] += 1
                if answer.status_code != 200:
                    return
        except httpx.TransportError as error:
            said[type(error).__name__] += 1

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    until(lambda: said["200"] >= 16, 120)
    started = time.monotonic()
    for _ in range(signals):
        running.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    code = running.wait(30)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    print(signals, "signals:", code, f"{time.monotonic() - started:.1f} s", dict(said))
    assert code == (0 if signals == 1 else 128 + signal.SIGTERM)
    if signals == 1:
        assert set(said) <= {"200", "503", "ConnectError"}, said  # a connection is never cut
    assert "Traceback" not in running.stderr.read()  # type: ignore[union-attr]


@pytest.mark.slow
def test_ten_thousand_requests(tmp_path: Path) -> None:
    """Of every kind, good and bad: memory stays flat, no row or pin is left."""
    with serving(tmp_path, Limits(slots=16, prefix_bytes=8 << 20), resident=3) as served:
        many_requests(served)


def many_requests(served: Served) -> None:
    total = int(os.environ.get("TRIMTAB_REQUESTS", 10_000))
    kinds: list[tuple[str, dict[str, Any]]] = [
        (TEXT, {"model": "ends", "prompt": PROMPT, "max_tokens": 4}),
        (TEXT, {"model": "all", "prompt": LONG[:60], "max_tokens": 2, "logprobs": 1}),
        (CHAT, {"model": "apart", "messages": [user("cat")], "max_tokens": 4, "stream": True}),
        (CHAT, {"model": "new", "messages": [user("dog")], "max_tokens": 3, "seed": 1, "reft_scale": 0.5}),
        (TEXT, {"model": "nobody", "prompt": PROMPT}),
        (TEXT, {"model": BASE, "prompt": PROMPT, "tools": [1]}),
        (LOAD, {"lora_name": "again", "lora_path": "ends", "load_inplace": True}),
    ]
    said, memory = Counter[int](), []

    async def client(draw: random.Random, http: httpx.AsyncClient) -> None:
        while sum(said.values()) < total:
            path, body = draw.choice(kinds)
            said[(await http.post(path, json=body)).status_code] += 1
            if sum(said.values()) % (total // 10) == 0:
                memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6)

    async def every() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
            await asyncio.gather(*(client(random.Random(i), http) for i in range(16)))

    started = time.monotonic()
    asyncio.run(every())
    print(dict(said), f"{time.monotonic() - started:.0f} s", [round(m) for m in memory], "MB")
    until(lambda: is_idle(served))
    assert set(said) == {200, 404, 400}
    assert memory[-1] - memory[len(memory) // 3] < 30
    assert is_right(served)
    assert served.service.engine.stats().table_evictions > 100
