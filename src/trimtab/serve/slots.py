"""The embedded engine: rows of a key-value cache, one forward a step over those that decode.

A step admits what waits, runs one chunk of prompts, then one token of every row that is past its prompt. Rows that run
stand side by side in the cache, so that a forward reads a slice of it. An admitted request has its row and its adapters
until it ends: nothing is preempted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from trimtab.serve.engine import (
    BadRequest,
    Emit,
    EngineError,
    Event,
    FinishReason,
    Health,
    Logprob,
    QueueFull,
    QueueTimeout,
    Request,
    Stats,
    StepFailed,
    Unavailable,
)
from trimtab.serve.grammar import Form, Grammars
from trimtab.serve.model import ServedModel
from trimtab.serve.rows import Limits as Limits
from trimtab.serve.rows import Row, Runner, check_request, wanted
from trimtab.serve.sampling import choose, logprobs
from trimtab.serve.table import AdapterTable

_LOG = logging.getLogger(__name__)
_FAILURES = 3
"""Steps that may fail in a row before the engine gives up."""


class SlotsEngine:
    """The engine for one model in this process; an `Engine`.

    Args:
        model: a causal language model of transformers, without PEFT around it. While the engine is open nobody else may
            run it.
        table: whose hooks are on the model.
        tokenizer: for the text of answers and stop strings; None gives tokens alone.
        limits: sizes.

    Raises:
        NotServed: its cache is not one of keys and values.
    """

    tells_moves = True

    def __init__(self, model: Any, table: AdapterTable, tokenizer: Any = None, limits: Limits | None = None) -> None:
        self.limits, self.table, self._tokenizer = limits or Limits(), table, tokenizer
        try:
            self._model = ServedModel(model)
        except BaseException:
            table.close()
            raise
        self._ends = end_tokens(model, tokenizer)
        self._grammars = Grammars(tokenizer, self._model.vocabulary, self._ends)
        self._runner = Runner(self._model, table, self.limits)
        self._rows: list[Row] = []
        self._waiting: deque[tuple[Request, Emit, float]] = deque()
        self._ids: set[str] = set()
        self._cancelled: set[str] = set()
        self._wake = threading.Condition()
        self._paused, self._stepping, self._stopped, self._failures = 0, False, False, 0
        self._health: Health = "starting"
        self._thread: threading.Thread | None = None
        self._stats = Stats()

    # ---- for any thread ----------------------------------------------------------------------------------------

    @property
    def health(self) -> Health:
        return self._health

    @property
    def max_len(self) -> int:
        return min(self.limits.max_len, self._model.max_len or self.limits.max_len)

    def start(self) -> None:
        """Check the model against its own forward, then run steps in a thread of the engine's.

        Raises:
            NotServed: it differs.
        """
        try:
            self.check()
        except BaseException:
            self.close()
            raise
        self._health = "ready"
        self._thread = threading.Thread(target=self._run, name="trimtab-engine", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises NotServed where the model, in rows of a shared cache, differs from itself alone."""
        self._runner.check()

    def submit(self, request: Request, emit: Emit) -> None:
        check_request(request, self.max_len, self._model.vocabulary, len(self.table))
        with self._wake:
            if self._health in ("draining", "dead"):
                raise Unavailable(f"the engine is {self._health} and takes no requests.")
            if request.id in self._ids:
                raise BadRequest("id", f"id={request.id!r}: a request of this id is running.")
            if self.limits.full(len(self._ids)):
                raise QueueFull(f"{len(self._ids)} requests run or wait, as many as may; try again later.")
            self._ids.add(request.id)
            self._waiting.append((request, emit, time.monotonic()))
            self._wake.notify_all()

    def form(self, grammar: str, field: str) -> Form:
        return self._grammars.form(grammar, field)

    def cancel(self, id: str) -> None:
        with self._wake:
            if id in self._ids:
                self._cancelled.add(id)
                self._wake.notify_all()

    @contextmanager
    def pause(self) -> Iterator[None]:
        with self._wake:
            self._paused += 1
            self._wake.wait_for(lambda: not self._stepping)
        try:
            yield
        finally:
            with self._wake:
                self._paused -= 1
                self._wake.notify_all()

    def stats(self) -> Stats:
        table, own = self.table, self._stats
        with self._wake:
            return replace(
                own,
                waiting=len(self._waiting),
                running=len(self._rows),
                resident_adapters=table.resident,
                pinned_adapters=table.pinned,
                prefix_bytes=self._runner.store.nbytes,
                cached_tokens=self._runner.cached_tokens,
                edited_rows=table.edited_rows,
                table_hits=table.hits,
                table_misses=table.misses,
                table_evictions=table.evictions,
            )

    def close(self, grace: float = 0.0) -> None:
        with self._wake:
            if self._health != "dead":
                self._health = "draining"
            self._wake.wait_for(lambda: self._stopped or not self._ids, grace)
            self._stopped = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._abort_all("abort", None)
        self._health = "dead"
        self.table.close()
        self._model.close()

    # ---- the engine's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                if self._stopped:
                    return
                self._stepping = True
            try:
                self.step()
            finally:
                with self._wake:
                    self._stepping = False
                    self._wake.notify_all()

    def _has_work(self) -> bool:
        return self._stopped or (not self._paused and bool(self._ids))

    @torch.inference_mode()
    def step(self) -> None:
        """End what is to end, admit, run a chunk of prompts, run a token of each row."""
        started = time.monotonic()
        try:
            self._sweep()
            self._admit()
            self._prefill()
            self._decode()
            self._failures = 0
        except Exception as error:
            self._fail(error)
        self._stats.steps += 1
        self._stats.step_seconds += time.monotonic() - started

    def _sweep(self) -> None:
        """Cancelled requests, and those that waited too long."""
        now = time.monotonic()
        with self._wake:
            cancelled, self._cancelled = self._cancelled, set()
            late = [w for w in self._waiting if w[0].id in cancelled or now - w[2] > self.limits.queue_seconds]
            for waiting in late:
                self._waiting.remove(waiting)
        for request, emit, _ in late:
            if request.id in cancelled:
                self._end(request, emit, Event(finish_reason="abort", prompt_tokens=len(request.tokens)))
            else:
                error = QueueTimeout(f"waited {self.limits.queue_seconds:g} s for a free row; try again later.")
                self._end(request, emit, Event(finish_reason="error", error=error))
        for row in [row for row in self._rows if row.request.id in cancelled]:
            self._finish(row, "abort")

    def _admit(self) -> None:
        """Rows for those that wait, in their order; one whose adapters find no room lets others pass."""
        with self._wake:
            first = list(islice(self._waiting, 2 * self.limits.slots))
        for item in first:
            if len(self._rows) == self.limits.slots:
                break
            request, emit, _ = item
            entries = self.table.acquire(wanted(request))
            if entries is None:
                continue
            row = Row(request, emit, entries, self._tokenizer)
            row.index = min(set(range(self.limits.slots)) - {other.index for other in self._rows})
            if self.limits.prefix_bytes:
                row.keys = row.block_keys(row.prompt, self.limits.block)
            with self._wake:
                self._waiting.remove(item)
            self._rows.append(row)

    # ---- forwards ----------------------------------------------------------------------------------------------

    def _prefill(self) -> None:
        """One chunk of the prompts, of as many rows as fit."""
        batch = self._next_prompts()
        if not batch:
            return
        self._runner.arrange(self._rows, [row for row in self._rows if not row.prefilling], list(batch))
        rows = sorted(batch, key=lambda row: row.index)
        scores = any(row.scores_prompt for row in rows)
        logits = self._runner.forward(rows, [batch[row] for row in rows], scores)
        last = logits[:, -1] if scores else logits
        self._stats.prompt_tokens += sum(batch.values())
        for i, row in enumerate(rows):
            if row.scores_prompt:
                self._score(row, logits[i, -batch[row] :])
            row.done += batch[row]
        whole = self._without_broken(rows, last)
        for row in whole:
            self._runner.keep_blocks(row, row.keys)
        ready = [row for row in whole if not row.prefilling]
        if ready:
            self._advance(ready, last[[rows.index(row) for row in ready]])

    def _next_prompts(self) -> dict[Row, int]:
        """Rows whose prompts run next, and how many tokens of each: together, padding included, at most a chunk.

        The first that came, and with it those whose rests are the most like its own in length, so that little is
        padded. One whose next block another of them is about to compute waits for it.
        """
        batch: dict[Row, int] = {}
        coming: set[bytes] = set()
        chunk, block = self.limits.chunk, self.limits.block
        rows = [row for row in self._rows if row.prefilling]
        for row in rows:
            self._runner.take_blocks(row)
        rest = {row: row.prompt - row.done for row in rows}
        for row in sorted(rows, key=lambda row: abs(rest[row] - rest[rows[0]])):
            at, length = row.done // block, min(row.prompt - row.done, chunk)
            if self._runner.shares(row) and at < len(row.keys) and row.keys[at] in coming:
                continue
            if batch and (len(batch) + 1) * max(length, *batch.values()) > chunk:
                break
            batch[row] = length
            coming.update(row.keys[at : (row.done + length) // block])
        return batch

    def _decode(self) -> None:
        """One token of every row that is past its prompt."""
        rows = [row for row in self._rows if not row.prefilling]
        if not rows:
            return
        self._runner.arrange(self._rows, rows)
        rows.sort(key=lambda row: row.index)
        logits = self._runner.forward(rows, [1] * len(rows))
        for row in rows:
            row.done += 1
        whole = self._without_broken(rows, logits)
        if whole:
            self._advance(whole, logits if whole == rows else logits[[rows.index(row) for row in whole]])

    # ---- answers -----------------------------------------------------------------------------------------------

    def _without_broken(self, rows: Sequence[Row], logits: Tensor) -> list[Row]:
        """The rows whose logits (B, V) are numbers; the others end with an error, and leave no NaN in the cache."""
        broken = logits.amax(-1).isnan().tolist()
        for row, bad in zip(rows, broken, strict=True):
            if bad:
                self._runner.cache.clear(row.index)
                self._finish(row, "error", StepFailed("the model gave NaN: a diverged adapter, or too large a scale."))
        return [row for row, bad in zip(rows, broken, strict=True) if not bad]

    def _score(self, row: Row, logits: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow those that gave logits (n, V)."""
        following = row.tokens[row.done + 1 : row.prompt][: len(logits)]
        if following:
            row.scores += logprobs(logits[: len(following)], following, row.request.sampling.prompt_logprobs or 0)

    def _advance(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Choose the next token of each row from logits (B, V), and say so."""
        try:
            tokens = choose(logits, [row.sampler for row in rows])
        except Exception as error:  # one row's own settings: its neighbours go on
            if len(rows) == 1:
                _LOG.exception("choosing a token failed")
                said = f"the next token could not be chosen: {type(error).__name__}: {error}"
                self._finish(rows[0], "error", StepFailed(said))
            else:
                for i, row in enumerate(rows):
                    self._advance([row], logits[i : i + 1])
            return
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if row.request.form is not None and (failed := row.request.form.failed):
                self._finish(row, "error", StepFailed(f"the answer could not be kept to its form: {failed}"))
                continue
            top = row.request.sampling.logprobs
            scores = logprobs(logits[i : i + 1], [token], top) if top is not None else ()
            self._take(row, token, scores)

    def _take(self, row: Row, token: int, scores: tuple[Logprob, ...]) -> None:
        sampling, first = row.request.sampling, row.generated == 0
        prompt_scores = tuple(row.scores) if first and row.scores_prompt else ()
        moves = tuple(row.moves) if first else ()
        if sampling.max_tokens == 0:
            self._finish(row, "length", prompt_logprobs=prompt_scores, prompt_moves=moves)
            return
        row.tokens.append(token)
        self._stats.generated_tokens += 1
        stop: str | int | None = None
        if token in sampling.stop_token_ids or (token in self._ends and not sampling.ignore_eos):
            text, stop = "", token
        else:
            text, stop = row.text.add(token)
        news: dict[str, Any] = {"tokens": (token,), "logprobs": scores, "text": text}
        news |= {"prompt_logprobs": prompt_scores, "prompt_moves": moves}
        if stop is not None or row.generated == sampling.max_tokens:
            self._finish(row, "length" if stop is None else "stop", stop=stop, **news)
        else:
            self._say(row, Event(**news, **_counts(row)))

    def _finish(self, row: Row, reason: FinishReason, error: EngineError | None = None, **news: Any) -> None:
        """End a row: its place, its adapters and its id are free, and its last event is said."""
        if reason in ("stop", "length") and self.limits.prefix_bytes:
            self._runner.keep_blocks(row, row.block_keys(row.done, self.limits.block))
        if error is None:
            news["text"] = news.get("text", "") + row.text.end()
        self._rows.remove(row)
        self.table.release(row.entries)
        self._end(row.request, row.emit, Event(finish_reason=reason, error=error, **news, **_counts(row)))

    def _say(self, row: Row, event: Event) -> None:
        try:
            row.emit(event)
        except Exception:
            _LOG.exception("request %s: its receiver raised; the request is cancelled", row.request.id)
            self.cancel(row.request.id)

    def _end(self, request: Request, emit: Emit, event: Event) -> None:
        with self._wake:
            self._ids.discard(request.id)
            self._cancelled.discard(request.id)
            self._wake.notify_all()
        try:
            emit(event)
        except Exception:
            _LOG.exception("request %s: its receiver raised at its last event", request.id)

    # ---- faults ------------------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        """A step raised: its requests end, and the cache is made anew; after several in a row the engine is dead."""
        _LOG.error("a step of the engine failed", exc_info=error)
        self._failures += 1
        self._stats.failed_steps += 1
        self._stats.last_error = f"{type(error).__name__}: {error}"
        failed = StepFailed(f"the model raised {self._stats.last_error}")
        for row in list(self._rows):
            self._finish(row, "error", failed)
        self._runner.reset()
        if self._failures >= _FAILURES:
            self._health = "dead"
            self._abort_all("error", Unavailable(f"the engine gave up: {self._stats.last_error}"))

    def _abort_all(self, reason: FinishReason, error: EngineError | None) -> None:
        for row in list(self._rows):
            self._finish(row, reason, error)
        with self._wake:
            waiting = list(self._waiting)
            self._waiting.clear()
        for request, emit, _ in waiting:
            self._end(request, emit, Event(finish_reason=reason, error=error, prompt_tokens=len(request.tokens)))


def _counts(row: Row) -> dict[str, Any]:
    return {"prompt_tokens": row.prompt, "completion_tokens": row.generated, "cached_tokens": row.cached}


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer: the model's own end tokens and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(own if isinstance(own, list) else [own]), getattr(tokenizer, "eos_token_id", None)]
    return frozenset(end for end in ends if end is not None)
