"""Calls of tools: how the model's chat template writes one, what holds an answer to that, and what an answer calls.

calls = Calls(tokenizer, tools, choice="auto")
calls.grammar                       # of llguidance: words, or words and a call, or a call alone
calls.read(text)                    # ("", Called("weather", '{"in": "Rome"}'))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from trimtab.errors import DataError
from trimtab.serve.engine import BadRequest
from trimtab.serve.grammar import json_rule
from trimtab.serve.text import overlap
from trimtab.tasks.messages import Message
from trimtab.tasks.tokens import turn_end
from trimtab.tasks.turns import write_messages

FIELD = "tools"
_NAME, _ARGUMENTS = "some_function", {"some_argument": "some value"}
_EXAMPLE: list[Message] = [
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call00000", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}},
        ],
    },
    {"role": "tool", "tool_call_id": "call00000", "content": "?"},
    {"role": "user", "content": "?"},
]
_WRITTEN = re.compile(rf'(.+?){_NAME}(.*?){{\s*"some_argument"\s*:\s*"some value"\s*}}(.*)', re.DOTALL)


class Called(NamedTuple):
    """A function, and its arguments as JSON text."""

    name: str
    arguments: str


class Calls:
    """The calls that an answer may make, one at most.

    Args:
        tools: as OpenAI's API has them.
        choice: "auto" where the model may also just talk, "required", or the name of the function that is called.

    Raises:
        BadRequest: the chat template writes no calls whose names and arguments could be read, or a tool is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]], choice: str) -> None:
        schemas = dict(map(_function, tools))
        if choice not in ("auto", "required"):
            if choice not in schemas:
                raise BadRequest("tool_choice", f"tool_choice: there is no function {choice!r} among the tools.")
            schemas = {choice: schemas[choice]}
        special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        before, between, after = (_pieces(part, special) for part in _written(tokenizer, tools))
        self._before = _text(before).lstrip()
        around = (self._before, _text(between), _text(after).rstrip())
        names, (begin, middle, end) = "|".join(map(re.escape, schemas)), map(re.escape, around)
        self._call = re.compile(f"(.*?){begin}({names}){middle}(.*){end}", re.DOTALL)
        rest = " | ".join(_rule([name, *between], json_rule(schema), after) for name, schema in schemas.items())
        start = _start(before, list(special.values())) if choice == "auto" else f"start: {_rule(before, 'rest')}"
        self.grammar = f"{start}\nrest: {rest}\n"

    def read(self, text: str) -> tuple[str, Called | None]:
        """What a whole answer says, and what it calls."""
        found = self._call.fullmatch(text.rstrip())
        try:
            return (found[1], Called(found[2], json.dumps(json.loads(found[3])))) if found else (text, None)
        except ValueError:
            return text, None

    def apart(self, text: str) -> tuple[str, str]:
        """The beginning of an answer as what can be said, and what may yet become a call."""
        place = text.find(self._before)
        if place < 0:
            place = len(text) - overlap(text, self._before)
        return text[:place], text[place:]


def _function(tool: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and schema. Raises BadRequest."""
    function: Any = tool.get("function")
    name = function.get("name") if tool.get("type") == "function" and isinstance(function, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
        raise BadRequest(
            FIELD, f"{FIELD}: {json.dumps(tool)[:100]} is no function with a name of letters, digits, _ . -"
        )
    schema = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise BadRequest(FIELD, f"{FIELD}: the parameters of {name!r} must be a schema of type object.")
    return name, schema


def _written(tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """What the chat template writes before a function's name, between it and the arguments, and behind them."""
    try:
        start = write_messages(tokenizer, _EXAMPLE[:1], list(tools), add_generation_prompt=True)
        try:  # some write what the model thought before a call only where no question follows
            whole = write_messages(tokenizer, _EXAMPLE, list(tools))
        except DataError:  # others take no question here
            whole = write_messages(tokenizer, _EXAMPLE[:2], list(tools))
    except DataError as error:
        raise BadRequest(FIELD, f"{FIELD}: {error}.") from None
    found = _WRITTEN.fullmatch(whole.removeprefix(start)) if whole.startswith(start) else None
    if found is None:
        said = "this model's chat template writes no name with the arguments as JSON behind it, so no call can be read"
        raise BadRequest(FIELD, f"{FIELD}: {said}; tool_choice none writes the tools into the prompt alone.")
    before, between, after = found.groups()
    return before, between, after.partition(turn_end(tokenizer))[0]


def _pieces(text: str, special: dict[str, int]) -> list[str | int]:
    """A text as texts and the ids of special tokens between them."""
    if not special:
        return [text] if text else []
    found = re.split(f"({'|'.join(map(re.escape, special))})", text)
    return [special.get(piece, piece) for piece in found if piece]


def _text(pieces: list[str | int]) -> str:
    """As an answer has it, whose special tokens are not shown."""
    return "".join(piece for piece in pieces if isinstance(piece, str))


def _rule(*parts: Any) -> str:
    """Pieces and rules one after another, as llguidance reads them."""

    def terms() -> Iterator[str]:
        for part in parts:
            if isinstance(part, str):
                yield part
            else:
                yield from (f"<[{piece}]>" if isinstance(piece, int) else json.dumps(piece) for piece in part)

    return " ".join(terms())


def _start(before: list[str | int], special: Sequence[int]) -> str:
    """The rule of words with or without a call at their end.

    Words are any text and `special` tokens, as the model writes them without tools, but not what a call begins with.
    """
    first, more = before[0], _rule(before[1:], "rest")
    others = ",".join(str(token) for token in special if token != first)
    words = f"(TEXT? <[{others}]>)*" if others else ""
    if isinstance(first, int):
        return f"start: {words} TEXT? (<[{first}]> {more})?\nTEXT: /(?s:.+)/"
    begins = "".join(rf"\x{{{ord(character):x}}}" for character in first)
    text = f"TEXT: /(?s:.+)/ & ~/(?s:.*){begins}(?s:.*)/\nlead[lazy]: /(?s:.*){begins}/"
    return f"start: {words} (TEXT? | lead {more})\n{text}"
