"""One experiment: (task, model, way to adapt it, learning rate, seed) -> `Outcome`.

`compare` and `tune` run trials and keep their outcomes; `train` (runs/train.py) runs one a task and keeps its adapter.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from trimtab.errors import DataError, DivergedError, MemoryFull, NotPossible, RunError
from trimtab.runs.earlier import completed_trial
from trimtab.runs.experiment import Experiment, Trial, digest, fingerprints
from trimtab.runs.fit import TOO_LARGE, Fit
from trimtab.runs.folder import versions, write_json
from trimtab.runs.kept import base_for, give_back
from trimtab.runs.measures import thinned, window_loss, windows
from trimtab.runs.models import Base, ModelSource, fitting, is_in
from trimtab.runs.predict import Evaluation, context_of, mean_loss
from trimtab.runs.reuse import Reuse
from trimtab.runs.trainer import Progress, looked_at
from trimtab.tasks import Example, Task
from trimtab.tasks.tokens import is_templated

LATE = 0.75
"""The share of the steps after which validation is scored, to tell whether it still moves at the end."""
_base_losses: dict[tuple[ModelSource, str], float] = {}
"""A process's held-out losses of models as they come, since each trial starts from one."""


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: scores and costs, or why there are none."""

    run: dict[str, Any] = field(default_factory=dict)
    """What was run, all that decides the rest."""
    versions: dict[str, str] = field(default_factory=dict)
    validation: float | None = None
    test: dict[str, float] = field(default_factory=dict)
    predictions: list[Any] = field(default_factory=list)
    """On test."""
    validation_predictions: list[Any] = field(default_factory=list)
    validation_loss: float | None = None
    """By which scores that tie on validation are told apart; None of what is not trained."""
    late_move: float | None = None
    """By how much the score on some of validation moved in the last quarter of the steps; None where not taken."""
    parameters: int = 0
    """Trained ones."""
    model_parameters: int = 0
    seconds: float | None = None
    steps: int = 0
    tokens: int = 0
    memory: int = 0
    """Bytes of training above the model."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    forgetting: float | None = None
    """Growth of the loss a token on held-out text."""
    failed: str | None = None
    impossible: str | None = None

    @property
    def learning_rate(self) -> float | None:
        rate: float | None = self.run.get("learning_rate")
        return rate

    @property
    def seed(self) -> int:
        return int(self.run.get("seed", 0))

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, [], {})}

    @classmethod
    def read(cls, path: Path) -> Outcome:
        """From a file; keys of other versions are passed over."""
        known = {one.name for one in fields(cls)}
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{key: value for key, value in found.items() if key in known})


def run_trial(trial: Trial, folder: Path, content: dict[str, str] | None = None) -> Outcome:
    """The trial's outcome: read where there is one, else trained, scored and written.

    Args:
        folder: where the outcomes lie, each in a file named by all that decides it.
        content: the task's `fingerprints`, where the caller has them; with them an outcome is found without the data.
    """
    content = content or fingerprints(trial.experiment, trial.held_out)
    if found := outcome_of(trial, folder, content):
        return found
    try:
        with fitting("the trial", TOO_LARGE):
            outcome, lasting = _run(trial), True
    except NotPossible as error:
        outcome, lasting = Outcome(impossible=str(error)), False  # another version of PEFT may know how
    except MemoryFull as error:
        outcome, lasting = Outcome(failed=str(error)), False
    except (DivergedError, FloatingPointError, DataError) as error:
        outcome, lasting = Outcome(failed=str(error)), True
    except RunError as error:  # of this machine or this moment
        outcome, lasting = Outcome(failed=str(error)), False
    return keep(outcome, trial, folder, content) if lasting else _told(outcome, trial, content)


def keep(outcome: Outcome, trial: Trial, folder: Path, content: dict[str, str]) -> Outcome:
    """Write what came of a trial, for `outcome_of`."""
    outcome = _told(outcome, trial, content)
    file = _file(trial, folder, outcome.run)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, outcome.as_dict())
    return outcome


