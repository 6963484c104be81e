"""Training of several trials in one batch.

One model holds an adapter for each of them. A step is a single forward over the rows of all their batches, each row
edited by its own trial's adapter, so that what is frozen is computed, and what is kept of it read, for all at once.
Each trial has its own order of examples, loss, clipping, learning rate and end, and comes out as `run_trial` makes it,
to rounding. What does not fit is run by itself, and so is a trial whose loss is no number, to say what it says alone.

run_trials(trials, folder, content)    # the outcomes, in order
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed

from trimtab.errors import DataError, NotPossible, RunError
from trimtab.runs import processes
from trimtab.runs.experiment import Trial, fingerprints
from trimtab.runs.fit import TOO_LARGE, check_trainable
from trimtab.runs.kept import base_for, give_back, store_for
from trimtab.runs.measures import thinned
from trimtab.runs.models import fitting
from trimtab.runs.reuse import PrefixReuse
from trimtab.runs.trainer import (
    Batch,
    LengthGrouped,
    NumberedCollator,
    ReftTrainer,
    looked_at,
    training_arguments,
    with_supervised,
)
from trimtab.runs.trial import LATE, Outcome, drawn, held_out, keep, measured, outcome_of, run_trial
from trimtab.tasks.tokens import Encoded


def run_trials(trials: Sequence[Trial], folder: Path, content: dict[str, str] | None = None) -> list[Outcome]:
    """The trials' outcomes, in order: read where there are some, else trained together where that can be.

    Args:
        folder, content: as for `run_trial`.
    """
    contents = [content or fingerprints(trial.experiment, trial.held_out) for trial in trials]
    run_together(trials, folder, contents)
    return [run_trial(trial, folder, own) for trial, own in zip(trials, contents, strict=True)]


def run_together(trials: Sequence[Trial], folder: Path, contents: Sequence[dict[str, str]]) -> None:
    """Train those trials together that can be and have no outcome yet, for `run_trial` to read what came of them."""
    groups: dict[str, list[tuple[Trial, dict[str, str]]]] = {}
    for trial, content in zip(trials, contents, strict=True):
        if joins(trial) and outcome_of(trial, folder, content) is None:
            groups.setdefault(in_common(trial, content), []).append((trial, content))
    for group in groups.values():
        most = group[0][0].training.together
        for at in range(0, len(group), most):
            some = group[at : at + most]
            for (trial, content), outcome in zip(some, train_together([trial for trial, _ in some]), strict=True):
                if outcome is not None:
                    keep(outcome, trial, folder, content)


def joins(trial: Trial) -> bool:
    """Whether others may be trained in its batch."""
    spec, one = trial.training, processes.count() == 1
    plain = spec.reuse and not spec.gradient_checkpointing and spec.gradient_accumulation == 1
    return trial.way.joins and spec.together > 1 and plain and one and not trial.experiment.task.head.is_new


def in_common(trial: Trial, content: dict[str, str]) -> str:
    """A name for all that trials of one batch share: everything but the adapter, the rate and the seed."""
    own = ("settings", "learning_rate", "seed")
    said = {key: value for key, value in trial.described(content).items() if key not in own}
    return json.dumps([str(trial.experiment.source), trial.held_out, trial.splits, said], sort_keys=True)


@dataclass
class Member:
    """A trial in the common batch."""

    trial: Trial
    name: str
    """Of its adapter."""
    encoded: list[Encoded]
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    late_score: float | None = None
    left: bool = False
    """It diverged."""
    outcome: Outcome | None = None


def train_together(trials: Sequence[Trial]) -> list[Outcome | None]:
    """What comes of trials that have all `in_common`; None for one to be run by itself."""
    if len(trials) == 1:
        return [None]
    try:
        with fitting("a step of several trials", TOO_LARGE):
            return _train_together(trials)
    except (NotPossible, RunError, FloatingPointError, DataError):  # whose fault it is, each finds out by itself
        return [None] * len(trials)


def _train_together(trials: Sequence[Trial]) -> list[Outcome | None]:
    experiment, task = trials[0].experiment, trials[0].experiment.task
    base = base_for(experiment.source)
    model, _ = base.load(task.head, trials[0].seed)
    check_trainable(model)
    texts, size = held_out(trials[0], base, model), sum(p.numel() for p in model.parameters())
    adapted, members = _members(trials, model, base.tokenizer)
    reuse = _kept(adapted, members)
    steps = _fit(adapted, base.tokenizer, members, reuse)
    for member in (one for one in members if not one.left):
        adapted.set_adapter(member.name)
        found: dict[str, Any] = {"steps": steps, "tokens": member.tokens, "curve": thinned(member.losses)}
        found["late_score"] = member.late_score
        with suppress(RunError):  # its loss on validation is no number
            member.outcome = measured(member.trial, adapted, base.tokenizer, size, found, reuse=reuse, texts=texts)
    give_back(base, adapted)
    return [member.outcome for member in members]


def _members(trials: Sequence[Trial], model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, list[Member]]:
    """The model with an adapter for each trial, which starts as it does alone."""
    task, members = trials[0].experiment.task, []
    adapted: Any = None
    for number, trial in enumerate(trials):
        set_seed(trial.seed)
        if adapted is None:
            adapted = trial.way.build(model, task.task_type, edit_turns=task.edit_turns)
            name = str(adapted.active_adapter)
        else:
            name = f"trial{number}"
            trial.way.join(adapted, name, task.task_type, task.edit_turns)
        examples = drawn(task.examples("train"), trial.examples, trial.seed)
        members.append(Member(trial, name, trial.experiment.encode(tokenizer, examples, training=True)[0]))
    return adapted, members


def _kept(adapted: Any, members: Sequence[Member]) -> PrefixReuse:
    """The keys and values kept for all of them. Raises NotPossible where none are, or batches differ in size."""
    experiment, found = members[0].trial.experiment, []
    store = store_for(experiment.source, experiment.training.reuse_memory_gb)
    for member in members:
        adapted.set_adapter(member.name)
        reuse = member.trial.way.reuse(adapted, store, False)
        if not isinstance(reuse, PrefixReuse) or len(member.encoded) != len(members[0].encoded):
            raise NotPossible("no keys and values are kept, or not of as many examples")
        found.append(reuse)
    return found[0].beside(found[1:])


def _fit(adapted: Any, tokenizer: PreTrainedTokenizerBase, members: Sequence[Member], reuse: PrefixReuse) -> int:
    """Train; the number of steps."""
    trial, names = members[0].trial, [member.name for member in members]
    some = looked_at(trial.experiment.task.examples("validation")) if trial.looks else []

    def look() -> None:
        for member in (one for one in members if not one.left):
            adapted.set_adapter(member.name)
            found = member.trial.experiment.evaluate(adapted, tokenizer, "validation", examples=some, reuse=reuse)
            member.late_score = found.main
        adapted.base_model.set_adapter(names)

    adapted.base_model.set_adapter(names)
    with tempfile.TemporaryDirectory() as folder:
        trainer = JointTrainer(adapted, Path(folder), tokenizer, members, reuse, look if some else None)
        trainer.train()
    return int(trainer.state.global_step)


class Interleaved(Sampler[int]):
    """A batch of each trial, one after another: of examples that are numbered through all the trials' own."""

    def __init__(self, own: Sequence[LengthGrouped]) -> None:
        self.own = own

    def __len__(self) -> int:
        return sum(map(len, self.own))

    def set_epoch(self, epoch: int) -> None:
        for sampler in self.own:
            sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        size, count = self.own[0].batch_size, len(self.own[0])
        orders = [list(sampler) for sampler in self.own]
        for at in range(0, count, size):
            for place, order in enumerate(orders):
                yield from (place * count + number for number in order[at : at + size])


