"""A real server over the real engine, in a thread of the test's process, and what plain `generate` says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
import uvicorn
from peft import PeftModel, get_peft_model

import trimtab
from trimtab import ReftConfig
from trimtab.runs.models import ModelSource, load_model
from trimtab.serve.app import create_app
from trimtab.serve.guard import Access
from trimtab.serve.rows import Limits
from trimtab.serve.server import Settings, open_service
from trimtab.serve.service import Service

MODEL = str(Path(__file__).parents[2] / "models/tiny-llama")
BASE = "tiny-llama"
ADAPTERS: dict[str, dict[str, Any]] = {
    "ends": {"positions": "f1+l2", "r": 4},
    "apart": {"positions": "f2+l3", "r": 2, "tied": False},
    "all": {"positions": "all", "r": 2, "method": "direft"},
    "new": {"positions": "generated", "r": 2, "layers": [3, 5]},
}
"""Random edits, strong enough to change every answer."""


def make_adapters(folder: Path, adapters: dict[str, dict[str, Any]] = ADAPTERS, model: str = MODEL) -> None:
    base = load_model(ModelSource(model, "float32"))
    for name, fields in adapters.items():
        torch.manual_seed(len(name))
        config = ReftConfig(task_type="CAUSAL_LM", init_weights="paper", **fields)
        adapted = get_peft_model(base, config)
        for key, parameter in adapted.named_parameters():
            if ".reft." in key and key.endswith(("weight", "bias")):
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(str(folder / name))
        base = adapted.unload()


@dataclass
class Served:
    """A running server."""

    service: Service
    url: str
    adapters: Path
    client: httpx.Client = field(init=False)
    _said: dict[Any, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @cached_property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def async_openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def ids(self, prompt: str) -> list[int]:
        return self.service.tokens.of_text(prompt)

    def chat_ids(self, prompt: str) -> list[int]:
        tokens: list[int] = self.client.post("/tokenize", json={"messages": [user(prompt)]}).json()["tokens"]
        return tokens

    def text(self, ids: list[int]) -> str:
        return str(self.service.tokens.tokenizer.decode(ids, skip_special_tokens=True))

    def expected(
        self, ids: list[int], model: Any = BASE, most: int = 8, scale: Any = 1.0, prompt: int | None = None
    ) -> list[int]:
        """The greedy answer of plain `generate` on a model of its own, to a prompt of so many of the tokens.

        Of several adapters in sequence, with tuples of names and scales.
        """
        key = (tuple(ids), model, most, scale, prompt)
        if key not in self._said:
            self._said[key] = self._generate(*key)
        return self._said[key]

    def _generate(self, ids: tuple[int, ...], model: Any, most: int, scale: Any, prompt: int | None) -> list[int]:
        with torch.no_grad(), self._reference(model, scale) as reference:
            out = reference.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=most,
                do_sample=False,
                prompt_lengths=[len(ids) if prompt is None else prompt],
            )
        return [int(token) for token in out[0, len(ids) :]]

    def expected_text(self, ids: list[int], model: Any = BASE, most: int = 8, scale: Any = 1.0) -> str:
        return self.text(self.expected(ids, model, most, scale))

    @cached_property
    def _model(self) -> Any:
        model: Any = load_model(ModelSource(MODEL, "float32")).eval()
        for name in ADAPTERS:
            folder = str(self.adapters / name)
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        return model.eval()

    @contextmanager
    def _reference(self, name: Any, scale: Any) -> Iterator[Any]:
        if name == BASE:
            with self._model.disable_adapter():
                yield self._model
            return
        names, scales = ((name,), (scale,)) if isinstance(name, str) else (name, scale)
        self._model.base_model.set_adapter(list(names))
        for each, own in zip(names, scales, strict=True):
            trimtab.set_scale(self._model, each, own)
        yield self._model
        for each in names:
            trimtab.set_scale(self._model, each, 1.0)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def is_ready(url: str) -> bool:
    """Whether a server in another process takes requests."""
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """An app on a free port: its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def serving(
    folder: Path, limits: Limits | None = None, access: Access | None = None, body_bytes: int = 1 << 20, **settings: Any
) -> Iterator[Served]:
    """The bundled model with `ADAPTERS`, served."""
    if not (folder / "ends").exists():
        make_adapters(folder)
    settings = {"folder": folder, "dtype": "float32", "limits": limits or Limits(), **settings}
    service = open_service(Settings(MODEL, **settings))
    try:
        with listening(create_app(service, access or Access(), body_bytes)) as url:
            yield Served(service, url, folder)
    finally:
        service.engine.close()
