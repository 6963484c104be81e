"""What the server and its engine do: tokens a second, waiting times, what sharing a prefix saves, what memory does.

    python benchmarks/serve.py --out benchmarks/results/serve.json

- throughput: requests that are all there at once, so many running at a time, by the engine for the base model and for
  1 to 1,000 adapters mixed; beside `generate` on batches sorted by length and padded, and beside LoRA adapters mixed by
  `adapter_names` in such batches. Interleaved; ratios are of the same round;
- load: `trimtab serve` as a process, asked by this one through the openai client, for the base model and for one of
  1 to 1,000 adapters by chance, which the server reads from a folder when they are first asked for. So many clients
  that each ask again when answered; then requests that come by chance over time, as many a second as a part of what
  the base gave with the most clients, or more than that. The server on one core, this process on another;
- prefix: suffix-only adapters on one long prompt, with the prefix store and without;
- memory: of the process, while 1,000 adapters go through a table of 64.

A result file keeps the parts that a later run leaves out. With another model and device: --model, --device;
`--random WIDTH,BLOCKS` builds one of random weights instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import soak
import torch
from common import described_machine, spread, write_json
from inference import llama, resident_bytes
from openai import APIStatusError, AsyncOpenAI
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import ReftConfig
from trimtab.edits import LoReFT
from trimtab.serve.engine import Applied, Event, Request, Sampling
from trimtab.serve.registry import Adapter
from trimtab.serve.slots import Limits, SlotsEngine
from trimtab.serve.table import AdapterTable, Layout
from trimtab.where.positions import parse_positions
from trimtab.where.sites import find_sites

Prompts = list[list[int]]
clock = time.process_time
"""For throughput and prefix. All runs in one thread, so on a CPU these are the seconds that it worked, whatever else
the machine did meanwhile; with a GPU, those that passed."""
RANK = 4


class Load(NamedTuple):
    """Requests at once, their prompts' lengths, how many run at a time, tokens of each answer."""

    requests: int
    shortest: int
    longest: int
    running: int
    new: int = 32


LOADS = [Load(64, 30, 60, 32), Load(48, 100, 200, 16), Load(48, 20, 300, 48)]


