"""vLLM's own LoRA beside LoReFT on vLLM: tokens a second, time to the first token and between tokens.

    .venv-vllm/bin/python benchmarks/serve_vllm.py --out benchmarks/results/serve_vllm.json    # after `make vllm`

Three engines, each with vLLM processes of its own and alive all the time: vLLM as it comes, without trimtab in it; vLLM
with trimtab, by `VllmEngine`; vLLM with its LoRA (rank 8 on every linear layer) and without trimtab. Each is asked the
same prompts by so many clients, of which each asks again when it has its answer; one engine works at a time. What is
compared goes in rounds, and ratios are of the same round. Nothing is shared between prompts: no round finds what
another computed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import random
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # as trimtab has it

import torch
from common import described_machine, spread, write_json
from serve import RANK, Load, adapters, load_model, lora_model, percentiles, prompts_of

from trimtab.serve.engine import Applied, Event, Request, Sampling
from trimtab.serve.rows import Limits
from trimtab.serve.table import Layout
from trimtab.serve.vllm import probe
from trimtab.serve.vllm.engine import VllmEngine
from trimtab.where.sites import find_sites

BLOCK, LORA_RANK = 32, 8
REST = 1.2
"""Seconds between runs: for one second after its last step a worker of vLLM waits by computing."""
Heard = Callable[[Sequence[int], bool], None]
"""Told of new tokens, and whether they are the last."""
Submit = Callable[[str, list[int], int, Any, Heard], None]
"""Starts an answer: its id, prompt, length and adapter."""


class Plain:
    """vLLM without trimtab in its processes, on a loop of its own, as `VllmEngine` runs it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        os.environ["VLLM_PLUGINS"] = ""
        self.llm = asyncio.run_coroutine_threadsafe(self._open(options), self.loop).result()
        del os.environ["VLLM_PLUGINS"]

    async def _open(self, options: dict[str, Any]) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_vllm_config(AsyncEngineArgs(**options).create_engine_config())

    def submit(self, id: str, prompt: list[int], new: int, lora: Any, heard: Heard) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

        async def serve() -> None:
            async for output in self.llm.generate({"prompt_token_ids": prompt}, params, id, lora_request=lora):
                heard(output.outputs[0].token_ids, output.finished)

        asyncio.run_coroutine_threadsafe(serve(), self.loop)

    def close(self) -> None:
        self.llm.shutdown()


class Edited:
    """vLLM with trimtab, by the engine of `trimtab serve --engine vllm`."""

    def __init__(self, model: Any, layout: Layout, entries: int, options: dict[str, Any]) -> None:
        limits = Limits(slots=options["max_num_seqs"], max_len=options["max_model_len"], prefix_bytes=0)
        cases = probe.cases(model, layout, BLOCK)
        self.engine = VllmEngine(options["model"], layout, entries, cases, limits=limits, options=options)
        self.engine.start()

    def submit(self, id: str, prompt: list[int], new: int, adapter: Any, heard: Heard) -> None:
        def emit(event: Event) -> None:
            heard(event.tokens, event.finish_reason is not None)

        sampling = Sampling(max_tokens=new, temperature=0, ignore_eos=True)
        self.engine.submit(Request(id, prompt, sampling, (Applied(adapter),) if adapter else ()), emit)

    def close(self) -> None:
        self.engine.close()


class Answers(NamedTuple):
    """Of one run."""

    seconds: float
    tokens: list[list[int]]
    first: list[float]
    """Seconds from a request to its first token."""
    gaps: list[float]
    """Seconds between tokens."""


def asked(submit: Submit, load: Load, prompts: Sequence[list[int]], chosen: Sequence[Any], run: str) -> Answers:
    """All prompts, `load.running` at a time, each with the next of the adapters; None is the base model.

    Raises:
        queue.Empty: an answer did not come.
        RuntimeError: one has not the tokens that were asked for.
    """
    ended: queue.Queue[int] = queue.Queue()
    tokens: list[list[int]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]
    started = [0.0] * len(prompts)

    def ask(i: int) -> None:
        def heard(new: Sequence[int], last: bool) -> None:
            tokens[i] += new
            times[i] += [time.perf_counter()] * len(new)
            if last:
                ended.put(i)

        started[i] = time.perf_counter()
        submit(f"{run} {i}", prompts[i], load.new, chosen[i % len(chosen)], heard)

    begin = time.perf_counter()
    for i in range(len(prompts)):
        if i >= load.running:
            ended.get(timeout=120)
        ask(i)
    for _ in range(min(load.running, len(prompts))):
        ended.get(timeout=120)
    seconds = time.perf_counter() - begin
    if any(len(answer) != load.new for answer in tokens):
        raise RuntimeError(f"{run}: an answer has not {load.new} tokens.")
    first = [own[0] - start for own, start in zip(times, started, strict=True)]
    return Answers(seconds, tokens, first, [b - a for own in times for a, b in pairwise(own)])


