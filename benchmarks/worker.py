"""The process that computes: one in each environment, told what to do in JSON lines on stdin, answering on stdout.

`Worker` is also usable in the same process, as the tests do. One request is one method call:
{"call": "step", "name": "pyreft", "batch": 3} is `worker.step(name="pyreft", batch=3)`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import described_machine, spread
from contenders import Contender, Plan, build, collate, edit_values
from samples import Sample
from shapes import build_llama
from torch import Tensor

LARGE_BLOCKS_LEAVE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc's allocator gives freed memory back at once, so that resident memory is memory in use."""


class Worker:
    """Holds one frozen model and the contenders on it, which share its weights."""

    def load(
        self, shape: str, device: str, names: list[str], plan: dict[str, Any], batches: list[Any]
    ) -> dict[str, Any]:
        """Build the model and the contenders; `batches` are lists of (prompt, answer) token ids."""
        self.shape, self.device, self.plan = shape, device, Plan(**plan)
        self.base = build_llama(shape, device)
        self.batches = [
            {**collate(samples, device), "numbers": list(range(i * len(samples), (i + 1) * len(samples)))}
            for i, samples in enumerate([[Sample(*s) for s in batch] for batch in batches])
        ]
        self.contenders = {name: build(name, self.base, self.plan) for name in names}
        self.prepared: dict[tuple[str, int], Any] = {}
        return {"parameters": sum(p.numel() for p in self.base.parameters()), **described_machine()}

    def step(self, name: str, batch: int) -> dict[str, Any]:
        """One full training step, timed."""
        contender, prepared = self.contenders[name], self._prepared(name, batch)
        self._wait()
        start = time.perf_counter()
        loss = float(contender.step(prepared))
        self._wait()
        return {"seconds": time.perf_counter() - start, "loss": loss}

    def facts(self, name: str, batch: int) -> dict[str, Any]:
        """What a contender's size is, and its loss before any step; for LoReFT also with given R, W and b."""
        contender, prepared = self.contenders[name], self._prepared(name, batch)
        trained = {"floor": 0, "base-forward": 0}.get(name, sum(p.numel() for p in contender.trainable()))
        facts = {
            "trainable_parameters": trained,
            "adapter_bytes": self._added_bytes(contender) if trained else 0,
            "bytes_kept_for_backward": kept_for_backward(contender, prepared) if name != "base-forward" else 0,
            "loss_at_identity": self._loss(contender, prepared),
            "loss_with_given_edits": None,
        }
        if contender.has_edits:
            blocks, width = len(self.plan.blocks(self.base)), self.base.config.hidden_size
            contender.set_edits(edit_values(blocks, self.plan.r, width, identity=False))
            facts["loss_with_given_edits"] = self._loss(contender, prepared)
            contender.start_at_identity()
        return facts

    def memory(self, shape: str, device: str, name: str, plan: dict[str, Any], batch: Any, rounds: int) -> Any:
        """Peak memory of a step over the frozen model alone: adapter, optimizer state, activations, gradients."""
        self._peaks("toy", device, name, Plan(**{**plan, "layers": None}), batch, 1)  # imports all that there is
        return self._peaks(shape, device, name, Plan(**plan), batch, rounds)

    def _peaks(self, shape: str, device: str, name: str, plan: Plan, batch: Any, rounds: int) -> dict[str, Any]:
        base = build_llama(shape, device)
        gc.collect()
        before = resident(device)
        contender = build(name, base, plan)
        samples = [Sample(*s) for s in batch]
        prepared = contender.prepare({**collate(samples, device), "numbers": list(range(len(samples)))})
        contender.step(prepared)  # the optimizer's state is made by the first
        peaks = []
        for _ in range(rounds):
            reset_peak(device)
            contender.step(prepared)
            peaks.append(peak(device) - before)
        return {"peak_bytes": spread(peaks), "base_bytes": sum(p.numel() * p.element_size() for p in base.parameters())}

    def _prepared(self, name: str, batch: int) -> Any:
        key = (name, batch)
        if key not in self.prepared:
            self.prepared[key] = self.contenders[name].prepare(self.batches[batch])
        return self.prepared[key]

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    @torch.no_grad()
    def _loss(self, contender: Contender, batch: Any) -> float:
        return float(contender.loss(batch))

    def _added_bytes(self, contender: Contender) -> int:
        """Of all parameters and buffers that the contender added to the model."""
        own = {t.untyped_storage().data_ptr() for t in (*self.base.parameters(), *self.base.buffers())}
        added = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*contender.trainable(), *_state(contender.model))
        }
        return sum(size for pointer, size in added.items() if pointer not in own)


def _state(model: Any) -> list[Tensor]:
    """Parameters and buffers; pyreft keeps its edits in a plain dictionary, where `modules` does not look."""
    roots = [model]
    edits = getattr(model, "interventions", None)
    if isinstance(edits, dict):
        roots += [v[0] if isinstance(v, tuple | list) else v for v in edits.values()]
    return [t for root in roots for t in (*root.parameters(), *root.buffers())]


def kept_for_backward(contender: Contender, batch: Any) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, weights left out."""
    weights = {t.untyped_storage().data_ptr() for t in (*_state(contender.model), *contender.trainable())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # else an output and its graph node keep each other, and the model, for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contender.loss(batch)
    del loss
    return sum(kept.values())


def resident(device: str) -> int:
    """Bytes in use now."""
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    gc.collect()
    _give_back()
    return _status("VmRSS")


def _give_back() -> None:
    """Have the allocator return what is free to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def reset_peak(device: str) -> None:
    """Begin to look for the peak."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return
    _give_back()
    with suppress(OSError):  # where it is not allowed, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """The most bytes in use since `reset_peak`."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


class WorkerProcess:
    """A `Worker` under another interpreter."""

    def __init__(self, python: str, threads: int, extra: dict[str, str] | None = None) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **(extra or {}),
        }
        self.process = subprocess.Popen(
            [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, call: str, **arguments: Any) -> Any:
        """The answer to one request; raises what the worker raised, as text."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with code {self.process.wait()} during {call}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{call} failed in the worker:\n{answer['error']}")
        return answer["value"]

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Answer requests until stdin ends. Libraries print to stdout too: what they print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(worker, request.pop("call"))(**request)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
