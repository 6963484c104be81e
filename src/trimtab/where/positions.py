"""Positions: which tokens of a row are edited (paper, section 4.1).

A string is parsed once into an immutable `Positions`; `Positions.rows` answers, in tensor code without a loop over rows
or tokens, for a whole batch, a cached step, or a chunk of a longer prompt. Tokens are counted among a row's real
tokens: padding, on either side or in the middle, is neither counted nor edited.

    f7+l7      the first 7 and the last 7 tokens of the prompt
    f3, l1     the first 3 · the last one
    prompt     all of the prompt
    generated  all that follows it
    all        every real token
    random14   14 prompt tokens drawn by the prompt's length alone, the same in training and generation: a control
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scope = Literal["prompt", "generated", "all"]
Turns = Literal["each", "first"]
"""What the prompt is in a conversation: of each answer all that comes before it, or only what comes before the first
answer, all that follows being answers."""
GRAMMAR = "fN (first N prompt tokens), lN (last N), fN+lM, randomN (a control), 'prompt', 'generated' or 'all'"
_PART = re.compile(r"([fl])([0-9]+)")
MOST = 100_000
"""Tokens that one part of a position may name: more than any context holds, few enough for a tensor of them."""


class Rows(NamedTuple):
    """Edited tokens of a chunk, at most K a row; where `valid` is False there is no token and `columns` is 0."""

    columns: Tensor
    """(B, K) of the chunk."""
    valid: Tensor
    """(B, K) bool."""


@dataclass(frozen=True)
class Positions:
    """Parsed positions: the first and last so many prompt tokens, or else a scope."""

    text: str
    first: int = 0
    last: int = 0
    scope: Scope | None = None
    random: int = 0
    turns: Turns = "each"

    @property
    def needs_prompt_end(self) -> bool:
        """Whether the edited tokens depend on where the prompt ends, whatever its length."""
        return self.last > 0 or self.random > 0 or self.scope in ("prompt", "generated")

    @property
    def enough(self) -> int:
        """Of a prefix alone, the tokens that make a prompt's end not matter: half of a shorter one is edited."""
        return self.first if self.first > 1 and not self.needs_prompt_end else 0

    @property
    def words(self) -> str:
        """The tokens meant, as one would say it: 'the first 7 tokens and the last 7 tokens of the prompt'."""
        scopes = {"prompt": "every token of the prompt", "generated": "every token after the prompt"}
        if self.scope is not None:
            return scopes.get(self.scope, "every token")
        if self.random:
            return f"{self.random} tokens of the prompt, drawn at random"
        ends = [
            f"the {end} {count} tokens" if count > 1 else f"the {end} token"
            for end, count in (("first", self.first), ("last", self.last))
            if count
        ]
        return f"{' and '.join(ends)} of the prompt"

    def slots(self, prompt_length: Tensor) -> tuple[Tensor, Tensor]:
        """The edited tokens of whole prompts, prefix slots before suffix slots.

        For a prompt of n < first + last tokens p = min(first, ⌊n/2⌋) and s = min(last, ⌈n/2⌉), so that no token is
        edited twice.

        Args:
            prompt_length: (B,) real tokens of each prompt.
        Returns:
            Ordinals (B, first + last) among the row's real tokens, and whether each is to be edited.
        """
        n = prompt_length.unsqueeze(1)
        if self.random:
            return self._random_slots(n)
        short = n < self.first + self.last
        p = torch.where(short, (n // 2).clamp(max=self.first), self.first)
        s = torch.where(short, ((n + 1) // 2).clamp(max=self.last), self.last)
        prefix = torch.arange(self.first, device=n.device).expand(n.shape[0], -1)
        suffix = n - self.last + torch.arange(self.last, device=n.device)
        return torch.cat([prefix, suffix], 1), torch.cat([prefix < p, suffix >= n - s], 1)

    def _random_slots(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens with the smallest hashes of (ordinal, prompt length); all of a prompt with no more than N."""
        longest = max(int(n.max()), self.random)
        ordinals = torch.arange(longest, device=n.device).expand(n.shape[0], -1)
        mixed = ((ordinals + 1) * 2654435761 + n * 40503) & 0xFFFFFFFF
        for _ in range(2):  # spreads each bit over the whole (the finalizer of MurmurHash, on 32 bits)
            mixed = ((mixed ^ (mixed >> 16)) * 73244475) & 0xFFFFFFFF
        mixed = torch.where(ordinals < n, mixed, 2**33 + ordinals)
        slots = mixed.topk(self.random, dim=1, largest=False).indices.sort(dim=1).values
        return slots, slots < n

    def rows(self, prompt_length: Tensor, length: int, start: Tensor | int = 0, real: Tensor | None = None) -> Rows:
        """The edited tokens of a chunk of `length` columns.

        Args:
            prompt_length: (B,) real tokens of each row's prompt.
            length: columns of the chunk.
            start: tokens of the row that came before the chunk; (B,) where they differ (no padding then).
            real: (B, start + length) bool, False at padding, over the past and the chunk; None for none.
        """
        start = torch.as_tensor(start, device=prompt_length.device).expand_as(prompt_length).unsqueeze(1)
        if self.scope:
            return self._scope_rows(prompt_length, length, start, real)
        ordinals, valid = self.slots(prompt_length)
        if real is not None:  # the column of the k-th real token: the first whose running count reaches k + 1
            ordinals = torch.searchsorted(real.long().cumsum(1), (ordinals + 1).contiguous())
        index = ordinals - start
        valid = valid & (index >= 0) & (index < length)
        return Rows(torch.where(valid, index, 0), valid)

    def _scope_rows(self, prompt_length: Tensor, length: int, start: Tensor, real: Tensor | None) -> Rows:
        index = torch.arange(length, device=prompt_length.device).expand(prompt_length.shape[0], -1)
        ordinals = start + index if real is None else real.long().cumsum(1)[:, -length:] - 1
        valid = torch.ones_like(index, dtype=torch.bool) if real is None else real[:, -length:].clone()
        n = prompt_length.unsqueeze(1)
        if self.scope == "prompt":
            valid &= ordinals < n
        elif self.scope == "generated":
            valid &= ordinals >= n
        return Rows(torch.where(valid, index, 0), valid)


def parse_positions(text: str) -> Positions:
    """Parse `f7+l7` and its like.

    Raises:
        ValueError: saying what is wrong with the string and what is allowed.
    """
    if not isinstance(text, str):
        raise ValueError(f"positions={text!r}: must be a string, one of {GRAMMAR}.")
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Positions:
    if text in get_args(Scope):
        return Positions(text, scope=text)  # type: ignore[arg-type]
    if match := re.fullmatch(r"random([1-9][0-9]*)", text):
        _check_count(text, match[1])
        return Positions(text, random=int(match[1]))
    counts: dict[str, int] = {}
    for part in text.split("+"):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"positions={text!r}: {part!r} is not a position. Allowed: {GRAMMAR}.")
        _check_count(text, match[2])
        side, count = match[1], int(match[2])
        if side in counts:
            raise ValueError(f"positions={text!r}: {side!r} is given twice. Allowed: {GRAMMAR}.")
        if side == "f" and "l" in counts:
            raise ValueError(f"positions={text!r}: write the prefix first, as in 'f{count}+l{counts['l']}'.")
        if count == 0:
            raise ValueError(f"positions={text!r}: {part!r} edits nothing; leave it out or give at least 1.")
        counts[side] = count
    return Positions(text, first=counts.get("f", 0), last=counts.get("l", 0))


def _check_count(text: str, digits: str) -> None:
    if len(digits) > len(str(MOST)) or int(digits) > MOST:
        raise ValueError(f"positions={text[:60]!r}: at most {MOST:,} tokens can be named; for all of them write 'all'.")
