"""Rows of running requests: where they stand in the cache, what of their prompts is kept, and their forwards.

runner = Runner(ServedModel(model), table, limits)
runner.check()
runner.arrange(rows); logits = runner.forward(rows, [1] * len(rows))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.serve.cache import PrefixStore, RowCache
from trimtab.serve.engine import Applied, BadRequest, Emit, Logprob, Request, Sampling
from trimtab.serve.model import NotServed, ServedModel
from trimtab.serve.registry import Adapter
from trimtab.serve.sampling import Sampler
from trimtab.serve.table import AdapterTable, Key
from trimtab.serve.text import AnswerText
from trimtab.where.plan import Edited, Span, block_keys
from trimtab.where.positions import parse_positions

_CHECK = b"check"
"""The digest of the start check's adapter."""


@dataclass(frozen=True)
class Limits:
    """Sizes of the engine, fixed at its start."""

    slots: int = 32
    """Requests that run at a time."""
    max_len: int = 4096
    """Tokens of a prompt and its answer together; the model's own limit where that is lower."""
    chunk: int = 512
    """Prompt tokens, padding included, of one forward."""
    block: int = 16
    """Tokens of a block of the prefix store."""
    prefix_bytes: int = 1 << 30
    """Of the prefix store; 0 for none."""
    max_queue: int = 1024
    queue_seconds: float = 60.0
    """That a request may wait for its row."""

    def full(self, requests: int) -> bool:
        """Whether so many, running or waiting, are all that may be; rows are given to those that wait by steps."""
        return requests >= self.slots + self.max_queue


