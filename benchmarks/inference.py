"""What a ReFT adapter costs while generating, and what thousands of them cost to keep.

    python benchmarks/inference.py --adapters 10000 --out benchmarks/results/inference.json

- decode: operations in one decode step, counted by the profiler, and its time, for the base model, a prompt-only ReFT
  adapter and an unmerged LoRA on every linear layer; interleaved;
- pool: memory of many adapters over that of their parameters, and the time to load one into memory and onto the device,
  beside PEFT's LoRA hotswap.

The model has random weights; no figure here depends on what it says.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import as_table, described_machine, spread, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import ReftConfig
from trimtab.serve.pool import AdapterPool

REFT: dict[str, Any] = {"task_type": "CAUSAL_LM", "positions": "f7+l7", "r": 8, "init_weights": "paper"}


def llama(width: int, blocks: int) -> LlamaForCausalLM:
    """A model with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            num_key_value_heads=max(1, width // 256),
            vocab_size=4096,
            max_position_embeddings=1024,
        )
    ).eval()


def lora(model: LlamaForCausalLM) -> PeftModel:
    """Not merged, as a server with many adapters has it."""
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")).eval()


def reft(model: LlamaForCausalLM) -> PeftModel:
    """Frozen, as `PeftModel.from_pretrained` loads it."""
    return get_peft_model(model, ReftConfig(**REFT, inference_mode=True)).eval().requires_grad_(False)


class Decoding:
    """A model past its prompt, ready for one decode step after another."""

    def __init__(self, model: Any, batch: int, prompt: int = 64) -> None:
        self.model = model
        ids = torch.randint(3, 4096, (batch, prompt))
        self.mask = torch.ones_like(ids)
        with torch.no_grad():
            self.cache = model(input_ids=ids, attention_mask=self.mask, use_cache=True).past_key_values
        self.next = torch.randint(3, 4096, (batch, 1))

    @torch.no_grad()
    def step(self) -> None:
        """One token for each row."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.next)], 1)
        self.model(input_ids=self.next, attention_mask=self.mask, past_key_values=self.cache, use_cache=True)

    def operations(self) -> Counter[str]:
        """The operations of one decode step, by name."""
        self.step()
        with profile(activities=[ProfilerActivity.CPU]) as record:
            self.step()
        return Counter(event.name for event in record.events() if event.name.startswith("aten::"))


def measure_decode(width: int, blocks: int, batches: list[int], rounds: int, steps: int) -> list[dict[str, Any]]:
    """One row for each method and batch size."""
    rows = []
    for batch in batches:
        models = {
            "base": llama(width, blocks),
            "reft": reft(llama(width, blocks)),
            "lora": lora(llama(width, blocks)),
        }
        running = {name: Decoding(model, batch) for name, model in models.items()}
        counts = {name: decoding.operations() for name, decoding in running.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            for name, decoding in running.items():
                start = time.perf_counter()
                for _ in range(steps):
                    decoding.step()
                times[name].append((time.perf_counter() - start) / steps)
        for name in ("reft", "lora"):
            ratios = [a / b for a, b in zip(times[name], times["base"], strict=True)]
            rows.append(
                {
                    "method": name,
                    "batch": batch,
                    "extra_operations": sum((counts[name] - counts["base"]).values()),
                    "base_operations": sum(counts["base"].values()),
                    "time_ratio": spread(ratios),
                    "base_seconds": statistics.median(times["base"]),
                }
            )
    return rows


def resident_bytes(process: int | str = "self") -> int:
    """Of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096


def timed(action: Callable[[], object], rounds: int) -> dict[str, float]:
    """Seconds of an action."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return spread(times)


def measure_pool(width: int, blocks: int, adapters: int, rounds: int) -> dict[str, Any]:
    """Memory of a pool of adapters read from one file, and times to switch and load."""
    config = ReftConfig(**REFT)
    model = get_peft_model(llama(width, blocks), config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        parameters = model.get_nb_trainable_parameters()[0]
        pool = AdapterPool(model, entries=8, max_rank=config.r or 1)
        for i in range(20):  # whatever the first reads allocate once
            pool.add(f"warm{i}", folder)
        before = resident_bytes()
        for i in range(adapters):
            pool.add(str(i), folder)
        each = (resident_bytes() - before) / adapters
        numbers, loads = iter(range(adapters)), iter(range(rounds))
        result = {
            "adapters": adapters,
            "parameter_bytes": 4 * parameters,
            "resident_bytes_each": each,
            "ratio": each / (4 * parameters),
            "switch_seconds": timed(lambda: switch(pool, str(next(numbers))), rounds),
            "load_seconds": timed(lambda: pool.add(f"load{next(loads)}", folder), rounds),
            "file_bytes": size,
        }
    return result | measure_hotswap(width, blocks, rounds)


def switch(pool: AdapterPool, name: str) -> None:
    """Put an adapter on the device."""
    with pool.rows([name]):
        pass


def measure_hotswap(width: int, blocks: int, rounds: int) -> dict[str, Any]:
    """Seconds of PEFT's replacing one LoRA by another from a file."""
    with tempfile.TemporaryDirectory() as folder:
        model = lora(llama(width, blocks))
        model.save_pretrained(folder)
        return {
            "lora_hotswap_seconds": timed(
                lambda: hotswap_adapter(model, folder, adapter_name="default", torch_device="cpu"), rounds
            ),
            "lora_file_bytes": (Path(folder) / "adapter_model.safetensors").stat().st_size,
        }


def table(result: dict[str, Any]) -> str:
    """The result for the terminal."""
    decode = [
        [
            row["method"],
            str(row["batch"]),
            str(row["extra_operations"]),
            "{median:.3f} ({min:.3f}-{max:.3f})".format(**row["time_ratio"]),
        ]
        for row in result["decode"]
    ]
    pool = result["pool"]
    microseconds = {key: 1e6 * pool[f"{key}_seconds"]["median"] for key in ("switch", "load", "lora_hotswap")}
    return "\n".join(
        [
            as_table(["method", "batch", "extra operations", "time of base"], decode),
            f"{pool['adapters']} adapters: {pool['ratio']:.3f} bytes resident for each byte of parameters",
            "microseconds: " + ", ".join(f"{key} {value:.0f}" for key, value in microseconds.items()),
        ]
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="decode steps timed together")
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="a JSON file to write; by default the result is only printed")
    args = parser.parse_args()
    result = {
        **described_machine(),
        "model": {"width": args.width, "blocks": args.blocks, "weights": "random"},
        "adapter": REFT,
        # First: memory that other measurements freed would be reused, and so not counted.
        "pool": measure_pool(args.width, args.blocks, args.adapters, args.rounds),
        "decode": measure_decode(args.width, args.blocks, args.batches, args.rounds, args.steps),
    }
    print(table(result))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
