"""What stands between the routes and the engine: names to edits, prompts to requests, events as they come."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastapi import Request
from transformers import PreTrainedTokenizerBase

from trimtab.adapter.weights import CONFIG, WEIGHTS
from trimtab.errors import AdapterError
from trimtab.serve import schemas
from trimtab.serve.answers import Form, Tokens, merged
from trimtab.serve.engine import Applied, Engine, EngineError, Event
from trimtab.serve.engine import Request as EngineRequest
from trimtab.serve.errors import ApiError, of_engine
from trimtab.serve.metrics import Metrics
from trimtab.serve.registry import NameTaken, Registry, UnknownAdapter

FIELD = "reft_adapter"
"""That an adapter comes in."""
Events = AsyncGenerator[tuple[int, Event], None]


class ClientGone(Exception):
    """The client has left; nobody waits for the answer."""


class Service:
    """What the routes share.

    Args:
        base: the name of the base model.
        takes_adapters: whether a request may bring an adapter.
        choices: answers of one request at most, over its prompts.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        tokenizer: PreTrainedTokenizerBase,
        base: str,
        takes_adapters: bool = False,
        choices: int = 128,
    ) -> None:
        self.engine, self.registry, self.base = engine, registry, base
        self.tokens, self.takes_adapters, self.choices = Tokens(tokenizer), takes_adapters, choices
        self.metrics, self.created = Metrics(engine), int(time.time())
        self._post: _Post | None = None

    def applied(self, model: str, scale: float) -> tuple[Applied, ...]:
        """The edit that a request's `model` and `reft_scale` ask for; reads files.

        Raises:
            ApiError: there is no such model, or nothing that the scale could be of.
        """
        if model == self.base:
            if scale != 1:
                raise ApiError(
                    400, "reft_scale: the base model has no edit to scale; name an adapter.", param="reft_scale"
                )
            return ()
        for name in (model, model.removeprefix(f"{self.base}:")):
            with suppress(UnknownAdapter):
                return (Applied(self.registry.get(name), scale),)
        raise ApiError(404, f"there is no model {model!r}; see /v1/models.", "model_not_found", "model")

    def _several(self, body: schemas.Generation) -> tuple[Applied, ...]:
        """The edits of `reft_adapters`, in their order. Raises ApiError."""
        field = "reft_adapters"
        if body.model != self.base:
            raise ApiError(400, f"{field}: edit the base model; give model as {self.base!r}.", param="model")
        if body.reft_scale != 1 or body.reft_adapter is not None:
            raise ApiError(400, f"{field}: give each its scale, and neither reft_scale nor reft_adapter.", param=field)
        asked = [schemas.ScaledAdapter(name=one) if isinstance(one, str) else one for one in body.reft_adapters]
        names = [one.name.removeprefix(f"{self.base}:") for one in asked]
        if len(set(names)) < len(names):
            raise ApiError(400, f"{field}: {names} names one twice; give it once, with a scale.", param=field)
        try:
            applied = tuple(Applied(self.registry.get(name), one.scale) for name, one in zip(names, asked, strict=True))
        except UnknownAdapter as error:
            raise ApiError(
                404, f"{field}: no adapter {str(error)!r}; see /v1/models.", "model_not_found", field
            ) from None
        if len({one.adapter.positions.turns for one in applied}) > 1:
            raise ApiError(400, f"{field}: {names} differ in edit_turns, and a request has one prompt.", param=field)
        return applied

    def _asked(self, body: schemas.Generation) -> tuple[Applied, ...]:
        if body.reft_adapters:
            return self._several(body)
        return (
            self._brought(body.reft_adapter, body) if body.reft_adapter else self.applied(body.model, body.reft_scale)
        )

    def _brought(self, brought: schemas.BroughtAdapter, body: schemas.Prompt) -> tuple[Applied, ...]:
        """The edit that a request brings. Raises ApiError."""
        if not self.takes_adapters:
            raise ApiError(403, f"{FIELD}: this server takes no adapters from requests.", "not_allowed", FIELD)
        if body.model != self.base:
            raise ApiError(400, f"{FIELD}: edits the base model; give model as {self.base!r}.", param="model")
        with TemporaryDirectory() as folder, _as_brought(folder):
            _write(brought, Path(folder))
            return (Applied(self.registry.read(folder, "(brought)"), body.reft_scale),)

    def load(self, body: schemas.LoadAdapter) -> None:
        """Give a name to a folder's adapter, or to one that comes with the request.

        Raises:
            ApiError: that one is none. AdapterError: of what the registry says of a name or a folder.
        """
        name, replaced = body.lora_name, body.load_inplace
        if body.reft_adapter is None:
            self.registry.load(name, str(body.lora_path), replaced)
            return
        folder = self.registry.room()
        try:
            with _as_brought(str(folder)):
                _write(body.reft_adapter, folder)
                self.registry.add(name, folder, replaced)
        except BaseException:
            shutil.rmtree(folder)
            raise

    def requests(self, form: Form, tenant: bytes) -> list[EngineRequest]:
        """One for each choice. Raises ApiError."""
        body = form.body
        applied, made = self._asked(body), []
        if len(form.prompts) * body.n > self.choices:
            raise ApiError(
                400, f"n: {len(form.prompts) * body.n} answers in one request; at most {self.choices}.", param="n"
            )
        turns = next((one.adapter.positions.turns for one in applied), None)
        ends = form.prompt_ends(turns) if turns else [None] * len(form.prompts)
        kept = self._kept_form(form)
        for prompt, end in zip(form.prompts, ends, strict=True):
            room = self.engine.max_len - len(prompt)
            sampling = form.sampling(max(1, room))
            if sampling.max_tokens > room:
                asked = f"{len(prompt)} tokens of prompt and {sampling.max_tokens} of answer"
                message = f"{asked} are more than the {self.engine.max_len} that fit; shorten the prompt or max_tokens."
                raise ApiError(400, message, "context_length_exceeded", form.field)
            for i in range(body.n):
                own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i)
                held = kept.copy() if kept is not None else None
                told: dict[str, Any] = {"moves": body.reft_moves, "form": held}
                made.append(EngineRequest(uuid.uuid4().hex, prompt, own, applied, tenant, end, **told))
        return made

    def _kept_form(self, form: Form) -> Any:
        """What the answers are held to, or None. Raises ApiError."""
        if form.kept is None:
            return None
        if form.body.ignore_eos:
            raise ApiError(400, "ignore_eos: an answer of a form ends where it is whole.", param="ignore_eos")
        try:
            return self.engine.form(*form.kept)
        except EngineError as error:
            raise of_engine(error) from None

    def card(self, name: str) -> schemas.ModelCard:
        return schemas.ModelCard(
            id=name,
            created=self.created,
            root=self.base,
            parent=None if name == self.base else self.base,
            max_model_len=self.engine.max_len,
            chat=self.tokens.chat,
            reft_moves=self.engine.tells_moves,
        )

    def _post_of(self, loop: asyncio.AbstractEventLoop) -> _Post:
        if self._post is None or self._post.loop is not loop:
            self._post = _Post(loop)
        return self._post

    async def events(self, requests: Sequence[EngineRequest], http: Request, parts: bool) -> Events:
        """Run requests; each event with the place of its request. Leaving early cancels what is left.

        Args:
            parts: events as they come, instead of one for each whole answer.

        Raises:
            ApiError: a request was not taken or failed. ClientGone: nobody listens.
        """
        queue, post = asyncio.Queue[tuple[int, Event] | None](), self._post_of(asyncio.get_running_loop())
        watch = asyncio.create_task(_until_gone(http))
        watch.add_done_callback(lambda _: queue.put_nowait(None))
        left: dict[int, EngineRequest] = {}
        told: dict[int, int] = {}  # tokens so far

        def emit_for(index: int) -> Callable[[Event], None]:
            held, clock = list[Event](), _Clock(self.metrics)

            def emit(event: Event) -> None:
                clock.count(event)
                told[index] = event.completion_tokens
                held.append(event)
                if parts or event.finish_reason is not None:
                    post(queue, (index, merged(held)))
                    held.clear()

            return emit

        try:
            for index, request in enumerate(requests):
                self.engine.submit(request, emit_for(index))
                left[index] = request
            while left:
                item = await queue.get()
                if item is None:
                    raise ClientGone
                index, event = item
                if event.finish_reason is not None:
                    self.metrics.ended(_names(left.pop(index)), event)
                if event.error is not None:
                    raise event.error
                yield index, event
        except EngineError as error:
            raise of_engine(error) from None
        finally:
            watch.cancel()
            for index, request in left.items():
                self.engine.cancel(request.id)
                gone = Event(finish_reason="abort", completion_tokens=told.get(index, 0))
                self.metrics.ended(_names(request), gone)


