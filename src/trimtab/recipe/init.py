"""What `trimtab init` writes: a commented recipe for a model, with values that suit its size."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from trimtab.edits import METHODS, parameter_count
from trimtab.errors import DataError
from trimtab.recipe.guess import UNKNOWN, Guess, guess
from trimtab.runs.models import loading, skeleton
from trimtab.runs.predict import context_of
from trimtab.tasks import TASKS, Head
from trimtab.where.sites import find_sites


@dataclass(frozen=True)
class ModelFacts:
    """What `init` needs to know of a model, from its config alone: no weight is read."""

    name: str
    generates: bool
    width: int
    blocks: int
    parameters: int
    context: int | None
    """How many tokens it reads, where its config says."""
    half: str | None
    """The 16-bit type that its weights are stored in, where they are."""
    lora_parameters: int
    """Of a LoRA of rank 8 on every linear layer but the output head."""


@dataclass(frozen=True)
class Suggestion:
    """Adapter and training values for a size of model."""

    r: int
    positions: str
    learning_rate: float
    epochs: int


def look_at(name: str) -> ModelFacts:
    """Build the model without memory and measure it.

    Raises:
        ModelError: there is no such model folder or Hub name.
        ValueError: the model has no blocks that trimtab could edit.
    """
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    generates = any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in config.architectures or [])
    model: Any = skeleton(name, Head("AutoModelForCausalLM" if generates else "AutoModel"))
    sites = find_sites(model, "block", "all")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return ModelFacts(
        name=name,
        generates=generates,
        width=sites[0].width,
        blocks=len(sites),
        parameters=sum(p.numel() for p in model.parameters()),
        context=context_of(model),
        half=stored if (stored := str(config.dtype).removeprefix("torch.")) in ("bfloat16", "float16") else None,
        lora_parameters=sum(8 * (m.in_features + m.out_features) for m in linear),
    )


def suggest(facts: ModelFacts) -> Suggestion:
    """Starting values: the paper's for large models (tables 5 to 8), higher rates and lower ranks for small ones.

    Of an encoder every token is edited, which costs nothing more as nothing is decoded: edits of the first few fall
    behind as texts grow, below a new head alone (docs/loreft-vs-lora.md).
    """
    if not facts.generates:
        return Suggestion(r=4, positions="all", learning_rate=1e-3, epochs=20)
    if facts.width < 512:
        return Suggestion(r=4, positions="f1+l2", learning_rate=4e-3, epochs=20)
    if facts.width < 2048:
        return Suggestion(r=4, positions="f3+l3", learning_rate=2e-3, epochs=9)
    return Suggestion(r=8, positions="f7+l7", learning_rate=9e-4, epochs=6)


def adapter_parameters(facts: ModelFacts, r: int) -> int:
    """Of a tied LoReFT of rank r on every block."""
    return facts.blocks * parameter_count("loreft", facts.width, r)


def with_new_head(tasks: Mapping[str, tuple[str, Guess]]) -> bool:
    """Whether a head is trained with the edit of one of them."""
    return any(not TASKS[found.type].generates for _, found in tasks.values())


def recipe_text(facts: ModelFacts, tasks: dict[str, tuple[str, Guess]]) -> str:
    """The YAML, commented, for tasks given by name: the training file of each, and what it is for."""
    s = suggest(facts)
    weight = adapter_parameters(facts, s.r)
    beside = " beside a new head" if with_new_head(tasks) else ""
    dtype = "auto             # as the weights are stored; or float32, bfloat16, float16"
    if facts.half and not torch.accelerator.is_available():
        dtype = f"float32          # faster on a CPU than {facts.half}, as the weights are stored (auto)"
    head = f"""\
# A recipe for trimtab: `trimtab train THIS_FILE` trains one adapter for each task, on one frozen model.
model: {json.dumps(facts.name)}
output: runs            # each task leaves a folder here, which PEFT loads: runs/<task>
seed: 0
dtype: {dtype}

# The edit. {weight:,} parameters{beside}, {100 * weight / facts.parameters:.3g}% of the model's {facts.parameters:,}.
adapter:
  method: loreft        # {", ".join(METHODS)}
  r: {s.r}                  # rank; raise it if training loss stays high, lower it if data is scarce
  positions: {s.positions:<10} # edited prompt tokens: fN first, lN last; or prompt, generated, all
  layers: all           # or a list such as [0, 4, -1]: fewer layers, fewer parameters
  # site: block         # or attention, mlp, heads (method red there is scale and shift by head), a module pattern
  # lora: {{r: 8}}        # a LoRA trained with the edits and saved in the same adapter

training:
  learning_rate: {s.learning_rate:g}
  epochs: {s.epochs}            # or max_steps
  batch_size: 16
  warmup: 0.1           # share of the steps
  weight_decay: 0.0
  max_length: {min(512, facts.context or 512)}       # longer examples are left out (a classifier: cut), and counted

tasks:
"""
    return head + "\n".join(_task(name, *found) for name, found in tasks.items())


COMMENTS: dict[str, str | dict[str, str]] = {
    "type": {"classification": "or regression, for a number", "regression": "or classification"},
    "prompt": "the row's fields in braces, of several the first whose fields are filled; the chat template goes around",
    "train_turns": "which answers are trained on and scored; or last",
    "edit_turns": "the prompt is all before each answer; or first: what is before a conversation's first answer",
    "text": "a field, or [first, second] for a pair",
    "score": {
        "exact_match": "or number (the last one counts), choice with choices: [yes, no], overlap",
        "overlap": "of words; or exact_match, number, choice with choices: [yes, no]",
        "accuracy": "or f1, mcc",
    },
    "max_new_tokens": "that an answer may have",
}


def _task(name: str, data: str, found: Guess) -> str:
    lines = [f"  # {found.said}"] if found.said else []
    lines += [f"  {_as_yaml(name)}:", f"    type: {found.type}{_comment('type', found.type)}", "    data:"]
    given = {"train": data, **found.data}
    lines += [f"      {key}: {_as_yaml(value)}" for key, value in given.items()]
    lines += ["      # validation: ...  without it, a tenth of train validates", "      # test: ..."]
    lines += [f"    {key}: {_as_yaml(value)}{_comment(key, value)}" for key, value in found.keys.items()]
    return "\n".join(lines) + "\n"


def _as_yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _comment(key: str, value: Any) -> str:
    said = COMMENTS.get(key, "")
    text = said if isinstance(said, str) else said.get(str(value), "")
    return f"     # {text}" if text else ""


def look_at_tasks(
    pairs: list[str], generates: bool, columns: Sequence[str] | None = None, separator: str | None = None
) -> dict[str, tuple[str, Guess]]:
    """The tasks that `name=file` pairs ask for; a file alone is named after itself.

    Without any they are two examples, whose files are to be written.

    Args:
        columns: the fields' names in CSV and TSV files that have no header line.
        separator: what stands between their cells, found by looking where not given.

    Raises:
        DataError: two tasks share a name, or a file cannot be read or used.
    """
    if not pairs:
        return {name: (f"data/{name}.train.jsonl", UNKNOWN[generates]) for name in ("first", "second")}
    tasks: dict[str, tuple[str, Guess]] = {}
    for pair in pairs:
        name, sep, path = pair.partition("=")
        if not sep:
            name, path = Path(pair).stem, pair
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", name).lstrip("_-") or "task"
        if name in tasks:
            raise DataError(f"--task {pair}: there is a task {name!r} already; write other_name={path}")
        tasks[name] = (path, guess(path, generates, columns, separator))
    return tasks
