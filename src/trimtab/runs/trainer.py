"""`ReftTrainer`: transformers' `Trainer`, at the price of the frozen model and below it.

It groups examples of like length (or packs them), projects only supervised positions onto the vocabulary, and leaves
out what a frozen model makes the same at every step (`reuse.py`). Any other trainer trains a ReFT adapter too, only
dearer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from trimtab.runs.reuse import Reuse
from trimtab.tasks.tokens import IGNORED, Collator, Encoded

Batch = dict[str, Any]
NEAR = 50
"""Batches' worth of shuffled examples among which those of like length are put together."""


def supervised_only(collate: Callable[[Any], Batch]) -> Callable[[Any], Batch]:
    """A collator for any Trainer, after which only supervised positions are projected onto the vocabulary.

    It adds `logits_to_keep` (B, T) and `shift_labels` (n,), which transformers' causal language models take; their
    logits then have shape (n, vocabulary). The loss is the same.

    Example:
        >>> Trainer(model, args, data_collator=supervised_only(collator), ...)
    """

    def collate_supervised(examples: Any) -> Batch:
        return with_supervised(collate(examples))

    return collate_supervised


def with_supervised(batch: Batch) -> Batch:
    """The batch with `logits_to_keep` and `shift_labels` for its labels (B, T)."""
    following = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    keep = following != IGNORED
    return {**batch, "logits_to_keep": keep, "shift_labels": following[keep]}


class LengthGrouped(Sampler[int]):
    """Random order in which neighbours, a batch at a time, have like lengths; the same for the same seed and epoch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

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
        return iter([i for b in (*(whole[k] for k in shuffled), *rest) for i in b])


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
    """One row of examples: input_ids, position_ids and labels (1, total). Each example's prompt has its own end.

    Without a cache, since transformers tells packed examples apart only then.
    """
    columns: dict[str, list[Any]] = {
        "input_ids": [e.input_ids for e in examples],
        "position_ids": [range(len(e.input_ids)) for e in examples],
        "labels": [e.labels for e in examples],
    }
    tensors = {name: torch.tensor([[i for part in parts for i in part]]) for name, parts in columns.items()}
    return {**tensors, "use_cache": False}


class ReftTrainer(Trainer):
    """Trains a ReFT adapter on encoded examples.

    Args:
        examples: all of them; a batch is padded on the right.
        reuse: what `choose_reuse` found; None to compute everything at every step.
        supervised: project supervised positions only; False where the model puts virtual tokens before the batch's.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        examples: Sequence[Encoded],
        reuse: Reuse | None = None,
        supervised: bool = True,
        **kwargs: Any,
    ):
        self.lengths = [len(e.input_ids) for e in examples]
        self.reuse = reuse
        self.reuse_refused: str | None = None
        takes = inspect.signature(_base(model).forward).parameters
        self._keeps_supervised = supervised and "logits_to_keep" in takes
        self._checked = False
        super().__init__(model=model, args=args, train_dataset=list(enumerate(examples)), **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        args = self.args
        return LengthGrouped(self.lengths, args.train_batch_size, args.data_seed or args.seed)

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """The loss of one batch, over less work where that gives the same."""
        examples = inputs.pop("example_ids").tolist()
        if self.reuse is not None and not self._checked:
            self._check(model, inputs, examples)
        with self.reuse.applied(inputs, examples) if self.reuse is not None else nullcontext(inputs) as batch:
            if self._keeps_supervised and batch["labels"].dim() == 2:
                batch = with_supervised(batch)
            return super().compute_loss(model, batch, *args, **kwargs)

    def _check(self, model: nn.Module, inputs: Batch, examples: Sequence[int]) -> None:
        """Compare the first batch's loss with and without reuse, and give reuse up should they differ."""
        self._checked = True
        assert self.reuse is not None
        state = torch.get_rng_state()
        was_training = model.training
        model.eval()
        with torch.no_grad():
            plain = float(model(**inputs).loss)
            with self.reuse.applied(inputs, examples) as batch:
                reused = float(model(**batch).loss)
        model.train(was_training)
        torch.set_rng_state(state)
        narrow = next(_base(model).parameters()).dtype in (torch.bfloat16, torch.float16)
        if not abs(plain - reused) <= (0.05 if narrow else 1e-3) * max(1.0, abs(plain)):
            self.reuse_refused = f"the first loss came out as {reused:.5f} instead of {plain:.5f}"
            self.reuse.store.close()
            self.reuse = None


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
