"""What a request carries to vLLM's processes in `SamplingParams.extra_args`, where only the front end writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from trimtab.serve.engine import Request
from trimtab.serve.table import Key
from trimtab.where.plan import Edited, Part, Span
from trimtab.where.positions import parse_positions

NAME = "trimtab"
"""Of the field, in `extra_args` as in vLLM's `additional_config`."""


class Carried(NamedTuple):
    """The edits of a request."""

    prompt: int
    """Tokens that positions are counted in."""
    edits: tuple[Edited, ...]
    entries: tuple[tuple[tuple[int, Part], ...], ...]
    """For each edit the entries of the table, and which part of the adapter each is."""

    def spans(self, start: int, length: int, offset: int) -> Iterator[list[Span]]:
        """What edits a chunk of the request: a list for each of its adapters."""
        for edit, entries in zip(self.edits, self.entries, strict=True):
            where = (edit.positions, self.prompt, start, length, offset, edit.scale)
            yield [Span(entry, *where, part) for entry, part in (entries if edit.scale else ())]


def written(request: Request, entries: Mapping[Key, int]) -> dict[str, Any]:
    """The edits of a request as `extra_args`, of what msgpack and JSON both keep."""
    edits = [
        {
            "digest": adapter.digest.hex(),
            "scale": float(scale),
            "positions": adapter.positions.text,
            "entries": [[entries[adapter.digest, part], part] for part in adapter.parts],
        }
        for adapter, scale in ((one.adapter, one.scale) for one in request.adapters)
    ]
    prompt = len(request.tokens) if request.prompt_end is None else request.prompt_end
    return {NAME: {"prompt": prompt, "edits": edits}} if edits else {}


def read(extra_args: Mapping[str, Any] | None) -> Carried | None:
    """What `written` wrote; None on a request of the base model."""
    held = (extra_args or {}).get(NAME)
    if held is None:
        return None
    edits: Sequence[Mapping[str, Any]] = held["edits"]
    entries = tuple(tuple((entry, cast(Part, part)) for entry, part in e["entries"]) for e in edits)
    return Carried(
        held["prompt"],
        tuple(
            Edited(
                bytes.fromhex(e["digest"]), e["scale"], parse_positions(e["positions"]), tuple(part for _, part in own)
            )
            for e, own in zip(edits, entries, strict=True)
        ),
        entries,
    )
