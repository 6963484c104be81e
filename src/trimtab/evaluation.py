"""Predictions of a model on a task's examples, and their scores.

`predict` works on any model, adapted or not; batches are formed by length, and results come back in the given order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trimtab.data import Collator, Encoded
from trimtab.tasks import Example, Task


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on one split, the task's main one first, and what they were taken from."""

    scores: dict[str, float]
    predictions: list[Any]
    per_item: list[float]

    @property
    def main(self) -> float:
        return next(iter(self.scores.values()))


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task[Any],
    examples: Sequence[Example],
    batch_size: int = 64,
) -> Evaluation:
    """Score the model on examples of the task.

    Raises:
        DataError: an example cannot be tokenised for this model.
    """
    encoded, _ = task.encode(tokenizer, examples, training=False)
    max_new_tokens = getattr(task.spec, "max_new_tokens", None)
    predictions = predict(model, tokenizer, encoded, batch_size, max_new_tokens=max_new_tokens)
    if task.spec.type == "regression":
        predictions = [p[0] for p in predictions]
    elif task.spec.type == "classification":
        predictions = [max(range(len(p)), key=p.__getitem__) for p in predictions]
    return Evaluation(task.score(predictions, examples), predictions, task.per_item(predictions, examples))


@torch.no_grad()
def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    batch_size: int = 64,
    *,
    max_new_tokens: int | None = None,
    adapter_names: Sequence[str] | None = None,
) -> list[Any]:
    """Greedy continuations as texts, or, where `max_new_tokens` is None, the logits of a classifier's head as lists.

    Args:
        adapter_names: one adapter (or `__base__`) for each example.
    """
    collate, device = Collator(tokenizer), next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids), reverse=True)
    results: list[Any] = [None] * len(encoded)
    with evaluating(model):
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            batch = {k: v.to(device) for k, v in collate([encoded[i] for i in chosen]).items() if k != "labels"}
            extra = {"adapter_names": [adapter_names[i] for i in chosen]} if adapter_names else {}
            if max_new_tokens is None:
                outputs = model(**batch, **extra).logits.float().tolist()
            else:
                outputs = _generate(model, tokenizer, collate.pad_id, batch, max_new_tokens, extra)
            for i, output in zip(chosen, outputs, strict=True):
                results[i] = output
    return results


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int,
    batch: dict[str, Tensor],
    max_new_tokens: int,
    extra: dict[str, Any],
) -> list[str]:
    out = model.generate(**batch, **extra, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id)
    texts: list[str] = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
