"""Frozen-part reuse: what no training step changes is computed once.

Under a frozen base model much of a forward pass is the same at every step of every epoch:

- with suffix-only positions (`lN`) and causal attention, everything before the first edited token, in every layer. Its
  keys and values are kept, and training runs only on the tokens from there on (`PrefixReuse`);
- with edits from block k up, the hidden states that enter block k. They are kept, and the blocks below are skipped
  (`LowerBlocksReuse`).

Both are exact to rounding. Each example's part is computed alone, without padding, so that it does not depend on the
batch it first came in: a resumed run ends in the same bits as an uninterrupted one. A part is kept under what it was
computed from, so that tasks, seeds, rates and ranks share it and a search computes it once. Kept parts stay
in memory up to a budget and go to disk past it.
"""

from __future__ import annotations

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import groupby
from typing import IO, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from trimtab.adapter.cache import CACHE, cache_of
from trimtab.adapter.config import ReftConfig
from trimtab.adapter.forward import BASE
from trimtab.tasks.tokens import IGNORED
from trimtab.where.positions import Positions
from trimtab.where.sites import find_blocks, find_sites


class Store:
    """Parts of one frozen model's work by name: in memory up to `budget` bytes, past it in a file without a name in
    the folder for temporary files, which a process that is killed does not leave behind."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used, self.on_disk = budget, 0, 0
        self.checked: dict[str, bool] = {}
        """The kinds of reuse that were seen to give the plain loss, and whether the leanest way of it did."""
        self.forms: dict[str, Callable[[Tensor], Any]] = {}
        """By kind, what makes of a kept part what the model's own module returns."""
        self._kept: dict[str, Tensor] = {}
        self._on_disk: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        """Where in the file each starts, its shape and its type."""
        self._file: IO[bytes] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._kept or name in self._on_disk

    def put(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.used + size <= self.budget:
            self.used += size
            self._kept[name] = tensor
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open until `close`)
        self._file.seek(self.on_disk)
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self._on_disk[name] = self.on_disk, tensor.shape, tensor.dtype
        self.on_disk += size

    def get(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        start, shape, dtype = self._on_disk[name]
        kept = torch.empty(shape, dtype=dtype)
        assert self._file is not None
        self._file.seek(start)
        self._file.readinto(kept.flatten().view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        return kept

    def close(self) -> None:
        self._kept.clear()
        self._on_disk.clear()
        if self._file is not None:
            self._file.close()


class Reuse(ABC):
    """One way to reuse; `applied` turns a batch into a cheaper one with the same loss and gradients."""

    def __init__(self, model: PeftModel, store: Store) -> None:
        self.model, self.store = model, store
        self.lean = False
        """Whether it takes a way to the same loss that is cheaper still, but not every model's."""
        self.tokens, self.tokens_saved = 0, 0
        """Real tokens of all batches, and those that the trained part of the pass did not have to touch."""

    @property
    @abstractmethod
    def what(self) -> str:
        """What is reused, in words."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """A name for what is kept, of whatever example."""

    @abstractmethod
    @contextmanager
    def applied(self, batch: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """The batch to call the model with, within the context.

        Args:
            batch: input_ids, attention_mask, labels (B, T), padded on the right, and prompt_lengths (B,); what else
                is in it stays there.
        """

    def started(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What to hand to `generate` beside a batch, so that it need not repeat the rest.

        Args:
            batch: input_ids, attention_mask (B, T), padded on the left, and prompt_lengths (B,) where the prompts end
                before the rows.
        """
        return {}

    def summary(self) -> dict[str, Any]:
        """For the run's metrics: what was reused, and what it saved."""
        return {
            "reused": self.what,
            "tokens": self.tokens,
            "tokens_saved": round(self.tokens_saved),
            "bytes_in_memory": self.store.used,
            "bytes_on_disk": self.store.on_disk,
        }

    def part(self, ids: Tensor) -> Tensor:
        """What is kept of an example, worked out at its first use from the token ids (1, n) it depends on."""
        name = hashlib.sha256(self.kind.encode() + ids.cpu().numpy().tobytes()).hexdigest()
        if name not in self.store:
            tuner: Any = self.model.base_model
            with torch.no_grad(), tuner._enable_peft_forward_hooks(adapter_names=[BASE]):  # as the base model alone
                self.store.put(name, self.compute(ids).cpu())
        return self.store.get(name).to(ids.device)

    @abstractmethod
    def compute(self, ids: Tensor) -> Tensor:
        """The part of one example, from the token ids (1, n) it depends on."""


class PrefixReuse(Reuse):
    """Keys and values of the tokens before the first edited one, as (layers, 2, heads, tokens, head size).

    Those of all of the prompt but its last token are kept, since the first edited one depends on the positions.

    Args:
        positions: of each adapter of the model.
    """

    kind = "prefix"

    def __init__(self, model: PeftModel, store: Store, *positions: Positions) -> None:
        super().__init__(model, store)
        self.positions = positions
        self.lean = next(model.parameters()).device.type == "cpu"  # row by row, which many small kernels would not be

    @property
    def what(self) -> str:
        texts = ", ".join(one.text for one in self.positions)
        return f"keys and values of the tokens before the edited ones ({texts})"

    def beside(self, others: Sequence[PrefixReuse]) -> PrefixReuse:
        """One that holds for its adapter and for those of the others."""
        positions = (one for reuse in (self, *others) for one in reuse.positions)
        return PrefixReuse(self.model, self.store, *dict.fromkeys(positions))

    def compute(self, ids: Tensor) -> Tensor:
        base: Any = self.model.get_base_model()
        cache = cache_of(base(input_ids=ids, use_cache=True, logits_to_keep=1))
        return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])

    def _first(self, prompts: Tensor) -> Tensor:
        """(B,) tokens before the first edited one, for prompts of so many."""
        slots = [positions.slots(prompts) for positions in self.positions]
        longest = int(prompts.max())
        return torch.cat([torch.where(valid, ordinals, longest) for ordinals, valid in slots], 1).amin(1)

    def _before(self, prompt: Tensor, start: int) -> Tensor | None:
        """Of the first `start` tokens of a prompt (1, n)."""
        return self.part(prompt[:, :-1])[:, :, :, :start] if start else None

    def started(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1)
        prompts = batch.get("prompt_lengths", lengths)
        left = lengths - self._first(prompts)  # from the first edited token on
        width = ids.shape[1] - int(left.max())
        rows = zip(ids.split(1), lengths.tolist(), strict=True)
        parts = [self._before(row[:, -n:], max(0, width - ids.shape[1] + n)) for row, n in rows]
        cache = self._cache(parts, width)
        return {} if cache is None else {CACHE: cache, "prompt_lengths": prompts}

    @contextmanager
    def applied(self, batch: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        ids, lengths, prompts = batch["input_ids"], batch["attention_mask"].sum(1), batch["prompt_lengths"]
        first = self._first(prompts)
        starts = first.tolist()
        rows = zip(ids.split(1), prompts.tolist(), starts, strict=True)
        parts = [self._before(row[:, :n], start) for row, n, start in rows]
        self.tokens += int(lengths.sum())
        self.tokens_saved += sum(starts)
        width = int((lengths - first).max())
        columns = first.unsqueeze(1) + torch.arange(width, device=ids.device)  # (B, width) of the original row
        real = columns < lengths.unsqueeze(1)
        taken = columns.clamp(max=ids.shape[1] - 1)
        before = torch.arange(max(starts), device=ids.device) >= max(starts) - first.unsqueeze(
            1
        )  # prefixes end together
        lean = self.lean and any(starts)
        with _attending_to(self.model.get_base_model(), parts) if lean else nullcontext():
            yield {
                **batch,
                "input_ids": ids.gather(1, taken),
                "labels": batch["labels"].gather(1, taken).masked_fill(~real, IGNORED),
                "attention_mask": torch.cat([before, real], 1).long(),
                "position_ids": taken,
                CACHE: _Elsewhere(parts, max(starts)) if lean else self._cache(parts, max(starts)),
                "prompt_lengths": prompts,
                "use_cache": True,
            }

    def _cache(self, parts: list[Tensor | None], width: int) -> DynamicCache | None:
        some = next((part for part in parts if part is not None), None)
        if some is None:
            return None
        layers, _, heads, _, size = some.shape
        batch = some.new_zeros(layers, 2, len(parts), heads, width, size)
        for row, part in enumerate(parts):
            if part is not None:
                batch[:, :, row, :, width - part.shape[3] :] = part
        base: Any = self.model.get_base_model()
        cache = DynamicCache(config=base.config)
        for layer in range(layers):
            cache.update(batch[layer, 0], batch[layer, 1], layer)
        return cache


class _Elsewhere(DynamicCache):
    """A cache that counts the tokens before a batch and does not hold them: `_attend` takes them where they are kept.

    Growing one by the batch's own keys would copy all of it in every block, and attention's backward would then work
    out the gradients of all the keys, of which no frozen one needs any.
    """

    def __init__(self, parts: Sequence[Tensor | None], length: int) -> None:
        super().__init__()
        self.layers = [_Counted(length) for _ in next(part for part in parts if part is not None)]


class _Counted(DynamicLayer):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length


class UnlikeAttention(NotImplementedError):
    """The model's attention is asked for more than `_attend` does."""


_parts: ContextVar[Sequence[tuple[int, Tensor | None]]] = ContextVar("parts")
"""The keys and values (layers, 2, heads, tokens, head size) of what comes before so many rows of the batch, one after
another: those of one example, of which there are several where trials are trained together."""
ATTENTION = "trimtab_kept"
"""The name of `_attend` among transformers' attention functions."""
OF_NO_MATTER = {"position_ids", "is_causal", "use_cache", "cache_position", "num_items_in_batch", "shift_labels"}
"""What models hand on to their attention that makes no difference to `_attend`."""


@contextmanager
def _attending_to(base: Any, parts: Sequence[Tensor | None]) -> Iterator[None]:
    """Have the model's attention read these parts before the batch's own tokens."""
    config = base.config.get_text_config()
    usual, token = config._attn_implementation, _parts.set(_runs(parts))
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual
        _parts.reset(token)


def _runs(parts: Sequence[Tensor | None]) -> list[tuple[int, Tensor | None]]:
    """Neighbours that have the same part, as (rows, part)."""
    found = (list(same) for _, same in groupby(parts, lambda part: part if part is None else part.data_ptr()))
    return [(len(same), same[0]) for same in found]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(q [K K']ᵀ) [V V'] with what is kept in K, V and the batch's own in K', V', without joining them.

    Args:
        query: (B, heads, T, size); key and value (B, a divisor of heads, T, size).
        attention_mask: (B, 1, T, before + T), whose last T columns are taken, or None for one token.
    Raises:
        UnlikeAttention: there is a dropout, a bias, a cap or whatever else.
    """
    more = [
        name for name, asked in others.items() if asked is not None and asked is not False and name not in OF_NO_MATTER
    ]
    (rows, heads, length, size), groups = query.shape, query.shape[1] // key.shape[1]
    if dropout or more or (attention_mask is None and length > 1):
        raise UnlikeAttention(", ".join(more) or "dropout or mask")
    query = query.reshape(rows, key.shape[1], groups * length, size) * (size**-0.5 if scaling is None else scaling)
    near = query @ key.transpose(2, 3)
    if attention_mask is not None:
        seen = attention_mask[..., -length:].repeat(1, 1, groups, 1)
        near = near.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else near + seen
    runs, read = _parts.get(), []
    sizes = [many for many, _ in runs]
    asked = zip(query.split(sizes), near.split(sizes), value.split(sizes), runs, strict=True)
    for queries, own, values, (many, part) in asked:
        kept = part[module.layer_idx] if part is not None else key.new_zeros(2, *key.shape[1:2], 0, size)
        # Of all the rows at once, which read the kept ones a single time: (heads of keys, rows groups T, before).
        before = queries.transpose(0, 1).flatten(1, 2) @ kept[0].transpose(1, 2)
        scores = torch.cat([before.unflatten(1, (many, -1)).transpose(0, 1), own], 3)
        shares = scores.float().softmax(3).to(value.dtype).split([kept.shape[2], length], 3)
        found = shares[0].transpose(0, 1).flatten(1, 2) @ kept[1]
        read.append(found.unflatten(1, (many, -1)).transpose(0, 1) + shares[1] @ values)
    return torch.cat(read).reshape(rows, heads, length, size).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class LowerBlocksReuse(Reuse):
    """Hidden states (tokens, width) that enter the lowest edited block."""

    def __init__(self, model: PeftModel, store: Store, blocks: list[nn.Module]) -> None:
        super().__init__(model, store)
        self.blocks = blocks
        """Those below the lowest edited one."""
        self.share = len(blocks) / len(find_blocks(model.get_base_model()))

    @property
    def kind(self) -> str:
        return f"block {len(self.blocks)}"

    @property
    def what(self) -> str:
        return f"hidden states that enter block {len(self.blocks)}, the lowest edited one"

    def compute(self, ids: Tensor) -> Tensor:
        last, captured = self.blocks[-1], []
        original = last.forward

        def capture(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.store.forms[self.kind] = (lambda h: h) if isinstance(output, Tensor) else (lambda h: (h, *output[1:]))
            captured.append(output if isinstance(output, Tensor) else output[0])
            raise _Captured

        with _forward_of([last], capture):
            try:
                base: Any = self.model.get_base_model()
                base(input_ids=ids, use_cache=False)
            except _Captured:
                pass
        hidden: Tensor = captured[0][0]
        return hidden

    @contextmanager
    def applied(self, batch: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
        parts = [self.part(row[:, :n]) for row, n in zip(ids.split(1), lengths, strict=True)]
        self.tokens += sum(lengths)
        self.tokens_saved += self.share * sum(lengths)
        hidden = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        hidden = nn.functional.pad(hidden, (0, 0, 0, ids.shape[1] - hidden.shape[1]))
        with _forward_of(self.blocks, lambda *args, **kwargs: self.store.forms[self.kind](hidden)):
            yield {**batch, "use_cache": False}


class _Captured(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def _forward_of(modules: list[nn.Module], forward: Any) -> Iterator[None]:
    """The modules with another `forward`, which their class's shows through again afterwards."""
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def choose_reuse(model: PeftModel, config: ReftConfig, store: Store, checkpointing: bool) -> Reuse | str:
    """The reuse that holds for this model and adapter, or why none does."""
    base: Any = model.get_base_model()
    if config.task_type != "CAUSAL_LM" or getattr(base.config, "is_encoder_decoder", False):
        return "only decoders that generate are supported"
    random = _dropouts(base)
    if random:
        return f"the base model is random in training ({random})"
    if getattr(base.config, "output_router_logits", False):
        return "the router's loss needs every block"
    positions = config.parsed_positions
    if positions.last and not positions.first and not checkpointing and _plain_cache(base.config):
        return PrefixReuse(model, store, positions)
    if config.site in ("block", "attention", "mlp", "heads") and config.layers != "all":
        blocks = [block for _, block in find_blocks(base)]
        lowest = find_sites(base, "block", config.layers)[0].module
        below = next(i for i, block in enumerate(blocks) if block is lowest)
        if below and not any("forward" in block.__dict__ for block in blocks[:below]):
            return LowerBlocksReuse(model, store, blocks[:below])
    return (
        "the first tokens of the lowest block are edited" if config.layers == "all" else "no part of a pass is frozen"
    )


def _plain_cache(config: Any) -> bool:
    """Whether every layer's cache is just its keys and values, all of them."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or ["full_attention"]
    return set(types) == {"full_attention"} and not getattr(text, "sliding_window", None)


def _dropouts(base: Any) -> str | None:
    """A dropout of the base model itself, heads for other tasks aside."""
    for name, value in base.config.get_text_config().to_dict().items():
        random = ("dropout" in name or "pdrop" in name) and not name.startswith(("classifier", "summary"))
        if random and isinstance(value, float) and value > 0:
            return f"{name}={value}"
    return None
