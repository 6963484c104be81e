"""Passes: what is known of a running forward, and which of its rows an adapter edits.

A `Pass` is opened when the model (or, in an encoder-decoder, its encoder or decoder) starts a forward, and closed when
it ends; the hooks of `tuner.py` ask it for rows. Gradient checkpointing runs parts of the model again during the
backward pass, long after the forward has ended and perhaps after another has begun, so `Passes.bind` hands each
checkpointed call the pass it belongs to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.where.positions import Positions

BASE = "__base__"
"""PEFT's name, among `adapter_names`, for a row without an adapter."""


@dataclass
class Prompt:
    """Where the prompts of a batch end."""

    width: int | None = None
    """Columns of the prompts, padding included: at and after it no prompt token stands. None: not known."""
    real: Tensor | None = None
    """(B, width) bool, False at padding; None for no padding. With packed rows, (S, width): each sequence's own."""
    lengths: Tensor | None = None
    """(B,) or (S,) real tokens of each prompt; None where they fill the width."""
    guessed: bool = False
    """Nobody said where the prompt ends: the whole input is taken for it."""
    mid_sequence: bool = False
    """Guessed, and on top of a cache, so that even without training the guess would be wrong."""
    blurred: bool = False
    """There is padding, but the mask counts the model's audio samples, not its hidden states."""
    awaits_mask: bool = False
    """`generate` was given no mask; the first pass brings the one it made."""

    def receive_mask(self, columns: int, real: Tensor | None) -> None:
        """Take, from the first pass of `generate`, the mask that it made.

        Raises:
            ValueError: the pass is a chunk of the prompt, and its mask does not cover the rest.
        """
        if self.width is not None and columns < self.width:
            raise ValueError("prefill_chunk_size: pass attention_mask too, without which padding is seen too late.")
        self.width, self.real, self.awaits_mask = columns, real, False

    def is_over(self, start: int, columns: int | None) -> bool:
        """Whether all from column `start` on follows the prompt; a prompt not yet seen is what the pass holds."""
        if self.width is None and self.lengths is None:
            self.width = columns
        return self.width is not None and start >= self.width

    def lengths_of(self, batch: int, device: torch.device) -> Tensor:
        if self.lengths is not None:
            return _repeated(self.lengths.to(device), batch)
        if self.real is not None:
            return _repeated(self.real.to(device), batch).sum(1)
        return torch.full((batch,), self.width or 0, device=device)


class EditedRows(NamedTuple):
    """Edited tokens of (B, T, d) hidden states seen as (B T, d)."""

    flat: Tensor
    """(n, K) indices."""
    valid: Tensor
    """(n, K, 1) bool."""


