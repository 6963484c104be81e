"""Conversations to tokens: up to where the next answer starts, and with the answers that are trained on.

What is asked in use and what is trained come from the same functions, so that the same tokens are edited.

encode_messages(tokenizer, messages)                         # the prompt of the next answer is all of them
encode_answers(tokenizer, messages, [2])                     # the same up to message 2, and that as the answer
encode_answers(tokenizer, messages, [2, 4], turns="first")   # both answers behind one prompt, in one row
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.errors import DataError
from trimtab.tasks.messages import Message, answers
from trimtab.tasks.tokens import IGNORED, Encoded, Turns, render_messages, token_ids, turn_end, with_system


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    system: str | None = None,
    tools: list[Any] | None = None,
    turns: Turns = "each",
) -> Encoded:
    """Tokenise a conversation up to where the next answer starts.

    Its prompt is all of that or, where only the `first` one is edited, what comes before the first answer.

    Raises DataError where the chat template refuses the conversation, leaves out a part of it, or writes its beginning
    otherwise once it has gone on.
    """
    said = with_system(system, messages)
    ids = prompt_ids(tokenizer, said, tools)
    return Encoded(ids, prompt_end(tokenizer, ids, said, tools, turns), None)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[Any] | None = None
) -> list[int]:
    """A conversation up to where its next answer starts; one that ends with the assistant's words, to these words' end.

    Raises DataError where the chat template refuses the conversation or leaves out a part of it.
    """
    goes_on = bool(messages) and messages[-1]["role"] == "assistant"
    how = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
    return token_ids(tokenizer, write_messages(tokenizer, messages, tools, **how))


def prompt_end(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    turns: Turns = "each",
) -> int:
    """How many of `prompt_ids` are the prompt, in which positions are counted: the rest is taken for the answer.

    Raises DataError where what comes before the answer is written otherwise once there is more of it.
    """
    goes_on = messages[-1]["role"] == "assistant"
    last = len(messages) - goes_on
    place = next(iter(answers(messages)), last) if turns == "first" else last
    if place == len(messages):
        return len(ids)
    first = prompt_ids(tokenizer, messages[:place], tools)
    _check_begins(tokenizer, ids, first, place)
    return len(first)


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    places: Sequence[int],
    *,
    tools: list[Any] | None = None,
    turns: Turns = "each",
) -> Encoded:
    """Tokenise a conversation up to the last of the answers at `places`, with labels on these.

    Each stands behind the tokens that `encode_messages` gives for what comes before it. Several go with `first` alone.

    Raises DataError as that does, and where the template writes an answer or what is before it otherwise later on.
    """
    stretches = [_answer(tokenizer, messages[: place + 1], tools) for place in places]
    prompt, answer = stretches[-1]
    ids = prompt + answer
    labels = [IGNORED] * len(ids)
    for place, (before, own) in zip(places, stretches, strict=True):
        _check_begins(tokenizer, ids, before + own, place)
        labels[len(before) : len(before) + len(own)] = own
    return Encoded(ids, prompt_end(tokenizer, prompt, messages[: places[-1]], tools, turns), labels)


def _answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[Any] | None
) -> tuple[list[int], list[int]]:
    """The tokens of the prompt for the last message, and those of it that follow, up to what ends it."""
    *before, message = messages
    prompt = write_messages(tokenizer, before, tools, add_generation_prompt=True)
    whole = write_messages(tokenizer, messages, tools)
    if not whole.startswith(prompt):
        raise DataError(
            f"the chat template writes an answer otherwise than it asks for one: {whole[-60:]!r} does not follow "
            f"{prompt[-60:]!r}, so what is trained would not be what is asked. Take type: generation, which writes the "
            "answer right behind the prompt, or a model whose template does"
        )
    closed = _closed(tokenizer, whole[len(prompt) :], message["content"])
    ids, joint = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + closed)
    return ids, joint[len(ids) :] if joint[: len(ids)] == ids else token_ids(tokenizer, closed)


def _closed(tokenizer: PreTrainedTokenizerBase, written: str, content: str) -> str:
    """What is written of an answer, up to what ends it; eos where nothing does."""
    end = turn_end(tokenizer)
    if end in written:
        return written[: written.rindex(end) + len(end)]
    bare = written.rstrip()
    return bare + end if content and bare.endswith(content.rstrip()) else bare


def _check_begins(tokenizer: PreTrainedTokenizerBase, ids: list[int], beginning: list[int], place: int) -> None:
    if ids[: len(beginning)] != beginning:
        at = next((i for i, (a, b) in enumerate(zip(ids, beginning, strict=False)) if a != b), len(ids))
        now, before = (tokenizer.decode(side[max(0, at - 8) : at + 8]) for side in (ids, beginning))
        raise DataError(
            f"the chat template, or the tokenizer, writes message {place + 1} or what is before it otherwise once the "
            f"conversation goes on ({before!r} becomes {now!r}), so that one prompt cannot hold for all answers. Take "
            "edit_turns: each"
        )


def write_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[Any] | None = None, **how: bool
) -> str:
    """What the chat template makes of a conversation.

    Args:
        how: as `apply_chat_template` takes it.

    Raises DataError where there is no template, or it refuses the conversation or leaves out its tools.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template, by which a conversation becomes text; take a model that has one"
        )

    def written(messages: Sequence[Message], tools: list[Any] | None) -> str:
        return render_messages(tokenizer, messages, "such conversations need another one", tools=tools, **how)

    text = written(messages, tools)
    if tools and text == written(messages, None):
        raise DataError("the chat template has no place for tools; take a model whose template has, or leave them out")
    plain = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    if plain != list(messages) and text == written(plain, tools):
        raise DataError("the chat template does not write calls of tools; take a model whose template does")
    return text
