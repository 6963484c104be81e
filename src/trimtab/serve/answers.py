"""Requests of OpenAI's API to the engine's, and its events to their answers.

`Chat` and `Text` are the two forms of an answer. Each says what the prompts are, what sampling is asked for, and what a
choice looks like, whole or in parts.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from trimtab.errors import DataError
from trimtab.serve import schemas
from trimtab.serve.engine import Event, Logprob, Sampling
from trimtab.serve.errors import ApiError
from trimtab.serve.grammar import json_rule
from trimtab.serve.tools import FIELD, Called, Calls
from trimtab.tasks.messages import Message, as_message
from trimtab.tasks.tokens import Turns, encode
from trimtab.tasks.turns import prompt_end, prompt_ids


class Tokens:
    """A tokenizer as a server needs it; used from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        tokenizer("warm")  # the first call may change the tokenizer's settings, which threads must not do at a time
        self.text: Callable[[int], str] = lru_cache(65536)(lambda token: str(tokenizer.decode([token])))

    @property
    def chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    def of_text(self, text: str) -> list[int]:
        ids = encode(self.tokenizer, text, chat=False).input_ids
        if not ids:
            raise ApiError(
                400, "prompt: is empty, and the model has no token to begin with.", "invalid_value", "prompt"
            )
        return ids

    def of_messages(self, messages: Sequence[schemas.Message], tools: list[Any] | None = None) -> list[int]:
        """Up to where the next answer starts; where the last message is the assistant's, to its end."""
        if not self.chat:
            raise ApiError(400, "the model has no chat template; use /v1/completions.", "no_chat_template", "messages")
        with _as_api_error():
            return prompt_ids(self.tokenizer, _said(messages), tools)

    def prompt_end(
        self, ids: list[int], messages: Sequence[schemas.Message], tools: list[Any] | None, turns: Turns
    ) -> int:
        """How many of those tokens are the prompt that an adapter's positions are counted in."""
        with _as_api_error():
            return prompt_end(self.tokenizer, ids, _said(messages), tools, turns)


def _said(messages: Sequence[schemas.Message]) -> list[Message]:
    """As training reads them."""
    return [as_message(m.model_dump(exclude_none=True), f"message {i}") for i, m in enumerate(messages, 1)]


@contextmanager
def _as_api_error() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise ApiError(400, f"messages: {error}.", "invalid_value", "messages") from None


class Form(Protocol):
    """How one kind of request is read and answered."""

    field: str
    """What the prompts come from."""
    prompts: list[list[int]]
    kept: tuple[str, str] | None
    """The grammar that answers are held to, and the field that asks for it."""

    def prompt_ends(self, turns: Turns) -> list[int | None]:
        """How many tokens of each are the prompt that an adapter's positions are counted in; None for all."""
        ...

    @property
    def body(self) -> schemas.Generation: ...

    def sampling(self, room: int) -> Sampling:
        """For a prompt that leaves `room` tokens of the context."""
        ...

    def whole(self, events: Sequence[Event], usage: schemas.Usage) -> schemas.ChatCompletion | schemas.Completion: ...

    def part(self, index: int, event: Event, first: bool) -> schemas.ChatCompletion | schemas.Completion:
        """What one event adds to a stream."""
        ...

    def end(self, usage: schemas.Usage) -> schemas.ChatCompletion | schemas.Completion:
        """The last of a stream, of no choice."""
        ...


def _kept(body: schemas.Generation) -> tuple[str, str] | None:
    """What `response_format` asks for."""
    asked = body.response_format
    if isinstance(asked, schemas.AnyText):
        return None
    schema = asked.json_schema.json_schema if isinstance(asked, schemas.JsonOfSchema) else {"type": "object"}
    return f"start: {json_rule(schema)}", "response_format"


def _head(kind: str, body: schemas.Generation) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}


def _common(body: schemas.Generation) -> dict[str, Any]:
    """The fields of sampling that all forms share."""
    same = {"temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed"}
    return {
        **body.model_dump(include=same | {"ignore_eos"}),
        "stop_token_ids": tuple(body.stop_token_ids),
        "top_k": max(0, body.top_k),
        "logit_bias": {int(token): bias for token, bias in body.logit_bias.items()},
        "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
    }


