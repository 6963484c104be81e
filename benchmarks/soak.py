"""A server under everything at once for minutes: 1,000 adapters, 32 of them resident, names loaded and unloaded,
clients that leave in the middle, streams, answers held to JSON. Every answer is compared with plain `generate`'s.

    python benchmarks/soak.py [--minutes 10] [--adapters 1000] [--resident 32] [--out benchmarks/results/soak.json]

The server is a process of its own, `trimtab serve`; adapters are random edits of every block, asked for by Zipf's law.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import torch
from common import described_machine, write_json
from inference import resident_bytes
from peft import PeftModel, get_peft_model

from trimtab import ReftConfig
from trimtab.runs.models import ModelSource, load_model, load_tokenizer

MODEL = "models/tiny-llama"
BASE = "tiny-llama"
PROMPTS = ["The cat and the dog went", "Once upon a time there was an old house by the sea, and in it"]
NEW = 6
CLIENTS = 8
POSITIONS = ("f1+l2", "l1", "f3+l3", "prompt", "all")
LEFT = ("requests_running", "requests_waiting", "adapters_pinned")
SAMPLE = 2
"""Adapters that one name is switched between."""


def main() -> None:
    """Make the adapters, ask, and write what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--resident", type=int, default=32)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), asked.adapters, asked.resident, asked.minutes)
    print(json.dumps(found, indent=2))
    if asked.out:
        write_json(asked.out, {**described_machine(), **found})
    if found["wrong"] or any(found["left"].values()):
        raise SystemExit("wrong answers, or something left behind")


def soak(folder: Path, adapters: int, resident: int, minutes: float) -> dict[str, Any]:
    """Run server and clients; what was asked and answered by minute."""
    names = [f"a{i}" for i in range(adapters)]
    said = make(folder, names)
    limits = ["--dtype", "float32", "--resident", str(resident), "--prefix-mb", "64"]
    with serving(MODEL, "--adapters", str(folder), *limits) as (server, client):
        for name in names:  # into the host's memory, so that growth is not theirs
            body = {"lora_name": name, "lora_path": name}
            client.post("/v1/load_lora_adapter", json=body).raise_for_status()
        by_minute: list[dict[str, Any]] = [{"minute": 0, "mib": resident_mib(server.pid)}]
        load = Load(names, said, str(client.base_url))
        threads = [threading.Thread(target=load.ask, args=(seed,)) for seed in range(CLIENTS)]
        threads.append(threading.Thread(target=load.switch, args=(CLIENTS,)))
        for thread in threads:
            thread.start()
        steps = max(1, round(minutes))
        for minute in range(1, steps + 1):
            time.sleep(60 * minutes / steps)
            by_minute.append({"minute": minute, "mib": resident_mib(server.pid), **load.counts})
        load.over.set()
        for thread in threads:
            thread.join()
        left = idle(client)
    return {
        "adapters": adapters,
        "resident": resident,
        "clients": CLIENTS,
        "minutes": minutes,
        "asked": load.counts,
        "wrong": load.wrong,
        "left": left,
        "by_minute": by_minute,
    }


def make(folder: Path, names: list[str]) -> dict[tuple[str, int], str]:
    """Adapters in `folder`, and what plain `generate` says to each prompt, in mixed batches of theirs."""
    model: Any = load_model(ModelSource(MODEL, "float32")).eval()
    tokenizer, said = load_tokenizer(MODEL), {}
    for at in range(0, len(names), 10):
        some = names[at : at + 10]
        adapted: Any = None
        for name in some:
            number = int(name[1:])
            torch.manual_seed(number)
            positions = POSITIONS[number % len(POSITIONS)]
            config = ReftConfig(task_type="CAUSAL_LM", init_weights="paper", r=2, positions=positions)
            if adapted is None:
                adapted = get_peft_model(model, config, adapter_name=name)
            else:
                adapted.add_adapter(name, config)
        for key, parameter in adapted.named_parameters():
            if ".reft." in key and key.endswith(("weight", "bias")):
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(str(folder))
        said.update(answers(adapted.eval(), tokenizer, some))
        model = adapted.unload()
    return said | answers(model, tokenizer, [BASE])


def answers(model: Any, tokenizer: Any, names: list[str]) -> dict[tuple[str, int], str]:
    """By name and prompt, of adapters or of a model without any."""
    found, mixed = {}, {"adapter_names": names} if isinstance(model, PeftModel) else {}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer([prompt], return_tensors="pt")["input_ids"].repeat(len(names), 1)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **mixed)
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        found.update({(name, i): text for name, text in zip(names, texts, strict=True)})
    return found


