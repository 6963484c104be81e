"""Answers of a given form: llguidance says, after each token, which may come next for the text to be of a grammar.

grammars = Grammars(tokenizer, vocabulary=len(tokenizer), ends={tokenizer.eos_token_id})
form = grammars.form(f"start: {json_rule({'type': 'object'})}", "response_format")
form.allowed()                      # (V,) bool
form.saw(token)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.serve.engine import BadRequest

if TYPE_CHECKING:  # loaded when the first request asks for a form
    from llguidance import LLMatcher, LLTokenizer

LARGEST = 65536
"""Characters of a grammar, its schemas included."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
"""Between the parts of JSON: a bound, since a small model may go on with spaces until its tokens are spent."""


class Form:
    """What an answer may still become. Of one answer; `copy` for another."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Form:
        return Form(self._matcher.deep_copy())

    def allowed(self) -> Tensor:
        """(V,) the tokens that may come next, end tokens where the text is whole."""
        return torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0

    def saw(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def failed(self) -> str:
        """Why it cannot go on: it took more than its limits allow. Empty where it can."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else ""


class Grammars:
    """Forms for one model.

    Args:
        vocabulary: of the model, whose logits may be more than the tokenizer's tokens.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """Made when it is first asked for, in about a second."""
        from llguidance.hf import from_tokenizer

        if not self._ends:
            raise ValueError("the model has no end token, so that an answer could not end")
        return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends)

    def form(self, grammar: str, field: str) -> Form:
        """Of a grammar in llguidance's syntax; may take a second, and is not for an event loop.

        Args:
            field: of the request, which errors name.

        Raises:
            BadRequest: a schema is none, asks for what cannot be held to, or is too large.
        """
        from llguidance import LLMatcher

        if len(grammar) > LARGEST:
            raise BadRequest(field, f"{field}: a schema of {len(grammar)} characters; at most {LARGEST}.")
        try:
            matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(grammar), log_level=0)
        except ValueError as error:
            raise BadRequest(field, f"{field}: not possible with this model's tokenizer ({error}).") from None
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300]
            raise BadRequest(field, f"{field}: the schema cannot be held to: {reason}")
        return Form(matcher)


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON that a schema describes, as a part of a grammar."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})
