"""`train`: one trial a task, whose adapter is kept; `evaluate`: the adapters of such runs, scored again.

Each task's folder is an adapter that PEFT loads, with `metrics.json` (scores, cost), `run.json` (what was run) and a
picture of its loss. A finished task is skipped and an interrupted one resumes from its last checkpoint, to the same
adapter that an uninterrupted run gives.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import set_seed

from trimtab.adapter.folder import inspect_adapter
from trimtab.adapter.weights import CONFIG, WEIGHTS
from trimtab.errors import RunError
from trimtab.runs import processes
from trimtab.runs.card import card
from trimtab.runs.curve import CURVE, draw_curve
from trimtab.runs.experiment import Experiment, Trial, fingerprints
from trimtab.runs.fit import Fit
from trimtab.runs.folder import RunFolder, differing, digest_of, put
from trimtab.runs.forecast import forecast, told
from trimtab.runs.kept import close_stores
from trimtab.runs.measures import thinned
from trimtab.runs.models import Base
from trimtab.runs.predict import Evaluation
from trimtab.runs.summary import checked_summary
from trimtab.runs.trainer import Progress, Watch, looked_at
from trimtab.runs.trial import trained_parameters
from trimtab.runs.ways import ReftWay, unload
from trimtab.tasks import Example, Task
from trimtab.tasks.failures import failures
from trimtab.tasks.scores import interval
from trimtab.tasks.tokens import Encoded


def train(
    experiments: Mapping[str, Experiment],
    output: str | Path,
    *,
    resume: bool = True,
    watch: Watch = lambda progress: None,
    say: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Train every task that is not done yet; returns each task's metrics.

    Args:
        experiments: by task, on one model.
        output: each task leaves a folder there.
        resume: False starts over, which removes what an earlier run of these tasks left.
        watch: called whenever a task's progress changed.
        say: told what each task that is not done will be trained on and what that takes, before the first step of
            any; without it that is not measured.

    Raises:
        RunError: a task's folder holds another run, or its adapter has no place on the model.
        DataError: a task's data cannot be read, or is longer than the model reads.
    """
    runs = [Run(experiment, Path(output) / name) for name, experiment in experiments.items()]
    with ExitStack() as locks:
        processes.meet()
        for run in runs:
            run.check_folder(resume)
            if processes.rank() == 0:
                locks.enter_context(run.folder.locked())
        base = Base(runs[0].experiment.source)
        for run in runs:  # every error in data or folders before the first step, and before anything is removed
            run.encode(base, resume, say)
        say_what_it_takes(runs, base, say)
        processes.wait()
        for run in runs:
            if not resume:
                processes.once(run.folder.remove)
        try:
            return {run.experiment.name: run.finish(base, watch) for run in runs}
        finally:
            close_stores()


def rehearse(
    experiments: Mapping[str, Experiment], output: str | Path, say: Callable[[str], None], *, resume: bool = True
) -> None:
    """Say what `train` would do, and what that would take; nothing is written. Raises what `train` does."""
    runs = [Run(experiment, Path(output) / name) for name, experiment in experiments.items()]
    for run in runs:
        run.check_folder(resume)
    base = Base(runs[0].experiment.source)
    for run in runs:
        run.encode(base, resume, say)
    say_what_it_takes(runs, base, say)


PATIENCE = 60.0
"""Seconds after which no further task is measured."""


def say_what_it_takes(runs: Sequence[Run], base: Base, say: Callable[[str], None] | None) -> None:
    """Measure the tasks that will be trained, unless several processes train them."""
    if say is None or processes.count() > 1:
        return
    start = time.perf_counter()
    for run in runs:
        if run.encoded and time.perf_counter() - start < PATIENCE:
            found = forecast(run.experiment, base, run.encoded)
            if found is not None:
                say(told(run.experiment.name, found))


def evaluate_runs(
    experiments: Mapping[str, Experiment], output: str | Path, split: str = "test"
) -> dict[str, dict[str, Any]]:
    """Score trained adapters, and the base model, on a split.

    Raises:
        RunError: a task has no adapter yet, or one that was trained under other settings.
    """
    results: dict[str, dict[str, Any]] = {}
    base: Base | None = None
    for name, experiment in experiments.items():
        folder, task = Path(output) / name, experiment.task
        if not (folder / CONFIG).exists():
            raise RunError(f"{folder}: no adapter yet; train it first.")
        inspect_adapter(folder)
        check_settings(experiment, RunFolder(folder))
        base = base or Base(experiment.source)
        model, _ = base.load(task.head, experiment.seed)
        untuned = experiment.evaluate(model, base.tokenizer, split)
        adapted = PeftModel.from_pretrained(model, str(folder))
        try:
            tuned = experiment.evaluate(adapted, base.tokenizer, split)
        finally:
            unload(adapted)
        examples = task.examples(split)
        results[name] = {
            "score": task.score.name,
            "split": "validation" if split == "test" and task.test_is_validation else split,
            "examples": len(examples),
            "untuned": untuned.main,
            "tuned": tuned.main,
            "sets": by_set(task, examples, untuned, tuned),
            **beside(task, examples, tuned),
            "answers": answers(task, examples, untuned, tuned),
        }
    return results