@contextmanager
def serving(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """`trimtab serve` with these arguments as a process on a free port, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "trimtab.cli", "serve", *words, "--port", port]
    server = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            until_ready(server, client)
            yield server, client
    finally:
        server.terminate()
        if server.wait(60) != 0:
            raise SystemExit(f"the server ended with {server.returncode}")


def until_ready(server: subprocess.Popen[bytes], client: httpx.Client) -> None:
    """Raises SystemExit where the server ends instead, or takes ten minutes."""
    end = time.monotonic() + 600
    while server.poll() is None and time.monotonic() < end:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise SystemExit("the server did not come up")


class Load:
    """Clients of all kinds, and what they met."""

    def __init__(self, names: list[str], said: dict[tuple[str, int], str], url: str) -> None:
        self.names, self.said, self.url = names, said, url
        self.over, self.lock = threading.Event(), threading.Lock()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.weights = list(accumulate(1 / (i + 1) for i in range(len(names))))

    def count(self, what: str, wrong: str = "") -> None:
        with self.lock:
            self.counts[what] += 1
            if wrong:
                self.wrong.append(wrong)

    def ask(self, seed: int) -> None:
        """One client, until it is over."""
        draw = random.Random(seed)
        kinds = {self.whole: 60, self.streamed: 20, self.leave: 10, self.held: 5, self.switched: 5}
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.over.is_set():
                name = draw.choices([*self.names], cum_weights=self.weights)[0] if draw.random() < 0.95 else BASE
                kind = draw.choices(list(kinds), list(kinds.values()))[0]
                kind(client, name, draw.randrange(len(PROMPTS)))

    def body(self, name: str, prompt: int, **more: Any) -> dict[str, Any]:
        return {"model": name, "prompt": PROMPTS[prompt], "max_tokens": NEW, "temperature": 0, **more}

    def compare(self, kind: str, name: str, prompt: int, text: str) -> None:
        wanted = self.said[name, prompt]
        self.count(kind, "" if text == wanted else f"{name}, prompt {prompt}: {text!r} instead of {wanted!r}")

    def whole(self, client: httpx.Client, name: str, prompt: int) -> None:
        answer = client.post("/v1/completions", json=self.body(name, prompt))
        if answer.status_code != 200:
            self.count(f"status {answer.status_code}", answer.text[:200])
            return
        self.compare("whole", name, prompt, answer.json()["choices"][0]["text"])

    def streamed(self, client: httpx.Client, name: str, prompt: int) -> None:
        text = ""
        with client.stream("POST", "/v1/completions", json=self.body(name, prompt, stream=True)) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
        self.compare("streamed", name, prompt, text)

    def leave(self, client: httpx.Client, name: str, prompt: int) -> None:
        body = self.body(name, prompt, stream=True, ignore_eos=True) | {"max_tokens": 200}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines(), None)
        self.count("left")

    def held(self, client: httpx.Client, name: str, prompt: int) -> None:
        schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
        schema["additionalProperties"] = False
        form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
        body = self.body(name, prompt, response_format=form) | {"max_tokens": 60}
        choice = client.post("/v1/completions", json=body).json()["choices"][0]
        whole = choice["finish_reason"] != "stop" or json.loads(choice["text"])["a"] in ("x", "y")
        self.count("held to a form", "" if whole else f"{choice['text']!r} is not of the schema")

    def switched(self, client: httpx.Client, name: str, prompt: int) -> None:
        answer = client.post("/v1/completions", json=self.body("switched", prompt))
        if answer.status_code == 404:
            self.count("a name that was unloaded")
            return
        text, either = answer.json()["choices"][0]["text"], [self.said[one, prompt] for one in self.names[:SAMPLE]]
        self.count("a name that is switched", "" if text in either else f"switched: {text!r} instead of {either}")

    def switch(self, seed: int) -> None:
        """Give one name to one adapter and another, and to none; load and unload others that are in use."""
        draw = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.over.wait(0.2):
                body = {"lora_name": "switched", "lora_path": draw.choice(self.names[:SAMPLE]), "load_inplace": True}
                if draw.random() < 0.3:
                    client.post("/v1/unload_lora_adapter", json={"lora_name": "switched"})
                    self.count("unloads")
                else:
                    client.post("/v1/load_lora_adapter", json=body).raise_for_status()
                    self.count("loads")
                name = draw.choice(self.names)
                body = {"lora_name": name, "lora_path": name, "load_inplace": True}
                client.post("/v1/load_lora_adapter", json=body).raise_for_status()
                self.count("loads")


def resident_mib(process: int) -> float:
    """Of a process, MiB."""
    return round(resident_bytes(process) / 2**20, 1)


def idle(client: httpx.Client) -> dict[str, int]:
    """What is running, waiting and pinned once nobody asks any more."""
    for _ in range(300):
        lines = client.get("/metrics").text.splitlines()
        values = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
        left = {name: int(values[f"trimtab_{name}"]) for name in LEFT}
        if not any(left.values()):
            break
        time.sleep(0.1)
    return left


if __name__ == "__main__":
    main()