def _told(outcome: Outcome, trial: Trial, content: dict[str, str]) -> Outcome:
    return replace(outcome, run=trial.described(content), versions=versions())


def outcome_of(trial: Trial, folder: Path, content: dict[str, str]) -> Outcome | None:
    """What `run_trial` would read, having run the trial before; None where it would run it."""
    described = trial.described(content)
    return _done(_file(trial, folder, described), described)


def _file(trial: Trial, folder: Path, described: dict[str, Any]) -> Path:
    return folder / trial.experiment.name / trial.way.name / f"{digest(described)}.json"


def _done(file: Path, described: dict[str, Any]) -> Outcome | None:
    """The outcome in its file, or in one that an earlier version named, which knew fewer keys."""
    if file.exists():
        return Outcome.read(file)
    others = map(Outcome.read, file.parent.glob("*.json"))
    return next((outcome for outcome in others if completed_trial(outcome.run) == described), None)


def _run(trial: Trial) -> Outcome:
    experiment, way, task = trial.experiment, trial.way, trial.experiment.task
    if way.shots and not task.takes_shots:
        raise NotPossible("the task takes no solved examples")
    base = base_for(experiment.source)
    model, new = base.load(task.head, trial.seed)
    texts = held_out(trial, base, model)
    size = sum(p.numel() for p in model.parameters())
    examples = drawn(task.examples("train"), trial.examples, trial.seed)
    shots = drawn(task.examples("train"), trial.examples or way.shots, trial.seed) if way.shots else []
    set_seed(trial.seed)
    adapted = way.build(model, task.task_type, new, trial.seed, task.edit_turns)
    reuse, trained = _trained(trial, adapted, base.tokenizer, examples, new) if way.trains else (None, {})
    outcome = measured(trial, adapted, base.tokenizer, size, trained, reuse=reuse, shots=shots, texts=texts)
    if way.leaves_base and not trial.training.gradient_checkpointing:  # which stays switched on
        give_back(base, adapted)
    return outcome


def held_out(trial: Trial, base: Base, model: nn.Module) -> list[list[int]]:
    """The stretches of the held-out text, of which the model's own loss is known from now on."""
    texts = windows(trial.held_out, base.tokenizer) if trial.experiment.task.generates else []
    key = (trial.experiment.source, str(trial.held_out))
    if texts and key not in _base_losses:
        _base_losses[key] = window_loss(model, texts)
    return texts


def measured(
    trial: Trial,
    adapted: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    trained: dict[str, Any],
    *,
    reuse: Reuse | None = None,
    shots: Sequence[Example] = (),
    texts: Sequence[list[int]] = (),
) -> Outcome:
    """What a trained model scores.

    Args:
        size: parameters of the model alone.
        trained: what the training cost, by `Outcome`'s names, with the `late_score`.
        texts: stretches of the held-out text.
    """
    way, task = trial.way, trial.experiment.task
    if way.trains and "validation" in trial.splits:
        trained["validation_loss"] = _validation_loss(trial, adapted, tokenizer, reuse)
    found = {split: _scored(trial, adapted, tokenizer, split, shots, reuse) for split in trial.splits}
    late = trained.pop("late_score", None)
    lost = None
    if texts:
        before = _base_losses[trial.experiment.source, str(trial.held_out)]
        lost = window_loss(adapted, texts, takes_prompts=way.takes_prompts) - before
    return Outcome(
        validation=found["validation"].main if "validation" in found else None,
        test=found["test"].scores if "test" in found else {},
        predictions=found["test"].predictions if "test" in found else [],
        validation_predictions=found["validation"].predictions if "validation" in found else [],
        parameters=trained_parameters(adapted),
        model_parameters=size,
        forgetting=lost,
        late_move=None if late is None else _some_score(task, found["validation"].predictions) - late,
        **trained,
    )


