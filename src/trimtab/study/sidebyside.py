"""Two adapters of one base model side by side, ReFT or LoRA each: settings, sizes, and what they do to hidden states.

The same tokens go through the base model and through it with either adapter: prompts, each with what the base model
greedily answers, so that neither adapter is measured on its own words. Hidden states are those that blocks give, in the
whole forward: at a token that is not edited they move too, as far as the edited ones reach it through attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.adapter import compared
from trimtab.adapter.folder import read_adapter
from trimtab.adapter.weights import CONFIG, read_tensors, weights_in
from trimtab.errors import AdapterError, DataError, RunError
from trimtab.runs.folder import RunFolder
from trimtab.runs.generate import encode_as, find_adapters
from trimtab.runs.models import Base, ModelSource
from trimtab.runs.predict import check_context
from trimtab.runs.ways import unload
from trimtab.study.sidebyside_settings import METHODS, Setting, Settings, side_by_side
from trimtab.tasks import Head, Task
from trimtab.tasks.conversation import Turn
from trimtab.tasks.tokens import Collator, Encoded, encode_texts
from trimtab.where.sites import find_sites

PROMPTS = 16
"""Rows that are taken of the adapters' own tasks."""
TEXTS = (
    "The capital of France is Paris.",
    "Add two and three.",
    "She opened the door and",
    "Translate to French: good morning",
)
"""What is read where no prompts are given and neither adapter's task is at hand."""

GENERATING = Head("AutoModelForCausalLM")

Pair = tuple[float | None, float | None]


@dataclass(frozen=True)
class Block:
    """One block, or what is beside the blocks: each pair is of the two adapters."""

    name: str
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    prompt: Pair = (None, None)
    """Mean over the prompts' tokens of ‖h' - h‖ / ‖h‖ at the block's output."""
    generated: Pair = (None, None)
    """The same over the tokens that follow; None where there are none."""
    directions: tuple[int, int] = (0, 0)
    """How many hold `compared.SHARE` of the changes' squared length."""
    overlap: float | None = None
    """Of the spans of those, their mean squared cosine."""
    chance: float | None = None
    """What random directions would have."""
    angles: tuple[float, ...] = ()
    """The principal angles between them, in degrees."""
    cka: float | None = None
    """Linear CKA of the two adapters' states, at tokens that either moves."""
    cka_base: Pair = (None, None)
    """And of either's states with the base model's."""


@dataclass(frozen=True)
class Text:
    """What was read: tokens, and how far each moves at each block under either adapter."""

    tokens: tuple[str, ...]
    prompt: int
    """So many of them are the prompt."""
    moved: tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]
    """Of the two adapters: (blocks, tokens)."""


@dataclass(frozen=True)
class SideBySide:
    """All that is found."""

    names: tuple[str, str]
    base: str
    width: int
    settings: tuple[Setting, ...]
    blocks: tuple[Block, ...]
    beside: Block
    """What is saved of no block, a classifier for one."""
    source: str
    """Where the texts come from."""
    texts: tuple[Text, ...]

    @property
    def total(self) -> Block:
        """Parameters and bytes of all."""
        every = (*self.blocks, self.beside)
        sums = [tuple(sum(getattr(one, name)[i] for one in every) for i in (0, 1)) for name in ("parameters", "bytes")]
        return Block("all", *sums)  # type: ignore[arg-type]


class Saved:
    """An adapter's folder, checked.

    Raises:
        AdapterError: it is not there, is damaged, or is of a method that cannot be set beside another.
    """

    def __init__(self, given: str | Path) -> None:
        if Path(given).is_file():
            raise AdapterError(f"{given}: a file; give the folder that it is in: {Path(given).parent}")
        found = find_adapters([str(given)])
        if len(found) > 1:
            raise AdapterError(f"{given}: holds {len(found)} adapters, {', '.join(found)}; name one of them.")
        self.path = next(iter(found.values()))
        self.tensors = read_tensors(weights_in(self.path))
        try:
            config = PeftConfig.from_pretrained(str(self.path))
        except (ValueError, TypeError, KeyError) as error:
            raise AdapterError(f"{self.path / CONFIG}: {error}") from None
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in METHODS:
            raise AdapterError(f"{self.path}: an adapter of method {kind}; only {' and '.join(METHODS)} are compared.")
        if kind == "REFT":
            read_adapter(self.path)
        self.settings: Settings = METHODS[kind](config)
        self.base: str | None = config.base_model_name_or_path
        self.task_type = getattr(config.task_type, "value", config.task_type)

    @cached_property
    def run(self) -> RunFolder | None:
        """What trimtab says of its training, where trimtab did that."""
        folder = RunFolder(self.path)
        try:
            return folder if folder.run else None
        except RunError:
            return None

    @cached_property
    def task(self) -> Task[Any] | None:
        """What it was trained on."""
        return self.run.task if self.run is not None else None

    @property
    def generates(self) -> bool:
        return self.task_type in (None, "CAUSAL_LM")

    def head(self, other: Saved) -> Head:
        """The model that it needs, as its own run says or the other's. Raises AdapterError where neither does."""
        if self.generates:
            return GENERATING
        for one in (self, other):
            if one.task is not None and one.task.task_type == self.task_type:
                return one.task.head
        raise AdapterError(
            f"{self.path}: trained for {self.task_type}, and no run.json says what its head is like, neither there "
            f"nor in {other.path}."
        )

    def inputs(self, text: Encoded, device: torch.device) -> dict[str, Any]:
        """The arguments of a forward."""
        found: dict[str, Any] = {"input_ids": torch.tensor([text.input_ids], device=device)}
        if text.token_type_ids is not None:
            found["token_type_ids"] = torch.tensor([text.token_type_ids], device=device)
        if self.settings.takes_prompts and self.generates:
            found["prompt_lengths"] = [text.prompt_length]
        return found

    @contextmanager
    def on(self, model: Any) -> Iterator[PeftModel]:
        """The model with the adapter, within. Raises AdapterError for a file that is not whole."""
        try:
            adapted = PeftModel.from_pretrained(model, str(self.path)).eval()
        except RuntimeError as error:
            raise AdapterError(f"{self.path}: does not fit the base model: {str(error).splitlines()[-1]}") from None
        try:
            missing = [name for name, _ in adapted.named_parameters() if _is_missing(name, self.tensors)]
            if missing:
                raise AdapterError(f"{self.path}: has no {missing[0]}. Copy or save the adapter again.")
            yield adapted
        finally:
            unload(adapted)