@dataclass
class Pass:
    """One forward of the model over a chunk of columns that starts at `start`."""

    prompt: Prompt
    start: int = 0
    after_prompt: bool = False
    """Whether the chunk follows the prompt of every row, as decode steps do: known on the host."""
    mask: Tensor | None = None
    """(B, start + T) over the past and the chunk, 0 at padding; None where only the prompt can hold padding. Kept as it
    came, since a decode step that edits nothing must not launch a kernel."""
    length: int = 0
    """Columns of the chunk that the model was given; 0 where it was not given tokens."""
    owner: Tensor | None = None
    """(S,) the row that each packed sequence lies in; None where each row is one sequence."""
    adapter_names: list[str] | None = None
    training: bool = False
    _rows: dict[Any, EditedRows | None] = field(default_factory=dict)

    def rows(self, adapter: str, positions: Positions, hidden: Tensor) -> EditedRows | None:
        """The rows that `adapter` edits in hidden states (B, T, d), worked out once a pass; None for none at all.

        Raises:
            ValueError: in training, the end of the prompt matters and nobody said where it is.
        """
        batch, length, _ = hidden.shape
        if length < self.length:
            raise RuntimeError(
                f"hidden states of shape {tuple(hidden.shape)} for {self.length} tokens a row: the model pools its "
                "tokens or does not put the batch first, so which are meant is not known. Choose another site."
            )
        key = (adapter if self.adapter_names else None, positions, batch, length, hidden.device)
        if key not in self._rows:
            self._rows[key] = self._find_rows(adapter, positions, batch, length, hidden.device)
        return self._rows[key]

    def _find_rows(
        self, adapter: str, positions: Positions, batch: int, length: int, device: torch.device
    ) -> EditedRows | None:
        if self.prompt.mid_sequence and positions.needs_prompt_end:
            raise ValueError(
                f"positions={positions.text!r}: the call continues a cache of which it is not known where its prompt "
                "ended. Pass prompt_lengths (one number of real prompt tokens a row), or use generate."
            )
        if self.prompt.blurred and positions.last:
            raise ValueError(
                f"positions={positions.text!r}: the batch is padded, and its mask counts other things than hidden "
                "states, so each row's last ones are not known. Pass prompt_lengths (one number of hidden states a "
                "row), rows of one length, or use positions such as 'f7'."
            )
        if self.after_prompt and positions.scope not in ("generated", "all"):
            return None  # a decode step, which costs no kernel
        chosen = self._rows_of(adapter, batch)
        if chosen == []:
            return None
        picked = rows = torch.arange(batch, device=device) if chosen is None else torch.tensor(chosen, device=device)
        if self.owner is not None:
            owner = self.owner.to(device)
            picked = torch.isin(owner, rows).nonzero().squeeze(1)
            rows = owner[picked]
        lengths, start, real = self._extent(positions, batch, length, device)
        index, valid = positions.rows(lengths[picked], length, start, real[picked] if real is not None else None)
        flat = rows.unsqueeze(1) * length + index
        if self.owner is not None and positions.scope:  # (S, T), though each sequence holds few of the columns
            flat, valid = flat[valid].unsqueeze(0), valid[valid].unsqueeze(0)
        return EditedRows(flat, valid.unsqueeze(-1))

    def _extent(
        self, positions: Positions, batch: int, length: int, device: torch.device
    ) -> tuple[Tensor, int, Tensor | None]:
        """The prompts' lengths, where the chunk starts, and the real tokens up to its end."""
        if self.after_prompt:  # nothing that came before matters, so a compiled decode step fits every step
            real = None if self.mask is None else _repeated(self.mask[:, -length:].bool().to(device), batch)
            return torch.zeros(batch, dtype=torch.long, device=device), 0, real
        prompt = self.prompt
        if prompt.width is None and prompt.lengths is None:
            prompt.width = self.start + length
        sequences = batch if self.owner is None else len(self.owner)
        if self.training:
            _check_prompt_end(prompt, positions, sequences, device, packed=self.owner is not None)
        return prompt.lengths_of(sequences, device), self.start, self._real(sequences, self.start + length, device)

    def _rows_of(self, adapter: str, batch: int) -> list[int] | None:
        """Which rows of the batch use the adapter; None for all. Beams and returned sequences repeat a row in place."""
        if self.adapter_names is None:
            return None
        times, rest = divmod(batch, len(self.adapter_names))
        if rest:
            raise ValueError(
                f"adapter_names: {len(self.adapter_names)} names for a batch of {batch} rows; give one a row."
            )
        return [i for i in range(batch) if self.adapter_names[i // times] == adapter]

    def _real(self, batch: int, columns: int, device: torch.device) -> Tensor | None:
        if self.mask is not None:
            real = _repeated(self.mask.bool().to(device), batch)[:, :columns]
            return nn.functional.pad(real, (0, columns - real.shape[1]))  # Longformer pads further by itself
        if self.prompt.real is None:
            return None
        real = _repeated(self.prompt.real.to(device), batch)[:, :columns]
        generated = torch.ones(batch, columns - real.shape[1], dtype=torch.bool, device=device)
        return torch.cat([real, generated], 1)


def _check_prompt_end(prompt: Prompt, positions: Positions, batch: int, device: torch.device, packed: bool) -> None:
    if prompt.guessed and positions.needs_prompt_end:
        raise ValueError(
            f"positions={positions.text!r}: in training the end of the prompt must be known, but the model was called "
            "with neither labels nor prompt_lengths. Pass labels with -100 on the prompt, or prompt_lengths (one "
            "number of real prompt tokens a row) to the forward call; positions such as 'f7' or 'all' need neither."
        )
    if prompt.lengths is None or positions.scope in ("all", "generated") or torch.compiler.is_compiling():
        return
    unsupervised = 1 if packed else 0  # the first token of a packed sequence follows nothing: it is never supervised
    if not bool((prompt.lengths_of(batch, device) > unsupervised).any()):
        raise ValueError(
            f"positions={positions.text!r}: every prompt in the batch is empty, so nothing would be edited or learned. "
            "The labels supervise the first token; set them to -100 on the prompt (in TRL: a prompt-completion data "
            "set or completion_only_loss=True), or use positions='all'."
        )


class Passes:
    """The passes now running on one model; shared by its tuner and its edited layers."""

    def __init__(self) -> None:
        self._running: list[Pass] = []
        self.generation: Prompt | None = None
        self.decoder_generation: Prompt | None = None
        self.adapter_names: list[str] | None = None
        self.labels: Tensor | None = None
        self.prompt_lengths: Tensor | None = None

    @property
    def current(self) -> Pass | None:
        return self._running[-1] if self._running else None

    @property
    def outer(self) -> Pass | None:
        return self._running[-2] if len(self._running) > 1 else None

    def open(self, new: Pass) -> None:
        self._running.append(new)

    def replace(self, new: Pass) -> None:
        self._running[-1] = new

    def close(self) -> Pass:
        return self._running.pop()

    @contextmanager
    def within(self, running: Pass) -> Iterator[None]:
        self._running.append(running)
        try:
            yield
        finally:
            self._running.pop()

    def bind(self, module: nn.Module) -> None:
        """Make what `module` checkpoints run within the pass it first ran in, also when it is recomputed."""
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _Bound):
            module._gradient_checkpointing_func = _Bound(self, function)  # type: ignore[assignment]

    def unbind(self, module: nn.Module) -> None:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, _Bound):
            module._gradient_checkpointing_func = function.function  # type: ignore[assignment]

    @contextmanager
    def generating(self, inputs: Any, kwargs: dict[str, Any]) -> Iterator[None]:
        """Remember the prompt that `generate` starts from; takes `prompt_lengths` out of its arguments."""
        lengths = kwargs.pop("prompt_lengths", None)
        if self.generation is not None:  # the model as its own assistant proposes for the same prompt
            yield
            return
        embeds = kwargs.get("inputs_embeds")
        source = embeds if embeds is not None else inputs if inputs is not None else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        widest = real if real is not None else source  # where a cache is continued the mask covers more than the input
        width = widest.shape[1] if isinstance(widest, Tensor) and widest.dim() >= 2 else None
        self.generation = Prompt(width, real, as_lengths(lengths, width), awaits_mask=real is None)
        self.decoder_generation = Prompt()
        try:
            yield
        finally:
            self.generation = self.decoder_generation = None