def load_model(args: argparse.Namespace) -> Any:
    """In float32 on a CPU, else in bfloat16; with positions for prompts longer than it was trained on."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    if args.random:
        width, blocks = map(int, args.random.split(","))
        return llama(width, blocks).to(args.device, dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model.config.max_position_embeddings = max(2048, model.config.max_position_embeddings)
    return model.to(args.device).eval()


def adapters(layout: Layout, count: int, positions: str = "f7+l7") -> list[Adapter]:
    """LoReFT of random values on every block."""
    made = []
    for i in range(count):
        edits = {site.name: LoReFT(site.width, RANK, init_weights="paper").terms() for site in layout.sites}
        made.append(Adapter(str(i), i.to_bytes(32, "big"), parse_positions(positions), {"edit": layout.vector(edits)}))
    return made


def prompts_of(load: Load, vocabulary: int) -> Prompts:
    """Random tokens."""
    rng = random.Random(0)
    lengths = [rng.randint(load.shortest, load.longest) for _ in range(load.requests)]
    return [[rng.randrange(5, vocabulary) for _ in range(length)] for length in lengths]


@contextmanager
def serving(model: Any, sites: Any, **limits: Any) -> Iterator[SlotsEngine]:
    """An engine that is stepped by hand, with a table of 64 entries."""
    table = AdapterTable(Layout(sites, RANK), 64, model.device)
    engine = SlotsEngine(model, table, None, Limits(**{"max_len": 2048, "queue_seconds": 1e9, **limits}))
    try:
        yield engine
    finally:
        engine.close()


class Clients:
    """Requests to an engine, and when each of their tokens came."""

    def __init__(self, engine: SlotsEngine, new: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.engine, self.new, self.clock = engine, new, clock
        self.started: dict[str, float] = {}
        self.times: dict[str, list[float]] = {}
        self.cached = self.running = 0

    def ask(self, prompt: list[int], adapter: Adapter | None) -> str:
        id = str(len(self.started))
        sampling = Sampling(max_tokens=self.new, temperature=0, ignore_eos=True)
        self.started[id], self.times[id] = self.clock(), []
        applied = (Applied(adapter),) if adapter else ()
        self.engine.submit(Request(id, prompt, sampling, applied), lambda event: self._heard(id, event))
        self.running += 1
        return id

    def _heard(self, id: str, event: Event) -> None:
        if event.error:
            raise event.error
        self.times[id] += [self.clock()] * len(event.tokens)
        if event.finish_reason:
            self.running -= 1
            self.cached += event.cached_tokens

    def wait(self, below: int = 1) -> None:
        """Run steps until fewer requests are under way."""
        while self.running >= below:
            self.engine.step()

    def first(self, id: str) -> float:
        return self.times[id][0] - self.started[id]


def by_slots(model: Any, sites: Any, load: Load, prompts: Prompts, chosen: Sequence[Adapter]) -> float:
    """Seconds for all requests, each with one of the adapters by chance. The table starts empty."""
    with serving(model, sites, slots=load.running) as engine:
        clients, rng = Clients(engine, load.new), random.Random(0)
        start = clock()
        for prompt in prompts:
            clients.ask(prompt, rng.choice(chosen) if chosen else None)
        clients.wait()
        return clock() - start


@torch.inference_mode()
def by_generate(model: Any, load: Load, prompts: Prompts, names: Sequence[str] = ()) -> float:
    """Seconds for all requests in batches sorted by length, padded on the left."""
    start = clock()
    ordered = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(ordered), load.running):
        batch = ordered[first : first + load.running]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]).to(ids.device)
        per_row = {"adapter_names": [names[i % len(names)] for i in batch]} if names else {}
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=load.new,
            min_new_tokens=load.new,
            do_sample=False,
            pad_token_id=0,
            **per_row,
        )
    return clock() - start


def lora_model(args: argparse.Namespace, count: int) -> tuple[Any, list[str]]:
    """As many LoRA adapters on every linear layer, none merged."""
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
    names = [f"lora{i}" for i in range(count)]
    model = get_peft_model(load_model(args), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval(), names


def measure_throughput(args: argparse.Namespace, loads: Sequence[Load], counts: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each load and contender; the ratio is of tokens a second to that of `ratio_to` in the same round."""
    model = load_model(args)
    sites = find_sites(model, "block", "all")
    every = adapters(Layout(sites, RANK), max(counts))
    lora, names = lora_model(args, args.loras)
    rows = []
    by_slots(model, sites, loads[0], prompts_of(loads[0], model.config.vocab_size), every[:1])  # warms up
    for load in loads:
        prompts = prompts_of(load, model.config.vocab_size)
        slots = partial(by_slots, model, sites, load, prompts)
        one = f"slots, {counts[0]} adapters"
        contenders: dict[str, tuple[str, Callable[[], float]]] = {
            "generate": ("generate", partial(by_generate, model, load, prompts)),
            "slots, base": ("generate", partial(slots, ())),
            one: ("slots, base", partial(slots, every[: counts[0]])),
            **{f"slots, {count} adapters": (one, partial(slots, every[:count])) for count in counts[1:]},
            f"generate, {args.loras} LoRA": ("generate", partial(by_generate, lora, load, prompts, names)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name, (_, run) in contenders.items():
                seconds[name].append(run())
        for name, (against, _) in contenders.items():
            ratios = [b / a for a, b in zip(seconds[name], seconds[against], strict=True)]
            speeds = [load.requests * load.new / took for took in seconds[name]]
            rows.append({**load._asdict(), "name": name, "tokens_per_second": spread(speeds)})
            rows[-1] |= {"ratio_to": against, "ratio": spread(ratios)}
            print(load, name, f"{rows[-1]['tokens_per_second']['median']:.0f}", against, spread(ratios), flush=True)
    return rows


ASKED = Load(0, 30, 200, 64)
"""What the server is asked: as many at a time as it has rows."""
QUEUE = 64
"""Requests that may wait beside them; who comes then is refused."""
RATES = (0.5, 0.8, 2.0)


def measure_load(args: argparse.Namespace, counts: Sequence[int], in_flight: Sequence[int]) -> dict[str, Any]:
    """Rows of clients that each ask again when answered, and of requests that come over time."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    server_core, own_core = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    found: dict[str, Any] = {"seconds": args.seconds, "slots": ASKED.running, "max_queue": QUEUE, "resident": 64}
    found |= {"server_core": server_core, "client_core": own_core}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(args, folder, max(counts))
        pin(server_core)  # which the server inherits
        found["engine_alone"] = engine_alone(args, in_flight)
        words = ["--adapters", str(folder / "adapters"), "--max-rank", str(RANK)]
        words += ["--slots", str(ASKED.running), "--max-queue", str(QUEUE)]
        with soak.serving(str(folder / "base"), *words, OMP_NUM_THREADS="1") as (process, client):
            pin(own_core)
            found |= asyncio.run(drive(args, process.pid, f"{client.base_url}".rstrip("/"), counts, in_flight))
        pin(*cores)
    return found


def save(args: argparse.Namespace, folder: Path, count: int) -> None:
    """The model in `base`, and in `adapters` random edits of every block, each in a folder by its number."""
    model = load_model(args)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(args.model).save_pretrained(folder / "base")
    config = ReftConfig(task_type="CAUSAL_LM", init_weights="paper", r=RANK, positions="f7+l7")
    adapted = get_peft_model(model, config)
    edits = [parameter for name, parameter in adapted.named_parameters() if ".reft." in name]
    for i in range(count):
        for parameter in edits:
            torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(str(folder / "adapters" / str(i)))


def pin(*cores: int | None) -> None:
    """This process to these cores, where the system can."""
    if cores and None not in cores:
        os.sched_setaffinity(0, cores)  # type: ignore[arg-type]


def engine_alone(args: argparse.Namespace, in_flight: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens a second of the engine in this process, by such requests of the base model, all there at once."""
    model, rows = load_model(args), []
    for running in in_flight:
        load = ASKED._replace(requests=max(16, 2 * running), running=running)
        took = by_slots(model, find_sites(model, "block", "all"), load, prompts_of(load, model.config.vocab_size), ())
        rows.append({"in_flight": running, "tokens_per_cpu_second": round(load.requests * load.new / took, 1)})
        print(rows[-1], flush=True)
    return rows


async def drive(
    args: argparse.Namespace, process: int, url: str, counts: Sequence[int], in_flight: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """The rows of `measure_load`."""
    vocabulary = len(AutoTokenizer.from_pretrained(args.model))
    clients: list[dict[str, Any]] = []
    arrivals: list[dict[str, Any]] = []
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        draw = random.Random(0)  # one for all rows: a prompt that came before would be in the prefix store
        new = partial(Asking, client, draw, vocabulary, process, args.seconds)
        await new(0).clients(1)  # warms up
        for count in (0, *counts):
            for running in in_flight:
                row: dict[str, Any] = {"adapters": count, "in_flight": running}
                clients.append(row | await new(count).clients(running))
                print(clients[-1], flush=True)
        most = max(row["tokens_per_second"] for row in clients if not row["adapters"]) / ASKED.new
        for count in (0, *counts):
            for rate in RATES:
                row = {"adapters": count, "rate": rate, "requests_per_second": round(rate * most, 2)}
                arrivals.append(row | await new(count).arrivals(rate * most))
                print(arrivals[-1], flush=True)
    return {"clients": clients, "arrivals": arrivals}


class Asking:
    """Requests to a server for some seconds, each for one of so many adapters by chance, or for the base model."""

    def __init__(
        self,
        client: AsyncOpenAI,
        draw: random.Random,
        vocabulary: int,
        process: int,
        seconds: float,
        adapters: int,
    ) -> None:
        self.client, self.draw, self.vocabulary, self.process = client, draw, vocabulary, process
        self.seconds, self.adapters, self.refused = seconds, adapters, 0
        self.first: list[float] = []
        """From when each was due to its first token."""
        self.times: list[list[float]] = []
        """When each's tokens came."""

    async def clients(self, running: int) -> dict[str, Any]:
        """So many clients that each ask again when answered; what is under way at the end is waited for."""

        async def one() -> None:
            while (now := time.perf_counter()) < end:
                await self._ask(now)

        start, busy = time.perf_counter(), cpu_seconds(self.process)
        end = start + self.seconds
        await asyncio.gather(*(one() for _ in range(running)))
        return self._found(start, busy)

    async def arrivals(self, rate: float) -> dict[str, Any]:
        """A Poisson process of so many a second, whatever is under way."""
        start, busy = time.perf_counter(), cpu_seconds(self.process)
        due, gaps = start, random.Random(1)
        async with asyncio.TaskGroup() as group:
            while (due := due + gaps.expovariate(rate)) < start + self.seconds:
                await asyncio.sleep(due - time.perf_counter())
                group.create_task(self._ask(due))
        return self._found(start, busy)

    async def _ask(self, due: float) -> None:
        length, times = self.draw.randint(ASKED.shortest, ASKED.longest), []
        sent: dict[str, Any] = {"model": str(self.draw.randrange(self.adapters)) if self.adapters else "base"}
        sent["prompt"] = [self.draw.randrange(5, self.vocabulary) for _ in range(length)]
        sent |= {"max_tokens": ASKED.new, "temperature": 0, "extra_body": {"ignore_eos": True}}
        try:
            async for _ in await self.client.completions.create(**sent, stream=True):
                times.append(time.perf_counter())
        except APIStatusError as error:
            if error.status_code not in (429, 503):
                raise
            self.refused += 1
            return
        if len(times) != ASKED.new:
            raise ValueError(f"{len(times)} parts of a stream of {ASKED.new} tokens")
        self.first.append(times[0] - due)
        self.times.append(times)

    def _found(self, start: float, busy: float) -> dict[str, Any]:
        took, busy = time.perf_counter() - start, cpu_seconds(self.process) - busy
        tokens = sum(at < start + self.seconds for own in self.times for at in own)
        return {
            "tokens_per_second": round(tokens / self.seconds, 1),
            "answered": len(self.times),
            "refused": self.refused,
            "first_token_ms": percentiles(self.first),
            "between_tokens_ms": percentiles([b - a for own in self.times for a, b in pairwise(own)]),
            "server_busy": round(busy / took, 2),
            "tokens_per_server_cpu_second": round(len(self.times) * ASKED.new / busy, 1),
        }


def cpu_seconds(process: int) -> float:
    """That all threads of a process have computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    found = torch.tensor(seconds).double().quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)) * 1000
    return {"p50": round(float(found[0]), 2), "p99": round(float(found[1]), 2)}


def measure_prefix(args: argparse.Namespace, count: int, length: int) -> dict[str, Any]:
    """Suffix-only adapters on one prompt, one after another."""
    model = load_model(args)
    sites = find_sites(model, "block", "all")
    every = adapters(Layout(sites, RANK), count + 1, "l7")
    prompt = prompts_of(Load(1, length, length, 1), model.config.vocab_size)[0]
    found: dict[str, Any] = {"adapters": count, "prompt": length}
    times: dict[bool, list[float]] = {}
    for share in (False, True):
        with serving(model, sites, slots=4, prefix_bytes=share << 30) as engine:
            clients = Clients(engine, 4, clock)
            for adapter in every:
                clients.ask(prompt, adapter)
                clients.wait()
            times[share] = [clients.first(id) for id in clients.times][1:]  # after the one that fills the store
            if share:
                found["cached_share"] = clients.cached / (len(prompt) * count)
    found |= {"first_token_ms_without": percentiles(times[False]), "first_token_ms_with": percentiles(times[True])}
    found["times_sooner"] = spread([a / b for a, b in zip(times[False], times[True], strict=True)])
    return found


def measure_memory(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """Of the process after each pass of all adapters through a table of 64, in MiB."""
    model = load_model(args)
    sites = find_sites(model, "block", "all")
    every = adapters(Layout(sites, RANK), count)
    load = Load(count, 30, 60, 32, 4)
    prompts, used = prompts_of(load, model.config.vocab_size), []
    with serving(model, sites, slots=32, prefix_bytes=16 << 20) as engine:
        for _ in range(3):
            clients = Clients(engine, load.new)
            for first in range(0, count, 500):
                for i in range(first, min(first + 500, count)):
                    clients.ask(prompts[i], every[i])
                clients.wait()
            used.append(round(resident_bytes() / 2**20, 1))
        stats = engine.stats()
    size = every[0].nbytes
    left = {"pinned": stats.pinned_adapters, "running": stats.running, "evictions": stats.table_evictions}
    return {"adapters": count, "bytes_per_adapter": size, "mib_after_each_pass": used, **left}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny-llama")
    parser.add_argument("--random", help="WIDTH,BLOCKS of a model of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loras", type=int, default=8)
    parser.add_argument("--adapters", type=int, nargs="+", help="how many; by default 1 to 1,000")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=15, help="of each row of the part load")
    parser.add_argument("--parts", nargs="+", default=["throughput", "load", "prefix", "memory"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.device != "cpu":
        global clock
        clock = time.perf_counter
    parts: dict[str, Callable[[], Any]] = {
        "throughput": lambda: measure_throughput(args, LOADS, args.adapters or [1, 64, 1000]),
        "load": lambda: measure_load(args, args.adapters or [1, 10, 100, 1000], args.in_flight),
        "prefix": lambda: measure_prefix(args, 50, 1000),
        "memory": lambda: measure_memory(args, max(args.adapters or [1000])),
    }
    result = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for part in args.parts:
        found = parts[part]()
        result[part] = {**described_machine(), "found": found}
        print(part, found, flush=True)
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