def _is_missing(name: str, tensors: dict[str, Tensor]) -> bool:
    """Of a parameter that a LoRA must have, whether its file lacks it."""
    return ".lora_" in name and name.replace(".default", "") not in tensors


def compare_adapters(
    first: str | Path,
    second: str | Path,
    prompts: Sequence[str] = (),
    *,
    model: str | None = None,
    new_tokens: int = 8,
) -> SideBySide:
    """Set two adapters side by side.

    Args:
        first, second: folders that PEFT or trimtab saved.
        prompts: put as the adapters' training put its own; by default rows of the adapters' own tasks.
        model: the base model, where it is not the one that the adapters name.
        new_tokens: of the base model's answer, which is read behind each prompt; at most so many.
    Raises:
        AdapterError: a folder cannot be used, or the two are of different base models.
        DataError: a prompt is longer than the model reads.
    """
    pair = (Saved(first), Saved(second))
    base = Base(ModelSource(_base_of(pair, model), _dtype(pair)))
    texts, source = _texts(pair, prompts, base.tokenizer)
    texts = _continued(pair, base, texts, new_tokens)
    a, b = (_seen(own, other, base, texts) for own, other in (pair, pair[::-1]))
    if not torch.equal(a.base, b.base):
        raise AdapterError(
            f"{pair[0].path} and {pair[1].path}: one of them changes the base model itself, its embeddings perhaps; "
            "there are no states to compare with."
        )
    is_prompt = torch.cat([torch.arange(len(text.input_ids)) < text.prompt_length for text in texts])
    moved = [compared.moved(one.base, one.edited) for one in (a, b)]
    lengths = [len(text.input_ids) for text in texts]
    by_text = zip(texts, *(far.split(lengths, dim=1) for far in moved), strict=True)
    return SideBySide(
        names=_names(pair),
        base=base.source.name,
        width=a.base.shape[-1],
        settings=tuple(side_by_side(pair[0].settings, pair[1].settings)),
        blocks=tuple(_block(i, a, b, moved, is_prompt) for i in range(len(a.names))),
        beside=Block("beside the blocks", (a.sizes[-1][0], b.sizes[-1][0]), (a.sizes[-1][1], b.sizes[-1][1])),
        source=source,
        texts=tuple(
            Text(
                tuple(str(base.tokenizer.decode([i])) for i in text.input_ids),
                text.prompt_length,
                (_rounded(far_a), _rounded(far_b)),
            )
            for text, far_a, far_b in by_text
        ),
    )


def _rounded(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(value, 4) for value in row) for row in values.tolist())


def _names(pair: tuple[Saved, Saved]) -> tuple[str, str]:
    """The folders' names, or as many of their last parts as tell them apart."""
    parts = [own.path.resolve().parts for own in pair]
    count = next((n for n in range(1, min(map(len, parts))) if parts[0][-n:] != parts[1][-n:]), 1)
    return str(Path(*parts[0][-count:])), str(Path(*parts[1][-count:]))


def _base_of(pair: tuple[Saved, Saved], model: str | None) -> str:
    """The base model's name. Raises AdapterError where the two name none, or different ones."""
    if model is not None:
        return model
    a, b = (str(Path(own.base).resolve()) if own.base and Path(own.base).is_dir() else own.base for own in pair)
    if a is None or b is None:
        raise AdapterError(f"{pair[a is not None].path}: names no base model; give --model.")
    if a != b:
        raise AdapterError(
            f"{pair[0].path} is of the base model {pair[0].base!r} and {pair[1].path} of {pair[1].base!r}: only "
            "adapters of one base model are compared. Where both names mean the same, say it: --model."
        )
    return str(pair[0].base)


