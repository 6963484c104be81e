"""The model card that a run leaves: what the adapter is, and lines that use it, which run as they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.adapter.config import ReftConfig
from trimtab.runs.experiment import Experiment


def card(
    experiment: Experiment,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    new: Sequence[str],
    untuned: float,
    tuned: float,
) -> str:
    """The README of an adapter on `model`, whose lines run where its training ran.

    Args:
        new: the modules of the model's head, which the adapter brings.
        untuned, tuned: scores on test.
    """
    config = ReftConfig(**experiment.adapter.model_dump())
    task, head = experiment.task, experiment.task.head
    split = "validation" if task.test_is_validation else "test"
    arguments = {"dtype": experiment.source.dtype, **head.config}
    if head.is_new:
        arguments["pad_token_id"] = model.config.pad_token_id
    base = repr(experiment.source.name)
    given = ", ".join([base, *(f"{key}={value!r}" for key, value in arguments.items())])
    load = f"base = {head.auto}.from_pretrained({given})\n"
    if new:
        names = ", ".join(map(repr, new))
        load = f"with trimtab.expect_missing({names}):  # the head, which the adapter brings\n    {load}"
    pooled = "".join(f"trimtab.set_pool(base, {pool!r})\n" for pool in experiment.pool.values())
    return f"""\
---
base_model: {experiment.source.name}
library_name: peft
tags: [trimtab, reft, {config.method}]
---
A ReFT adapter ({config.method_text}, positions {config.positions}) for `{experiment.source.name}`, the task
`{experiment.name}` ({experiment.spec.type}).
Trained on {len(task.examples("train"))} rows; {task.score.name} on {len(task.examples("test"))} {split} rows: \
{tuned:.3f}, without it {untuned:.3f}.

```python
import trimtab  # registers the method with PEFT
from peft import PeftModel
from transformers import {head.auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base})
{load}{pooled}model = PeftModel.from_pretrained(base, {str(folder)!r}).eval()

{_use(experiment, tokenizer)}
```

On a file of rows: `trimtab predict FILE -a {folder}`.
"""


def _use(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> str:
    """Lines that ask the model about one row, its fields' names in place of what they hold."""
    task = experiment.task
    sample = task.sample()
    if not task.generates:
        texts, length = sample.texts, experiment.training.max_length
        given = "text" if len(texts) == 1 else ", ".join(map(repr, texts))
        named = f"text = {texts[0]!r}\n" if len(texts) == 1 else ""
        return f"""\
{named}batch = tokenizer({given}, truncation=True, max_length={length}, return_tensors="pt")
logits = model(**batch).logits[0]
print({task.read_by})"""
    text, special = task.rendered(tokenizer, sample)
    options = "" if special else ", add_special_tokens=False"
    how = "".join(f", {key}={value!r}" for key, value in task.decoding().items())
    return f"""\
batch = tokenizer([{text!r}]{options}, return_tensors="pt")
out = model.generate(**batch, do_sample=False{how})
print(tokenizer.decode(out[0, batch["input_ids"].shape[1]:], skip_special_tokens=True)){_TURNS[task.edit_turns]}"""


_TURNS = {
    "each": "",
    "first": """
# With later turns: model.generate(..., prompt_lengths=[n]), n the tokens of what comes before the first answer.""",
}
