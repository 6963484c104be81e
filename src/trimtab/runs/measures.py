"""What a trial costs and what it forgets: memory of training, learning curve, loss on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trimtab.runs.predict import evaluating
from trimtab.runs.trainer import ReftTrainer
from trimtab.tasks.tokens import Encoded

CURVE = 60
"""Points of a learning curve."""
HELD_OUT_WINDOWS, HELD_OUT_LENGTH = 32, 128


def training_memory(trainer: ReftTrainer, model: nn.Module, encoded: Sequence[Encoded], batch_size: int) -> int:
    """Bytes that training needs on top of the model: what autograd keeps on the longest batch, gradients and moments.

    Counted rather than measured, so that it is the same on every machine and in every allocator.
    """
    longest = sorted(enumerate(encoded), key=lambda pair: len(pair[1].input_ids))[-batch_size:]
    collate: Any = trainer.data_collator
    batch = trainer._prepare_inputs(collate(longest))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own graph node saved would keep both, and the model, for good

    reuse, trainer.reuse = trainer.reuse, None
    # Dropout draws: a trial of which this is known already must not train under another stream of numbers.
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(gpus), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(model, batch)
    del loss
    trainer.reuse = reuse
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sum(kept.values()) + 3 * trained


def thinned(curve: Sequence[float]) -> list[tuple[int, float]]:
    """(step, loss) at no more than `CURVE` places, each the mean since the last."""
    stride = max(1, -(-len(curve) // CURVE))
    parts = [curve[i : i + stride] for i in range(0, len(curve), stride)]
    return [(min((n + 1) * stride, len(curve)), round(sum(p) / len(p), 7)) for n, p in enumerate(parts)]


def windows(path: str | None, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Stretches of a held-out text, evenly spread over it."""
    if path is None:
        return []
    text = Path(path).read_text(encoding="utf-8")
    width = 16 * HELD_OUT_LENGTH  # characters, more than enough for the tokens
    starts = [i * max(1, len(text) - width) // HELD_OUT_WINDOWS for i in range(HELD_OUT_WINDOWS)]
    parts = [tokenizer(text[s : s + width])["input_ids"][:HELD_OUT_LENGTH] for s in starts]
    return [list(ids) for ids in parts if len(ids) == HELD_OUT_LENGTH]


@torch.no_grad()
def window_loss(model: Any, texts: Sequence[list[int]], *, takes_prompts: bool = False) -> float:
    """The mean loss a token on the second half of each stretch, its first half being the prompt.

    So an adapter that edits prompts edits text as it would in use, and the loss is taken past its edits.

    Args:
        takes_prompts: whether the model takes `prompt_lengths`.
    """
    losses = []
    device = next(model.parameters()).device
    with evaluating(model):
        for at in range(0, len(texts), 16):
            ids = torch.tensor(texts[at : at + 16], device=device)
            labels = ids.clone()
            labels[:, : HELD_OUT_LENGTH // 2] = -100
            lengths = torch.full((len(ids),), HELD_OUT_LENGTH // 2, device=device)
            extra = {"prompt_lengths": lengths} if takes_prompts else {}
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            losses += [float(model(**batch, **extra).loss)] * len(ids)
    return sum(losses) / len(losses)
