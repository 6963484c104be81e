"""The engine over vLLM on the bundled model, small and on a CPU, and the random mixes of `mixes` on it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mixes import RANK, Asked, Inbox, Served

from trimtab.serve.engine import Event
from trimtab.serve.registry import Registry
from trimtab.serve.rows import Limits
from trimtab.serve.table import Layout
from trimtab.serve.vllm import probe
from trimtab.serve.vllm.engine import VllmEngine

BLOCK = 32
CPU: dict[str, Any] = {
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": BLOCK,
    "max_model_len": 256,
    "dtype": "float32",
    "enforce_eager": True,
}


def make_engine(served: Served, path: str, limits: dict[str, Any] | None = None, **options: Any) -> VllmEngine:
    layout = Layout(served.sites, RANK)
    served.registry = Registry(layout, served.folder)
    sizes = Limits(**{"slots": 8, "max_len": 256, "queue_seconds": 600, **(limits or {})})
    cases = probe.cases(served.model.eval(), layout, BLOCK)
    return VllmEngine(path, layout, 12, cases, limits=sizes, options={**CPU, **options})


@contextmanager
def engine_of(*args: Any, **kwargs: Any) -> Iterator[VllmEngine]:
    engine = make_engine(*args, **kwargs)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


class Waiting(Inbox):
    """An inbox that can wait for all last events."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left, self.done, self._lock = count, threading.Event(), threading.Lock()

    def of(self, id: str) -> Any:
        said = super().of(id)

        def emit(event: Event) -> None:
            said(event)
            if event.finish_reason is not None:
                with self._lock:
                    self.left -= 1
                    if not self.left:
                        self.done.set()

        return emit


def answers(served: Served, engine: VllmEngine, asked: Sequence[Asked], name: str = "r", **sampling: Any) -> Waiting:
    """All at once; ended each."""
    inbox = Waiting(len(asked))
    for i, one in enumerate(asked):
        engine.submit(served.request(f"{name}{i}", one, **sampling), inbox.of(f"{name}{i}"))
    assert inbox.done.wait(300)
    return inbox


@torch.no_grad()
def mismatches(served: Served, engine: VllmEngine, asked: Sequence[Asked], name: str = "r") -> list[Asked]:
    """Those that vLLM answers otherwise than `generate`."""
    inbox = answers(served, engine, asked, name)
    return [one for i, one in enumerate(asked) if inbox.tokens(f"{name}{i}") != served.truth(one)]
