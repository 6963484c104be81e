"""Training the tasks of a recipe, one adapter each, on transformers' `Trainer`.

Each task's folder, `output/<task>`, is an adapter that PEFT loads, with `metrics.json` (scores, cost) and `run.json`
(what was run: the resolved recipe, versions, seed). A finished task is skipped and an interrupted one resumes from its
last checkpoint, to the same adapter that an uninterrupted run gives.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.folder import inspect_adapter
from trimtab.recipe.schema import Recipe, TrainingSpec
from trimtab.runs.models import (
    ModelError,
    as_attention,
    as_dtype,
    device,
    heads_beyond_peft,
    heads_of,
    load_causal_lm,
    load_tokenizer,
    loading,
)
from trimtab.runs.predict import Evaluation, evaluate
from trimtab.runs.reuse import Reuse, Store, choose_reuse
from trimtab.runs.trainer import NumberedCollator, ReftTrainer
from trimtab.tasks import Example, Task, build_task
from trimtab.tasks.tokens import Collator, Encoded

VALIDATION_LOOKS = 4
"""How often the validation score is taken during a run, to be shown; it chooses nothing."""


class RunError(ValueError):
    """A run that cannot start or go on. The message says what is in the way and what to do."""


@dataclass
class Progress:
    """Where one task stands; `training` changes it, whoever watches reads it."""

    task: str
    state: str = "waiting"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    score: float | None = None
    """On validation, while training."""
    tokens: int = 0
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    """What `metrics.json` holds, once the task is done."""


Watch = Callable[[Progress], None]


def train_recipe(
    recipe: Recipe, only: list[str] | None = None, *, resume: bool = True, watch: Watch = lambda progress: None
) -> dict[str, dict[str, Any]]:
    """Train every task of the recipe that is not done yet; returns each task's metrics.

    Args:
        only: the tasks to train; all by default.
        resume: False starts over, which removes what an earlier run of these tasks left.
        watch: called whenever a task's progress changed.

    Raises:
        RunError: a task's folder holds another run.
        DataError: a task's data cannot be read.
        ValueError: a task is not in the recipe.
    """
    runs = [Run(recipe, name) for name in recipe.chosen(only)]
    base = Base(recipe)
    for run in runs:  # every error in data or folders before the first step, and before anything is removed
        run.check_folder(resume)
        run.encode(base.tokenizer, resume)
    for run in runs:
        if not resume and run.folder.exists():
            shutil.rmtree(run.folder)
    return {run.name: run.finish(base, watch) for run in runs}


def evaluate_run(recipe: Recipe, only: list[str] | None = None, split: str = "test") -> dict[str, dict[str, Any]]:
    """Score the recipe's trained adapters, and the base model, on a split.

    Raises:
        RunError: a task has no adapter yet.
    """
    names = recipe.chosen(only)
    base, results = Base(recipe), {}
    for name in names:
        run = Run(recipe, name)
        if not (run.folder / "adapter_config.json").exists():
            raise RunError(f"{run.folder}: no adapter yet; train it first.")
        inspect_adapter(run.folder)
        model, examples = base.model_for(run.task), run.task.examples(split)
        untuned = evaluate(model, base.tokenizer, run.task, examples)
        adapted = PeftModel.from_pretrained(model, str(run.folder))
        try:
            tuned = evaluate(adapted, base.tokenizer, run.task, examples)
        finally:
            unload(adapted)
        results[name] = {
            "score": run.task.main_score,
            "examples": len(examples),
            "untuned": untuned.main,
            "tuned": tuned.main,
            "sets": by_set(run.task, examples, untuned, tuned),
        }
    return results


def by_set(
    task: Task[Any], examples: list[Example], untuned: Evaluation, tuned: Evaluation
) -> dict[str, dict[str, Any]]:
    """Where there are several test sets, of each its score's name, its number of examples and its scores."""
    counts = Counter(e.set for e in examples)
    return {
        name: {
            "score": one.main_score,
            "examples": counts[name],
            "untuned": untuned.scores[name],
            "tuned": tuned.scores[name],
        }
        for name, one in task.sets.items()
        if counts[name]
    }


class Base:
    """The frozen model and its tokenizer, loaded once for all generation tasks, and for each classification task."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = load_tokenizer(recipe.model)
        self._causal: nn.Module | None = None
        self.heads: dict[str, list[str]] = {}
        """The modules of each classification task's model that are trained with any adapter."""

    def model_for(self, task: Task[Any]) -> nn.Module:
        name, dtype = self.recipe.model, self.recipe.dtype
        if task.spec.type == "generation":
            if self._causal is None:
                self._causal = load_causal_lm(name, dtype, self.recipe.attention)
            return self._causal
        with loading(name):
            config = AutoConfig.from_pretrained(name, num_labels=task.num_labels)  # type: ignore[attr-defined]
            if task.spec.type == "regression":
                config.problem_type = "regression"
            config.pad_token_id = Collator(self.tokenizer).pad_id  # by which the head of a decoder finds the last token
            set_seed(self.recipe.seed)  # the head is new
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                dtype=as_dtype(dtype),
                attn_implementation=as_attention(self.recipe.attention),
                output_loading_info=True,
            )
        self.heads[task.name] = heads_of(model, info["missing_keys"])
        if model.base_model_prefix in self.heads[task.name]:
            raise ModelError(f"cannot load the model {name!r}: none of its weights fit a {type(model).__name__}")
        moved: nn.Module = model.to(device())
        return moved