def _dtype(pair: tuple[Saved, Saved]) -> str:
    """What they were trained in, as far as that is known and the same; else as the weights are stored."""
    said = {str(own.run.run["dtype"]) for own in pair if own.run is not None}
    return said.pop() if len(said) == 1 else "auto"


def _texts(
    pair: tuple[Saved, Saved], prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Encoded], str]:
    """What is read, and where it comes from."""
    known = [own for own in pair if own.task is not None]
    lead = known[0] if known else pair[0]

    def put(text: str) -> Encoded:
        if lead.task is not None and not lead.task.generates:
            return encode_texts(tokenizer, [text], None, 512)[0]
        return encode_as(lead.path, tokenizer, text)

    if prompts:
        how = f", put as the training of {lead.path.name} put its own" if known else ""
        return list(map(put, prompts)), f"{len(prompts)} given{how}"
    found: list[Encoded] = []
    tasks = {task.name: task for own in known if (task := own.task) is not None}
    try:
        alone = any(task.edit_turns == "first" for task in tasks.values())  # to whom the prompt ends before later turns
        for task in tasks.values():
            examples = [*task.examples("test"), *task.examples("train")]
            examples = [one for one in examples if not (alone and isinstance(one, Turn) and one.follows)]
            found += task.encode(tokenizer, examples[: PROMPTS // len(tasks)], training=False)[0]
    except DataError as error:
        return list(map(put, TEXTS)), f"{len(TEXTS)} short texts, since the tasks' own are not at hand ({error})"
    if found:
        return found, f"{len(found)} rows of {' and '.join(tasks)}, those of test before those of train"
    return list(map(put, TEXTS)), f"{len(TEXTS)} short texts; give your own with --prompt"


def _continued(pair: tuple[Saved, Saved], base: Base, texts: list[Encoded], new_tokens: int) -> list[Encoded]:
    """Each prompt with the base model's greedy answer; alone where no adapter is of a model that answers."""
    if not new_tokens or not any(own.generates for own in pair):
        return texts
    model: Any = base.load(GENERATING, 0).model.eval()
    check_context(model, texts, new_tokens, lambda i: f"prompt {i + 1}")
    pad = Collator(base.tokenizer).pad_id
    found = []
    for text in texts:
        ids = torch.tensor([text.input_ids], device=model.device)
        how = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad}
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
        found.append(Encoded(whole[0].tolist(), len(text.input_ids), None))
    return found


@dataclass(frozen=True)
class Seen:
    """One adapter's blocks."""

    names: list[str]
    base: Tensor
    """(blocks, n, d) without the adapter."""
    edited: Tensor
    """And with it."""
    sizes: list[tuple[int, int]]
    """Parameters and bytes of each block, and last of what is beside them."""


def _seen(own: Saved, other: Saved, base: Base, texts: Sequence[Encoded]) -> Seen:
    plain: Any = base.load(own.head(other), 0).model.eval()
    if getattr(plain.config, "is_encoder_decoder", False):
        raise AdapterError(f"{base.source.name}: an encoder and a decoder read different texts; they are not compared.")
    blocks = find_sites(plain, "block", "all")
    inputs = [own.inputs(text, plain.device) for text in texts]
    without = [{name: value for name, value in one.items() if name != "prompt_lengths"} for one in inputs]
    before = compared.block_outputs(plain, blocks, without)
    with own.on(plain) as adapted:
        after = compared.block_outputs(adapted, blocks, inputs)
    names = [site.name for site in blocks]
    return Seen(names, before, after, _sizes(names, own.tensors))


def _sizes(blocks: Sequence[str], tensors: dict[str, Tensor]) -> list[tuple[int, int]]:
    sizes = [[0, 0] for _ in (*blocks, "beside")]
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        place = next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), len(blocks))
        sizes[place][0] += tensor.numel()
        sizes[place][1] += tensor.numel() * tensor.element_size()
    return [(count, size) for count, size in sizes]


def _block(i: int, a: Seen, b: Seen, moved: Sequence[Tensor], is_prompt: Tensor) -> Block:
    h, edited = a.base[i], (a.edited[i], b.edited[i])
    spans = [compared.directions(one - h) for one in edited]
    touched = (moved[0][i] > 0) | (moved[1][i] > 0)
    states = [one[touched] for one in edited]
    overlap = compared.overlap(*spans)
    return Block(
        a.names[i],
        (a.sizes[i][0], b.sizes[i][0]),
        (a.sizes[i][1], b.sizes[i][1]),
        prompt=_means(moved, i, is_prompt),
        generated=_means(moved, i, ~is_prompt),
        directions=(len(spans[0]), len(spans[1])),
        overlap=overlap,
        chance=compared.chance(*spans) if overlap is not None else None,
        angles=tuple(compared.cosines(*spans).arccos().rad2deg().tolist()) if overlap is not None else (),
        cka=compared.cka(*states),
        cka_base=(compared.cka(h[touched], states[0]), compared.cka(h[touched], states[1])),
    )


def _means(moved: Sequence[Tensor], i: int, chosen: Tensor) -> Pair:
    a, b = (float(far[i][chosen].mean()) if bool(chosen.any()) else None for far in moved)
    return a, b