def changed(submit: Submit, load: Load, prompts: Sequence[list[int]], chosen: Sequence[Any], base: Answers) -> int:
    """How many of the adapters answer the prompts otherwise than the base model; each is asked all of them."""
    each = [adapter for adapter in chosen for _ in prompts]
    answers = asked(submit, load, [*prompts] * len(chosen), each, "changed").tokens
    return sum(answers[i : i + len(prompts)] != base.tokens for i in range(0, len(answers), len(prompts)))


class Contender(NamedTuple):
    """How it is asked, with which adapters, and those that its tokens a second are set against."""

    submit: Submit
    adapters: Sequence[Any]
    against: tuple[str, ...] = ("base",)


def measure(
    contenders: dict[str, Contender], loads: Sequence[Load], rounds: int, vocabulary: int
) -> list[dict[str, Any]]:
    """One row for each load and contender."""
    rows = []
    for load in loads:
        prompts, runs = prompts_of(load, vocabulary), defaultdict[str, list[Answers]](list)
        for turn in range(rounds + 1):  # the first warms up
            order = list(contenders)
            random.Random(turn).shuffle(order)
            for name in order:
                one = contenders[name]
                time.sleep(REST)
                runs[name].append(asked(one.submit, load, prompts, one.adapters, f"{load.running} {name} {turn}"))
        for name, one in contenders.items():
            own = runs[name][1:]
            speeds = [load.requests * load.new / run.seconds for run in own]
            row = {**load._asdict(), "name": name, "tokens_per_second": spread(speeds), "ratio_to": {}}
            for other in one.against:
                row["ratio_to"][other] = spread(
                    [b.seconds / a.seconds for a, b in zip(own, runs[other][1:], strict=True)]
                )
            row["first_token_ms"] = percentiles([each for run in own for each in run.first])
            row["between_tokens_ms"] = percentiles([each for run in own for each in run.gaps])
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Start the engines, see that the adapters act, measure."""
    from vllm.lora.request import LoRARequest

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny-llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.device, args.random = "cpu", None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    most, model = max(args.adapters), load_model(args)
    options: dict[str, Any] = {
        "model": args.model,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": max(args.in_flight),
        "max_num_batched_tokens": 512,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "enforce_eager": True,  # on a CPU vLLM compiles no model that has LoRA
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "compilation_config": {"cudagraph_mode": "NONE"},
    }
    layout = Layout(find_sites(model, "block", "all"), RANK)
    edits, (peft, names) = adapters(layout, most), lora_model(args, most)
    with tempfile.TemporaryDirectory() as folder:
        peft.save_pretrained(folder)
        loras = [LoRARequest(name, i + 1, f"{folder}/{name}") for i, name in enumerate(names)]
        with_lora = {"enable_lora": True, "max_loras": most, "max_cpu_loras": most, "max_lora_rank": LORA_RANK}
        plain, edited, lora = Plain(options), Edited(model, layout, most, options), Plain({**options, **with_lora})
        few = Load(4, 30, 60, min(args.in_flight))
        prompts = prompts_of(few, model.config.vocab_size)
        base, *same = (asked(one.submit, few, prompts, [None], "base") for one in (plain, edited, lora))
        act = {
            "base_alike": all(one.tokens == base.tokens for one in same),
            "loreft_that_change_answers": changed(edited.submit, few, prompts, edits, base),
            "lora_that_change_answers": changed(lora.submit, few, prompts, loras, base),
            "of": most,
        }
        print(act, flush=True)
        contenders = {
            "base": Contender(plain.submit, [None], ()),
            "trimtab, nothing edited": Contender(edited.submit, [None]),
            **{f"{n} LoReFT": Contender(edited.submit, edits[:n]) for n in args.adapters},
            "vLLM's LoRA, no adapter": Contender(lora.submit, [None]),
            **{f"{n} LoRA": Contender(lora.submit, loras[:n], ("base", f"{n} LoReFT")) for n in args.adapters},
        }
        loads = [Load(max(most, 2 * running), 30, 60, running) for running in args.in_flight]
        rows = measure(contenders, loads, args.rounds, model.config.vocab_size)
        for engine in (plain, edited, lora):
            engine.close()
    if args.out:
        about = {**described_machine(), "vllm": version("vllm"), "model": args.model}
        shown = {key: value for key, value in options.items() if key != "model"}
        write_json(args.out, {**about, "options": shown, "act": act, "found": rows})


if __name__ == "__main__":
    main()