class Run:
    """One task of a recipe and the folder it leaves."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self.recipe, self.name = recipe, name
        self.spec = recipe.tasks[name]
        self.task: Task[Any] = build_task(name, self.spec)
        self.folder = Path(recipe.output) / name
        self.checkpoints = self.folder / "checkpoints"
        self.encoded: list[Encoded] = []
        self.left_out = 0
        """Training examples that are too long."""

    @property
    def description(self) -> dict[str, Any]:
        """All that decides the outcome."""
        return {
            "model": self.recipe.model,
            "dtype": self.recipe.dtype,
            "attention": self.recipe.attention,
            "seed": self.recipe.seed,
            "name": self.name,
            "task": self.spec.model_dump(mode="json"),
        }

    def check_folder(self, resume: bool) -> None:
        """Refuse a folder that holds what is not trimtab's or, when resuming, work under other settings.

        Raises:
            RunError: saying whose it is.
        """
        if not self.folder.exists() or not [f for f in self.folder.iterdir() if not f.name.endswith(".saving")]:
            return
        try:
            earlier = json.loads((self.folder / "run.json").read_text())["run"]
        except (OSError, ValueError, KeyError):
            raise RunError(f"{self.folder} is not empty and was not left by trimtab; give another output:.") from None
        started = (self.folder / "metrics.json").exists() or self.checkpoints.exists()
        if resume and started and earlier != self.description:
            differing = ", ".join(_differing(earlier, self.description))
            raise RunError(
                f"{self.folder} holds a run with other settings ({differing}). Give another output: to keep it, "
                f"or --no-resume --task {self.name} to replace it."
            )

    def encode(self, tokenizer: PreTrainedTokenizerBase, resume: bool) -> None:
        """Read the data and, unless the task is done, tokenise it.

        Raises:
            DataError: it cannot be read, or no example fits.
        """
        train, _ = self.task.examples("train"), self.task.examples("test")
        if not resume or not (self.folder / "metrics.json").exists():
            self.encoded, self.left_out = self.task.encode(tokenizer, train, training=True)

    def finish(self, base: Base, watch: Watch) -> dict[str, Any]:
        """Train what is left to train, score, and write the folder; returns the metrics."""
        progress = Progress(self.name)
        done = self.folder / "metrics.json"
        if not done.exists():
            self._train(base, progress, watch)
        progress.metrics = json.loads(done.read_text())
        progress.state = "done"
        progress.score = progress.metrics["tuned"][self.task.main_score]
        watch(progress)
        return progress.metrics

    def _train(self, base: Base, progress: Progress, watch: Watch) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "run.json", {"run": self.description, "versions": versions()})
        progress.state = "untuned score"
        watch(progress)
        model, tokenizer = base.model_for(self.task), base.tokenizer
        test = self.task.examples("test")
        untuned = evaluate(model, tokenizer, self.task, test)
        set_seed(self.recipe.seed)
        whole = heads_beyond_peft(base.heads.get(self.name, []))
        adapted = get_peft_model(model, ReftConfig(**self.spec.adapter_fields(), modules_to_save=whole or None))
        try:
            store = Store(int(self.spec.training.reuse_memory_gb * 1e9), self.folder / "reuse")
            reuse = self._reuse(adapted, store)
            trainer = self._trainer(adapted, tokenizer, progress, watch, reuse)
            progress.state = "training"
            trainer.train(resume_from_checkpoint=last_checkpoint(self.checkpoints))
            losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]  # resumed or not
            progress.state = "tuned score"
            watch(progress)
            tuned = evaluate(adapted, tokenizer, self.task, test)
            save_adapter(adapted, self.folder)
            trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            if trainer.reuse_refused:
                reuse = trainer.reuse_refused
            reused = reuse.summary() if isinstance(reuse, Reuse) else {"reused": None, "because": reuse}
        finally:
            store.close()
            unload(adapted)
        metrics = {
            "task": self.name,
            "score": self.task.main_score,
            "split": "validation" if self.task.test_is_validation else "test",
            "examples": len(test),
            "untuned": untuned.scores,
            "tuned": tuned.scores,
            "sets": by_set(self.task, test, untuned, tuned),
            "parameters": trainable,
            "bytes": (self.folder / "adapter_model.safetensors").stat().st_size,
            "seconds": round(progress.seconds, 2),
            "steps": trainer.state.global_step,
            "train_loss": sum(losses) / len(losses),
            "train_examples": len(self.encoded),
            "left_out_as_too_long": self.left_out,
            "left_out_as_bad": self.task.skipped,
            "reuse": reused,
        }
        write_json(self.folder / "predictions.json", {"untuned": untuned.predictions, "tuned": tuned.predictions})
        write_json(self.folder / "metrics.json", metrics)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _trainer(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        watch: Watch,
        reuse: Reuse | str,
    ) -> ReftTrainer:
        def look() -> float:
            return evaluate(model, tokenizer, self.task, self.task.examples("validation")[:100]).main

        collate = Counting(tokenizer, progress)
        collate.packed = self.task.spec.type == "generation" and self._packs(model, reuse)
        trainer = ReftTrainer(
            model,
            training_arguments(self.spec.training, self.checkpoints, self.recipe.seed, len(self.encoded)),
            self.encoded,
            reuse if isinstance(reuse, Reuse) else None,
            data_collator=collate,
            callbacks=[Report(progress, watch, None if self.spec.data.validation is False else look)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _packs(self, model: PeftModel, reuse: Reuse | str) -> bool:
        if isinstance(reuse, Reuse):
            return False  # what is kept belongs to an example of its own row
        packing = self.spec.training.packing
        base: Any = model.get_base_model()
        return "flash" in str(base.config._attn_implementation) if packing == "auto" else packing

    def _reuse(self, model: PeftModel, store: Store) -> Reuse | str:
        training = self.spec.training
        if not training.reuse:
            return "reuse: false"
        return choose_reuse(model, ReftConfig(**self.spec.adapter_fields()), store, training.gradient_checkpointing)


def training_arguments(spec: TrainingSpec, folder: Path, seed: int, examples: int) -> TrainingArguments:
    """The recipe's training section in transformers' words."""
    a_step = spec.batch_size * spec.gradient_accumulation
    steps_an_epoch = max(1, -(-examples // a_step))
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=spec.learning_rate,
        num_train_epochs=spec.epochs or 1,
        max_steps=spec.max_steps or -1,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        lr_scheduler_type=spec.schedule,
        warmup_steps=spec.warmup,  # below 1, a share of all steps
        weight_decay=spec.weight_decay,
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=spec.checkpoint_every or max(20, steps_an_epoch),
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if spec.gradient_checkpointing:  # naming it at all warns, since transformers is about to rename it
        arguments.gradient_checkpointing = arguments.activation_checkpointing = True
    return arguments


class Counting(NumberedCollator):
    """A collator that counts the real tokens it hands out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
        super().__init__(tokenizer)
        self.progress = progress

    def __call__(self, batch: Any) -> dict[str, Any]:
        self.progress.tokens += sum(len(e.input_ids) for _, e in batch)
        return super().__call__(batch)


