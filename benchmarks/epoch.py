"""Examples a second over whole epochs, each library with its own training loop.

    python benchmarks/epoch.py --shape 60m --data DATA --peers-python .venv-peers/bin/python \\
        --out benchmarks/results/epoch-60m.json

trimtab trains a recipe, as `trimtab train` does; pyreft goes through its own dataset, collator and loss in a plain loop
(its Trainer does not run on a current transformers); LoRA runs on transformers' Trainer. Same examples, epochs, batch
size and learning-rate schedule. Each run is a fresh process, one at a time, in random order within a round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import as_table, described_machine, spread, versions, write_json
from contenders import ATTENTION, LINEAR, Plan, Where, pyreft_loss, pyreft_model
from samples import EOS, TOKENIZER, Pair, draw_pairs, encode
from shapes import SHAPES, build_llama, dtype_of

LONGEST = 1200
RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """Real examples and the tokens and blocks that are edited."""

    lengths: str
    first: int
    last: int
    upper: bool = False
    """Only the upper half of the blocks."""

    def plan(self, shape: str, r: int) -> Plan:
        blocks = SHAPES[shape]["num_hidden_layers"]
        layers = list(range(blocks // 2, blocks)) if self.upper else None
        return Plan(r=r, first=self.first, last=self.last, layers=layers, learning_rate=RATE)


CASES = {
    "commonsense": Case("commonsense", 7, 7),
    "gsm8k": Case("gsm8k", 7, 7),
    "long-prompts": Case("long", 0, 4),
    "upper-half": Case("commonsense", 7, 7, upper=True),
}


@dataclass(frozen=True)
class Job:
    """One run of one method: what a fresh process is told."""

    method: str
    shape: str
    device: str
    plan: Plan
    pairs: list[Pair]
    batch: int
    epochs: int
    seed: int

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(len(self.pairs) / self.batch)


Marks = list[float]
"""Seconds since the start of training at the end of each step."""


# ---- trimtab -------------------------------------------------------------------------------------------------------


def train_trimtab(job: Job, reuse: bool = True) -> Marks:
    """A recipe, through `train`."""
    from trimtab.recipe.load import load_recipe
    from trimtab.runs.train import train

    marks: Marks = []

    def watch(progress: Any) -> None:
        if progress.step > len(marks):
            marks.append(progress.seconds)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_run(job, folder, reuse)
        recipe = load_recipe(folder / "recipe.yaml")
        metrics = train(recipe.experiments(), recipe.output, watch=watch)
        print(json.dumps(metrics["task"].get("reuse")), file=sys.stderr)
    return marks


def _write_run(job: Job, folder: Path, reuse: bool) -> None:
    """A model, data and a recipe; JSON is YAML. Scoring, which is not timed, gets two examples and one token each."""
    build_llama(job.shape, seed=job.seed).save_pretrained(folder / "model")
    _write_tokenizer(folder / "model")
    rows = [json.dumps(pair._asdict()) for pair in job.pairs]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "few.jsonl").write_text("\n".join(rows[:2]))
    plan = job.plan
    recipe = {
        "model": str(folder / "model"),
        "output": str(folder / "runs"),
        "seed": job.seed,
        "dtype": str(dtype_of(job.shape)).removeprefix("torch."),
        "adapter": {"r": plan.r, "positions": plan.positions, "layers": plan.layers or "all"},
        "training": {
            "learning_rate": plan.learning_rate,
            "epochs": job.epochs,
            "batch_size": job.batch,
            "warmup": 0.1,
            "max_length": LONGEST,
            "checkpoint_every": job.steps_an_epoch * job.epochs + 1,
            "reuse": reuse,
        },
        "tasks": {
            "task": {
                "type": "generation",
                "data": {s: str(folder / f"{f}.jsonl") for s, f in (("train", "train"), ("validation", "few"))}
                | {"test": str(folder / "few.jsonl")},
                "prompt": "{prompt}",
                "answer": "{answer}",
                "chat": False,
                "max_new_tokens": 1,
            }
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def _write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    config = json.loads(TOKENIZER.with_name("tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": LONGEST}))


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def train_lora(job: Job, targets: list[str], trimmed: bool = False) -> Marks:
    """transformers' Trainer as its users run it; `trimmed` adds what trimtab does for itself to the batches.

    Which is: only supervised positions to the vocabulary, and batches of like lengths.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer

    r = job.plan.r
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=2 * r,
        target_modules=targets,
        layers_to_transform=job.plan.layers,
        layers_pattern="layers" if job.plan.layers else None,
    )
    model = get_peft_model(build_llama(job.shape, job.device, job.seed), config)
    collator: Any = DataCollatorForSeq2Seq(_fast_tokenizer(), label_pad_token_id=-100)
    if trimmed:
        from trimtab.runs.trainer import supervised_only

        collator = supervised_only(collator)
    marks, callback = _marking()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=_trainer_arguments(job, folder, trimmed),
            train_dataset=_encoded(job.pairs),
            data_collator=collator,
            callbacks=[callback],
        )
        trainer.train()
    return marks