def _write(brought: schemas.BroughtAdapter, folder: Path) -> None:
    """The two files of an adapter that came with a request. Raises ApiError."""
    try:
        weights = base64.b64decode(brought.weights, validate=True)
    except ValueError:
        raise ApiError(400, f"{FIELD}.weights: is not base64.", param=f"{FIELD}.weights") from None
    (folder / CONFIG).write_text(json.dumps(brought.config))
    (folder / WEIGHTS).write_bytes(weights)


@contextmanager
def _as_brought(folder: str) -> Iterator[None]:
    """What is wrong with an adapter in this folder is said of the field that it came in."""
    try:
        yield
    except NameTaken:
        raise
    except AdapterError as error:
        raise ApiError(400, str(error).replace(folder, FIELD), "invalid_adapter", FIELD) from None


class _Post:
    """What the engine's thread has for queues of a loop, which is woken once for all that comes until it runs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._woken = False

    def __call__(self, queue: asyncio.Queue[Any], item: Any) -> None:
        self._items.append((queue, item))
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before the last look: what comes after it wakes the loop again
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)


class _Clock:
    """Times the tokens of one answer."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.last, self.first = metrics, time.monotonic(), True

    def count(self, event: Event) -> None:
        if event.tokens:
            now = time.monotonic()
            self.metrics.waited(now - self.last, len(event.tokens), self.first)
            self.last, self.first = now, False


def _names(request: EngineRequest) -> list[str]:
    """Of the request's adapters; the base model's is ""."""
    return [one.adapter.name for one in request.adapters] or [""]


async def _until_gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
