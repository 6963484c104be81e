"""`ReftTrainer`: transformers' `Trainer`, at the price of the frozen model and below it.

It groups examples of like length (or packs them), projects only supervised positions onto the vocabulary, and leaves
out what a frozen model makes the same at every step (`reuse.py`). Any other trainer trains a ReFT adapter too, only
dearer.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from trimtab.errors import DivergedError, RunError
from trimtab.runs import processes
from trimtab.runs.reuse import Reuse, UnlikeAttention
from trimtab.tasks.spec import Section
from trimtab.tasks.tokens import IGNORED, Collator, Encoded
from trimtab.where.prompts import prompt_lengths_of

Batch = dict[str, Any]
NEAR = 50
"""Batches' worth of shuffled examples among which those of like length are put together."""


class TrainingSpec(Section):
    """How a task is trained. `epochs` and `max_steps` replace each other; the one not used is None."""

    learning_rate: PositiveFloat = 4e-3
    """The highest, which is reached after the warm-up. Edits take far higher ones than weights do."""
    head_learning_rate: Annotated[PositiveFloat | None, Field(examples=[1e-2])] = None
    """Of a new head, which starts from nothing; without it the adapter's. What trains the head alone has its own."""
    epochs: PositiveFloat | None = 20.0
    """How often each example is trained on."""
    max_steps: Annotated[PositiveInt | None, Field(examples=[300])] = None
    """How many steps are made, instead of `epochs`."""
    batch_size: PositiveInt = 16
    """Examples in a forward and backward pass."""
    gradient_accumulation: PositiveInt = 1
    """Such passes in a step: a step is of `batch_size` times this many examples."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up: to 0 in a line or a cosine, or not at all."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the steps over which the rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's; R keeps orthonormal rows all the same."""
    max_length: PositiveInt = 512
    """The most tokens of an example, its answer included; texts for a classifier are cut to it."""
    too_long: Literal["leave_out", "cut"] = "leave_out"
    """What is done with generation examples longer than that: left out of training, or their answers cut short."""
    eval_batch_size: PositiveInt = 64
    """Examples at a time when scoring; no score depends on it."""
    checkpoint_every: Annotated[PositiveInt | None, Field(examples=[100])] = None
    """In steps; without it once an epoch, or every 20 steps where epochs are shorter."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, more time."""
    packing: Literal[True, False, "auto"] = "auto"
    """Pack a batch into one row instead of padding it; auto: where attention is a flash kernel, which profits."""
    reuse: bool = True
    """Compute once what the frozen model makes the same at every step, where the adapter leaves any such part."""
    reuse_memory_gb: NonNegativeFloat = 4.0
    """What is kept for reuse beyond this goes to disk, to the folder for temporary files (TMPDIR)."""
    together: PositiveInt = 8
    """Trials of `compare` and `tune` that are trained in one batch at most, where that is faster; 1 for none."""
    IDLE: ClassVar[frozenset[str]] = frozenset({"together"})

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        epochs, max_steps = data.get("epochs"), data.get("max_steps")
        if epochs is not None and max_steps is not None:
            raise ValueError("epochs and max_steps are both given; keep one, and remove the other or make it null")
        if max_steps is not None:
            return {**data, "epochs": None}
        return {**data, "max_steps": None} if epochs is not None else {k: v for k, v in data.items() if k != "epochs"}


def supervised_only(collate: Callable[[Any], Batch]) -> Callable[[Any], Batch]:
    """A collator for any Trainer, after which only supervised positions are projected onto the vocabulary.

    It adds `logits_to_keep` (B, T) and `shift_labels` (n,), which transformers' causal language models take; their
    logits then have shape (n, vocabulary). The loss is the same.

    Examples:
        >>> Trainer(model, args, data_collator=supervised_only(collator), ...)
    """

    def collate_supervised(examples: Any) -> Batch:
        return with_supervised(collate(examples))

    return collate_supervised