def described(experiment: Experiment) -> dict[str, Any]:
    """All that decides a run's outcome, but for what the data and the model's files hold."""
    source = experiment.source
    return {
        "model": source.name,
        "dtype": source.dtype,
        "attention": source.attention,
        "seed": experiment.seed,
        "name": experiment.name,
        "task": experiment.settings,
        **experiment.pool,
    }


SCORING = re.compile(
    r"dtype|attention|task\.(score|choices|max_new_tokens|repetition_penalty|no_repeat_ngram_size)"
    r"|task\.data\.(limit\.)?test.*|task\.training\.eval_batch_size"
)
"""What may differ between training and a later score."""


def check_settings(experiment: Experiment, folder: RunFolder) -> None:
    """Raises RunError where the recipe says of an adapter that trimtab trained what it is not."""
    if not (folder.path / "run.json").exists():
        return
    changed = [place for place in differing(folder.run, described(experiment)) if not SCORING.fullmatch(place)]
    if changed:
        raise RunError(
            f"{folder.path} was trained under other settings ({', '.join(changed)}), so this would not be their score. "
            "Train again, or score it under its own."
        )


class Run:
    """One task and the folder it leaves."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.task, self.folder = experiment, experiment.task, RunFolder(folder)
        way = ReftWay(experiment.adapter.method, experiment.adapter.model_dump())
        self.trial = Trial(experiment, way, None, experiment.seed, splits=("test",))
        self.content = fingerprints(experiment)
        self.encoded: list[Encoded] = []
        self.too_long = 0

    def check_folder(self, resume: bool) -> None:
        """Refuse a folder that holds what is not trimtab's or, when resuming, work on other data or settings.

        Raises:
            RunError: saying whose it is.
        """
        folder = self.folder
        if folder.is_empty:
            return
        try:
            earlier = folder.run
        except RunError:
            raise RunError(f"{folder.path} is not empty and was not left by trimtab; give another output:.") from None
        if not resume or not folder.is_started:
            return
        remedy = f"Give another output: to keep it, or --no-resume --task {self.experiment.name} to replace it."
        if changed := differing(earlier, described(self.experiment)):
            raise RunError(f"{folder.path} holds a run with other settings ({', '.join(changed)}). {remedy}")
        if folder.content is not None and folder.content != self.content:
            files = ", ".join(differing(folder.content, self.content))
            raise RunError(f"{folder.path} holds a run on other files: what they say has changed ({files}). {remedy}")

    def encode(self, base: Base, resume: bool, say: Callable[[str], None] | None) -> None:
        """Read the data and, unless the task is done, tokenise it, check what can be known and say what it is.

        Raises:
            DataError: it cannot be read, or does not fit.
            RunError: the adapter has no place on the model.
        """
        examples, _ = self.task.examples("train"), self.task.examples("test")
        name, tell = self.experiment.name, say or (lambda text: None)
        if resume and self.folder.is_done:
            tell(f"{name} is done already in {self.folder.path}; --no-resume --task {name} trains it again.")
            return
        self.encoded, self.too_long = self.experiment.encode(base.tokenizer, examples, training=True)
        tell(checked_summary(self.experiment, base.tokenizer, (self.encoded, self.too_long)))
        if resume and (checkpoint := self.folder.last_checkpoint()):
            tell(f"{name} goes on from {checkpoint}.")

    def finish(self, base: Base, watch: Watch) -> dict[str, Any]:
        """Train what is left to train, score, and write the folder; returns the metrics."""
        progress = Progress(self.experiment.name)
        if not self.folder.is_done:
            self._train(base, progress, watch)
        progress.metrics = self.folder.metrics
        progress.state = "done"
        watch(progress)
        return progress.metrics

    def _train(self, base: Base, progress: Progress, watch: Watch) -> None:
        settled = self.task.settled.model_dump(mode="json")
        processes.once(self.folder.begin, described(self.experiment), self.content, settled)
        progress.state = "untuned score"
        watch(progress)
        experiment, tokenizer = self.experiment, base.tokenizer
        model, new = base.load(self.task.head, experiment.seed)
        untuned = experiment.evaluate(model, tokenizer, "test")
        set_seed(experiment.seed)
        adapted: Any = self.trial.way.build(model, self.task.task_type, new, edit_turns=self.task.edit_turns)

        def look() -> float:
            some = looked_at(self.task.examples("validation"))
            return experiment.evaluate(adapted, tokenizer, "validation", examples=some, reuse=fit.reuse).main

        try:
            fit = Fit(
                self.trial,
                adapted,
                tokenizer,
                self.encoded,
                self.folder.path,
                progress,
                head=new,
                watch=watch,
                look=None if experiment.spec.data.validation is False else look,
                checkpoints=self.folder.checkpoints,
            )
            progress.state = "training"
            fit.run(self.folder.last_checkpoint())
            progress.state = "tuned score"
            watch(progress)
            tuned = experiment.evaluate(adapted, tokenizer, "test", reuse=fit.reuse)
            text = card(self.experiment, self.folder.path, tokenizer, model, new, untuned.main, tuned.main)
            processes.once(save_adapter, adapted, self.folder.path, text)
            sizes = {"parameters": trained_parameters(adapted), "head_parameters": trained_parameters(adapted, new)}
        finally:
            unload(adapted)
        metrics = self._metrics(progress, fit, untuned, tuned, sizes)
        examples = self.task.examples("test")
        processes.once(draw_curve, metrics, self.folder.path / CURVE)
        processes.once(self.folder.finish, metrics, answers(self.task, examples, untuned, tuned))

    def _metrics(
        self, progress: Progress, fit: Fit, untuned: Evaluation, tuned: Evaluation, sizes: dict[str, int]
    ) -> dict[str, Any]:
        test, losses = self.task.examples("test"), fit.losses
        part = max(1, len(losses) // 4)  # of several steps, since each is of another batch
        return {
            "task": self.experiment.name,
            "score": self.task.score.name,
            "split": "validation" if self.task.test_is_validation else "test",
            "examples": len(test),
            "untuned": untuned.scores,
            "tuned": tuned.scores,
            "sets": by_set(self.task, test, untuned, tuned),
            **beside(self.task, test, tuned),
            **sizes,
            "bytes": (self.folder.path / WEIGHTS).stat().st_size,
            "digest": digest_of(self.folder.path / WEIGHTS),
            "seconds": round(progress.seconds, 2),
            "steps": fit.steps,
            "train_loss": sum(losses) / len(losses),
            "loss_at_start": sum(losses[:part]) / part,
            "loss_at_end": sum(losses[-part:]) / part,
            "curve": {"loss": thinned(losses), "validation": fit.looks},
            "train_examples": len(self.encoded),
            "left_out_as_too_long": self.too_long,
            "left_out_as_bad": self.task.skipped,
            "reuse": fit.reuse_summary,
        }


def by_set(
    task: Task[Any], examples: list[Example], untuned: Evaluation, tuned: Evaluation
) -> dict[str, dict[str, Any]]:
    """Where there are several test sets, of each its score's name, its number of examples and its scores."""
    counts = Counter(e.set for e in examples)
    return {
        name: {
            "score": one.score.name,
            "examples": counts[name],
            "untuned": untuned.scores[name],
            "tuned": tuned.scores[name],
        }
        for name, one in task.sets.items()
        if counts[name]
    }


