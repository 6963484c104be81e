"""What a run would train on: its rows, its tokens and the first of them, checked and said before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from trimtab.adapter.config import ReftConfig
from trimtab.errors import ModelError, RunError
from trimtab.runs.experiment import Experiment
from trimtab.runs.models import load_tokenizer, skeleton
from trimtab.runs.predict import check_context, context_of
from trimtab.tasks import Task
from trimtab.tasks.classification import ClassificationTask
from trimtab.tasks.files import QUOTES_OF_TSV, quoted_cells
from trimtab.tasks.tokens import Encoded
from trimtab.where.plan import edited
from trimtab.where.positions import parse_positions
from trimtab.where.sites import find_sites

SHOWN = 24
"""Tokens of an unbroken stretch that are shown at each of its ends."""
PLAUSIBLE_RATES = (9e-5, 2e-2)
"""Learning rates of edits: the paper's, from large models' lowest to several times the highest, for small ones."""
Trained = tuple[list[Encoded], int]
"""Training examples as tokens, and how many were too long."""


def checked_summary(
    experiment: Experiment,
    tokenizer: PreTrainedTokenizerBase,
    trained: Trained | None = None,
    *,
    placed: bool = True,
) -> str:
    """The summary, once the adapter is known to have its place and the examples to fit the model.

    Args:
        placed: False where other adapters than the recipe's are tried, each of which is checked when it is built.

    Raises:
        DataError: the data cannot be used, or an example is longer than the model reads.
        RunError: the model has no such layers or modules, or is narrower than the rank.
    """
    name, config = experiment.name, ReftConfig(**experiment.adapter.model_dump())
    trained = trained or experiment.encode(tokenizer, experiment.task.examples("train"), training=True)
    model = skeleton(experiment.source.name, experiment.task.head, experiment.source.attention)
    try:
        if placed:
            find_sites(model, config.site, config.layers, config.r)
    except ValueError as error:
        raise RunError(f"{name}: adapter: {error}") from None
    remedy = f"set training: max_length: {context_of(model)} (it is {experiment.training.max_length})"
    check_context(model, trained[0], 0, lambda i: f"{name}: a training example", remedy)
    _check_prompts(experiment, tokenizer, model)
    return summary(experiment, tokenizer, model, trained)


def _check_prompts(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    task, new = experiment.task, experiment.task.decoding().get("max_new_tokens", 0)
    if not new:
        return
    scored = [
        split for split in ("validation", "test") if experiment.spec.data.validation is not False or split == "test"
    ]
    examples = [example for split in scored for example in task.examples(split)]
    prompts, _ = experiment.encode(tokenizer, examples, training=False)
    where, remedy = f"{experiment.name}: a row to be scored", "shorten its prompt, or lower max_new_tokens:"
    check_context(model, prompts, new, lambda i: where, remedy)


def summary(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, model: nn.Module, trained: Trained) -> str:
    """Some lines on rows, tokens and edits, then what is odd about them. Raises DataError."""
    task, adapter = experiment.task, experiment.adapter
    census, odd = task.census(task.examples("train"))
    said = ReftConfig(**adapter.model_dump()).method_text
    edited = f"{said}, positions {adapter.positions}, layers {adapter.layers}, {adapter.site}"
    lines = {
        "train": ": ".join(filter(None, [_rows(experiment, "train"), census])),
        "validation": _rows(experiment, "validation"),
        "test": _rows(experiment, "test"),
        "tokens": _tokens(experiment, trained, model),
        "edited": "; ".join(filter(None, [edited, task.prompt_said])),
        "first row": _first(experiment, tokenizer),
    }
    text = "".join(f"\n  {key:<11}{value}" for key, value in lines.items())
    odd = [*_too_long(experiment, trained), *odd_data(task), *_odd_rate(experiment), *odd]
    remarks = "".join(f"\n  ! {said}" for said in odd)
    return f"{experiment.name} ({experiment.spec.type}, {task.score_said}){text}{remarks}"


def _rows(experiment: Experiment, split: str) -> str:
    task, data = experiment.task, experiment.spec.data
    if split == "validation" and data.validation is False:
        return "none"
    if split == "test" and task.test_is_validation:
        return "the rows of validation, since no test data is given"
    count = f"{len(task.examples(split))} {task.unit}"
    if split == "validation" and task.validation_is_cut:
        whole = f", of each {data.group} all or none" if data.group else ""
        return f"{count} drawn from train by the seed{whole}"
    if split == "test" and data.sets:
        return f"{count} in {len(data.sets)} set{'s' * (len(data.sets) > 1)}, {', '.join(data.sets)}"
    return f"{count} of {task.source(split)}"


def _tokens(experiment: Experiment, trained: Trained, model: nn.Module) -> str:
    lengths, room = [len(e.input_ids) for e in trained[0]], context_of(model)
    cut = "" if trained[1] else f"; max_length {experiment.training.max_length} cuts none"
    context = f"; the model reads {room}" if room else ""
    return f"{median(lengths):g} at the median, {max(lengths)} at most{cut}{context}"


def odd_data(task: Task[Any]) -> list[str]:
    """What is odd about the rows: some cannot be used, all of a split have one class, or two splits share some."""
    data = task.spec.data
    splits = [
        "train",
        *([] if data.validation is False else ["validation"]),
        *([] if task.test_is_validation else ["test"]),
    ]
    skipped = f"{task.skipped} rows cannot be used and are left out, first {task.first_flaw}"
    own = [skipped] if task.skipped else []
    classes = [*_of_one_class(task, splits), *_never_tested(task, splits)]
    return [*own, *_broken(task, splits), *_quoted(task), *classes, *_shared(task, splits)]


def _broken(task: Task[Any], splits: Sequence[str]) -> list[str]:
    """Lines of test, and of a file for validation, that are left out."""
    said = []
    for split in splits:
        whole = len(task.examples(split))
        if found := [error for one in (task, *task.sets.values()) for error in one.broken.get(split, ())]:
            score = f"{split}'s score is of the other {whole} alone"
            said.append(f"{len(found)} lines of {split} cannot be used and are left out, so {score}; first {found[0]}")
    return said


def _quoted(task: Task[Any]) -> list[str]:
    file = task.source("train")
    if not file.lower().endswith(".tsv") or not (count := quoted_cells([e.row for e in task.examples("train")])):
        return []
    return [f"{count} cells of {file} are in quotes, with quotes doubled in them: {QUOTES_OF_TSV}"]


def _of_one_class(task: Task[Any], splits: Sequence[str]) -> list[str]:
    said = []
    for split in splits if isinstance(task, ClassificationTask) else ():
        examples = task.examples(split)
        if len(examples) > 1 and len({e.label for e in examples}) == 1:
            only = task.readable(examples[0].label)
            limit = getattr(task.spec.data.limit, split)
            why = f"; limit: takes the first {limit} rows, and the file is sorted: shuffle it" if limit else ""
            said.append(f"all {len(examples)} rows of {split} are {only!r}{why}")
    return said


def _never_tested(task: Task[Any], splits: Sequence[str]) -> list[str]:
    """Classes of a tenth of train that test, though it has rows enough, has none of."""
    if not isinstance(task, ClassificationTask) or "test" not in splits or len(task.examples("test")) < ENOUGH:
        return []
    train, tested = task.examples("train"), {e.label for e in task.examples("test")}
    counts = Counter(e.label for e in train)
    return [
        f"{task.readable(label)!r} is {count} of {len(train)} rows of train and none of test; where it stands for rows "
        "without a class, leave them out"
        for label, count in counts.items()
        if label not in tested and 10 * count >= len(train)
    ]


ENOUGH = 50
"""Rows of test in which a class of a tenth of them is missing by chance once in 200 times."""


def _shared(task: Task[Any], splits: Sequence[str]) -> list[str]:
    """What is in two splits, of which one is to be new to the other."""
    data, said = task.spec.data, []
    for one, other in combinations(splits, 2):
        count, whole = task.shared(one, other), len(task.examples(other))
        if not count:
            if data.group and (groups := task.shared_groups(one, other)):
                said.append(f"{groups} of {other}'s {data.group}s are in {one} too, so {CHEATED[one]}")
            continue
        how = "all" if count == whole else f"{count} of"
        remedy = f"give {other} rows of its own"
        said.append(f"{how} {whole} {task.unit} of {other} are in {one} too, so {CHEATED[one]}: {remedy}")
    return said


CHEATED = {
    "train": "their score is partly of what was learnt by heart",
    "validation": "settings are chosen on what is reported",
}
"""What comes of it that rows of a split are in a later one."""


def _odd_rate(experiment: Experiment) -> list[str]:
    rate, (low, high) = experiment.training.learning_rate, PLAUSIBLE_RATES
    if low <= rate <= high:
        return []
    side = "below" if rate < low else "above"
    return [f"learning_rate {rate:g} is {side} the usual {low:g} to {high:g}; trimtab tune finds one"]


def _too_long(experiment: Experiment, trained: Trained) -> list[str]:
    task, training, (_, too_long) = experiment.task, experiment.training, trained
    if not too_long:
        return []
    done = "cut" if training.too_long == "cut" or not task.generates else "left out"
    of = f"{too_long} of {len(task.examples('train'))} {task.unit}"
    more = f"more fit with a larger training: max_length: (now {training.max_length}), as far as the model reads"
    return [f"{of} are longer than {training.max_length} tokens and {done}; {more}"]


def _first(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> str:
    task = experiment.task
    example = task.examples("train")[0]
    (encoded,), _ = experiment.encode(tokenizer, [example], training=False)
    answer = str(task.readable(task.truth([example]).wanted[0]))  # of a class that the file numbers, the name
    answer = answer if len(answer) < 200 else f"{answer[:200]} ..."
    return f"{marked(tokenizer, encoded, experiment.adapter.positions)} -> {answer}".replace("\n", "\\n")


def first_row(experiment: Experiment) -> str:
    """The first training row as the model will read it, the edited tokens in «»; then its answer. Raises DataError."""
    try:
        shown = _first(experiment, load_tokenizer(experiment.source.name))
    except ModelError:
        shown = "not shown, since the model has no tokenizer here"
    return f"{experiment.name} ({experiment.spec.type}), first row, «edited tokens»:\n  {shown}"


def marked(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, positions: str) -> str:
    """The text up to the answer with the edited tokens in «», long stretches without an edit shortened."""
    ids, count = encoded.input_ids, len(encoded.input_ids)
    chosen = set(edited(parse_positions(positions), encoded.prompt_length, 0, count))
    text, at = "", 0
    while at < count:
        end = next((i for i in range(at, count) if (i in chosen) != (at in chosen)), count)
        shown = _decoded(tokenizer, ids[at:end])
        text += f"«{shown}»" if at in chosen else shown
        at = end
    return text


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    if len(ids) > 2 * SHOWN:
        return f"{tokenizer.decode(ids[:SHOWN])} ... {tokenizer.decode(ids[-SHOWN:])}"
    return str(tokenizer.decode(ids))
