"""What is asked of a run: an experiment, a task on a model, and a trial, one way to adapt it at one rate and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from trimtab.runs.models import ModelSource, hash_of_model, identity_of, pool_for
from trimtab.runs.predict import Evaluation, evaluate
from trimtab.runs.trainer import TrainingSpec
from trimtab.runs.ways import AdapterSpec, Way
from trimtab.tasks import Example, Task, TaskSpec, build_task
from trimtab.tasks.conversation import Turn
from trimtab.tasks.spec import SPLITS
from trimtab.tasks.tokens import Encoded

SMALL_STEPS = 100
"""Steps of a few-shot trial, whatever the number of examples."""
SPLITS_KEPT = 4
_encodings: dict[str, tuple[list[Encoded], int]] = {}
"""Tokens of the last splits that were asked for, since the trials of a search all read the same."""


@dataclass(frozen=True)
class Experiment:
    """A task, the model it is for, and the settings it is trained under."""

    name: str
    source: ModelSource
    spec: TaskSpec
    adapter: AdapterSpec
    training: TrainingSpec
    seed: int = 0

    @cached_property
    def task(self) -> Task[Any]:
        return build_task(self.name, self.spec, self.seed)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read of the data, for a process that reads its own."""
        return {key: value for key, value in self.__dict__.items() if key != "task"}

    @property
    def pool(self) -> dict[str, str]:
        """Which tokens the task's head reads, where it is not as the architecture does: the same settings may have been
        read otherwise by earlier versions."""
        pool = pool_for(self.task.head, self.source.name)
        return {} if pool == "model" else {"pool": pool}

    @property
    def settings(self) -> dict[str, Any]:
        """The task's part of a recipe, as JSON has it."""
        parts = {"adapter": self.adapter, "training": self.training}
        return {**self.spec.model_dump(mode="json"), **{k: part.deciding() for k, part in parts.items()}}

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], training: bool
    ) -> tuple[list[Encoded], int]:
        """The task's tokens, at most `training.max_length` of an example; also how many were longer.

        Raises:
            DataError: an example cannot be tokenised for this model, or none fits.
        """
        length, cut = self.training.max_length, self.training.too_long == "cut"
        read = str(identity_of(self.source)), tokenizer.chat_template, self.task.settled.model_dump(mode="json")
        told = (read, length, cut, training, list(map(repr, examples)))
        if (key := digest(told)) not in _encodings:
            while len(_encodings) >= SPLITS_KEPT:
                _encodings.pop(next(iter(_encodings)))
            _encodings[key] = self.task.encode(tokenizer, examples, training=training, max_length=length, cut=cut)
        encoded, longer = _encodings[key]
        return list(encoded), longer

    def evaluate(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, split: str, **how: Any) -> Evaluation:
        """Scores and predictions on a split. Raises DataError."""
        examples = how.pop("examples", None) or self.task.examples(split)
        encoded, _ = self.encode(tokenizer, examples, training=False)
        return evaluate(model, tokenizer, self.task, examples, encoded, self.training.eval_batch_size, **how)


@dataclass(frozen=True)
class Trial:
    """One way to adapt on one task, with one learning rate and seed."""

    experiment: Experiment
    way: Way
    learning_rate: float | None
    seed: int
    examples: int | None = None
    """Train on so many, drawn by the seed; None for all."""
    splits: tuple[str, ...] = ("validation", "test")
    """What is scored; a search looks at validation alone."""
    held_out: str | None = None
    """A text file, on which the loss is taken before and after."""

    @property
    def looks(self) -> bool:
        """Whether validation is scored before the end too, to tell whether the training was enough."""
        return "test" in self.splits and "validation" in self.splits  # a search does not report it

    @property
    def training(self) -> TrainingSpec:
        """With the trial's own learning rate and, of few examples, its own length."""
        spec = self.experiment.training
        if self.learning_rate is not None:
            spec = spec.model_copy(update={"learning_rate": self.learning_rate})
        if self.way.settings.get("trains") == "head":
            spec = spec.model_copy(update={"head_learning_rate": None})
        if self.examples is not None:
            small = {"epochs": None, "max_steps": SMALL_STEPS, "batch_size": min(spec.batch_size, self.examples)}
            spec = spec.model_copy(update=small)
        return spec

    def described(self, content: dict[str, str]) -> dict[str, Any]:
        """All that decides the outcome; files by their content, so that no path of this machine is in it."""
        experiment, data = self.experiment, self.experiment.spec.data
        spec = {k: v for k, v in experiment.settings.items() if k not in ("adapter", "data")}
        if data.sets:
            spec["sets"] = {name: one.model_dump(mode="json", exclude={"file"}) for name, one in data.sets.items()}
        name = experiment.source.name
        return {
            "model": Path(name).name if Path(name).is_dir() else name,
            "dtype": experiment.source.dtype,
            "attention": experiment.source.attention,
            "task": spec,
            "content": content,
            "settings": dict(self.way.settings),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "examples": self.examples,
            **experiment.pool,
        }


def digest(described: Any) -> str:
    """A short name for what JSON can say."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _said(example: Example) -> tuple[Any, ...]:
    beside = (example.beside,) if isinstance(example, Turn) and example.beside else ()
    return (example.texts, example.answer, example.label, example.set, *beside)


def fingerprints(experiment: Experiment, held_out: str | None = None) -> dict[str, str]:
    """Short hashes of what a task's splits, the held-out text and a local model's files say. Raises DataError."""
    task = build_task(experiment.name, experiment.spec, experiment.seed)  # which reads the data as it is now
    splits = [s for s in SPLITS if s != "validation" or experiment.spec.data.validation is not False]
    texts = {
        split: json.dumps(list(map(_said, task.examples(split))), ensure_ascii=False, default=str) for split in splits
    }
    if held_out:
        texts["held_out"] = Path(held_out).read_text(encoding="utf-8")
    found = {key: hashlib.sha256(text.encode()).hexdigest()[:16] for key, text in texts.items()}
    model = hash_of_model(experiment.source)
    return {**found, "model": model} if model else found
