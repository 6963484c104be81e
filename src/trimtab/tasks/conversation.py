"""Conversations: messages in, the assistant's answers out, of which all or the last are trained on and scored.

{"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "cats"}, ...], "tools": [...]}
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from trimtab.errors import DataError
from trimtab.tasks.base import Example
from trimtab.tasks.files import Row
from trimtab.tasks.generation import WritingSpec, WritingTask
from trimtab.tasks.messages import FIELDS, Message, answers, messages_of, tools_of
from trimtab.tasks.tokens import Encoded, Turns
from trimtab.tasks.turns import encode_answers, encode_messages, write_messages


class ConversationSpec(WritingSpec):
    """Messages of several turns in, the assistant's answers out."""

    example_rows = (
        {
            "messages": [
                {"role": "user", "content": "cat"},
                {"role": "assistant", "content": "cats"},
                {"role": "user", "content": "dog"},
                {"role": "assistant", "content": "dogs"},
            ]
        },
    )
    type: Literal["conversation"]
    train_turns: Literal["all", "last"] = "all"
    """Which of a conversation's answers are trained on and scored, each after all that really came before it."""
    edit_turns: Turns = "each"
    """What the prompt is that positions are counted in: `each` answer's is all that comes before it; or what comes
    before the `first` answer is that of all of them, and the whole conversation one training example."""


@dataclass(frozen=True)
class Turn(Example):
    """One answer of a conversation."""

    messages: Sequence[Message] = ()
    """The whole conversation."""
    place: int = 0
    """The answer's among them, or behind them where it is not there."""
    tools: list[Any] | None = None

    @property
    def before(self) -> Sequence[Message]:
        return self.messages[: self.place]

    @property
    def follows(self) -> bool:
        """Whether another answer comes before it."""
        return bool(answers(self.before))

    @property
    def beside(self) -> list[dict[str, Any]]:
        """What of the messages before is in no text here, though a chat template may write it; empty for nothing."""
        said = [{k: v for k, v in m.items() if k not in ("role", "content", "tool_calls")} for m in self.before]
        return said if any(said) else []


class ConversationTask(WritingTask[ConversationSpec]):
    """An example is an answer with all that comes before it; in training with `edit_turns: first`, a conversation."""

    spec_class = ConversationSpec
    unit = "answers"

    @property
    def edit_turns(self) -> Turns:
        return self.spec.edit_turns

    @property
    def prompt_said(self) -> str:  # type: ignore[override]
        return {
            "each": "each answer's prompt is all that comes before it",
            "first": "what comes before a conversation's first answer is the prompt of all its answers",
        }[self.spec.edit_turns]

    def prepared(self, row: Row, where: str) -> Row:
        """The row as it is: its conversation is read as a whole."""
        return row

    def question(self, row: Row, where: str) -> Example:
        """The last answer where the conversation ends with one, else the next."""
        messages = self._messages(row, where)
        at = len(messages) - bool(messages and messages[-1]["role"] == "assistant")
        if at == 0 or messages[at - 1]["role"] not in ("user", "tool"):
            raise DataError(f"{where}: the conversation does not end with a message to be answered, or its answer")
        return self._turn(row, messages, at, where)

    def example(self, row: Row, where: str) -> Example:
        return self.examples_of(row, where)[-1]

    def examples_of(self, row: Row, where: str) -> list[Example]:
        """Its answers, all or the last; those that say `weight: 0` are not trained on."""
        messages = self._messages(row, where)
        places = [place for place in answers(messages) if messages[place].get("weight") != 0]
        if not places:
            raise DataError(
                f"{where}: the conversation has no answer: no assistant's message behind a user's or tool's"
            )
        chosen = places if self.spec.train_turns == "all" else places[-1:]
        return [self.checked(self._answered(self._turn(row, messages, place, where)), where) for place in chosen]

    def sample(self) -> Example:
        return self._turn({}, self._with_system([{"role": "user", "content": "<user>"}]), 2, "the sample")

    def rendered(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[str, bool]:
        turn = cast(Turn, example)
        return write_messages(tokenizer, turn.before, turn.tools, add_generation_prompt=True), False

    def census(self, examples: Sequence[Example]) -> tuple[str, list[str]]:
        """How many conversations the answers are from, and which of theirs these are."""
        count = len({id(e.row) for e in examples})
        which = {"all": "all of theirs", "last": "the last of each"}[self.spec.train_turns]
        return f"of {count} conversations, {which}", []

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        training: bool,
        max_length: int = 512,
        cut: bool = False,
    ) -> tuple[list[Encoded], int]:
        """Tokenise; in training, answers of what is longer than `max_length` are left out, or cut; and counted.

        Raises DataError when none is left, or the chat template does not fit the conversations.
        """
        how, turns = self.spec.edit_turns, [cast(Turn, e) for e in examples]
        if not training:
            return [encode_messages(tokenizer, t.before, tools=t.tools, turns=how) for t in turns], 0
        of_row = defaultdict[int, list[Turn]](list)  # few that were drawn are in no order
        for turn in turns:
            of_row[id(turn.row)].append(turn)
        rows = [[t] for t in turns] if how == "each" else list(of_row.values())
        encoded = [
            encode_answers(tokenizer, own[0].messages, sorted(t.place for t in own), tools=own[0].tools, turns=how)
            for own in rows
        ]
        too_long = [len(own) for own, e in zip(rows, encoded, strict=True) if len(e.input_ids) > max_length]
        return self.fitting(encoded, max_length, cut), sum(too_long)

    def _messages(self, row: Row, where: str) -> list[Message]:
        name = self.spec.data.conversation or next((name for name in FIELDS if name in row), FIELDS[0])
        return self._with_system(messages_of(row, name, where))

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """With the recipe's system text before a conversation that has none."""
        has_own = bool(messages) and messages[0]["role"] in ("system", "developer")
        own = [] if has_own or self.spec.system is None else [{"role": "system", "content": self.spec.system}]
        return [*own, *messages]

    def _turn(self, row: Row, messages: list[Message], place: int, where: str) -> Turn:
        tools = tools_of(row, where)
        said = [f"{m['role']}: {_text(m)}" for m in messages[:place]]
        texts = [f"tools: {json.dumps(tools, ensure_ascii=False)}", *said] if tools else said
        return Turn(tuple(texts), "", None, row, messages=messages, place=place, tools=tools)

    def _answered(self, turn: Turn) -> Turn:
        return replace(turn, answer=_text(turn.messages[turn.place]))


def _text(message: Message) -> str:
    """What a message says, its calls of tools too."""
    calls = message.get("tool_calls")
    return f"{message['content']}{json.dumps(calls, ensure_ascii=False) if calls else ''}"
