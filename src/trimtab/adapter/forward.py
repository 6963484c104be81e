"""One forward: which of its tokens an adapter edits, and what about it cannot be right.

A `Pass` belongs to one call of the model (or, in an encoder-decoder, of its encoder or decoder); `running.py` makes it
and finds it again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.where.plan import Part, edited
from trimtab.where.positions import Positions
from trimtab.where.prompts import (
    Prompt,
    repeated,
)

BASE = "__base__"
"""PEFT's name, among `adapter_names`, for a row without an adapter."""


GUEST = "a trimtab.edit"


class Same:
    """Objects that are equal to themselves alone, kept so that no other takes their place in memory."""

    def __init__(self, *held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and list(map(id, self.held)) == list(map(id, other.held))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.held)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Same:
        return self


class Made(NamedTuple):
    """What edits a forward."""

    name: str
    positions: Positions
    scale: float
    version: Any = None
    """Another one once its tensors are written to, or others take their place."""


Edits = Sequence[Sequence[Made]]
"""What edits, in that order: one sequence for all rows, or one for each."""
Filled = Sequence[tuple[int, Edits]]
"""What edited a cache's columns, from each of these on to the next."""


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
    batch: int = 0
    """Rows of token ids that the model was given; 0 where it was not given tokens."""
    length: int = 0
    """Columns of the chunk that the model was given; 0 where it was not given tokens."""
    beside: bool = False
    """The model was given more than tokens, as an image, whose states may stand before theirs."""
    owner: Tensor | None = None
    """(S,) the row that each packed sequence lies in; None where each row is one sequence."""
    earlier: Prompt | None = None
    """The prompt that the cache was filled under, if another: up to column `compared` both must edit alike."""
    compared: int = 0
    unclear: str | None = None
    """Why it is not known which sequences are packed into the rows."""
    paged: bool = False
    """The rows are chunks of many requests, as continuous batching lays them out."""
    adapter_names: list[str] | None = None
    repeats: bool = False
    """Rows may be repeated in place, as `generate` does for beams and returned sequences."""
    training: bool = False
    watched: bool = True
    """Whether the host may look at the prompts, which waits for an accelerator."""
    several_turns: bool = False
    """A row's labels are supervised, -100 and supervised again."""
    notes: set[str] = field(default_factory=set)
    """What was said once for this model."""
    kept: dict[Any, Any] = field(default_factory=dict)
    """What others than adapters worked out once for this pass."""
    _rows: dict[Any, EditedRows | None] = field(default_factory=dict)

    def rows(
        self, adapter: str | None, positions: Positions, hidden: Tensor, parts: tuple[Part, ...] = ("edit",)
    ) -> EditedRows | None:
        """The rows that `adapter` edits in hidden states (B, T, d), worked out once a pass; None for none at all.

        An edit that is no adapter's (None) is made in every row of the batch, whatever adapter the row has.

        Raises:
            ValueError: in training, the end of the prompt matters and nobody said where it is; or the pass continues a
                cache that was filled with other edits than a run without it would make.
        """
        batch, length, _ = hidden.shape
        mixed = self.beside and length > self.length > 0  # states of an image before those of the text, say
        if length < self.length or mixed or (self.batch and batch != self.batch and self.owner is None):
            raise RuntimeError(
                f"hidden states of shape {tuple(hidden.shape)} for {self.length} tokens a row: the model pools its "
                "tokens, puts others beside them or does not put the batch first, so which are meant is not known. "
                "Choose another site."
            )
        sizes = tuple(n if isinstance(n, int) else str(n) for n in (batch, length))  # torch.export's have no hash
        key = (adapter if self.adapter_names else None, positions, parts, sizes, hidden.device)
        if key not in self._rows:
            self._check_prompt(positions, parts, batch, hidden.device)
            self._rows[key] = self._find_rows(adapter, positions, batch, length, hidden.device)
        return self._rows[key]

    def _find_rows(
        self, adapter: str | None, positions: Positions, batch: int, length: int, device: torch.device
    ) -> EditedRows | None:
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
            real = None if self.mask is None else repeated(self.mask[:, -length:].bool().to(device), batch)
            return torch.zeros(batch, dtype=torch.long, device=device), 0, real
        prompt = self.prompt
        if prompt.width is None and prompt.lengths is None:
            prompt.width = self.start + length
        sequences = batch if self.owner is None else len(self.owner)
        if self.training:
            self._check_training(positions, sequences, device)
        return prompt.lengths_of(sequences, device), self.start, self._real(sequences, self.start + length, device)

    def _rows_of(self, adapter: str | None, batch: int) -> list[int] | None:
        """Which rows of the batch use the adapter; None for all."""
        if self.adapter_names is None or adapter is None:
            return None
        times, rest = divmod(batch, len(self.adapter_names))
        if rest or (times > 1 and not self.repeats):
            raise ValueError(MISCOUNTED.format(len(self.adapter_names), batch))
        return [i for i in range(batch) if self.adapter_names[i // times] == adapter]

    def _real(self, batch: int, columns: int, device: torch.device) -> Tensor | None:
        if self.mask is not None:
            real = repeated(self.mask.bool().to(device), batch)[:, :columns]
            return nn.functional.pad(real, (0, columns - real.shape[1]))  # Longformer pads further by itself
        if self.prompt.real is None:
            return None
        real = repeated(self.prompt.real.to(device), batch)[:, :columns]
        generated = torch.ones(batch, columns - real.shape[1], dtype=torch.bool, device=device)
        return torch.cat([real, generated], 1)

    # ---- what cannot be right -----------------------------------------------------------------------------------

    def _check_prompt(self, positions: Positions, parts: tuple[Part, ...], batch: int, device: torch.device) -> None:
        if self.paged:
            raise ValueError(PAGED)
        if self.unclear and positions.scope != "all":
            raise ValueError(f"positions={positions.text!r}: {self.unclear}")
        if self.prompt.foreign:
            raise ValueError(
                f"positions={positions.text!r}: the call continues a cache of which it is not known what was edited in "
                "it, nor where its prompt ended: no forward of this model filled it as it is. Pass prompt_lengths (one "
                "number of real prompt tokens a row) if it holds what this adapter would edit, or leave the cache out."
            )
        if self.prompt.mid_sequence and positions.needs_prompt_end:
            raise ValueError(
                f"positions={positions.text!r}: the call continues a cache of which it is not known where its prompt "
                "ended. Pass prompt_lengths (one number of real prompt tokens a row), or leave the cache out."
            )
        if self.prompt.blurred and positions.last:
            raise ValueError(
                f"positions={positions.text!r}: the batch is padded, and its mask counts other things than hidden "
                "states, so each row's last ones are not known. Pass prompt_lengths (one number of hidden states a "
                "row), rows of one length, or use positions such as 'f7'."
            )
        if self.earlier is not None:
            self._check_cache(self.earlier, positions, parts, batch, device)
        if self.prompt.guessed and positions.needs_prompt_end and not self.training:
            say_once(self.notes, "guessed", _GUESSED.format(positions.text))
        if self.prompt.guessed and positions.enough:
            say_once(self.notes, "short", _SHORT.format(positions.text, positions.enough))

    def _check_cache(
        self, earlier: Prompt, positions: Positions, parts: tuple[Part, ...], batch: int, device: torch.device
    ) -> None:
        if earlier.edits_as(self.prompt, positions, parts, self._tokens(self.compared, batch, device)):
            return
        before, now = (p.lengths_of(batch, device).tolist() for p in (earlier, self.prompt))
        raise ValueError(
            f"positions={positions.text!r}: the cache was filled for prompts of {before} real tokens a row and is now "
            f"continued for prompts of {now}, so a run without it would edit other tokens. Leave the cache out, or say "
            f"where the prompt ends: prompt_lengths={before} to go on with the cache's prompt (what follows it is the "
            f"answer), or prompt_lengths={now} already in the call that fills the cache."
        )

    def _tokens(self, columns: int, batch: int, device: torch.device) -> Tensor:
        """Real tokens (B,) of each row in the first columns."""
        real = self._real(batch, columns, device)
        return real.sum(1) if real is not None else torch.full((batch,), columns, device=device)

    def check_filled(self, filled: Filled, now: Edits) -> None:
        """Raises ValueError if the cache was filled under other adapters or scales, and that changed what it holds."""
        if self.earlier is None or not self.batch or all(before == now for _, before in filled):
            return
        ends = self.earlier.lengths_of(self.batch, torch.device("cpu")).tolist()
        columns = [*(min(start, self.compared) for start, _ in filled), self.compared]
        seen = [self._tokens(column, self.batch, torch.device("cpu")).tolist() for column in columns]
        for (_, before), starts, stops in zip(filled, seen, seen[1:], strict=False):
            for row, (end, start, stop) in enumerate(zip(ends, starts, stops, strict=True)):
                old, new = (edits[row * len(edits) // self.batch] for edits in (before, now))
                did, would = ([m for m in own if edited(m.positions, end, start, stop - start)] for own in (old, new))
                if did != would:
                    told, again = _told(old), _told(new)
                    raise ValueError(
                        f"the cache was filled with {told} and is now continued with {again}"
                        f"{' as changed since' if told == again else ''}, so a run without it would edit other tokens, "
                        "or otherwise. Leave the cache out, or fill it under the adapters and scales of now."
                    )

    @property
    def _may_look(self) -> bool:
        """Whether the host may count: not in the graph of a block that is compiled alone, which would break there."""
        return self.watched and not torch.compiler.is_compiling()

    def _check_training(self, positions: Positions, batch: int, device: torch.device) -> None:
        prompt = self.prompt
        short = prompt.guessed and self._may_look and bool((prompt.lengths_of(batch, device) < positions.enough).any())
        if prompt.guessed and (positions.needs_prompt_end or short):
            raise ValueError(
                f"positions={positions.text!r}: in training the end of the prompt must be known, but the model was "
                "called with neither labels nor prompt_lengths. Pass labels with -100 on the prompt, or prompt_lengths "
                "(one number of real prompt tokens a row; decoder_prompt_lengths for a decoder that has an encoder); "
                "'all' and 'f1' need neither, nor 'f7' where every prompt has 7 tokens. In a trainer that takes labels "
                "away (label smoothing, compute_loss_func): data_collator=trimtab.with_prompts(collator). Around a "
                "loss that calls the model by itself, or its `forward` by name: with trimtab.prompts(model, lengths)."
            )
        if self.several_turns and positions.needs_prompt_end and positions.turns == "each":
            say_once(self.notes, "turns", TURNS.format(positions.text))
        self._check_empty(prompt, positions, batch, device)

    def _check_empty(self, prompt: Prompt, positions: Positions, batch: int, device: torch.device) -> None:
        if prompt.lengths is None or positions.scope in ("all", "generated") or not self._may_look:
            return
        unsupervised = 1 if self.owner is not None else 0  # the first token of a packed sequence is never supervised
        empty = int((prompt.lengths_of(batch, device) <= unsupervised).sum())
        if empty == batch:
            raise ValueError(
                f"positions={positions.text!r}: every prompt in the batch is empty, so nothing would be edited or "
                "learned. The labels supervise the first token; set them to -100 on the prompt (in TRL: a "
                "prompt-completion data set or completion_only_loss=True), or use positions='all'."
            )
        if empty:
            say_once(self.notes, "empty", _EMPTY.format(positions.text, empty, batch))


def _told(edits: Sequence[Made]) -> str:
    names = (m.name if m.name == GUEST else f"adapter {m.name!r}" for m in edits)
    told = dict.fromkeys(f"{name} at scale {m.scale:g}" for name, m in zip(names, edits, strict=True))
    return ", ".join(told) or "no adapter"


_GUESSED = (
    "positions={0!r}: the model was called with neither labels nor prompt_lengths, so the whole input is taken for the "
    "prompt, as in generate. If it holds an answer too, other tokens are edited than in training: pass prompt_lengths "
    "(one number of real prompt tokens a row), in a trainer by data_collator=trimtab.with_prompts(collator), or call "
    "within trimtab.prompts(model, lengths). Said once."
)
_SHORT = (
    "positions={0!r}: the model was called with neither labels nor prompt_lengths. Of a prompt shorter than {1} tokens "
    "only half are edited, so if there are such prompts with answers behind them, pass prompt_lengths (one number of "
    "real prompt tokens a row). Said once."
)


PAGED = (
    "continuous batching (generate_batch) does not say where the prompts of its requests end, so the tokens to edit "
    "are not known. Use generate on a padded batch, with adapter_names for a mixed one, or trimtab serve."
)
MISCOUNTED = "adapter_names: {} names for a batch of {} rows; give one a row."
_EMPTY = (
    "positions={0!r}: {1} of the {2} prompts of this batch are empty (their labels supervise the first token), so "
    "nothing is edited there. Packing that cuts sequences anywhere (TRL's packing_strategy='wrapped') does that: use "
    "packing_strategy='bfd' or no packing, and -100 on the prompts. Said once."
)
TURNS = (
    "positions={0!r}: some rows have several supervised turns (labels, -100, labels again). Their prompt ends before "
    "the first one, so that only the edits before it are trained, while at the second turn generate takes all that "
    "came before for the prompt. Give each turn a row of its own: the earlier turns as prompt, the last as completion. "
    "Or say edit_turns='first' in ReftConfig, by which chat and server go too, and pass the first prompt's "
    "prompt_lengths to a generate of your own. Said once."
)
WATCHED = 8
"""Training forwards whose prompts are looked at for what is worth a warning; from then on labels on an accelerator,
of which looking waits for it, are left alone."""


def say_once(notes: set[str], name: str, text: str) -> None:
    """Warn, unless `name` stands in the notes already."""
    if name not in notes and not torch.compiler.is_compiling():
        notes.add(name)
        warnings.warn(text, stacklevel=2)
