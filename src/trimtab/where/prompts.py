"""Where the prompts of a batch end: masks, labels, packed rows. Tensor code that knows no adapter.

Lengths are counted in real tokens: padding, wherever it stands, belongs to no prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.where.plan import Part, edited
from trimtab.where.positions import Positions


@dataclass
class Prompt:
    """Where the prompts of a batch end."""

    width: int | None = None
    """Columns of the prompts, padding included: at and after it no prompt token stands. None: not known."""
    real: Tensor | None = None
    """(B, width) bool, False at padding; None for no padding. With packed rows, (S, width): each sequence's own."""
    lengths: Tensor | None = None
    """(B,) or (S,) real tokens of each prompt; None where they fill the width."""
    told: bool = False
    """The caller said where it ends, which holds until the caller says otherwise."""
    guessed: bool = False
    """Nobody said where the prompt ends: the whole input is taken for it."""
    mid_sequence: bool = False
    """Guessed, and on top of a recurrent state, so that even without training the guess would be wrong."""
    foreign: bool = False
    """On top of a cache of which no record says how it was filled."""
    blurred: bool = False
    """There is padding, but the mask counts the model's audio samples, not its hidden states."""

    def is_over(self, start: int, columns: int | None) -> bool:
        """Whether all from column `start` on follows the prompt; a prompt not yet seen is what the pass holds."""
        if self.width is None and self.lengths is None:
            self.width = columns
        return self.width is not None and start >= self.width

    def fits(self, batch: int) -> bool:
        """Whether it says something of each row of a batch: not once rows were taken out of a cache."""
        rows = self.lengths if self.lengths is not None else self.real
        return rows is None or batch % len(rows) == 0

    def of_rows(self, same: Tensor) -> Prompt | None:
        """The same for rows taken from these: (B', B) which each may be. None where that leaves open what is edited."""
        if not self.fits(same.shape[1]):
            return None
        ends, first = self.lengths_of(same.shape[1], same.device), same.long().argmax(1)
        if not bool((same.any(1) & ~(same & (ends != ends[first].unsqueeze(1))).any(1)).all()):
            return None
        lengths, real = (
            None if rows is None else repeated(rows.to(same.device), same.shape[1])[first]
            for rows in (self.lengths, self.real)
        )
        return replace(self, lengths=lengths, real=real)

    def lengths_of(self, batch: int, device: torch.device) -> Tensor:
        if self.lengths is not None:
            return repeated(self.lengths.to(device), batch)
        if self.real is not None:
            return repeated(self.real.to(device), batch).sum(1)
        return torch.full((batch,), self.width or 0, device=device)

    def edits_as(self, other: Prompt, positions: Positions, parts: tuple[Part, ...], seen: Tensor) -> bool:
        """Whether the first tokens of every row are edited alike under this prompt and another.

        Args:
            seen: (B,) real tokens of each row.
        """
        rows = [p.lengths_of(len(seen), seen.device).tolist() for p in (self, other)]
        return all(
            tuple(edited(positions, mine, 0, n, part)) == tuple(edited(positions, theirs, 0, n, part))
            for mine, theirs, n in zip(*rows, seen.tolist(), strict=True)
            if mine != theirs
            for part in parts
        )


def as_real(mask: Any, columns: int | None) -> Tensor | None:
    """Which columns hold real tokens (B, columns), from a mask as models take it: 2-d, 4-d, or one a layer type."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 4:
        mask = _seen_by_itself(_allowed(mask), columns)
    real: Tensor = mask.bool()
    return real[:, :columns]


def _allowed(mask: Tensor) -> Tensor:
    """From a 4-d mask, which query sees which key (B, T, C)."""
    return mask[:, 0] >= 0 if mask.is_floating_point() else mask[:, 0].bool()


def _seen_by_itself(allowed: Tensor, columns: int | None) -> Tensor:
    """From (B, T, C), who may look at what: a real token at least at itself, a past one is seen by the last query."""
    columns = min(allowed.shape[2], columns or allowed.shape[2])
    own = allowed[:, :, :columns].diagonal(columns - allowed.shape[1], 1, 2)
    return torch.cat([allowed[:, -1, : columns - allowed.shape[1]], own], 1)


def positions_in(arguments: Mapping[str, Any]) -> Tensor | None:
    """Positions (B, T) of the tokens in their sequences, from a forward's arguments; None where they do not say."""
    given, starts, ids = (arguments.get(name) for name in ("position_ids", "cu_seq_lens_q", "input_ids"))
    if given is None and isinstance(starts, Tensor) and isinstance(ids, Tensor):
        columns = torch.arange(ids.shape[1], device=starts.device)
        return (columns - starts[torch.searchsorted(starts, columns, right=True) - 1]).unsqueeze(0)
    if isinstance(given, Tensor) and given.dim() == 3 and len(given) == 4:  # of text, time, height and width
        given = given[0]
    return given if isinstance(given, Tensor) and given.dim() == 2 else None


