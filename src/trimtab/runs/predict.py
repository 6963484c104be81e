"""Predictions of a model on a task's examples, and their scores.

`predict` works on any model, adapted or not; batches are formed by length, and results come back in the given order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trimtab.adapter.running import takes_prompts
from trimtab.errors import DataError
from trimtab.runs import processes
from trimtab.runs.models import fitting
from trimtab.runs.reuse import Reuse
from trimtab.tasks import Example, Task
from trimtab.tasks.tokens import IGNORED, Collator, Encoded


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on one split, the task's main one first, and what they were taken from."""

    scores: dict[str, float]
    predictions: list[Any]

    @property
    def main(self) -> float:
        return next(iter(self.scores.values()))


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task[Any],
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    batch_size: int = 64,
    *,
    equal_lengths: bool = False,
    until: str | None = None,
    reuse: Reuse | None = None,
) -> Evaluation:
    """Score the model on examples of the task; processes that train together share them out.

    Args:
        encoded: the examples as tokens, without answers.
        equal_lengths: batches without padding, for a model whose answers it would change.
        until: a generated text ends before this.
        reuse: what of the model's work on the prompts is kept.
    """
    how = {"equal_lengths": equal_lengths, "reuse": reuse, **task.decoding()}
    outputs = processes.shared(lambda part: predict(model, tokenizer, part, batch_size, **how), encoded)
    if until is not None:
        outputs = [text.lstrip().partition(until)[0] for text in outputs]
    predictions = task.read(outputs)
    return Evaluation(task.scores(predictions, examples), predictions)


@torch.no_grad()
def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    batch_size: int = 64,
    *,
    max_new_tokens: int | None = None,
    adapter_names: Sequence[str] | None = None,
    equal_lengths: bool = False,
    reuse: Reuse | None = None,
    **repetition: Any,
) -> list[Any]:
    """Greedy continuations as texts, or, where `max_new_tokens` is None, the logits of a classifier's head as lists.

    Of a head that reads tokens they are those of the tokens with a label.

    Args:
        adapter_names: one adapter (or `__base__`) for each example.
        equal_lengths: batches of examples of one length, so that nothing is padded.
        reuse: what of the model's work on the prompts is kept.
        repetition: `repetition_penalty` and `no_repeat_ngram_size`, as transformers' `generate` takes them.
    Raises:
        MemoryFull: a batch does not fit.
    """
    collate, device = Collator(tokenizer), next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids), reverse=True)
    results: list[Any] = [None] * len(encoded)
    size, several = min(batch_size, len(encoded)), "lower training: eval_batch_size: (of predict: --batch-size)"
    remedy = several if size > 1 else "shorten the text, or load the model in bfloat16"
    with evaluating(model), fitting(f"answering {size} row{'s' * (size > 1)} at a time", remedy):
        for chosen in _batches(order, batch_size, [len(e.input_ids) for e in encoded] if equal_lengths else None):
            batch = {k: v.to(device) for k, v in collate([encoded[i] for i in chosen]).items()}
            labels = batch.pop("labels", None)
            if max_new_tokens is None or not takes_prompts(model):  # to a head the whole text is the prompt
                batch.pop("prompt_lengths", None)
            extra = {"adapter_names": [adapter_names[i] for i in chosen]} if adapter_names else {}
            if max_new_tokens is None:
                outputs = _logits(model(**batch, **extra).logits.float(), labels)
            else:
                kept = reuse.started(batch) if reuse is not None else {}
                how = {"max_new_tokens": max_new_tokens, "pad_token_id": collate.pad_id, **repetition, **kept}
                outputs = _generate(model, tokenizer, batch, **how, **extra)
            for i, output in zip(chosen, outputs, strict=True):
                results[i] = output
    return results


@torch.no_grad()
def mean_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    batch_size: int = 64,
    takes_prompts: bool = False,
    equal_lengths: bool = False,
    reuse: Reuse | None = None,
) -> float:
    """The mean loss a token of the answers, or a label.

    Args:
        encoded: with answers.
        takes_prompts: whether the model takes `prompt_lengths`.
        equal_lengths: batches of examples of one length, so that nothing is padded.
        reuse: what of the frozen model's work is kept, and need not be repeated.
    """
    collate, device, total, count = Collator(tokenizer), next(model.parameters()).device, 0.0, 0
    lengths = [len(e.input_ids) for e in encoded]
    order = sorted(range(len(encoded)), key=lengths.__getitem__)
    with evaluating(model):
        for chosen in _batches(order, batch_size, lengths if equal_lengths else None):
            batch = {k: v.to(device) for k, v in collate([encoded[i] for i in chosen]).items()}
            if not takes_prompts:
                batch.pop("prompt_lengths", None)
            supervised = int((batch["labels"] != IGNORED).sum())
            with reuse.applied(batch) if reuse is not None else nullcontext(batch) as less:
                total, count = total + float(model(**less).loss) * supervised, count + supervised
    return total / count


def _batches(order: list[int], size: int, lengths: list[int] | None) -> Iterator[list[int]]:
    runs = [order] if lengths is None else [list(run) for _, run in groupby(order, lengths.__getitem__)]
    for run in runs:
        for at in range(0, len(run), size):
            yield run[at : at + size]


def _logits(logits: Tensor, labels: Tensor | None) -> list[Any]:
    """As lists: (B, C), or of (B, T, C) those at tokens that have a label."""
    if logits.dim() == 2 or labels is None:
        return list(logits.tolist())
    return [row[real].tolist() for row, real in zip(logits, labels != IGNORED, strict=True)]


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, batch: dict[str, Tensor], **how: Any) -> list[str]:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first = ids.gather(1, mask.argmax(1, keepdim=True))
    filled = ids.where(mask.bool(), first)  # a penalty on repetition sees padding: a row's own first token adds nothing
    out = model.generate(**{**batch, "input_ids": filled, **how}, do_sample=False)
    texts: list[str] = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def context_of(model: nn.Module) -> int | None:
    """How many tokens the model reads; None where its config does not say."""
    config: Any = model.config
    room: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts positions from behind its padding
    return room


def check_context(
    model: nn.Module,
    encoded: Sequence[Encoded],
    new: int,
    where: Callable[[int], str],
    remedy: str = "shorten the prompt or allow fewer new tokens",
) -> None:
    """Raises DataError, starting with `where` of the longest, when its tokens and `new` ones exceed the context."""
    room = context_of(model)
    at = max(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
    length = len(encoded[at].input_ids)
    if room is not None and length + new > room:
        after = f" and up to {new} new ones" if new else ""
        raise DataError(f"{where(at)}: {length} tokens{after}, but the model reads {room} in all; {remedy}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
