"""Conversations in rows: `{"messages": [{"role": "user", "content": "cat"}, ...], "tools": [...]}`, and ShareGPT's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trimtab.errors import DataError
from trimtab.tasks.files import Row, as_text, is_missing, needed

Message = dict[str, Any]
"""What a chat template reads: `role`, `content`, and with an assistant's call of tools `tool_calls`."""
FIELDS = ("messages", "conversations", "conversation")
"""The names that the field has in most files."""
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
}
"""Other tools' names for roles."""
KNOWN = ("system", "developer", "user", "assistant", "tool")
TURNS = (["user"], ["user", "assistant"])
"""What can be told apart into a prompt and an answer; the first is a question without an answer."""


def messages_of(row: Row, name: str, where: str) -> list[Message]:
    """The messages in a row's field, in the field's usual words. Raises DataError."""
    messages = needed(row, name, where)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: the field {name!r} holds no list of messages with a role and a content each")
    return [as_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]


def as_message(message: dict[str, Any], where: str) -> Message:
    """A message in the usual words: its role's, one text, and arguments of calls as templates write them.

    Raises DataError for an unknown role, or content that is no text.
    """
    role = str(message.get("role", message.get("from", "")))
    role = ROLES.get(role, role)
    if role not in KNOWN:
        raise DataError(f"{where}: the role is {role!r}, none of {', '.join([*KNOWN, *ROLES])}")
    kept = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
    made = {**kept, "role": role, "content": _content(message.get("content", message.get("value")), where)}
    return {**made, "tool_calls": list(map(_call, made["tool_calls"]))} if made.get("tool_calls") else made


def _content(content: Any, where: str) -> str:
    """Text, or the texts of several parts."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    return as_text(content, "content", where)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool, its arguments as templates write them where they come as JSON text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call


def tools_of(row: Row, where: str) -> list[Any] | None:
    """The tools in a row's field `tools`, a list or the same as JSON text; None where there are none."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except ValueError:
        raise DataError(f"{where}: the field 'tools' is neither a list nor JSON text of one") from None
    if not is_missing(tools) and not isinstance(tools, list):
        raise DataError(f"{where}: the field 'tools' is neither a list nor JSON text of one")
    return tools or None


def answers(messages: Sequence[Message]) -> list[int]:
    """The places of the assistant's answers: its messages right behind one of a user or a tool."""
    roles = [message["role"] for message in messages]
    return [i for i in range(1, len(roles)) if roles[i] == "assistant" and roles[i - 1] in ("user", "tool")]


def one_turn(row: Row, name: str, where: str) -> Row:
    """The texts of a conversation by role, `system` empty where there is none.

    Raises:
        DataError: it is no conversation, or has several turns, which are a task of their own.
    """
    messages = messages_of(row, name, where)
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    said = messages[len(system) :]
    roles = [message["role"] for message in said]
    if roles not in TURNS:
        raise DataError(
            f"{where}: the conversation goes {', '.join(roles) or 'nowhere'}; a generation takes one user turn and one "
            "answer; take type: conversation"
        )
    return {"system": "", **{message["role"]: message["content"] for message in messages}}
