"""What a training step costs: trimtab, pyreft, adapters and LoRA beside the floor that no method can go below.

    python benchmarks/train.py --shape 60m --lengths commonsense --data DATA --peers-python .venv-peers/bin/python \\
        --out benchmarks/results/train-60m-commonsense.json

Each round takes one step of every method, in random order, on the same batch of real lengths; only one process computes
at a time. A method's ratio is to the floor of its own environment in the same round.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from common import as_table, described_machine, spread, write_json
from contenders import CONTENDERS, STANDARD, Plan
from samples import Sample, draw_batches
from shapes import SHAPES, dtype_of
from worker import LARGE_BLOCKS_LEAVE, WorkerProcess

WARM_UP = 2
Place = tuple[str, str]
"""A method in an environment."""


class Asked(Protocol):
    """A `Worker`, near or far."""

    def ask(self, call: str, **arguments: Any) -> Any: ...


def places(names: list[str], environments: list[str]) -> list[Place]:
    """Every method in each environment that it needs and that there is; the floor in all that hold another method."""
    found = [
        (e, name) for e in environments for name in names if name != "floor" and CONTENDERS[name].where in (e, "both")
    ]
    floors = [(e, "floor") for e in environments if any(e == environment for environment, _ in found)]
    return floors + found


def measure(workers: dict[str, Asked], where: list[Place], batches: int, repeats: int, seed: int) -> dict[str, Any]:
    """Seconds of every method in every round after the warm-up; round i is on batch i."""
    order, draw = list(where), random.Random(seed)
    seconds: dict[Place, list[float]] = {place: [] for place in where}
    for turn in range(WARM_UP + repeats):
        draw.shuffle(order)
        for environment, name in order:
            taken = workers[environment].ask("step", name=name, batch=turn % batches)["seconds"]
            if turn >= WARM_UP:
                seconds[environment, name].append(taken)
        print(f"round {turn + 1} of {WARM_UP + repeats}", file=sys.stderr)
    return {f"{environment}/{name}": taken for (environment, name), taken in seconds.items()}


def summarised(
    where: list[Place],
    seconds: dict[str, list[float]],
    tokens: list[int],
    facts: dict[Place, Any],
    memory: dict[Place, Any],
) -> list[dict[str, Any]]:
    """One row a method. `tokens` are those of each measured round's batch."""
    rows = []
    for environment, name in where:
        own, floor = seconds[f"{environment}/{name}"], seconds[f"{environment}/floor"]
        row = {
            "method": name,
            "environment": environment,
            "step_seconds": spread(own),
            "ratio_to_floor": spread([a / b for a, b in zip(own, floor, strict=True)]),
            "tokens_per_second": statistics.median(n / s for n, s in zip(tokens, own, strict=True)),
            **facts[environment, name],
        }
        peak = memory.get((environment, name))
        if peak:
            lowest = memory[environment, "floor"]["peak_bytes"]["median"]
            row |= {"peak_bytes": peak["peak_bytes"], "peak_ratio_to_floor": peak["peak_bytes"]["median"] / lowest}
        rows.append(row)
    return rows