def beside(task: Task[Any], examples: Sequence[Example], tuned: Evaluation) -> dict[str, Any]:
    """What makes a score readable: its 95% interval where it is a share of right rows, what always giving the commonest
    answer would score, and where the model fails."""
    answer, score = task.majority(examples)
    return {
        "interval": interval(tuned.main, len(examples)) if task.binary else None,
        "majority": {"answer": answer, "score": score},
        "failures": asdict(failures(task, examples, tuned.predictions)),
    }


def answers(
    task: Task[Any], examples: Sequence[Example], untuned: Evaluation, tuned: Evaluation
) -> dict[str, list[Any]]:
    """Of each example what was asked, expected and given."""
    given = {"expected": task.truth(examples).wanted, "untuned": untuned.predictions, "tuned": tuned.predictions}
    readable = {key: [task.readable(one) for one in values] for key, values in given.items()}
    return {"input": ["\n".join(e.texts) for e in examples], **readable}


def save_adapter(model: PeftModel, folder: Path, card: str) -> None:
    """Save the adapter and its card into `folder`, each file whole or not at all."""
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(str(staging))
    except SafetensorError as error:
        raise RunError(f"{folder}: the adapter cannot be written ({error}); is the disk full?") from None
    (staging / "README.md").write_text(card, encoding="utf-8")
    for file in staging.iterdir():
        put(file, folder / file.name)
    staging.rmdir()