class Report(TrainerCallback):
    """Keeps `Progress` up to date, takes the validation score now and then if told how, and stops at a NaN loss."""

    def __init__(self, progress: Progress, watch: Watch, look: Callable[[], float] | None = None) -> None:
        self.progress, self.watch, self.look = progress, watch, look
        self._last = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.steps = state.max_steps
        earlier = state.log_history[-1] if state.log_history else {}  # of a run that is resumed
        self.progress.seconds, self.progress.tokens = earlier.get("seconds", 0.0), earlier.get("tokens", 0)
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._last
        self.progress.step = state.global_step
        at_look = state.global_step % max(1, state.max_steps // VALIDATION_LOOKS) == 0
        if self.look is not None and at_look and state.global_step < state.max_steps:
            self.progress.score = self.look()
        self._last = time.perf_counter()  # looking is not training
        self.watch(self.progress)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.loss = logs["loss"]
            state.log_history[-1].update(seconds=self.progress.seconds, tokens=self.progress.tokens)
            if logs["loss"] != logs["loss"]:
                raise RunError(
                    f"{self.progress.task}: the loss is NaN at step {state.global_step}. Lower training: learning_rate "
                    "or set dtype: float32."
                )


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; an interrupted write is passed over."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    return next((str(path) for path in found if _complete(path)), None)


def _complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())  # the file that Trainer writes last
    except (OSError, ValueError):
        return False
    return (checkpoint / "adapter_model.safetensors").exists() and (checkpoint / "optimizer.pt").exists()


def unload(model: PeftModel) -> None:
    """Take the adapter off its base model, which is then as it was."""
    tuner: Any = model.base_model
    tuner.unload()


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter into `folder`, each file whole or not at all."""
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(str(staging))
    (staging / "README.md").write_text(_card(model), encoding="utf-8")
    for file in staging.iterdir():
        os.replace(file, folder / file.name)
    staging.rmdir()


def _card(model: PeftModel) -> str:
    """The model card: unlike PEFT's own, it says that the adapter needs trimtab."""
    config = model.active_peft_config
    return f"""\
---
base_model: {config.base_model_name_or_path}
library_name: peft
tags: [trimtab, reft, loreft]
---
A ReFT adapter ({config.method_text}, positions {config.positions}) for `{config.base_model_name_or_path}`.

```python
import trimtab  # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    staging = path.with_name(f".{path.name}.saving")
    staging.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staging, path)


def versions() -> dict[str, str]:
    """What a result depends on besides its settings."""
    packages = ("trimtab", "torch", "transformers", "peft", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _differing(a: Any, b: Any, place: str = "") -> list[str]:
    """The places at which two nested settings differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in {**a, **b} for d in _differing(a.get(key), b.get(key), f"{place}.{key}" if place else key)]
    return [] if a == b else [place]
