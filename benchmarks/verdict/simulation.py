"""How often `trimtab compare` tells two methods apart: identical ones, and ones that differ by so many points.

    python benchmarks/verdict/simulation.py --out benchmarks/results/verdict/simulation.json

Only the trials are made up: each answers items right or wrong by chance. The learning rates' search, the choice, the
statistics and the report are the command's own. What decides how hard that is:

- shape: what the learning rates are worth. `flat`: all the same; `gentle`: 2 points less a step away from the best;
  `steep`: 8 points; `collapsing`: as gentle, and from one step above the best half of the seeds fall by 30 points;
- validation: items that the rate is chosen on;
- spread: the standard deviation, in points, of a seed at one rate;
- unstable: one trial in ten, at any rate, falls by 25 points.

Items differ in difficulty. At one rate the seeds of a method find the same items hard, by half (`SHARED`): so
validation items mislead all seeds alike, which no spread of seeds shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from scipy import stats

from trimtab.runs.experiment import Experiment, Trial
from trimtab.runs.models import ModelSource
from trimtab.runs.trainer import TrainingSpec
from trimtab.runs.trial import Outcome
from trimtab.runs.ways import AdapterSpec, PeftWay
from trimtab.study import compare, report
from trimtab.study.statistics import Sample, judged, resamples
from trimtab.study.statistics import compare as difference
from trimtab.tasks.classification import ClassificationSpec

RATES, BEST, SHARED, HARDNESS = (1e-4, 1e-3, 1e-2, 1e-1), 2, 0.5, 1.5
SHAPES = {"flat": 0.0, "gentle": 0.02, "collapsing": 0.02, "steep": 0.08}
"""What a step away from the best rate costs."""
TEST, SEEDS, RESAMPLES = 400, 5, 400


@dataclass(frozen=True)
class Cell:
    """One kind of study."""

    shape: str
    validation: int
    spread: float
    """In points."""
    unstable: bool
    gap: float = 0.0
    """By how many points the second method is better, at any rate."""


CELLS = [Cell(*each) for each in itertools.product(SHAPES, (36, 150), (2, 6, 8), (False, True))]


class World:
    """What the trials of one study come to."""

    def __init__(self, cell: Cell, experiment: Experiment, seed: int) -> None:
        self.cell, self.seed = cell, seed
        self.wanted = {s: np.array([e.label for e in experiment.task.examples(s)]) for s in ("validation", "test")}
        self.hard = {s: self.draw(s).normal(0, HARDNESS, len(wanted)) for s, wanted in self.wanted.items()}

    def draw(self, *of: Any) -> np.random.Generator:
        """Chance that is the same whenever the same is asked."""
        return np.random.default_rng([self.seed, *map(ord, repr(of))])

    def run_all(self, trials: Sequence[Trial], *_: Any) -> list[Outcome]:
        """In place of `run_trials`."""
        return [self.run(trial) for trial in trials]

    def run(self, trial: Trial) -> Outcome:
        """What one scores."""
        rate, method = trial.learning_rate or 0.0, trial.way.name
        luck = self.draw(method, rate, trial.seed)
        skill = stats.norm.ppf(self.right(trial, luck)) * (1 + HARDNESS**2) ** 0.5
        answers = {s: self.answers(s, skill, luck, self.draw(method, rate, s)) for s in self.wanted}
        return Outcome(
            run={"learning_rate": rate, "seed": trial.seed},
            validation=float((answers["validation"] == self.wanted["validation"]).mean()),
            validation_loss=float(luck.random()),
            validation_predictions=answers["validation"].tolist(),
            test={"accuracy": float((answers["test"] == self.wanted["test"]).mean())},
            predictions=answers["test"].tolist(),
        )

    def right(self, trial: Trial, luck: np.random.Generator) -> float:
        """How often the trial is right in the long run."""
        cell = self.cell
        above = round(np.log10(trial.learning_rate or 0.0)) + len(RATES) - BEST
        found = 0.78 - SHAPES[cell.shape] * abs(above) + cell.spread / 100 * luck.normal()
        found += cell.gap / 100 * (trial.way.name == "second")
        found -= 0.30 * (cell.shape == "collapsing" and above > 0 and luck.random() < 0.5)
        found -= 0.25 * (cell.unstable and luck.random() < 0.1)
        return float(np.clip(found, 0.02, 0.98))

    def answers(self, split: str, skill: float, luck: np.random.Generator, shared: np.random.Generator) -> Any:
        wanted = self.wanted[split]
        noise = SHARED**0.5 * shared.normal(size=len(wanted)) + (1 - SHARED) ** 0.5 * luck.normal(size=len(wanted))
        return np.where(skill + noise > self.hard[split], wanted, 1 - wanted)


class Inline(Executor):
    """Runs a call when it is submitted."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