def with_prompts(collate: Callable[[Any], Batch]) -> Callable[[Any], Batch]:
    """A collator for any Trainer, after which each batch says where its prompts end, labels or no labels.

    Needed where a trainer takes the labels away before the model sees them: label smoothing, `compute_loss_func`, or
    forwards for metrics. It adds `prompt_lengths` (B,), with packed rows one a sequence, or `decoder_prompt_lengths`
    where the batch has `decoder_input_ids`; to a classifier's batch, whose labels are not tokens, nothing.

    Examples:
        >>> Trainer(model, args, data_collator=with_prompts(collator), ...)
    """

    def collate_told(examples: Any) -> Batch:
        batch = collate(examples)
        return {**prompt_lengths_of(batch), **batch}

    return collate_told


def with_supervised(batch: Batch) -> Batch:
    """The batch with `logits_to_keep` and `shift_labels` for its labels (B, T)."""
    following = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    keep = following != IGNORED
    return {**batch, "logits_to_keep": keep, "shift_labels": following[keep]}


class LengthGrouped(Sampler[int]):
    """Random order in which neighbours, a batch at a time, have like lengths; the same for the same seed and epoch.

    Args:
        batch_size: of all processes together, which take equal parts of a batch, one after another.
        processes: how many they are.
        blank: the number of an example without supervision, by which the last batch of an epoch is made whole; None
            leaves it as it is.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, processes: int = 1, blank: int | None = None
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.processes, self.blank = processes, blank

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return len(self.lengths) if self.blank is None else (whole + (rest > 0)) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch, so that a resumed run draws the order that it would have drawn."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        near = NEAR * self.batch_size
        groups = [sorted(order[i : i + near], key=self.lengths.__getitem__) for i in range(0, len(order), near)]
        batches = [group[i : i + self.batch_size] for group in groups for i in range(0, len(group), self.batch_size)]
        whole = [b for b in batches if len(b) == self.batch_size]
        rest = [b for b in batches if len(b) < self.batch_size]  # last, so that no batch straddles two groups
        shuffled = torch.randperm(len(whole), generator=generator).tolist()
        return iter([i for b in (*(whole[k] for k in shuffled), *map(self._filled, rest)) for i in b])

    def _filled(self, batch: list[int]) -> list[int]:
        if self.blank is None:
            return batch
        each = self.batch_size // self.processes
        parts = [batch[at :: self.processes] for at in range(self.processes)]
        return [i for part in parts for i in (*part, *[self.blank] * (each - len(part)))]


class NumberedCollator(Collator):
    """Collates (number, example) pairs; `example_ids` (B,) tells the trainer which examples a batch holds.

    Packed, the examples stand one after another in a single row without padding; `position_ids` tells them apart.
    """

    packed = False

    def __call__(self, batch: Sequence[Any]) -> Batch:
        examples = [encoded for _, encoded in batch]
        collated = pack(examples) if self.packed else super().__call__(examples)
        return {**collated, "example_ids": torch.tensor([number for number, _ in batch])}


def pack(examples: Sequence[Encoded]) -> Batch:
    """One row of examples: input_ids, position_ids and labels (1, total). Each example's prompt has its own length.

    Without a cache, since transformers tells packed examples apart only then.
    """
    columns: dict[str, list[Any]] = {
        "input_ids": [e.input_ids for e in examples],
        "position_ids": [range(len(e.input_ids)) for e in examples],
        "labels": [e.labels for e in examples],
    }
    tensors = {name: torch.tensor([[i for part in parts for i in part]]) for name, parts in columns.items()}
    return {**tensors, "prompt_lengths": torch.tensor([e.prompt_length for e in examples]), "use_cache": False}


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
LOOKED_AT = 100
"""Validation examples that are scored now and then while training."""
LOOKS = (0.25, 0.5, 0.75)
"""After which shares of a run's steps the validation score is taken, to be shown; it chooses nothing."""