def losses_agree(rows: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """Whether all methods computed the same: the untrained loss, and LoReFT's with the same R, W and b.

    adapters is left out of the second: its suffix is not the prompt's.
    """
    start = [row["loss_at_identity"] for row in rows]
    given = [r["loss_with_given_edits"] for r in rows if r["method"] in ("trimtab", "trimtab-all-logits", "pyreft")]
    given = [loss for loss in given if loss is not None]
    return {
        "tolerance": tolerance,
        "at_identity": max(start) - min(start) <= tolerance,
        "with_given_edits": max(given) - min(given) <= tolerance if len(given) > 1 else None,
    }


def peak_memory(pythons: dict[str, str], where: list[Place], args: argparse.Namespace, batch: list[Sample]) -> Any:
    """Each method alone in a fresh process."""
    found = {}
    for environment, name in where:
        with started(pythons[environment], args.threads, LARGE_BLOCKS_LEAVE) as worker:
            found[environment, name] = worker.ask(
                "memory",
                shape=args.shape,
                device=args.device,
                name=name,
                plan=asdict(plan_of(args)),
                batch=batch,
                rounds=args.memory_repeats,
            )
        print(f"memory of {environment}/{name}", file=sys.stderr)
    return found


@contextmanager
def started(python: str, threads: int, extra: dict[str, str] | None = None) -> Iterator[WorkerProcess]:
    """A worker that ends with the context."""
    worker = WorkerProcess(python, threads, extra)
    try:
        yield worker
    finally:
        worker.close()


def plan_of(args: argparse.Namespace) -> Plan:
    """What all methods have in common."""
    return Plan(r=args.rank, first=args.first, last=args.last)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; returns what the JSON file holds."""
    pythons = {"own": sys.executable, **({"peers": args.peers_python} if args.peers_python else {})}
    where = places(args.methods, list(pythons))
    batches = draw_batches(args.lengths, args.data, args.batch, args.batches or WARM_UP + args.repeats, args.seed)
    workers: dict[str, Asked] = {}
    machines: dict[str, Any] = {}
    running = []
    try:
        for environment in dict.fromkeys(e for e, _ in where):
            workers[environment] = worker = WorkerProcess(pythons[environment], args.threads)
            running.append(worker)
            machines[environment] = worker.ask("load", **load_arguments(args, environment, where, batches))
        facts = {(e, name): workers[e].ask("facts", name=name, batch=0) for e, name in where}
        seconds = measure(workers, where, len(batches), args.repeats, args.seed)
    finally:
        for worker in running:
            worker.close()
    largest = max(batches, key=lambda batch: max(len(s.prompt) + len(s.answer) for s in batch))
    memory = peak_memory(pythons, where, args, largest) if args.memory_repeats else {}
    return result_of(args, where, batches, machines, facts, seconds, memory)


def load_arguments(args: argparse.Namespace, environment: str, where: list[Place], batches: Any) -> dict[str, Any]:
    """What an environment's worker is told to load."""
    return {
        "shape": args.shape,
        "device": args.device,
        "names": [name for e, name in where if e == environment],
        "plan": asdict(plan_of(args)),
        "batches": batches,
    }


def result_of(
    args: argparse.Namespace,
    where: list[Place],
    batches: list[list[Sample]],
    machines: dict[str, Any],
    facts: dict[Place, Any],
    seconds: dict[str, list[float]],
    memory: dict[Place, Any],
) -> dict[str, Any]:
    """Everything measured, with where, when and how."""
    sizes = [sum(len(s.prompt) + len(s.answer) for s in batch) for batch in batches]
    tokens = [sizes[turn % len(batches)] for turn in range(WARM_UP, WARM_UP + args.repeats)]
    rows = summarised(where, seconds, tokens, facts, memory)
    shown = described_machine()
    return {
        **shown,
        "threads": args.threads,
        "versions": {e: machine["versions"] for e, machine in machines.items()},
        "model": {
            "shape": args.shape,
            "weights": "random",
            "parameters": next(iter(machines.values()))["parameters"],
            "dtype": str(dtype_of(args.shape)).removeprefix("torch."),
            "device": args.device,
            **SHAPES[args.shape],
        },
        "adapter": {"method": "LoReFT", "positions": plan_of(args).positions, "r": args.rank, "layers": "all"},
        "batches": {
            "lengths": args.lengths,
            "size": args.batch,
            "number": len(batches),
            "seed": args.seed,
            "tokens": spread(sizes),
            "supervised_tokens": spread([sum(len(s.answer) for s in batch) for batch in batches]),
            "columns": spread([max(len(s.prompt) + len(s.answer) for s in batch) for batch in batches]),
        },
        "losses_agree": losses_agree(rows, 1e-4 if dtype_of(args.shape).itemsize == 4 else 0.1),
        "methods": rows,
        "rounds": seconds,
    }


def table(result: dict[str, Any]) -> str:
    """The result for the terminal."""
    head = ["method", "env", "step s", "of floor", "range", "tokens/s", "peak MiB", "of floor", "kept MiB", "params"]
    rows = []
    for row in sorted(result["methods"], key=lambda row: row["ratio_to_floor"]["median"]):
        ratio, peak = row["ratio_to_floor"], row.get("peak_bytes")
        rows.append(
            [
                row["method"],
                row["environment"],
                f"{row['step_seconds']['median']:.4f}",
                f"{ratio['median']:.3f}",
                f"{ratio['min']:.3f}-{ratio['max']:.3f}",
                f"{row['tokens_per_second']:.0f}",
                f"{peak['median'] / 2**20:.1f}" if peak else "",
                f"{row['peak_ratio_to_floor']:.3f}" if peak else "",
                f"{row['bytes_kept_for_backward'] / 2**20:.1f}",
                str(row["trainable_parameters"]),
            ]
        )
    return as_table(head, rows)


def draw_plot(out: Path, peers_python: str | None) -> None:
    """Beside the JSON; by the environment that has matplotlib."""
    python = sys.executable if find_spec("matplotlib") else peers_python
    if python is None:
        print("no matplotlib: pip install 'trimtab[bench]' to get the plot", file=sys.stderr)
        return
    subprocess.run([python, str(Path(__file__).with_name("plot.py")), str(out)], check=True)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="60m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lengths", default="commonsense", help="commonsense, gsm8k, long or fixed:N")
    parser.add_argument("--data", type=Path, help="folder with llm-adapters/ and gsm8k/")
    parser.add_argument("--methods", nargs="+", choices=list(CONTENDERS), default=STANDARD, metavar="METHOD")
    parser.add_argument("--peers-python", help="interpreter of the peers' environment; without it they are left out")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batches", type=int, help="different batches; by default each round has its own")
    parser.add_argument("--memory-repeats", type=int, default=3, help="0 leaves peak memory out")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--first", type=int, default=7, help="edited tokens at the start of the prompt")
    parser.add_argument("--last", type=int, default=7, help="and at its end")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the JSON file to write; the plot goes beside it")
    return parser


def main() -> None:
    """Measure, print, write and plot."""
    args = arguments().parse_args()
    result = run(args)
    print(table(result))
    print("losses agree:", result["losses_agree"])
    if args.out:
        write_json(args.out, result)
        draw_plot(args.out, args.peers_python)


if __name__ == "__main__":
    main()