class Row:
    """A request that runs."""

    def __init__(self, request: Request, emit: Emit, entries: dict[Key, int], tokenizer: Any) -> None:
        self.request, self.emit, self.entries = request, emit, entries
        self.tokens = list(request.tokens)
        self.prompt = len(self.tokens)
        self.prompt_end = self.prompt if request.prompt_end is None else request.prompt_end
        self.done = self.cached = self.index = 0
        """Tokens whose keys and values are there · those of them from the prefix store · the row of the cache."""
        self.stored = 0
        """Blocks that the prefix store was given or gave."""
        self.edits = [
            Edited(one.adapter.digest, one.scale, one.adapter.positions, tuple(one.adapter.parts))
            for one in request.adapters
        ]
        self.sampler = Sampler(request.sampling, request.tokens, request.form)
        self.text = AnswerText(tokenizer, request.sampling.stop)
        self.keys: list[bytes] = []
        self.scores: list[Logprob | None] = [None]
        """Of the prompt's tokens, where asked for."""
        self.moves: list[float] = []
        """The same."""

    @property
    def prefilling(self) -> bool:
        return self.done < self.prompt

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def scores_prompt(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None

    def block_keys(self, end: int, block: int) -> list[bytes]:
        return list(block_keys(self.tokens[:end], self.edits, self.prompt_end, block, self.request.salt))

    def spans(self, start: int, length: int, offset: int) -> Iterator[list[Span]]:
        """What edits a chunk of the row: a list for each of its adapters."""
        for applied in self.request.adapters:
            adapter, scale = applied.adapter, float(applied.scale)
            where = (adapter.positions, self.prompt_end, start, length, offset, scale)
            yield [Span(self.entries[adapter.digest, p], *where, p) for p in (adapter.parts if scale else ())]


class Runner:
    """A model, its table of edits, and the keys and values of the rows that run on it."""

    def __init__(self, model: ServedModel, table: AdapterTable, limits: Limits) -> None:
        self.model, self.table, self.limits = model, table, limits
        self.store = PrefixStore(limits.prefix_bytes)
        self.cached_tokens = 0
        self.reset()

    def reset(self) -> None:
        """Forget all keys and values."""
        self.cache = RowCache(self.model.shapes, self.limits.slots, self.model.dtype, self.model.device)
        self.store.clear()

    def forward(self, rows: Sequence[Row], lengths: Sequence[int], everything: bool = False) -> Tensor:
        """Logits of the next tokens of rows that stand side by side: (B, V) of the last ones, or (B, Q, V).

        Rows are aligned on the right. What pads a row on the left writes behind the row's end, where it is written over
        before it is read.
        """
        queries = max(lengths)
        ids, place, positions = [], [], []
        stages: list[list[Span]] = [[] for _ in range(max(len(row.edits) for row in rows))]
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            end, pad = row.done + length, queries - length
            ids.append([0] * pad + row.tokens[row.done : end])
            place.append([*range(end, end + pad), *range(row.done, end)])
            positions.append([0] * pad + place[-1][pad:])
            for stage, spans in zip(stages, row.spans(row.done, length, b * queries + pad), strict=False):
                stage += spans
        self.cache.ensure(max(max(own) for own in place) + 1)
        width = max(row.done + length for row, length in zip(rows, lengths, strict=True))
        inputs, columns, told = torch.tensor([ids, place, positions], device=self.model.device)
        self.cache.show(range(rows[0].index, rows[0].index + len(rows)), columns, width)
        asked = [row.prefilling and row.request.moves for row in rows]
        moves = torch.zeros(len(rows) * queries, device=self.model.device) if any(asked) else None
        with self.table.editing(stages, moves):
            logits = self.model(inputs, columns, told, width, self.cache, everything)
        if moves is not None:
            for row, length, own, is_asked in zip(rows, lengths, moves.view(len(rows), -1), asked, strict=True):
                if is_asked:
                    row.moves += own[queries - length :].tolist()
        return logits

    def arrange(self, rows: Sequence[Row], *segments: Sequence[Row]) -> None:
        """Give the rows of the segments the indices from 0 on, a segment after another, moving as few as can be."""
        before = {row: row.index for row in rows}
        start = 0
        others = set(rows)
        for segment in segments:
            _place(segment, range(start, start := start + len(segment)))
            others.difference_update(segment)
        held = {row.index for row in others if row.index >= start}
        free = (i for i in range(start, self.limits.slots) if i not in held)
        for row in others:
            if row.index < start:
                row.index = next(free)
        moved = [row for row, index in before.items() if row.index != index and row.done]
        if moved:
            indices = [row.index for row in moved]
            self.cache.move([before[row] for row in moved], indices, max(row.done for row in moved))

    def shares(self, row: Row) -> bool:
        return bool(self.limits.prefix_bytes) and not row.scores_prompt and not row.request.moves

    def take_blocks(self, row: Row) -> None:
        """Go on from what the store has; the prompt's last token is always run, for its logits."""
        block = self.limits.block
        start = end = row.done // block
        while self.shares(row) and (end + 1) * block < row.prompt and row.keys[end] in self.store:
            end += 1
        if end * block > row.done:
            self.cache.ensure(end * block)
            self.cache.write(row.index, start * block, [self.store.get(key) for key in row.keys[start:end]])
            row.cached += end * block - row.done
            self.cached_tokens += end * block - row.done
            row.done, row.stored = end * block, end

    def keep_blocks(self, row: Row, keys: Sequence[bytes]) -> None:
        block, whole = self.limits.block, min(row.done // self.limits.block, len(keys))
        for i in range(row.stored, whole):
            if keys[i] not in self.store:
                self.store.put(keys[i], self.cache.read(row.index, i * block, (i + 1) * block))
        row.stored = max(row.stored, whole)

    # ---- the check at the start --------------------------------------------------------------------------------

    @torch.inference_mode()
    def check(self) -> None:
        """Plain and edited prompts in padded chunks and then by tokens, against one forward without a cache each.

        Raises:
            NotServed: the logits differ by more than rounding.
        """
        rows = self._check_rows(min(40, self.limits.max_len, self.model.max_len or 40))
        self.cache = RowCache(self.model.shapes, len(rows), self.model.dtype, self.model.device)
        try:
            apart = max(self._apart(rows))
        except Exception as error:
            raise NotServed(
                f"{self.model.name}: cannot be run in rows of a shared cache ({type(error).__name__}: {error})."
            ) from error
        finally:
            for row in rows:
                self.table.release(row.entries)
            self.reset()
        allowed = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        if not apart <= allowed:
            raise NotServed(
                f"{self.model.name}: in rows of a shared cache its logits differ from its own by {apart:.2g} of the "
                f"largest; {allowed:g} would be rounding. Slots cannot serve it."
            )

    def _check_rows(self, length: int) -> list[Row]:
        random = torch.Generator().manual_seed(0)
        vector = torch.randn(self.table.layout.size, generator=random) * 0.05
        for place in self.table.layout.places.values():
            place.of(vector.unsqueeze(0)).code.zero_()
        rows = []
        for i, text in enumerate(("", "f3+l3", "all")):
            adapter = Adapter("", _CHECK, parse_positions(text or "all"), {"edit": vector})
            tokens = torch.randint(self.model.vocabulary, (length - length // 4 * i,), generator=random).tolist()
            request = Request(str(i), tokens[: len(tokens) // 2], Sampling(), (Applied(adapter),) if text else ())
            entries = self.table.acquire(wanted(request))
            assert entries is not None
            row = Row(request, lambda event: None, entries, None)
            row.tokens, row.index = tokens, i
            rows.append(row)
        return rows

    def _apart(self, rows: list[Row]) -> Iterator[float]:
        """Differences of logits, as shares of the largest logit."""
        truth = []
        for row in rows:
            with self.table.editing(list(row.spans(0, len(row.tokens), 0))):
                truth.append(self.model.alone(row.tokens))
        shortest = min(len(row.tokens) - row.prompt for row in rows)
        halves = [row.prompt // 2 for row in rows]
        rests = [row.prompt - half for row, half in zip(rows, halves, strict=True)]
        for lengths in (halves, rests, *[[1] * len(rows)] * shortest):
            logits = self.forward(rows, lengths)
            for row, length, own, whole in zip(rows, lengths, logits, truth, strict=True):
                row.done += length
                yield float((own - whole[row.done - 1]).abs().max() / whole.abs().max())


def wanted(request: Request) -> dict[Key, Tensor]:
    """The entries that a request needs in the table."""
    return {
        (applied.adapter.digest, part): vector
        for applied in request.adapters
        for part, vector in applied.adapter.parts.items()
    }


def check_request(request: Request, room: int, vocabulary: int, entries: int, least: int = 0) -> None:
    """Raises BadRequest for what can never run.

    Args:
        room: tokens of a prompt and its answer.
        entries: of the table.
        least: tokens that are answered whatever is asked for.
    """
    sampling, length = request.sampling, len(request.tokens)
    if not length:
        raise BadRequest("prompt", "prompt: holds no token.")
    if length + max(least, sampling.max_tokens) > room:
        raise BadRequest(
            "max_tokens",
            f"the prompt's {length} tokens and max_tokens={sampling.max_tokens} are more than the {room} that this "
            "server runs; shorten one of them.",
        )
    for name, ids in (("prompt", request.tokens), ("logit_bias", sampling.logit_bias)):
        if any(not 0 <= token < vocabulary for token in ids):
            raise BadRequest(name, f"{name}: holds a token id outside 0 to {vocabulary - 1}.")
    if (needed := len(wanted(request))) > entries:
        raise BadRequest("model", f"needs {needed} entries of a table of {entries}.")


def _place(rows: Sequence[Row], room: range) -> None:
    """Give rows the indices of `room`; those that are in it stay."""
    held = {row.index for row in rows if row.index in room}
    free = (i for i in room if i not in held)
    for row in rows:
        if row.index not in room:
            row.index = next(free)
