"""What the front end and an engine say to each other.

engine.start()
engine.submit(Request("r1", tokens, Sampling(max_tokens=32), (Applied(registry.get("emoji")),)), emit)
...                                 # emit(Event) from the engine's thread, the last with a finish_reason
engine.close(grace=30)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from trimtab.serve.registry import Adapter

FinishReason = Literal["stop", "length", "abort", "error"]
Health = Literal["starting", "ready", "draining", "dead"]


class EngineError(Exception):
    """Why a request was not taken, or why it ended with `finish_reason` "error"."""


class QueueFull(EngineError):
    """As many requests wait as may; try again in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueTimeout(QueueFull):
    """The request waited longer than it may for a free row, or for room in the table of adapters."""


class Unavailable(EngineError):
    """The engine is draining or dead."""


class StepFailed(EngineError):
    """The forward that the request was part of raised; others go on, and the request may be sent again."""


class BadRequest(EngineError, ValueError):
    """The request cannot be served at all. `field` is what is wrong with it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a request ends.

    Raises:
        BadRequest: a value is out of its range.
    """

    max_tokens: int = 16
    """0 with `prompt_logprobs` scores the prompt alone."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 for all."""
    min_p: float = 0.0
    """Least probability of a token, as a share of the likeliest one's."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Both over the tokens generated so far."""
    repetition_penalty: float = 1.0
    """Over prompt and generated tokens; logits are divided by it where positive, multiplied where negative."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """The same seed and request give the same answer, whatever else runs."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stop_token_ids: tuple[int, ...] = ()
    """Beside the model's own end tokens."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """So many of the likeliest tokens with each generated one; 0 for the generated one alone. Of the model's own
    distribution, before temperature, penalties and bias."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""

    def __post_init__(self) -> None:
        self._check("max_tokens", 0 if self.prompt_logprobs is not None else 1, math.inf)
        self._check("temperature", 0, 100)
        self._check("top_p", 0, 1, above=True)
        self._check("top_k", 0, math.inf)
        self._check("min_p", 0, 1)
        self._check("presence_penalty", -2, 2)
        self._check("frequency_penalty", -2, 2)
        self._check("repetition_penalty", 0, 100, above=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check(name, 0, 100)
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise BadRequest("logit_bias", "logit_bias: each value must be from -100 to 100.")
        if not all(self.stop):
            raise BadRequest("stop", "stop: an empty string would end every answer at once; leave it out.")

    def _check(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        if not (low < value if above else low <= value) or not value <= high:
            limits = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
            raise BadRequest(name, f"{name}={value!r}: must be {limits}.")


@dataclass(frozen=True)
class Applied:
    """An adapter on a request. Holding the object keeps that very adapter alive, whatever becomes of its name."""

    adapter: Adapter
    scale: float = 1.0
    """Of the edits; negative reverses them."""


@dataclass(frozen=True)
class Request:
    """A prompt to be continued. `n` answers are `n` requests."""

    id: str
    tokens: Sequence[int]
    """Of the prompt, whose length decides which tokens are edited where `prompt_end` does not."""
    sampling: Sampling = Sampling()
    adapters: tuple[Applied, ...] = ()
    """In the order in which they edit; none for the base model."""
    salt: bytes = b""
    """Requests of different salt share no cached prefix."""
    prompt_end: int | None = None
    """How many of the tokens are the prompt that positions are counted in; the rest is taken for the answer."""
    moves: bool = False
    """Say how far each token of the prompt is moved; no part of it is then taken from the prefix store."""
    form: Any = None
    """What the engine's `form` gave, of this request alone: the answer keeps to it."""


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, and the likeliest tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """What is new of a request. Its last event, and only that, has a `finish_reason`."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    """Whole characters; what may yet become a stop string is held back. Empty where the engine has no tokenizer."""
    logprobs: tuple[Logprob, ...] = ()
    """One a token of `tokens`, where asked for."""
    prompt_logprobs: tuple[Logprob | None, ...] = ()
    """With the first event, where asked for: one a prompt token, None for the first."""
    prompt_moves: tuple[float, ...] = ()
    """With the first event, where asked for: one a prompt token, ‖change‖ / ‖h‖ summed over the edited sites."""
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    """The stop string or end token that ended it. A stop token counts among `tokens` but gives no text."""
    error: EngineError | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were taken from the prefix store."""


@dataclass
class Stats:
    """For `/metrics`. What counts up never goes down."""

    waiting: int = 0
    running: int = 0
    resident_adapters: int = 0
    pinned_adapters: int = 0
    prefix_bytes: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    edited_rows: int = 0
    table_hits: int = 0
    table_misses: int = 0
    table_evictions: int = 0
    failed_steps: int = 0
    last_error: str = ""


Emit = Callable[[Event], None]


class Engine(Protocol):
    """Runs requests on one model."""

    tells_moves: bool
    """Whether a request may ask for `moves`."""

    @property
    def health(self) -> Health: ...

    @property
    def max_len(self) -> int:
        """Most tokens of a prompt and its answer together."""
        ...

    def start(self) -> None:
        """Take requests. Returns when the engine is ready.

        Raises:
            ValueError: the model cannot be served, naming why.
        """
        ...

    def submit(self, request: Request, emit: Emit) -> None:
        """Queue a request, also before the start; from any thread, at once.

        `emit` is called from the engine's thread and must not block.

        Raises:
            BadRequest: it can never be served. QueueFull: not now. Unavailable: the engine is not ready.
        """
        ...

    def form(self, grammar: str, field: str) -> Any:
        """What keeps an answer to a grammar of llguidance's, with a `copy` for further answers; may take a second.

        Args:
            field: of the request, which errors name.

        Raises:
            BadRequest: it cannot be done.
        """
        ...

    def cancel(self, id: str) -> None:
        """End a request with a last event ("abort"); nothing happens where it has ended already."""
        ...

    def pause(self) -> AbstractContextManager[None]:
        """No step runs inside the `with`; entering waits for the one that does."""
        ...

    def stats(self) -> Stats: ...

    def close(self, grace: float = 0.0) -> None:
        """Take no more requests, let those running and waiting end for `grace` seconds, abort the rest, free all."""
        ...