class Chat:
    """`/v1/chat/completions`."""

    field = "messages"

    def __init__(self, body: schemas.ChatRequest, tokens: Tokens) -> None:
        self.body, self.tokens = body, tokens
        self.prompts = [tokens.of_messages(body.messages, body.tools or None)]
        self.head = _head("chatcmpl", body)
        choice = body.chosen_tools
        self.calls = Calls(tokens.tokenizer, body.tools, choice) if choice != "none" else None
        self.kept = (self.calls.grammar, FIELD) if self.calls else _kept(body)
        self._held: dict[int, str] = {}  # of a stream, by choice: what may yet become a call

    def prompt_ends(self, turns: Turns) -> list[int | None]:
        return [self.tokens.prompt_end(self.prompts[0], self.body.messages, self.body.tools or None, turns)]

    def sampling(self, room: int) -> Sampling:
        most = self.body.max_completion_tokens or self.body.max_tokens or room
        logprobs = self.body.top_logprobs if self.body.logprobs else None
        return Sampling(max_tokens=most, logprobs=logprobs, **_common(self.body))

    def whole(self, events: Sequence[Event], usage: schemas.Usage) -> schemas.ChatCompletion:
        choices = []
        for i, event in enumerate(events):
            text, called = self.calls.read(event.text) if self.calls else (event.text, None)
            calls = {"tool_calls": [_call(called)]} if called else {}
            said = schemas.Said(role="assistant", content=text or None if called else text, **calls)
            choices.append(self._choice(i, event, bool(called), message=said))
        return schemas.ChatCompletion(object="chat.completion", choices=choices, usage=usage, **self.head)

    def part(self, index: int, event: Event, first: bool) -> schemas.ChatCompletion:
        text, called = self._held.pop(index, "") + event.text, None
        if self.calls and event.finish_reason is None:
            text, self._held[index] = self.calls.apart(text)
        elif self.calls:
            text, called = self.calls.read(text)
        more: dict[str, Any] = {"role": "assistant"} if first else {}
        if called:
            more["tool_calls"] = [_call(called, index=0)]
        said = schemas.Said(content=text, **more)
        return self._chunk(choices=[self._choice(index, event, bool(called), delta=said)])

    def end(self, usage: schemas.Usage) -> schemas.ChatCompletion:
        return self._chunk(choices=[], usage=usage)

    def _chunk(self, **parts: Any) -> schemas.ChatCompletion:
        return schemas.ChatCompletion(object="chat.completion.chunk", **self.head, **parts)

    def _choice(self, index: int, event: Event, calls: bool, **said: schemas.Said) -> schemas.ChatChoice:
        logprobs = schemas.ChatLogprobs(content=list(map(self._logprob, event.logprobs))) if event.logprobs else None
        more = {**said, **_moves(self.tokens, self.prompts[0], event)}
        reason = "tool_calls" if calls else event.finish_reason
        return schemas.ChatChoice(index=index, logprobs=logprobs, finish_reason=reason, **more)

    def _logprob(self, one: Logprob) -> schemas.TokenLogprob:
        top = [schemas.TopLogprob(**self._named(token, logprob)) for token, logprob in one.top]
        return schemas.TokenLogprob(**self._named(one.token, one.logprob), top_logprobs=top)

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokens.text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


