"""Plans: which tokens of a chunk are edited, from lengths and positions alone.

Pure functions of whole numbers, for whoever runs chunks of many prompts at once: the server, continuous batching, vLLM.
`Positions.rows` says the same in tensors for a padded batch; the tests hold the two against each other.

    edited(parse_positions("f7+l7"), prompt=40, start=32, length=8)     # (1, 2, 3, 4, 5, 6, 7): offsets in the chunk
    plan([Span(entry=3, positions=..., prompt=40, start=32, length=8, offset=64)])
    block_keys(tokens, [Edited(digest, scale, positions)], prompt=40, block=16)
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.where.positions import Positions

Part = Literal["edit", "prefix", "suffix"]
"""The whole of an adapter whose prefix and suffix share one edit, or one of the two."""


class Span(NamedTuple):
    """A chunk of one sequence in a flat batch, and what edits it."""

    entry: int
    """Of the table of edits."""
    positions: Positions
    prompt: int
    """Tokens of the whole prompt, fixed when the request came: never the length of what is computed so far."""
    start: int
    """Tokens of the sequence before the chunk."""
    length: int
    offset: int
    """The row of the flat batch at which the chunk starts."""
    scale: float = 1.0
    part: Part = "edit"


class Group(NamedTuple):
    """Edited rows of a flat batch, a line an entry, K of them at most."""

    rows: Tensor
    """(G, K) of the batch; 0 where there is none."""
    valid: Tensor
    """(G, K) bool."""
    entry: Tensor
    """(G,) of the table."""
    scale: Tensor
    """(G,) float32."""


class Edited(NamedTuple):
    """An adapter as the key of a cached block knows it."""

    digest: bytes
    """Of everything that changes the edit, never its name."""
    scale: float
    positions: Positions
    parts: tuple[Part, ...] = ("edit",)
    """`prefix` and `suffix`, which edit apart: one token may be of either, in prompts of other lengths."""


@lru_cache(maxsize=65536)
def ordinals(positions: Positions, prompt: int, part: Part = "edit") -> tuple[int, ...]:
    """The edited tokens of a whole prompt of `prompt` tokens, for positions without a scope."""
    if positions.random:
        return tuple(sorted(sorted(range(prompt), key=lambda i: _mixed(i, prompt))[: positions.random]))
    first, last = positions.first, positions.last
    if prompt < first + last:
        first, last = min(first, prompt // 2), min(last, (prompt + 1) // 2)
    prefix, suffix = tuple(range(first)), tuple(range(prompt - last, prompt))
    return {"edit": prefix + suffix, "prefix": prefix, "suffix": suffix}[part]


def _mixed(ordinal: int, prompt: int) -> tuple[int, int]:
    """The hash that `randomN` orders tokens by, as `Positions` computes it."""
    mixed = ((ordinal + 1) * 2654435761 + prompt * 40503) & 0xFFFFFFFF
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 73244475) & 0xFFFFFFFF
    return mixed, ordinal


def edited(positions: Positions, prompt: int, start: int, length: int, part: Part = "edit") -> Sequence[int]:
    """The edited tokens of a chunk, as offsets in it.

    Args:
        prompt: tokens of the whole prompt.
        start: tokens of the sequence before the chunk.
        length: tokens of the chunk.
    """
    if positions.scope == "all":
        return range(length)
    over = min(max(prompt - start, 0), length)  # where the prompt ends in the chunk
    if positions.scope == "prompt":
        return range(over)
    if positions.scope == "generated":
        return range(over, length)
    if start >= prompt:
        return ()
    return tuple(i - start for i in ordinals(positions, prompt, part) if start <= i < start + length)


def plan(spans: Sequence[Span], device: torch.device | str = "cpu") -> list[Group]:
    """The edited rows of a flat batch, grouped so that one long line does not pad all the short ones.

    Lines whose K fall between the same powers of two share a group; spans that edit nothing are left out.
    """
    lines: dict[int, list[tuple[Span, list[int]]]] = {}
    for span in spans:
        rows = [span.offset + i for i in edited(*span[1:5], span.part)]
        if rows:
            lines.setdefault((len(rows) - 1).bit_length(), []).append((span, rows))
    groups = []
    for held in lines.values():
        most = max(len(rows) for _, rows in held)
        groups.append(
            Group(
                torch.tensor([rows + [0] * (most - len(rows)) for _, rows in held], device=device),
                torch.tensor([[i < len(rows) for i in range(most)] for _, rows in held], device=device),
                torch.tensor([span.entry for span, _ in held], device=device),
                torch.tensor([span.scale for span, _ in held], device=device),
            )
        )
    return groups


def edits_within(
    edits: Iterable[Edited], prompt: int, start: int, length: int
) -> Iterator[tuple[Edited, Part, Sequence[int]]]:
    """The edits that touch a chunk, part by part with the offsets in it: all that its key must say beside tokens."""
    for edit in edits:
        for part in edit.parts:
            offsets = edited(edit.positions, prompt, start, length, part)
            if offsets and edit.scale:
                yield edit, part, offsets


def block_keys(
    tokens: Sequence[int], edits: Sequence[Edited], prompt: int, block: int, salt: bytes = b""
) -> Iterator[bytes]:
    """Keys of the whole blocks of a sequence, such that equal keys mean equal keys and values in every layer.

    In a causal model they are a function of the weights, the tokens so far and the edits at those, and of nothing else;
    so a block without an edited token adds only its tokens, and is shared by all adapters and the base model until
    the first edited one.

    Args:
        edits: the adapters of the request, in their order.
        prompt: tokens of the whole prompt.
        block: tokens of a block.
        salt: what tells tenants apart.
    """
    key = hashlib.sha256(b"trimtab" + salt).digest()
    for start in range(0, len(tokens) - block + 1, block):
        own = hashlib.sha256(key)
        own.update(struct.pack(f"<{block}q", *tokens[start : start + block]))
        for edit, part, offsets in edits_within(edits, prompt, start, block):
            own.update(struct.pack("<Id6s", len(edit.digest), edit.scale, part.encode()) + edit.digest)
            own.update(struct.pack(f"<I{len(offsets)}I", len(offsets), *offsets))
        key = own.digest()
        yield key
