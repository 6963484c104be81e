"""What a run would train on: its rows, its tokens and the first of them, before the first step."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from trimtab.errors import ModelError
from trimtab.runs.models import load_tokenizer
from trimtab.runs.trial import Experiment
from trimtab.tasks.tokens import Encoded
from trimtab.where.plan import edited
from trimtab.where.positions import parse_positions

SHOWN = 24
"""Tokens of an unbroken stretch that are shown at each of its ends."""


def first_row(experiment: Experiment, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The first training row as the model will read it, the edited tokens in «»; then its answer. Raises DataError."""
    example = experiment.task.examples("train")[0]
    head = f"{experiment.name} ({experiment.spec.type}), the first training row; «edited tokens»"
    try:
        tokenizer = tokenizer or load_tokenizer(experiment.source.name)
    except ModelError:
        return f"{head}: not shown, since the model has no tokenizer here"
    (encoded,), _ = experiment.encode(tokenizer, [example], training=False)
    return f"{head}:\n  {marked(tokenizer, encoded, experiment.adapter.positions)}\n  -> {example.answer[:200]}"


def marked(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, positions: str) -> str:
    """A prompt's text with the edited tokens in «», long stretches without an edit shortened."""
    ids, prompt = encoded.input_ids, encoded.prompt_length
    chosen = set(edited(parse_positions(positions), prompt, 0, prompt))
    text, at = "", 0
    while at < prompt:
        end = next((i for i in range(at, prompt) if (i in chosen) != (at in chosen)), prompt)
        shown = _decoded(tokenizer, ids[at:end])
        text += f"«{shown}»" if at in chosen else shown
        at = end
    return text.replace("\n", "\\n")


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    if len(ids) > 2 * SHOWN:
        return f"{tokenizer.decode(ids[:SHOWN])} ... {tokenizer.decode(ids[-SHOWN:])}"
    return str(tokenizer.decode(ids))