def _trained(
    trial: Trial,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    new: Sequence[str],
) -> tuple[Reuse | None, dict[str, Any]]:
    """Train in a folder that is thrown away; what is kept of the frozen model's work, and what the training cost."""
    encoded, _ = trial.experiment.encode(tokenizer, examples, training=True)
    progress = Progress(trial.experiment.name)
    some = looked_at(trial.experiment.task.examples("validation")) if trial.looks else []

    def look() -> float:
        how = {"examples": some, "equal_lengths": trial.way.adds_tokens, "reuse": fit.reuse}
        return trial.experiment.evaluate(model, tokenizer, "validation", **how).main

    how: Any = {"measured": "test" in trial.splits, "look": look if some else None}  # a search does not report memory
    with tempfile.TemporaryDirectory() as folder:
        fit = Fit(trial, model, tokenizer, encoded, Path(folder), progress, head=new, looks=(LATE,), **how)
        fit.run()
    return fit.reuse, {
        "late_score": next((score for _, score in fit.looks), None),
        "seconds": round(progress.seconds, 3),
        "steps": fit.steps,
        "tokens": progress.tokens,
        "memory": fit.memory,
        "curve": thinned(fit.losses),
    }


def _scored(
    trial: Trial,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    shots: Sequence[Example],
    reuse: Reuse | None,
) -> Evaluation:
    experiment = trial.experiment
    asked = with_shots(experiment, tokenizer, experiment.task.examples(split), shots)
    if shots:
        _check_context(model, experiment, tokenizer, asked, len(shots))
    until = "\n\n" if shots and not _chats(experiment, tokenizer) else None
    how = {"examples": asked, "equal_lengths": trial.way.adds_tokens, "until": until, "reuse": reuse}
    return experiment.evaluate(model, tokenizer, split, **how)


def _some_score(task: Task[Any], predictions: list[Any]) -> float:
    """Of what is predicted on validation, on those of it that were looked at in training."""
    some = looked_at(task.examples("validation"))
    return next(iter(task.scores(looked_at(predictions), some).values()))


def _validation_loss(trial: Trial, model: nn.Module, tokenizer: PreTrainedTokenizerBase, reuse: Reuse | None) -> float:
    """Raises DivergedError where it is not finite."""
    experiment, way = trial.experiment, trial.way
    encoded, _ = experiment.encode(tokenizer, experiment.task.examples("validation"), training=True)
    size = experiment.training.eval_batch_size
    loss = mean_loss(model, tokenizer, encoded, size, way.takes_prompts, way.adds_tokens, reuse)
    if not math.isfinite(loss):  # such a model's answers look like a constant, which may even score
        raise DivergedError(f"{experiment.name}: after training the loss on validation is {loss}")
    return loss


def drawn(examples: list[Example], count: int | None, seed: int) -> list[Example]:
    """So many examples, drawn by the seed; all of them for None. Raises NotPossible where there are fewer."""
    if count is None:
        return examples
    if count > len(examples):
        raise NotPossible(f"{count} examples asked for, {len(examples)} there")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[:count]]


def with_shots(
    experiment: Experiment,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    shots: Sequence[Example],
) -> list[Example]:
    """The examples with solved ones before each prompt: in the user's turn or, without a chat, as text that goes on."""
    if not shots:
        return list(examples)
    solved = "".join(f"{s.texts[0]}\n{s.answer}\n\n" for s in shots)
    end = "" if _chats(experiment, tokenizer) else "\n"
    return [replace(e, texts=(solved + e.texts[0] + end,)) for e in examples]


def _chats(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> bool:
    return is_templated(tokenizer, getattr(experiment.spec, "chat", False))


def _check_context(
    model: Any, experiment: Experiment, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], shots: int
) -> None:
    """Raises NotPossible where solved examples make a prompt longer than the model reads."""
    encoded, _ = experiment.encode(tokenizer, examples, training=False)
    longest = max(len(e.input_ids) for e in encoded) + experiment.task.decoding()["max_new_tokens"]
    room = context_of(model)
    if room is not None and longest > room:
        raise NotPossible(f"{shots} solved examples make a prompt of {longest} tokens; the model reads {room}")


def trained_parameters(model: nn.Module, modules: Sequence[str] | None = None) -> int:
    """How many values are trained, in all or in some modules."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return sum(n for name, n in trained.items() if modules is None or is_in(name, modules))
