"""Conversations: which answers are trained on, and that each is trained behind the tokens that are asked in use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from talks import OWN, TOOLS, WITH_TOOLS, conversations, tokenizer_with

from trimtab.errors import DataError
from trimtab.tasks import TASKS, Task, build_task, tokens
from trimtab.tasks.messages import answers, messages_of
from trimtab.tasks.turns import encode_answers, encode_messages, prompt_end, prompt_ids
from trimtab.where import positions

Make = Callable[..., Task[Any]]


@given(conversations(), st.sampled_from([None, TOOLS]))
def test_each_answer_is_trained_behind_what_is_asked_in_use(messages: list[dict[str, Any]], tools: Any) -> None:
    for place in answers(messages):
        asked = encode_messages(WITH_TOOLS, messages[:place], tools=tools)
        trained = encode_answers(WITH_TOOLS, messages, [place], tools=tools)
        count = len(asked.input_ids)
        assert trained.input_ids[:count] == asked.input_ids
        assert trained.prompt_length == asked.prompt_length == count
        assert trained.labels == [-100] * count + trained.input_ids[count:]
        assert WITH_TOOLS.decode(trained.input_ids[count:]).endswith("<|end|>")


@given(conversations(), st.sampled_from([None, TOOLS]), st.data())
def test_answers_behind_one_prompt_are_in_one_row(
    messages: list[dict[str, Any]], tools: Any, data: st.DataObject
) -> None:
    places = answers(messages)
    chosen = sorted(data.draw(st.sets(st.sampled_from(places), min_size=1)))
    trained = encode_answers(WITH_TOOLS, messages, chosen, tools=tools, turns="first")
    supervised = set()
    for place in chosen:
        asked = encode_messages(WITH_TOOLS, messages[:place], tools=tools, turns="first")
        count = len(asked.input_ids)
        assert trained.input_ids[:count] == asked.input_ids
        assert trained.prompt_length == asked.prompt_length == len(prompt_ids(WITH_TOOLS, messages[: places[0]], tools))
        alone = encode_answers(WITH_TOOLS, messages, [place], tools=tools)
        assert trained.labels[count : len(alone.input_ids)] == alone.input_ids[count:]  # type: ignore[index]
        supervised |= set(range(count, len(alone.input_ids)))
    assert {i for i, label in enumerate(trained.labels) if label != -100} == supervised  # type: ignore[arg-type]


def test_an_answer_that_is_gone_on_with_is_no_prompt() -> None:
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "ca"}]
    ids = prompt_ids(OWN, messages)
    assert OWN.decode(ids) == "<|bos|><|user|>cat<|assistant|>ca"
    for turns in ("each", "first"):
        assert prompt_end(OWN, ids, messages, turns=turns) == len(prompt_ids(OWN, messages[:1]))  # type: ignore[arg-type]
    more = [*messages, {"role": "user", "content": "dog"}, {"role": "assistant", "content": "do"}]
    ids = prompt_ids(OWN, more)
    assert prompt_end(OWN, ids, more) == len(prompt_ids(OWN, more[:3]))
    assert prompt_end(OWN, ids, more, turns="first") == len(prompt_ids(OWN, more[:1]))


@pytest.mark.parametrize("template", ["open", None])
def test_an_answer_ends_as_the_template_ends_it_else_with_eos(template: str | None) -> None:
    tokenizer = tokenizer_with(template)
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "cats"}]
    trained = encode_answers(tokenizer, messages, [1])
    assert tokenizer.decode(trained.input_ids[trained.prompt_length :]) == "cats<|end|>"


def talk(*said: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


THOUGHT = talk("a", "<think>hm</think>b", "c", "d")


def test_a_template_that_forgets_thoughts_fits_each_answer_and_not_one_prompt_for_all() -> None:
    tokenizer = tokenizer_with("forgets thoughts")
    first, last = (encode_answers(tokenizer, THOUGHT, [place]) for place in (1, 3))
    assert "hm" in tokenizer.decode(first.input_ids) and "hm" not in tokenizer.decode(last.input_ids)
    with pytest.raises(
        DataError, match=r"writes message 2 .* otherwise once the conversation goes on.*edit_turns: each"
    ):
        encode_answers(tokenizer, THOUGHT, [1, 3], turns="first")


@pytest.mark.parametrize(
    ("template", "messages", "tools", "said"),
    [
        ("opens a thought", talk("a", "b"), None, "writes an answer otherwise than it asks for one.*type: generation"),
        ("{{ raise_exception('no such role') }}", talk("a", "b"), None, "refuses the prompt .*no such role"),
        (None, talk("a", "b"), TOOLS, "has no place for tools"),
        (None, [*talk("a"), {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}], None, "not write calls"),
    ],
)
def test_what_a_template_cannot_write_is_an_error(template: str | None, messages: Any, tools: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        encode_answers(tokenizer_with(template), messages, [1], tools=tools)


def test_without_a_template_there_is_no_conversation() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template, by which a conversation becomes text"):
        encode_messages(tokenizer, talk("a"))


def test_the_words_for_turns_are_those_of_the_config() -> None:
    assert get_args(tokens.Turns) == get_args(positions.Turns)


# ---- rows --------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(rows: list[dict[str, Any]], **fields: Any) -> Task[Any]:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "rows.jsonl")}
        spec = TASKS["conversation"].spec_class.model_validate({"type": "conversation", **fields, "data": data})
        return build_task("talk", spec)

    return build


LONG = {"messages": [{"role": "system", "content": "Be brief."}, *talk("cat", "cats", "dog", "dogs")]}
GIVEN = {
    "conversations": [
        {"from": "gpt", "value": "hi"},
        {"from": "human", "value": "ox"},
        {"from": "gpt", "value": "oxen"},
    ]
}


def test_all_answers_or_the_last_are_examples(make: Make) -> None:
    task = make([LONG, GIVEN])
    assert [(e.texts, e.answer) for e in task.examples("train")] == [
        (("system: Be brief.", "user: cat"), "cats"),
        (("system: Be brief.", "user: cat", "assistant: cats", "user: dog"), "dogs"),
        (("assistant: hi", "user: ox"), "oxen"),
    ]
    assert task.census(task.examples("train")) == ("of 2 conversations, all of theirs", [])
    last = make([LONG, GIVEN], train_turns="last")
    assert [e.answer for e in last.examples("train")] == ["dogs", "oxen"]
    unwanted = {"messages": [dict(m, weight=i % 4) for i, m in enumerate(talk("a", "b", "c", "d", "e", "f"))]}
    unwanted["messages"][3]["weight"] = 0
    assert [e.answer for e in make([unwanted] * 2).examples("train")][:2] == ["b", "f"]


def test_rows_of_one_prompt_are_one_example_of_training(make: Make) -> None:
    for turns, count in (("each", 3), ("first", 2)):
        task = make([LONG, GIVEN], edit_turns=turns, system="Be kind.")
        encoded, too_long = task.encode(OWN, task.examples("train"), training=True)
        assert (len(encoded), too_long) == (count, 0)
        asked, _ = task.encode(OWN, task.examples("train"), training=False)
        assert len(asked) == 3 and all(e.labels is None for e in asked)
        assert OWN.decode(asked[2].input_ids[:9]).startswith("<|bos|><|user|>Be kind.<|assistant|>hi")
    assert asked[1].prompt_length == asked[0].prompt_length < len(asked[1].input_ids)
    first, second, other = task.examples("train")
    assert task.encode(OWN, [second, other, first], training=True)[0] == encoded  # as few that were drawn stand
    _, too_long = task.encode(OWN, task.examples("train"), training=True, max_length=len(encoded[1].input_ids))
    assert too_long == 2  # both answers of the long one


def test_what_follows_an_answer_and_what_is_in_no_text(make: Make) -> None:
    first, second, other = make([LONG, GIVEN]).examples("train")
    assert [one.follows for one in (first, second, other)] == [False, True, False]
    thought = {
        "messages": [*talk("cat", "cats"), {"role": "user", "content": "dog", "name": "me"}, *talk("", "dogs")[1:]]
    }
    assert [bool(one.beside) for one in make([thought]).examples("train")] == [False, True]


def test_a_row_to_be_answered_ends_with_a_question_or_its_answer(make: Make) -> None:
    task = make([LONG, GIVEN])
    for said, asked in (
        (talk("a", "b", "c"), "user: c"),
        (talk("a", "b", "c", "d"), "user: c"),
        (talk("a"), "user: a"),
    ):
        assert task.question({"messages": said}, "row 1").texts[-1] == asked
    for said in (talk("a", "b")[1:], [{"role": "system", "content": "s"}], []):
        with pytest.raises(DataError, match="row 1: the conversation does not end with a message to be answered"):
            task.question({"messages": said}, "row 1")


def test_messages_come_in_many_words() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    row = {
        "talk": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
            {"from": "observation", "value": 3},
        ]
    }
    first, second, third = messages_of(row, "talk", "row 1")
    assert first == {"role": "user", "content": "ab"}
    assert second["content"] == "" and second["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert "name" not in second and third == {"role": "tool", "content": "3"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "critic", "content": "a"}]}, "row 3, message 1: the role is 'critic', none of system"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1: the field 'content' holds a list",
        ),
        ({"messages": "a"}, "row 3: the field 'messages' holds no list of messages"),
        ({"messages": talk("a")}, "row 3: the conversation has no answer"),
        ({"messages": talk("a", "b"), "tools": "f"}, "row 3: the field 'tools' is neither a list nor JSON text of one"),
        ({"other": 1}, "row 3: no field 'messages'"),
    ],
)
def test_rows_that_are_no_conversation_are_named(make: Make, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        make([LONG, LONG, row]).examples("train")


def test_tools_are_read_from_lists_or_texts(make: Make) -> None:
    rows = [{**LONG, "tools": TOOLS}, {**LONG, "tools": json.dumps(TOOLS)}, {**LONG, "tools": ""}, LONG]
    task = make(rows, train_turns="last")
    encoded, _ = task.encode(WITH_TOOLS, task.examples("train"), training=True)
    assert [WITH_TOOLS.decode(e.input_ids).count("[weather]") for e in encoded] == [1, 1, 0, 0]
    assert [e.texts[0].startswith("tools: ") for e in task.examples("train")] == [True, True, False, False]