def packed_otherwise(mask: Any, position_ids: Tensor | None) -> str | None:
    """What to do where a mask and positions do not agree on the sequences that are packed into a row."""
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2 and position_ids is not None:
        real = mask[:, : position_ids.shape[1]].bool()
        if bool(((position_ids.diff(dim=1) <= 0) & real[:, 1:] & real[:, :-1]).any()):
            return (
                "position_ids start anew within a row, as for packed sequences, but attention_mask says that the row "
                "is one. Leave attention_mask out for packed rows, or position_ids for others."
            )
    if mask.dim() == 4 and mask.shape[2] == mask.shape[3]:
        allowed, real = _allowed(mask), _seen_by_itself(_allowed(mask), None)
        starts = real & ~allowed.tril(-1).any(2) & (real.cumsum(1) > 1)
        if position_ids is not None:
            starts = starts & (torch.nn.functional.pad(position_ids.diff(dim=1), (1, 0)) == 1)
        if bool(starts.any()):
            return (
                "attention_mask keeps several sequences in a row apart, but position_ids do not start anew with each, "
                "so each one's prompt is not known. Pass position_ids that do."
            )
    return None


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


def as_lengths(
    lengths: Any, rows: int | None = None, most: int | Tensor | None = None, remedy: str = ""
) -> Tensor | None:
    """`prompt_lengths` as a tensor (B,) of int64, since the arithmetic of smaller integers wraps around.

    Args:
        rows: how many there must be.
        most: the tokens that were given, or (B,) the real ones of each row.
        remedy: what else to do about more than those.

    Raises:
        ValueError: they are not one whole, non-negative number a row, or count more tokens than were given.
    """
    if lengths is None:
        return None
    counts: Tensor = torch.as_tensor(lengths)
    if counts.dim() != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
        raise ValueError(f"prompt_lengths={counts}: must be one whole number a row, the real tokens of its prompt.")
    counts = counts.long()
    if torch.compiler.is_compiling():  # a graph is of any number of rows, and would break here
        return counts
    if rows is not None and len(counts) != rows:
        raise ValueError(f"prompt_lengths: {len(counts)} given for a batch of {rows} rows; give one a row.")
    if not counts.is_cuda and bool((counts < 0).any()):
        raise ValueError(f"prompt_lengths={counts.tolist()}: must not be negative.")
    if most is not None and bool((counts > torch.as_tensor(most, device=counts.device)).any()):
        given = f"{most.tolist()} real tokens a row" if isinstance(most, Tensor) else f"{most} tokens"
        raise ValueError(f"prompt_lengths={counts.tolist()}: only {given} were given; padding is not counted.{remedy}")
    return counts


def first_supervised(labels: Tensor, real: Tensor | None) -> Tensor:
    """Real tokens (B,) before the first of them whose label is not -100; all of them where there is none."""
    supervised = labels != -100
    if real is None:
        return (supervised.cumsum(1) == 0).sum(1)
    real = real.to(labels.device)
    return ((supervised & real).cumsum(1).eq(0) & real).sum(1)


def has_several_turns(labels: Tensor, owner: Tensor | None, columns: Tensor | None) -> bool:
    """Whether a row, or a packed sequence in `columns` (S, T) of row `owner` (S,), is supervised in two stretches."""
    if owner is not None:
        labels = labels[owner.to(labels.device)]
    supervised = labels != -100
    if columns is not None:
        supervised = supervised & columns[:, -labels.shape[1] :].to(labels.device)  # which also cover what is kept
    starts = supervised & ~torch.nn.functional.pad(supervised, (1, -1))
    return bool((starts.sum(1) > 1).any())


def prompt_lengths_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a batch's labels say of where its prompts end, as the arguments by which a forward is told."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return {}
    if batch.get("decoder_input_ids") is not None:  # a start token and then the labels
        return {"decoder_prompt_lengths": first_supervised(labels, None) + 1}
    packed = find_packed(positions_in(batch)) if mask is None else None
    if packed is not None:
        return {"prompt_lengths": first_supervised(labels[packed[0]], packed[1])}
    return {"prompt_lengths": first_supervised(labels, as_real(mask, labels.shape[1]))}


def repeated(rows: Tensor, batch: int) -> Tensor:
    """Rows repeated in place, as beams and num_return_sequences repeat them, to the batch at hand."""
    if rows.shape[0] == batch:
        return rows
    times, rest = divmod(batch, rows.shape[0])
    if rest:
        raise ValueError(f"a mask, labels or prompt_lengths for {rows.shape[0]} rows met a batch of {batch}.")
    return rows.repeat_interleave(times, 0)