class JointCollator(NumberedCollator):
    """Rows of the same example stand together, for attention to read what is kept of it once."""

    def __call__(self, batch: Sequence[Any]) -> Batch:
        return super().__call__(sorted(batch, key=lambda one: one[1].input_ids))


class JointTrainer(ReftTrainer):
    """Trains the adapters of several trials, of as many examples each.

    Args:
        look: called when `LATE` of the steps are made.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        members: Sequence[Member],
        reuse: PrefixReuse,
        look: Any = None,
    ) -> None:
        self.members, self.count, self._looked_into = members, len(members[0].encoded), False
        spec, encoded = members[0].trial.training, [one for member in members for one in member.encoded]
        self._size = spec.batch_size
        whole = spec.model_copy(update={"batch_size": len(members) * spec.batch_size})
        arguments = training_arguments(whole, folder, members[0].trial.seed, len(encoded))
        arguments.save_strategy = "no"
        how: Any = {"data_collator": JointCollator(tokenizer), "callbacks": [_Steps(self, look)]}
        super().__init__(model, arguments, encoded, reuse, **how)
        self.remove_callback(PrinterCallback)
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._own = [{k: one for k, one in trained.items() if member.name in k.split(".")} for member in members]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = ([len(one.input_ids) for one in member.encoded] for member in self.members)
        seeds = (member.trial.seed for member in self.members)
        return Interleaved([LengthGrouped(own, self._size, seed) for own, seed in zip(lengths, seeds, strict=True)])

    def parts(self, trained: dict[str, nn.Parameter]) -> list[tuple[dict[str, nn.Parameter], float]]:
        """Of each trial its own, at its own rate; steps are elementwise, as those of an optimizer for each."""
        rates = (member.trial.training.learning_rate for member in self.members)
        return list(zip(self._own, rates, strict=True))

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """The sum of the trials' losses, each the mean over its own batch's supervised tokens."""
        owners = inputs.pop("example_ids") // self.count
        staying = torch.tensor([not member.left for member in self.members], device=owners.device)[owners]
        inputs, owners = {name: tensor[staying] for name, tensor in inputs.items()}, owners[staying]
        inputs["adapter_names"] = [self.members[owner].name for owner in owners.tolist()]
        if self.reuse is not None and self.reuse.kind not in self.reuse.store.checked:
            self._check(model, _rows_of(inputs, owners == owners[0]))
        if self.reuse is None:
            raise RunError(str(self.reuse_refused))
        tokens = owners.new_zeros(len(self.members)).index_add(0, owners, inputs["attention_mask"].sum(1))
        for member, more in zip(self.members, tokens.tolist(), strict=True):
            member.tokens += more
        with self.reuse.applied(inputs) as batch:
            supervised = with_supervised(batch)
            outputs = model(**(supervised if self._keeps_supervised else batch))
        places = supervised["logits_to_keep"]
        logits = outputs.logits.flatten(0, -2) if self._keeps_supervised else outputs.logits[places]
        each = F.cross_entropy(logits.float(), supervised["shift_labels"], reduction="none")
        losses = _means(each, owners[places.nonzero()[:, 0]], len(self.members))
        if not self._looked_into and not self._alike(float(each.detach().mean()), float(outputs.loss.detach())):
            raise RunError("the model's loss is more than that of its tokens")
        self._looked_into = True
        return self._taken(losses)

    def _taken(self, losses: Tensor) -> Tensor:
        """The sum of what can be learned from."""
        finite = losses.isfinite()
        for member, loss, fine in zip(self.members, losses.tolist(), finite.tolist(), strict=True):
            member.losses.append(loss)
            member.left = member.left or not fine
        return losses[finite].sum()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Of each trial by itself; of one that diverged there is nothing to step."""
        norms = []
        for member, own in zip(self.members, self._own, strict=True):
            norm = nn.utils.clip_grad_norm_(own.values(), self.args.max_grad_norm)
            member.left = member.left or not bool(norm.isfinite())
            if member.left:
                for parameter in own.values():
                    parameter.grad = None
            norms.append(norm)
        return torch.stack(norms).max()


def _rows_of(batch: Batch, chosen: Tensor) -> Batch:
    names = [name for name, one in zip(batch["adapter_names"], chosen.tolist(), strict=True) if one]
    return {**{key: value[chosen] for key, value in batch.items() if isinstance(value, Tensor)}, "adapter_names": names}


def _means(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """Of the values (n,) of each of so many owners (n,); NaN where there are none."""
    sums = values.new_zeros(count).index_add(0, owners, values)
    return sums / torch.bincount(owners, minlength=count)


class _Steps(TrainerCallback):
    """Has a look at the right step, and stops when nobody is left."""

    def __init__(self, trainer: JointTrainer, look: Any) -> None:
        self.trainer, self.look = trainer, look

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.look is not None and state.global_step == int(LATE * state.max_steps):
            self.look()
        control.should_training_stop |= all(member.left for member in self.trainer.members)
