"""What a run will take, before it is run: a few steps of it, timed."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from trimtab.errors import DivergedError, ModelError, NotPossible
from trimtab.runs.experiment import Experiment, Trial
from trimtab.runs.fit import Fit
from trimtab.runs.models import Base, device
from trimtab.runs.predict import predict
from trimtab.runs.trainer import LOOKED_AT, LOOKS, Progress, TrainingSpec
from trimtab.runs.ways import ReftWay, unload
from trimtab.tasks.tokens import Encoded

WORTH = 40
"""Steps from which on a run is worth measuring."""
STEPS = 4
"""Steps that are made: two of a first epoch, of which the first warms up, and two when each example was seen."""
NEW = 8
"""New tokens that are timed, at most."""


@dataclass(frozen=True)
class Forecast:
    """About what training and scoring take."""

    steps: int
    first: float
    """Seconds of a step of the first epoch, in which what is kept for reuse is made."""
    later: float
    epoch: int
    """Steps of an epoch."""
    scoring: float
    """Seconds of scoring at most: the test rows before and after, some rows of validation while training."""
    memory: int
    """Bytes of training beside the model's own."""
    model: int
    """Bytes of the model."""

    @property
    def training(self) -> float:
        """Seconds."""
        first = min(self.epoch, self.steps)
        return self.first * first + self.later * (self.steps - first)

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.training + self.scoring


def steps_of(training: TrainingSpec, examples: int) -> int:
    """Steps of a run on so many examples."""
    return training.max_steps or math.ceil((training.epochs or 1) * _epoch(training, examples))


def _epoch(training: TrainingSpec, examples: int) -> int:
    batches = math.ceil(examples / training.batch_size)
    return math.ceil(batches / training.gradient_accumulation)


def forecast(experiment: Experiment, base: Base, encoded: Sequence[Encoded] | None = None) -> Forecast | None:
    """Measured on the model with the recipe's adapter; None where the run is short, or fails at once.

    Args:
        encoded: the training examples, where they are at hand.

    Raises:
        DataError: the data cannot be read.
        MemoryFull: a step, or a batch that is scored, does not fit.
    """
    training, task = experiment.training, experiment.task
    if encoded is None:
        encoded, _ = experiment.encode(base.tokenizer, task.examples("train"), training=True)
    steps = steps_of(training, len(encoded))
    if steps < WORTH:
        return None
    try:
        model, new = base.load(task.head, experiment.seed)
        way = ReftWay(experiment.adapter.method, experiment.adapter.model_dump())
        adapted = way.build(model, task.task_type, new, experiment.seed, task.edit_turns)
    except (ModelError, NotPossible):
        return None  # said when it is run
    few = experiment.training.model_copy(update={"epochs": None, "max_steps": STEPS})
    trial = Trial(replace(experiment, training=few), way, None, experiment.seed)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        times, memory, reuses = _timed(trial, adapted, base, encoded)
        scoring = _scoring(experiment, adapted, base)
    except DivergedError:
        return None  # as it will be
    finally:
        unload(adapted)
    later = (times[3] - times[1]) / 2
    first = max(later, times[1] - times[0])
    if not reuses:  # then an epoch is like another, and what differs is the lengths of the rows
        first = later = (times[3] - times[0]) / 3
    return Forecast(steps, first, later, _epoch(training, len(encoded)), scoring, memory, size)


def _timed(trial: Trial, adapted: nn.Module, base: Base, encoded: Sequence[Encoded]) -> tuple[list[float], int, bool]:
    """When each of a few steps ended, on examples of all lengths; the bytes of training; whether anything is reused."""
    wanted = 2 * trial.training.batch_size * trial.training.gradient_accumulation
    in_order = sorted(encoded, key=lambda one: len(one.input_ids))
    some = [in_order[i * len(encoded) // wanted] for i in range(wanted)] if len(encoded) > wanted else in_order
    ends: list[float] = []
    progress = Progress(trial.experiment.name)
    with tempfile.TemporaryDirectory() as folder:
        fit = Fit(
            trial,
            adapted,
            base.tokenizer,
            some,
            Path(folder),
            progress,
            watch=lambda now: ends.append(now.seconds),
            measured=True,
        )
        fit.run()
    return ends, fit.memory, fit.reuse is not None


def _scoring(experiment: Experiment, adapted: nn.Module, base: Base) -> float:
    """Seconds of all looks that training takes, from one batch: its prompts, and a few new tokens."""
    task, size = experiment.task, experiment.training.eval_batch_size
    examples, decoding = task.examples("test"), task.decoding()
    some, _ = experiment.encode(base.tokenizer, examples[:size], training=False)
    new = decoding.get("max_new_tokens")

    def seconds(tokens: int | None = None) -> float:
        how = decoding if tokens is None else {**decoding, "max_new_tokens": tokens}
        start = time.perf_counter()
        predict(adapted, base.tokenizer, some, size, **how)
        return time.perf_counter() - start

    if new is None:
        batch = seconds()
    elif new <= NEW:
        batch = seconds(new)
    else:  # prompts are read once, whatever the answer's length
        first, few = seconds(1), seconds(NEW)
        batch = first + (new - 1) * max(0.0, few - first) / (NEW - 1)
    each = batch / len(some)
    rows = 2 * len(examples)
    if experiment.spec.data.validation is not False:
        rows += len(LOOKS) * min(LOOKED_AT, len(task.examples("validation")))
    return each * rows


def told(name: str, found: Forecast) -> str:
    """A line for whoever waits."""
    size = f"{found.memory / 1e6:,.0f} MB of memory beside the model's {found.model / 1e6:,.0f} MB"
    each = f"{found.steps} steps of {found.training / found.steps:.2g} s on {device()}"
    scoring = f"scoring {duration(found.scoring)} at most"
    return f"{name} takes about {duration(found.seconds)}: {each}, {scoring}; {size}."


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
