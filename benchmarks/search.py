"""What a search costs beside one trial, where trials share what the frozen model makes the same.

    python benchmarks/search.py [--trials 20] [--prompt 1000] [--width 2] [--out benchmarks/results/search.json]

The model is the bundled one, wider and with random weights and a longer context, the prompts are random words, the
adapters edit suffixes: other ranks, rates, seeds and positions (l1 to l4). Some trials are also run by themselves, for
their time and losses, with and without reuse. Seconds are the processor's, which other work on the machine does not
lengthen much.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trimtab.runs.models import ModelSource, quiet
from trimtab.runs.trainer import TrainingSpec
from trimtab.runs.trial import Experiment, Outcome, Trial, close_stores, run_trial
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
    start = time.process_time()
    together = [run_trial(one, folder / "together") for one in asked]
    seconds = time.process_time() - start
    close_stores()
    alone, apart, plain = [], [], []
    few = range(0, trials, max(1, trials // BY_THEMSELVES))
    for one in (asked[i] for i in few):
        start = time.process_time()
        apart.append(run_trial(one, folder / "apart"))
        alone.append(time.process_time() - start)
        close_stores()
        start = time.process_time()
        training = one.experiment.training.model_copy(update={"reuse": False})
        run_trial(replace(one, experiment=replace(one.experiment, training=training)), folder / "plain")
        plain.append(time.process_time() - start)
    alone, plain = sorted(alone), sorted(plain)
    one, without = alone[len(alone) // 2], plain[len(plain) // 2]
    return {
        "trials": trials,
        "width": width,
        "prompt_tokens": prompt,
        "examples": EXAMPLES,
        "epochs": epochs,
        "seconds_of_one": round(one, 2),
        "seconds_of_one_without_reuse": round(without, 2),
        "seconds_together": round(seconds, 2),
        "times_one": round(seconds / one, 2),
        "times_one_without_reuse": round(seconds / without, 2),
        "largest_difference_of_a_loss": max(apart_by(together[i], one) for i, one in zip(few, apart, strict=True)),
        "same_scores": all(together[i].validation == one.validation for i, one in zip(few, apart, strict=True)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def apart_by(one: Outcome, other: Outcome) -> float:
    """The largest difference between two curves of losses."""
    if one.failed or other.failed:
        raise RuntimeError(one.failed or other.failed)
    return max(abs(a - b) for (_, a), (_, b) in zip(one.curve, other.curve, strict=True))


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
