"""What a search costs beside one trial, where trials share what the frozen model makes the same.

    python benchmarks/search.py [--trials 20] [--prompt 1000] [--width 2] [--out benchmarks/results/search.json]

The model is the bundled one, wider and with random weights and a longer context, the prompts are random words, the
adapters edit suffixes: other ranks, rates, seeds and positions (l1 to l4). All are trained in one batch, and also one
after another; some are run by themselves too, for their time and losses, with and without reuse. Seconds are the
processor's, which other work on the machine does not lengthen much.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trimtab.runs.experiment import Experiment, Trial
from trimtab.runs.kept import close_stores
from trimtab.runs.models import ModelSource, quiet
from trimtab.runs.together import run_trials
from trimtab.runs.trainer import TrainingSpec
from trimtab.runs.trial import Outcome, run_trial
from trimtab.runs.ways import AdapterSpec, ReftWay
from trimtab.tasks import TASKS

ROOT = Path(__file__).parents[1]
EXAMPLES = {"train": 16, "validation": 4, "test": 4}
BY_THEMSELVES = 3


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--width", type=int, default=2, help="times the bundled model's")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), asked.trials, asked.prompt, asked.epochs, asked.width)
    print(json.dumps(found, indent=2))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=2) + "\n")


def measure(folder: Path, trials: int, prompt: int, epochs: int, width: int) -> dict[str, Any]:
    """Seconds of one trial by itself and of all together, and how far their losses are from those by themselves."""
    model(folder, prompt, width)
    asked = [trial(folder, prompt, epochs, i) for i in range(trials)]
    together, seconds = timed(lambda: run_trials(asked, folder / "together"))
    in_turn, seconds_in_turn = timed(lambda: [run_trial(one, folder / "in-turn") for one in asked])
    alone, apart, plain = [], [], []
    few = range(0, trials, max(1, trials // BY_THEMSELVES))
    for one in (asked[i] for i in few):
        found, spent = timed(lambda one=one: run_trial(one, folder / "apart"))
        apart.append(found)
        alone.append(spent)
        training = one.experiment.training.model_copy(update={"reuse": False})
        without = replace(one, experiment=replace(one.experiment, training=training))
        plain.append(timed(lambda without=without: run_trial(without, folder / "plain"))[1])
    one, without = median(alone), median(plain)
    return {
        "trials": trials,
        "width": width,
        "prompt_tokens": prompt,
        "examples": EXAMPLES,
        "epochs": epochs,
        "trained_in_one_batch": sum(one.seconds is None for one in together),
        "seconds_of_one": round(one, 2),
        "seconds_of_one_without_reuse": round(without, 2),
        "seconds_together": round(seconds, 2),
        "seconds_one_after_another": round(seconds_in_turn, 2),
        "times_one": round(seconds / one, 2),
        "times_one_after_another": round(seconds_in_turn / one, 2),
        "times_one_without_reuse": round(seconds / without, 2),
        "largest_relative_difference_of_a_loss": max(map(apart_by, together, in_turn)),
        "of_one_by_itself": max(apart_by(in_turn[i], one) for i, one in zip(few, apart, strict=True)),
        "same_scores": all(one.validation == other.validation for one, other in zip(together, in_turn, strict=True)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What comes of it, and the processor's seconds; what is kept for others is dropped."""
    start = time.process_time()
    found = work()
    seconds = time.process_time() - start
    close_stores()
    return found, seconds


def apart_by(one: Outcome, other: Outcome) -> float:
    """The largest relative difference between two curves of losses, or the losses on validation."""
    if one.failed or other.failed:
        raise RuntimeError(one.failed or other.failed)
    curves, ends = zip(one.curve, other.curve, strict=True), (one.validation_loss, other.validation_loss)
    return max(abs(a - b) / b for a, b in [*((a, b) for (_, a), (_, b) in curves), ends])  # type: ignore[operator]


def trial(folder: Path, prompt: int, epochs: int, number: int) -> Trial:
    """One of another rank, rate, seed and position than its neighbours."""
    data = {split: str(rows(folder, split, prompt)) for split in EXAMPLES}
    spec = {"type": "generation", "data": data, "prompt": "{input}", "answer": "{output}", "max_new_tokens": 4}
    adapter = AdapterSpec(r=(2, 4, 8)[number % 3], positions=f"l{number % 4 + 1}")
    training = TrainingSpec(epochs=epochs, batch_size=8, max_length=prompt + 64, eval_batch_size=8)
    task = TASKS["generation"].spec_class.model_validate(spec)
    experiment = Experiment("long", ModelSource(str(folder / "model")), task, adapter, training)
    rate = (1e-3, 2e-3, 4e-3, 8e-3)[number // 5 % 4]
    return Trial(experiment, ReftWay("loreft", adapter.model_dump()), rate, number, splits=("validation",))


def rows(folder: Path, split: str, prompt: int) -> Path:
    """A file of prompts of so many words, of a token each."""
    file = folder / f"{split}.jsonl"
    if not file.exists():
        draw = random.Random(split)
        words = ["cat", "dog", "tree", "house", "king", "book", "the", "of"]  # a token each
        lines = (
            {"input": " ".join(draw.choices(words, k=prompt)), "output": draw.choice(words)}
            for _ in range(EXAMPLES[split])
        )
        file.write_text("\n".join(map(json.dumps, lines)))
    return file


def model(folder: Path, prompt: int, width: int) -> None:
    """The bundled model's shape and tokenizer, so many times as wide, with room for the prompt."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "models/tiny-llama")
    config.max_position_embeddings = prompt + 128
    config.hidden_size, config.intermediate_size = width * config.hidden_size, width * config.intermediate_size
    config.head_dim = config.hidden_size // config.num_attention_heads
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / "models/tiny-llama").save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
