"""Two halves of one rotation, trained at once on two data sets: each alone, and both (the LoReFT paper's appendix).

Rows of both tasks share every batch, each edited by its half of rank 4. Beside it: two adapters of rank 4 whose
rotations know nothing of each other, and one of rank 8 for both tasks. Scores are exact match on test words.

And negation: an adapter trained on novels, at every token, turned down and over (`set_scale`). The losses are of texts
of novels and of textbooks that were held out; the judge is that of `concepts.py`, of what the model goes on to write.

    python benchmarks/parts.py --out benchmarks/results/parts.json --data DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import described_machine
from concepts import OPENING, Judge, begun, concepts, continued, loss
from peft import PeftModel, get_peft_model

from trimtab import ReftConfig, set_scale, share_rotation
from trimtab.adapter.compose import compose
from trimtab.runs.models import ModelSource, load_model, load_tokenizer
from trimtab.runs.predict import predict
from trimtab.tasks.files import read_rows
from trimtab.tasks.tokens import Collator, Encoded, encode

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "models/tiny-llama")
TASKS = ("opposite", "past")
STEPS, BATCH, RATE = 150, 16, 4e-3
RANK = 4


def base() -> Any:
    """The model, in float32."""
    return load_model(ModelSource(MODEL, "float32"))


def config(r: int = RANK) -> ReftConfig:
    """Of every adapter here."""
    return ReftConfig(task_type="CAUSAL_LM", r=r, positions="f1+l2")


class Data:
    """Rows of both tasks, as tokens."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(MODEL)
        folder = ROOT / "benchmarks/verdict/data"
        self.rows = {
            (task, split): read_rows(folder / task / f"{split}.jsonl") for task in TASKS for split in ("train", "test")
        }

    def encoded(self, task: str, split: str, answers: bool) -> list[Encoded]:
        """Prompts, with answers or without."""
        rows = self.rows[task, split]
        return [encode(self.tokenizer, row["input"], row["output"] if answers else None) for row in rows]

    def score(self, model: Any, task: str) -> float:
        """Exact match on test."""
        texts = predict(model.eval(), self.tokenizer, self.encoded(task, "test", False), max_new_tokens=8)
        rows = self.rows[task, "test"]
        return sum(text.strip() == row["output"] for text, row in zip(texts, rows, strict=True)) / len(rows)

    def scores(self, model: Any) -> dict[str, float]:
        """On both tasks."""
        return {task: self.score(model, task) for task in TASKS}


def train(model: Any, data: Data, adapters: dict[str, str], seed: int) -> None:
    """Half of each batch from either task, each row for its task's adapter."""
    model.base_model.set_adapter(sorted(set(adapters.values())))
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=RATE, weight_decay=0)
    random, collate = torch.Generator().manual_seed(seed), Collator(data.tokenizer)
    examples = {task: data.encoded(task, "train", True) for task in TASKS}
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        rows, names = [], []
        for task in TASKS:
            picked = torch.randint(len(examples[task]), (BATCH // 2,), generator=random).tolist()
            rows += [examples[task][i] for i in picked]
            names += [adapters[task]] * len(picked)
        optimizer.zero_grad()
        model(**collate(rows), adapter_names=names).loss.backward()
        optimizer.step()


def halves(data: Data, seed: int, shared: bool) -> dict[str, dict[str, float]]:
    """Two adapters, each alone, reversed, and both."""
    torch.manual_seed(seed)
    first, second = TASKS
    model: Any = get_peft_model(base(), config(), adapter_name=first)
    model.add_adapter(second, config())
    if shared:
        share_rotation(model, TASKS)
    train(model, data, {task: task for task in TASKS}, seed)
    found = {}
    for task in TASKS:
        model.set_adapter(task)
        found[task] = data.scores(model)
        set_scale(model, task, -1.0)
        found[f"{task} reversed"] = data.scores(model)
        set_scale(model, task, 1.0)
    model.base_model.set_adapter(list(TASKS))
    found["both, in sequence"] = data.scores(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, weight in (("both, in parallel", 1.0), ("both, half of each", 0.5)):
            compose([Path(folder, task) for task in TASKS], [weight] * 2, Path(folder, name), parallel=True)
            found[name] = data.scores(PeftModel.from_pretrained(base(), Path(folder, name)))
    return found


def whole(data: Data, seed: int) -> dict[str, dict[str, float]]:
    """One adapter of twice the rank for both tasks."""
    torch.manual_seed(seed)
    model = get_peft_model(base(), config(2 * RANK))
    train(model, data, dict.fromkeys(TASKS, "default"), seed)
    return {"one adapter": data.scores(model)}


SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0)


def style(folder: Path) -> list[dict[str, float]]:
    """An adapter for novels, at several scales."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(MODEL)
    novel = next(own for own in concepts(folder, tokenizer) if own.name == "novel")
    judge, train_on, held = Judge(tokenizer, *novel.others()), novel.plus[:300], novel.plus[300:]
    fields = {"r": RANK, "positions": "all", "layers": [4, 5, 6, 7]}
    model: Any = get_peft_model(base(), ReftConfig(task_type="CAUSAL_LM", **fields))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(STEPS):
        ids = begun(model, train_on[torch.randint(len(train_on), (BATCH,))])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    lines = []
    for scale in SCALES:
        set_scale(model.eval(), "default", scale)
        texts = continued(model, novel.prompts())
        own = {"novels": loss(model, held, 0), "textbooks": loss(model, novel.prompts(), 0)}
        lines.append({"scale": scale, **own, "judged_novel": judge(texts[:, OPENING:]), "judge": judge.accuracy})
        set_scale(model, "default", 0.0)
        lines[-1]["loss_under_base"] = loss(model, texts, OPENING)
    return lines


def main() -> None:
    """Print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, required=True, help="holds text/ and axbench/, as concepts.py says")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, negated = Data(), style(options.data)
    print(*negated, sep="\n")
    ways = {
        "shared rotation": lambda seed: halves(data, seed, True),
        "rotations apart": lambda seed: halves(data, seed, False),
        f"rank {2 * RANK}": lambda seed: whole(data, seed),
    }
    lines = [{"way": "untuned", "used": "-", **{task: [score] for task, score in data.scores(base()).items()}}]
    for way, run in ways.items():
        runs = [run(seed) for seed in range(options.seeds)]
        lines += [{"way": way, "used": used, **{t: [r[used][t] for r in runs] for t in TASKS}} for used in runs[0]]
    for line in lines:
        print(line["way"], line["used"], *(f"{task} {statistics.mean(line[task]):.2f}" for task in TASKS), sep=" | ")
    settings = {"steps": STEPS, "batch": BATCH, "learning_rate": RATE, "rank": RANK, "seeds": options.seeds}
    written = {**described_machine(), "settings": settings, "lines": lines, "style": negated}
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