def looked_at(items: Sequence[Any]) -> list[Any]:
    """Some of as many as validation has, from all over it, which may be sorted."""
    count = min(len(items), LOOKED_AT)
    return [items[i * len(items) // count] for i in range(count)]


class ReftTrainer(Trainer):
    """Trains a ReFT adapter on encoded examples.

    Args:
        examples: all of them; a batch is padded on the right.
        reuse: what `choose_reuse` found; None to compute everything at every step.
        supervised: project supervised positions only; False where the model puts virtual tokens before the batch's.
        takes_prompts: whether the model takes `prompt_lengths`, as one with ReFT adapters does.
        progress: whose tokens are counted.
        head: parameters that have a learning rate of their own, by name.
        head_rate: that rate.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        examples: Sequence[Encoded],
        reuse: Reuse | None = None,
        supervised: bool = True,
        takes_prompts: bool = True,
        progress: Progress | None = None,
        head: Collection[str] = (),
        head_rate: float | None = None,
        **kwargs: Any,
    ):
        self.takes_prompts = takes_prompts
        self._head, self._head_rate = frozenset(head), head_rate
        self.progress = progress or Progress("")
        self.lengths = [len(e.input_ids) for e in examples]
        self.reuse = reuse
        if reuse is not None:  # as an earlier run on this model found it
            reuse.lean = reuse.store.checked.get(reuse.kind, reuse.lean)
        self.reuse_refused: str | None = None
        takes = inspect.signature(_base(model).forward).parameters
        self._keeps_supervised = supervised and "logits_to_keep" in takes
        first = examples[0]
        # Among several processes: what one of them has too few of, where the loss can be told to pass it over.
        fills = processes.count() > 1 and isinstance(first.labels, list)
        blanks = [replace(first, labels=[IGNORED] * len(first.input_ids))] if fills else []
        self._blank = len(examples) if fills else None
        super().__init__(model=model, args=args, train_dataset=list(enumerate([*examples, *blanks])), **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        args, many = self.args, processes.count()
        seed = args.data_seed or args.seed
        return LengthGrouped(self.lengths, args.train_batch_size * many, seed, many, self._blank)

    def parts(self, trained: dict[str, nn.Parameter]) -> list[tuple[dict[str, nn.Parameter], float]]:
        """What is trained, by name, in parts of one learning rate each."""
        head = {name: one for name, one in trained.items() if name in self._head and self._head_rate}
        rest = {name: one for name, one in trained.items() if name not in head}
        parts = ((rest, self.args.learning_rate), (head, self._head_rate or 0.0))
        return [(part, rate) for part, rate in parts if part]

    def create_optimizer(self, model: Any = None) -> Any:
        """transformers' own, with a learning rate for each of the parts."""
        whole: Any = self.model if model is None else model
        if self.optimizer is None:
            decaying = set(self.get_decay_parameter_names(whole))
            kind, how = self.get_optimizer_cls_and_kwargs(self.args, whole)
            trained = {name: one for name, one in whole.named_parameters() if one.requires_grad}
            groups = [
                {
                    "params": [one for name, one in part.items() if (name in decaying) is decays],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                    "lr": rate,
                }
                for part, rate in self.parts(trained)
                for decays in (True, False)
            ]
            self.optimizer = kind(groups, **how)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """The loss of one batch, over less work where that gives the same."""
        examples = inputs.pop("example_ids").tolist()
        mine = sum(self.lengths[i] for i in examples if i != self._blank)
        self.progress.tokens += mine * processes.count()  # the others have about as many
        if not self.takes_prompts:
            inputs.pop("prompt_lengths", None)
        if self.reuse is not None and self.reuse.kind not in self.reuse.store.checked:
            self._check(model, inputs)
        with self.reuse.applied(inputs) if self.reuse is not None else nullcontext(inputs) as batch:
            if self._keeps_supervised and batch["labels"].dim() == 2:
                batch = with_supervised(batch)
            return super().compute_loss(model, batch, *args, **kwargs)

    def _check(self, model: nn.Module, inputs: Batch) -> None:
        """Compare a first batch's loss with and without reuse, the leanest first, and give up what differs."""
        assert self.reuse is not None
        state = torch.get_rng_state()
        was_training = model.training
        model.eval()
        with torch.no_grad():
            plain = float(model(**inputs).loss)
            reused = self._reused(model, inputs)
            if not self._alike(plain, reused) and self.reuse.lean:
                self.reuse.lean = False
                reused = self._reused(model, inputs)
        model.train(was_training)
        torch.set_rng_state(state)
        if not self._alike(plain, reused):
            self.reuse_refused = f"the first loss came out as {reused:.5f} instead of {plain:.5f}"
            self.reuse = None
            return
        self.reuse.store.checked[self.reuse.kind] = self.reuse.lean

    def _reused(self, model: nn.Module, inputs: Batch) -> float:
        assert self.reuse is not None
        try:
            with self.reuse.applied(inputs) as batch:
                return float(model(**batch).loss)
        except UnlikeAttention:
            return math.nan

    def _alike(self, plain: float, reused: float) -> bool:
        narrow = next(_base(self.model).parameters()).dtype in (torch.bfloat16, torch.float16)
        return abs(plain - reused) <= (0.05 if narrow else 1e-3) * max(1.0, abs(plain))


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def training_arguments(spec: TrainingSpec, folder: Path, seed: int, examples: int) -> TrainingArguments:
    """The recipe's training section in transformers' words.

    Raises:
        RunError: there are more processes than a batch can be shared out among.
    """
    if spec.batch_size % processes.count():
        raise RunError(
            f"training: batch_size {spec.batch_size} is the batch of all {processes.count()} processes together, which "
            "it cannot be shared out among; make it a multiple of their number."
        )
    a_step = spec.batch_size * spec.gradient_accumulation
    steps_an_epoch = max(1, -(-examples // a_step))
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=spec.learning_rate,
        num_train_epochs=spec.epochs or 1,
        max_steps=spec.max_steps or -1,
        per_device_train_batch_size=spec.batch_size // processes.count(),
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
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
    )
    if spec.gradient_checkpointing:  # naming it at all warns, since transformers is about to rename it
        arguments.gradient_checkpointing = arguments.activation_checkpointing = True
    return arguments


class Report(TrainerCallback):
    """Keeps `Progress` up to date, takes the validation score now and then if told how, and stops at a NaN loss."""

    def __init__(
        self,
        progress: Progress,
        watch: Watch,
        look: Callable[[], float] | None = None,
        reuse: Reuse | None = None,
        looks: Sequence[float] = LOOKS,
    ) -> None:
        self.progress, self.watch, self.look, self.reuse, self.looks = progress, watch, look, reuse, looks
        self._last = time.perf_counter()
        self._seen: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.steps = state.max_steps
        earlier = state.log_history[-1] if state.log_history else {}  # of a run that is resumed
        self.progress.seconds, self.progress.tokens = earlier.get("seconds", 0.0), earlier.get("tokens", 0)
        if self.reuse is not None:
            self.reuse.tokens, self.reuse.tokens_saved = earlier.get("reuse", (0, 0))
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._last
        self.progress.step = state.global_step
        if self.look is not None and state.global_step in {int(share * state.max_steps) for share in self.looks}:
            self.progress.score = self._seen = self.look()
        self._last = time.perf_counter()  # looking is not training
        self.watch(self.progress)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.loss = logs["loss"]
            state.log_history[-1].update(seconds=self.progress.seconds, tokens=self.progress.tokens)
            if self.reuse is not None:
                state.log_history[-1]["reuse"] = [self.reuse.tokens, self.reuse.tokens_saved]
            if self._seen is not None:
                state.log_history[-1]["validation"], self._seen = self._seen, None
            if logs["loss"] != logs["loss"]:
                raise DivergedError(
                    f"{self.progress.task}: the loss is NaN at step {state.global_step}. Lower training: learning_rate "
                    "or set dtype: float32."
                )