def _trainer_arguments(job: Job, folder: str, by_length: bool) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        learning_rate=job.plan.learning_rate,
        num_train_epochs=job.epochs,
        per_device_train_batch_size=job.batch,
        warmup_steps=0.1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=10**6,
        seed=job.seed,
        train_sampling_strategy="group_by_length" if by_length else "random",
        use_cpu=job.device == "cpu",
        dataloader_pin_memory=job.device != "cpu",
    )


def _marking() -> tuple[Marks, Any]:
    """A callback that keeps the time of every step."""
    from transformers import TrainerCallback

    marks: Marks = []

    class Marking(TrainerCallback):
        """Notes when each step ends."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter() - self.start)

    return marks, Marking()


def _encoded(pairs: list[Pair]) -> list[dict[str, list[int]]]:
    samples = [encode(pair) for pair in pairs]
    return [
        {
            "input_ids": [*s.prompt, *s.answer],
            "attention_mask": [1] * len(s.prompt + s.answer),
            "labels": [*[-100] * len(s.prompt), *s.answer],
        }
        for s in samples
    ]


def _fast_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_file=str(TOKENIZER),
        bos_token="<|bos|>",
        eos_token=EOS,
        pad_token="<|pad|>",
        model_max_length=LONGEST,
        padding_side="right",
    )


# ---- pyreft --------------------------------------------------------------------------------------------------------


def train_pyreft(job: Job) -> Marks:
    """pyreft's dataset, collator, model and loss; the loop does what its Trainer would: AdamW, clipping, decay."""
    from torch.utils.data import DataLoader

    torch.manual_seed(job.seed)
    model = pyreft_model(build_llama(job.shape, job.device, job.seed), job.plan)
    dataset, collator = _pyreft_data(job, model)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=job.batch, shuffle=True, collate_fn=collator)
    parameters = list(model.get_trainable_parameters())
    optimizer = torch.optim.AdamW(parameters, lr=job.plan.learning_rate, weight_decay=0.0)
    steps = job.steps_an_epoch * job.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    marks: Marks = []
    model.train()
    start = time.perf_counter()
    for _ in range(job.epochs):
        for batch in loader:
            on_device = {k: v.to(job.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            torch.autograd.backward(pyreft_loss(model, on_device))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if job.device != "cpu":
                torch.cuda.synchronize()
            marks.append(time.perf_counter() - start)
    return marks


def _pyreft_data(job: Job, model: Any) -> tuple[Any, Any]:
    import pyreft
    from transformers import DataCollatorForSeq2Seq

    tokenizer = _fast_tokenizer()
    blocks = job.plan.layers if job.plan.layers is not None else range(SHAPES[job.shape]["num_hidden_layers"])
    dataset = pyreft.ReftGenerationDataset(
        task="pairs",
        data_path=None,
        tokenizer=tokenizer,
        dataset=[pair._asdict() for pair in job.pairs],
        prompt_field="prompt",
        completion_field="answer",
        position=job.plan.positions,
        num_interventions=len(blocks),
        share_weights=True,
    )
    padding = DataCollatorForSeq2Seq(tokenizer, model=model.model, label_pad_token_id=-100, padding="longest")
    return dataset, pyreft.ReftDataCollator(data_collator=padding)


# ---- the table, the child process, the driver ------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A way to train and the environment it needs."""

    train: Callable[..., Marks]
    where: Where
    options: dict[str, Any]
    standard: bool = True


METHODS = {
    "trimtab": Row(train_trimtab, "own", {}),
    "trimtab-no-reuse": Row(train_trimtab, "own", {"reuse": False}, standard=False),
    "pyreft": Row(train_pyreft, "peers", {}),
    "peft-lora": Row(train_lora, "own", {"targets": ATTENTION}),
    "peft-lora-all": Row(train_lora, "own", {"targets": LINEAR}, standard=False),
    "peft-lora-trimmed": Row(train_lora, "own", {"targets": ATTENTION, "trimmed": True}, standard=False),
}
STANDARD = [name for name, row in METHODS.items() if row.standard]


def run_job(job: Job) -> dict[str, Any]:
    """Train, here and now; seconds of each epoch."""
    row = METHODS[job.method]
    marks = row.train(job, **row.options)
    ends = [0.0, *(marks[(epoch + 1) * job.steps_an_epoch - 1] for epoch in range(job.epochs))]
    return {"epoch_seconds": [b - a for a, b in pairwise(ends)], "versions": versions()}


def as_child(job: Job, python: str, threads: int) -> dict[str, Any]:
    """`run_job` in a fresh process under another interpreter."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [python, __file__, "--worker"], input=json.dumps(asdict(job)), capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{job.method} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    reused = [line for line in done.stderr.splitlines() if line.startswith('{"reused"')]
    return result | ({"reuse": json.loads(reused[-1])} if reused else {})


def serve() -> None:
    """The child: a job on stdin, its result as the last line of stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    told = json.loads(sys.stdin.read())
    told["plan"] = Plan(**told["plan"])
    told["pairs"] = [Pair(*pair) for pair in told["pairs"]]
    print(json.dumps(run_job(Job(**told))), file=answers, flush=True)


def measure_case(name: str, args: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    """All methods on one case, `rounds` times."""
    case = CASES[name]
    plan, pairs = case.plan(args.shape, args.rank), draw_pairs(case.lengths, args.data, args.examples, args.seed)
    methods = [m for m in args.methods if METHODS[m].where in pythons]
    runs: dict[str, list[dict[str, Any]]] = {m: [] for m in methods}
    draw = random.Random(args.seed)
    for turn in range(args.rounds):
        for method in draw.sample(methods, len(methods)):
            epochs = args.epochs if method == "trimtab" else args.plain_epochs or args.epochs
            job = Job(method, args.shape, args.device, plan, pairs, args.batch, epochs, args.seed + turn)
            runs[method].append(as_child(job, pythons[METHODS[method].where], args.threads))
            speed = len(pairs) * epochs / sum(runs[method][-1]["epoch_seconds"])
            print(f"{name}, round {turn + 1}: {method} {speed:.2f} examples/s", file=sys.stderr)
    lengths = [encode(pair) for pair in pairs]
    return {
        "case": name,
        **asdict(case),
        "positions": plan.positions,
        "layers": plan.layers or "all",
        "examples": len(pairs),
        "prompt_tokens": spread([len(s.prompt) for s in lengths]),
        "answer_tokens": spread([len(s.answer) for s in lengths]),
        "methods": [summarised(m, runs, len(pairs)) for m in methods],
    }


def summarised(method: str, runs: dict[str, list[dict[str, Any]]], examples: int) -> dict[str, Any]:
    """Examples a second: over all epochs, the first, and the later ones; and trimtab's speed over this method's."""
    epochs = [run["epoch_seconds"] for run in runs[method]]
    an_epoch = [statistics.mean(seconds) for seconds in epochs]
    row = {
        "method": method,
        "examples_per_second": spread([examples * len(s) / sum(s) for s in epochs]),
        "first_epoch": spread([examples / s[0] for s in epochs]),
        "reuse": runs[method][-1].get("reuse"),
        "versions": runs[method][-1]["versions"],
        "epoch_seconds": epochs,
    }
    if len(epochs[0]) > 1:
        row["later_epochs"] = spread([examples / statistics.mean(s[1:]) for s in epochs])
        row["later_over_first"] = spread([s[0] / statistics.mean(s[1:]) for s in epochs])
    if "trimtab" in runs:
        ours = [statistics.mean(run["epoch_seconds"]) for run in runs["trimtab"]]
        row["trimtab_is_faster_by"] = spread([theirs / own for theirs, own in zip(an_epoch, ours, strict=True)])
    return row


def table(result: dict[str, Any]) -> str:
    """The result for the terminal."""
    head = ["case", "method", "examples/s", "range", "first epoch", "later epochs", "trimtab is faster by"]
    rows = []
    for case in result["cases"]:
        for row in case["methods"]:
            speed, later, by = row["examples_per_second"], row.get("later_epochs"), row.get("trimtab_is_faster_by")
            rows.append(
                [
                    case["case"],
                    row["method"],
                    f"{speed['median']:.2f}",
                    f"{speed['min']:.2f}-{speed['max']:.2f}",
                    f"{row['first_epoch']['median']:.2f}",
                    f"{later['median']:.2f}" if later else "",
                    f"{by['median']:.2f} ({by['min']:.2f}-{by['max']:.2f})" if by else "",
                ]
            )
    return as_table(head, rows)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=list(SHAPES), default="60m")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=STANDARD, metavar="METHOD")
    parser.add_argument("--data", type=Path, help="folder with llm-adapters/ and gsm8k/")
    parser.add_argument("--peers-python", help="interpreter of the peers' environment; without it they are left out")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--plain-epochs", type=int, help="fewer for the methods whose epochs are all alike")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    return parser


def main() -> None:
    """Measure, print, write."""
    args = arguments().parse_args()
    if args.worker:
        return serve()
    if args.data is None:
        raise SystemExit("--data is needed")
    pythons = {"own": sys.executable, **({"peers": args.peers_python} if args.peers_python else {})}
    result = {
        **described_machine(),
        "threads": args.threads,
        "model": {"shape": args.shape, "weights": "random", "dtype": str(dtype_of(args.shape)), "device": args.device},
        "settings": {k: getattr(args, k) for k in ("epochs", "plain_epochs", "batch", "rounds", "rank", "seed")},
        "cases": [measure_case(name, args, pythons) for name in args.cases],
    }
    print(table(result))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