class Text:
    """`/v1/completions`."""

    field = "prompt"

    def __init__(self, body: schemas.CompletionRequest, tokens: Tokens) -> None:
        self.body, self.tokens = body, tokens
        self.prompts = [p if isinstance(p, list) else tokens.of_text(p) for p in _each(body.prompt)]
        self.head = {"object": "text_completion", **_head("cmpl", body)}
        self.kept = _kept(body)
        self._offsets: dict[int, int] = {}

    def prompt_ends(self, turns: Turns) -> list[int | None]:
        return [None] * len(self.prompts)

    def sampling(self, room: int) -> Sampling:
        echoed = self.body.logprobs if self.body.echo else None
        return Sampling(
            max_tokens=self.body.max_tokens, logprobs=self.body.logprobs, prompt_logprobs=echoed, **_common(self.body)
        )

    def whole(self, events: Sequence[Event], usage: schemas.Usage) -> schemas.Completion:
        choices = [self._choice(i, event, first=True) for i, event in enumerate(events)]
        return schemas.Completion(choices=choices, usage=usage, **self.head)

    def part(self, index: int, event: Event, first: bool) -> schemas.Completion:
        return schemas.Completion(choices=[self._choice(index, event, first)], **self.head)

    def end(self, usage: schemas.Usage) -> schemas.Completion:
        return schemas.Completion(choices=[], usage=usage, **self.head)

    def _choice(self, index: int, event: Event, first: bool) -> schemas.TextChoice:
        text = (self._prompt_text(index) if first and self.body.echo else "") + event.text
        logprobs = self._logprobs(index, event) if self.body.logprobs is not None else None
        more = _moves(self.tokens, self.prompts[index // self.body.n], event)
        return schemas.TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=event.finish_reason, **more)

    def _prompt_text(self, index: int) -> str:
        prompt = _each(self.body.prompt)[index // self.body.n]
        return prompt if isinstance(prompt, str) else str(self.tokens.tokenizer.decode(prompt))

    def _logprobs(self, index: int, event: Event) -> schemas.TextLogprobs:
        prompt = zip(self.prompts[index // self.body.n], event.prompt_logprobs, strict=False)
        found = [*prompt, *((one.token, one) for one in event.logprobs)]
        texts = [self.tokens.text(token) for token, _ in found]
        *offsets, self._offsets[index] = accumulate(map(len, texts), initial=self._offsets.get(index, 0))
        return schemas.TextLogprobs(
            tokens=texts,
            token_logprobs=[_finite(one.logprob) if one else None for _, one in found],
            top_logprobs=[self._top(one) if one else None for _, one in found],
            text_offset=offsets,
        )

    def _top(self, one: Logprob) -> dict[str, float]:
        top = {self.tokens.text(token): _finite(logprob) for token, logprob in reversed(one.top)}
        top.setdefault(self.tokens.text(one.token), _finite(one.logprob))  # a likelier token of the same text stays
        return top


def _moves(tokens: Tokens, prompt: Sequence[int], event: Event) -> dict[str, Any]:
    """Of a choice's first event, where asked for."""
    if not event.prompt_moves:
        return {}
    moves = [round(move, 4) for move in event.prompt_moves]
    return {"reft_moves": schemas.Moves(tokens=[tokens.text(token) for token in prompt], moves=moves)}


def _call(called: Called, **more: int) -> schemas.ToolCall:
    function = schemas.CalledFunction(name=called.name, arguments=called.arguments)
    return schemas.ToolCall(id=f"call_{uuid.uuid4().hex}", type="function", function=function, **more)


def _finite(logprob: float) -> float:
    """JSON has no infinity; a token that cannot be gets what OpenAI writes for it."""
    return max(logprob, -9999.0)


def _each(prompt: Any) -> list[Any]:
    """The prompts of a request: texts, or lists of token ids."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def merged(events: Sequence[Event]) -> Event:
    """The events of a request as one."""
    return replace(
        events[-1],
        tokens=tuple(chain.from_iterable(event.tokens for event in events)),
        text="".join(event.text for event in events),
        logprobs=tuple(chain.from_iterable(event.logprobs for event in events)),
        prompt_logprobs=events[0].prompt_logprobs,
        prompt_moves=events[0].prompt_moves,
    )


def usage_of(ends: Sequence[Event], n: int) -> schemas.Usage:
    """From the last event of each choice, `n` a prompt; a prompt counts once."""
    prompt, new = sum(e.prompt_tokens for e in ends[::n]), sum(e.completion_tokens for e in ends)
    cached = schemas.Cached(cached_tokens=sum(e.cached_tokens for e in ends[::n]))
    return schemas.Usage(
        prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new, prompt_tokens_details=cached
    )
