"""Steering, measured: adapters from pairs of prompts, without training, on words that were in none of the pairs.

A pair is a word with a skill's instruction and the bare word. The table says how often the steered model answers bare
test words by that skill, and how likely the base model finds what it answers.

    python benchmarks/steering.py --out benchmarks/results/steering.json
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import trimtab
from trimtab.adapter.steering import Steering, steer
from trimtab.runs.models import ModelSource, load_model, load_tokenizer
from trimtab.runs.predict import predict
from trimtab.tasks.files import read_rows
from trimtab.tasks.tokens import encode

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/tiny-llama"
TIMES = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
"""Of the strength that steer takes by itself; 0 is the base model."""


@torch.no_grad()
def answered(model: Any, tokenizer: Any, rows: list[dict[str, str]], encoded: list[Any]) -> dict[str, Any]:
    """Exact match, and the answers for `surprise`."""
    texts = [text.strip() for text in predict(model, tokenizer, encoded, max_new_tokens=8)]
    return {"exact": sum(t == r["output"] for t, r in zip(texts, rows, strict=True)) / len(rows), "answers": texts}


@torch.no_grad()
def surprise(model: Any, tokenizer: Any, encoded: list[Any], answers: list[str]) -> float:
    """Nats per token of answers after their prompts, under the base model."""
    total = count = 0.0
    for prompt, answer in zip(encoded, answers, strict=True):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([[*prompt.input_ids, *ids, 4]])  # 4 ends an answer
        logits = model(input_ids=whole).logits[0, len(prompt.input_ids) - 1 : -1].log_softmax(-1)
        total -= float(logits.gather(1, whole[0, len(prompt.input_ids) :, None]).sum())
        count += len(ids) + 1
    return total / count


def steered(model: Any, tokenizer: Any, found: Steering, times: float, rows: Any, encoded: Any) -> dict[str, Any]:
    """One line of the table."""
    layer = next(own for own in found.layers if own.number in found.chosen)
    how = {"layers": [layer.number], "positions": found.config.positions, "scale": times}
    with trimtab.edit(model, layer.change, **how):
        said = answered(model, tokenizer, rows, encoded)
    said["surprise"] = surprise(model, tokenizer, encoded, said.pop("answers"))
    return {"times": times, "strength": times * layer.strength, **said}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, model = load_tokenizer(str(MODEL)), load_model(ModelSource(str(MODEL), "float32")).eval()
    skills = json.loads((ROOT / "models/pretrain/skills.json").read_text())["skills"]
    lines = []
    for task in ("plural", "french", "kind"):
        folder, instruction = ROOT / "recipes/data" / task, skills[task]["instructions"][0]
        words = [row["input"] for row in read_rows(folder / "train.jsonl")][: options.pairs]
        rows = read_rows(folder / "test.jsonl")
        encoded = [encode(tokenizer, row["input"]) for row in rows]
        asked = answered(model, tokenizer, rows, [encode(tokenizer, f"{instruction}\n{r['input']}") for r in rows])
        ids = [
            [torch.tensor(encode(tokenizer, t.format(w)).input_ids) for w in words]
            for t in (f"{instruction}\n{{}}", "{}")
        ]
        for positions in ("l1", "all"):
            found = steer(model, *ids, positions=positions)
            sweep = [steered(model, tokenizer, found, times, rows, encoded) for times in TIMES]
            layers = [{"block": o.number, "accuracy": o.accuracy, "gap_closed": o.gap_closed} for o in found.layers]
            line = {"task": task, "positions": positions, "block": found.chosen[0], "instructed": asked["exact"]}
            lines.append({**line, "test_words": len(rows), "pairs": len(words), "sweep": sweep, "layers": layers})
            print(
                task,
                positions,
                "block",
                found.chosen[0],
                *(f"{s['times']:g}: {s['exact']:.2f} ({s['surprise']:.2f})" for s in sweep),
            )
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, trimtab)}
    command = f"python benchmarks/steering.py --out {options.out} --pairs {options.pairs}"
    written = {
        "command": command,
        "machine": platform.processor() or platform.machine(),
        "versions": versions,
        "lines": lines,
    }
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