@contextmanager
def here(jobs: int) -> Iterator[Executor]:
    """In place of processes."""
    yield Inline()


def experiment(folder: Path, validation: int) -> Experiment:
    """A task of two classes with so many validation items."""
    for split, count in (("train", 20), ("validation", validation), ("test", TEST)):
        rows = [json.dumps({"text": f"{split} {i}", "label": ("no", "yes")[i % 2]}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    data = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    said = {"type": "classification", "text": "text", "label": "label", "labels": ["no", "yes"], "data": data}
    spec = ClassificationSpec.model_validate(said)
    return Experiment("simulated", ModelSource("none"), spec, AdapterSpec(), TrainingSpec())


def verdicts(cell: Cell, times: int, seed: int = 0) -> Iterator[str]:
    """The command's verdict on the second method, in so many studies."""
    settings = compare.CompareSpec(learning_rates=list(RATES), seeds=SEEDS)
    ways = [PeftWay(name, {"peft_type": "LORA"}, RATES) for name in ("first", "second")]
    drawn = cache(partial(resamples, count=RESAMPLES))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patched:
        task = experiment(Path(folder), cell.validation)
        for module, name, instead in (
            (compare, "workers", here),
            (compare, "fingerprints", lambda *_: {}),
            (report, "resamples", lambda items, sources: drawn(items)),  # each its own
        ):
            patched.enter_context(patch.object(module, name, instead))
        for number in range(times):
            with patch.object(compare, "run_trials", World(cell, task, seed + number).run_all):
                study = compare.Study({task.name: task}, {task.name: ways}, settings, Path(folder))
                lines = report.summarise(study.run(1), settings).tasks[task.name].methods
            yield next(line.against_reference.verdict for line in lines if line.against_reference)


def apart(cell: Cell, times: int, seed: int = 0) -> float:
    """How many studies in 100 tell the methods apart."""
    return 100 * sum(found in ("better", "worse") for found in verdicts(cell, times, seed)) / times


def before(cell: Cell, times: int) -> float:
    """The same where the first seed chooses for all, and the choice is taken as certain, as many studies do it."""
    ways = [PeftWay(name, {"peft_type": "LORA"}) for name in ("first", "second")]
    weights, found = resamples(TEST, count=RESAMPLES), 0
    with tempfile.TemporaryDirectory() as folder:
        task = experiment(Path(folder), cell.validation)
        for number in range(times):
            world, samples = World(cell, task, number), []
            for way in ways:
                first = {rate: world.run(Trial(task, way, rate, 0)) for rate in RATES}
                rate = compare.by_worth(first)[0].learning_rate
                runs = [world.run(Trial(task, way, rate, seed)) for seed in range(SEEDS)]
                right = np.array([run.predictions for run in runs]) == world.wanted["test"]
                samples.append(Sample(right @ weights.T / TEST, TEST))
            found += judged([difference(*samples)])[0].verdict in ("better", "worse")
    return 100 * found / times


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: of 100 studies, those that tell identical methods apart, before and now, and find the gap."""
    kinds = list(itertools.product((2, 6, 8), (False, True)))
    head = ["shape", "validation", *(f"{spread} points{', unstable' * unstable}" for spread, unstable in kinds)]
    lines = [head, ["---"] * len(head)]
    for shape, validation in itertools.product(SHAPES, (36, 150)):
        row = [c for c in cells if (c["shape"], c["validation"]) == (shape, validation)]
        told = [f"{c['apart_first_seed_chooses']:.0f} → {c['apart']:.0f}; {c['found']:.0f}" for c in row]
        lines.append([shape, str(validation), *told])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Every cell, as JSON; the table is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--gap", type=float, default=6, help="points, for the power")
    chosen = parser.parse_args()
    lines = []
    for cell in CELLS:
        better = Cell(**{**asdict(cell), "gap": chosen.gap})
        line = {
            **asdict(cell),
            "gap": chosen.gap,
            "apart": apart(cell, chosen.times),
            "apart_first_seed_chooses": before(cell, chosen.times // 2),
            "found": apart(better, chosen.times // 4),
        }
        lines.append(line)
        print(line, flush=True)
    how = {"studies": chosen.times, "seeds": SEEDS, "test_items": TEST, "rates": RATES, "reach": 3}
    chosen.out.write_text(json.dumps({**how, "cells": lines}, indent=1) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
