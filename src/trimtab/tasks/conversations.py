"""Conversations of one turn as fields: `{"messages": [{"role": "user", "content": "cat"}, ...]}`, and ShareGPT's."""

from __future__ import annotations

from typing import Any

from trimtab.errors import DataError
from trimtab.tasks.files import Row, needed

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "prompter": "user"}
"""Other tools' names for roles."""
TURNS = (["user"], ["user", "assistant"])
"""What can be told apart into a prompt and an answer; the first is a question without an answer."""


def one_turn(row: Row, name: str, where: str) -> Row:
    """The texts of a conversation by role, `system` empty where there is none.

    Raises:
        DataError: it is no conversation, or has several turns, whose answers would not be trained on alike.
    """
    messages = needed(row, name, where)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: the field {name!r} holds no list of messages with a role and a content each")
    texts = [(_role(message), message.get("content", message.get("value"))) for message in messages]
    system = [text for role, text in texts[:1] if role == "system"]
    said = texts[len(system) :]
    roles = [role for role, _ in said]
    if roles not in TURNS:
        raise DataError(
            f"{where}: the conversation goes {', '.join(roles) or 'nowhere'}; a task takes one user turn and "
            "one answer. Cut it into such pairs, or leave such rows out: data: skip_bad_rows: true"
        )
    return {"system": system[0] if system else "", **dict(said)}


def _role(message: dict[str, Any]) -> str:
    role = str(message.get("role", message.get("from", "")))
    return ROLES.get(role, role)