class _Bound:
    def __init__(self, passes: Passes, function: Callable[..., Any]) -> None:
        self.passes, self.function = passes, function

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = self.passes.current
        return self.function(run if current is None else partial(self._rerun, current, run), *args, **kwargs)

    def _rerun(self, running: Pass, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.passes.within(running):
            return run(*args, **kwargs)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward call by name."""
    if not args:
        return kwargs
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind != p.VAR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def past_length(past: Any) -> int | None:
    """Columns that a cache holds; None for a recurrent state, which does not count what it has seen."""
    if not hasattr(past, "get_seq_length"):
        return 0
    try:
        return int(past.get_seq_length())
    except ValueError:  # no layer of it is an attention
        return None if past.has_previous_state() else 0


def as_real(mask: Any, columns: int | None) -> Tensor | None:
    """Which columns hold real tokens (B, columns), from a mask as models take it: 2-d, 4-d, or one a layer type."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 4:
        mask = _seen_by_itself(mask[:, 0] >= 0 if mask.is_floating_point() else mask[:, 0].bool(), columns)
    real: Tensor = mask.bool()
    return real[:, :columns]


def _seen_by_itself(allowed: Tensor, columns: int | None) -> Tensor:
    """From (B, T, C), who may look at what: a real token at least at itself, a past one is seen by the last query."""
    columns = min(allowed.shape[2], columns or allowed.shape[2])
    own = allowed[:, :, :columns].diagonal(columns - allowed.shape[1], 1, 2)
    return torch.cat([allowed[:, -1, : columns - allowed.shape[1]], own], 1)


def find_packed(position_ids: Any) -> tuple[Tensor, Tensor] | None:
    """Sequences packed one after another into rows, found as transformers does: where positions do not go on.

    Args:
        position_ids: (B, T); rows that hold one sequence each are not packed.
    Returns:
        The row (S,) of each sequence and the columns (S, T) that it covers.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return None
    breaks = position_ids.diff(dim=1) != 1
    if not bool(breaks.any()):
        return None
    number = torch.cat([torch.zeros_like(breaks[:, :1]), breaks], 1).long().cumsum(1)
    one_hot = torch.arange(int(number.max()) + 1, device=number.device)[:, None] == number[:, None]
    owner, sequence = one_hot.any(2).nonzero(as_tuple=True)
    return owner, one_hot[owner, sequence]


def as_lengths(lengths: Any, width: int | None = None) -> Tensor | None:
    """`prompt_lengths` as a tensor (B,).

    Raises:
        ValueError: they are not one whole, non-negative number a row.
    """
    if lengths is None:
        return None
    counts: Tensor = torch.as_tensor(lengths)
    if counts.dim() != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
        raise ValueError(f"prompt_lengths={counts}: must be one whole number a row, the real tokens of its prompt.")
    if not counts.is_cuda and bool((counts < 0).any()):
        raise ValueError(f"prompt_lengths={counts.tolist()}: must not be negative.")
    if not counts.is_cuda and width is not None and bool((counts > width).any()):
        raise ValueError(f"prompt_lengths={counts.tolist()}: only {width} tokens were given.")
    return counts


def first_supervised(labels: Tensor, real: Tensor | None) -> Tensor:
    """Real tokens (B,) before the first of them whose label is not -100; all of them where there is none."""
    supervised = labels != -100
    if real is None:
        return (supervised.cumsum(1) == 0).sum(1)
    real = real.to(labels.device)
    return ((supervised & real).cumsum(1).eq(0) & real).sum(1)


def _repeated(rows: Tensor, batch: int) -> Tensor:
    """Rows repeated in place, as beams and num_return_sequences repeat them, to the batch at hand."""
    if rows.shape[0] == batch:
        return rows
    times, rest = divmod(batch, rows.shape[0])
    if rest:
        raise ValueError(f"a mask, labels or prompt_lengths for {rows.shape[0]} rows met a batch of {batch}.")
    return rows.repeat_interleave(times, 0)
