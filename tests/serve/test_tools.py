"""Calls of tools: as the chat template writes them, always of the schema, read back as the openai client wants them."""

import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from served import MODEL, Served, listening, make_adapters, user
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trimtab.serve.answers import Chat, Tokens
from trimtab.serve.app import create_app
from trimtab.serve.engine import BadRequest, Event
from trimtab.serve.grammar import Grammars
from trimtab.serve.guard import Access
from trimtab.serve.schemas import ChatRequest
from trimtab.serve.server import Settings, open_service
from trimtab.serve.tools import Calls

CITY = {"type": "object", "properties": {"in": {"enum": ["Rome", "Oslo"]}}, "required": ["in"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": {**CITY, "additionalProperties": False}}},
    {"type": "function", "function": {"name": "time"}},
]
_HEAD = "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
_TAIL = (
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TURN = "{{ '<|assistant|>' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}"
CALLS = {
    "tags": '<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>',
    "JSON": '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}',
    "a token": '<|pad|>[{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}, "id": "call00000"}]',
}
"""As templates of Qwen's, Llama's and Mistral's models write them; the pad token stands for a special one of theirs."""
AS_SAID = {  # without special tokens
    "tags": '<tool_call>\n{"name": "weather", "arguments": {"in": "Rome"}}\n</tool_call>',
    "JSON": '{"name": "weather", "parameters": {"in": "Rome"}}',
    "a token": '[{"name": "weather", "arguments": {"in": "Rome"}, "id": "call00000"}]',
}


def template(call: str) -> str:
    calls = "{% for call in m.tool_calls or [] %}{% set c = call.function %}" + call + "{% endfor %}"
    return _HEAD + _TURN + calls + _TAIL


@pytest.fixture(params=CALLS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL)
    made.chat_template = template(CALLS[request.param])
    made.kind = request.param
    return made


def takes(tokenizer: Any, calls: Calls, text: str) -> bool:
    """Whether an answer may be this text and end there."""
    form = Grammars(tokenizer, len(tokenizer), {tokenizer.eos_token_id}).form(calls.grammar, "tools")
    for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]:
        if not form.allowed()[token]:
            return False
        form.saw(token)
    return True


def test_an_answer_is_words_or_a_call_of_the_schema(tokenizer: Any) -> None:
    said = AS_SAID[tokenizer.kind]
    written = ("<|pad|>" if tokenizer.kind == "a token" else "") + said
    auto, required = Calls(tokenizer, TOOLS, "auto"), Calls(tokenizer, TOOLS, "required")
    for calls in (auto, required, Calls(tokenizer, TOOLS, "weather")):
        assert takes(tokenizer, calls, written)
        assert calls.read(said) == ("", ("weather", '{"in": "Rome"}'))
        assert not takes(tokenizer, calls, written.replace("Rome", "Paris"))
        assert not takes(tokenizer, calls, written.replace("weather", "wind"))
        assert not takes(tokenizer, calls, written[: len(written) // 2 + 10])
    empty = written.replace("weather", "time").replace('{"in": "Rome"}', "{}")
    assert takes(tokenizer, auto, empty) and takes(tokenizer, required, empty)
    assert not takes(tokenizer, Calls(tokenizer, TOOLS, "weather"), empty)
    for words in ("", "It rains in Rome.", "Ünder\n<tool or {x"):
        assert takes(tokenizer, auto, words) and not takes(tokenizer, required, words)
        assert takes(tokenizer, auto, words + written) and not takes(tokenizer, required, "x" + words + written)
        assert auto.read(words) == (words, None)
        assert auto.read(words + said) == (words, ("weather", '{"in": "Rome"}'))


def test_a_stream_holds_back_what_may_become_a_call(tokenizer: Any) -> None:
    body = ChatRequest(model="a", messages=[user("Hi")], tools=TOOLS)
    for words, call in (("It rains <tool", ""), ("So: ", AS_SAID[tokenizer.kind]), ("", AS_SAID[tokenizer.kind])):
        chat = Chat(body, Tokens(tokenizer))
        *rest, last = words + call
        events = [*(Event(text=one) for one in rest), Event(text=last, finish_reason="stop")]
        parts = [chat.part(0, event, first=i == 0).choices[0] for i, event in enumerate(events)]
        assert "".join(part.delta.content for part in parts) == words
        called = [one for part in parts for one in part.delta.tool_calls or []]
        assert [(one.index, one.function.name) for one in called] == ([(0, "weather")] if call else [])
        assert parts[-1].finish_reason == ("tool_calls" if call else "stop")


FAMILIES = {
    "qwen2_5": ("<|im_end|>", "<tool_call>\n{}\n</tool_call>"),
    "qwen3": ("<|im_end|>", "<tool_call>\n{}\n</tool_call>"),
    "llama3_1": ("<|eot_id|>", "{}"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_models_own_templates(name: str) -> None:
    """As TRL ships them."""
    end, around = FAMILIES[name]
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = files("trl").joinpath(f"chat_templates/{name}.jinja").read_text()
    tokenizer.add_special_tokens({"eos_token": end})
    calls = Calls(tokenizer, TOOLS, "auto")
    field = "parameters" if name == "llama3_1" else "arguments"
    written = around.replace("{}", f'{{"name": "weather", "{field}": {{"in": "Oslo"}}}}')
    assert calls.read("Well: " + written) == ("Well: ", ("weather", '{"in": "Oslo"}'))
    assert takes(tokenizer, calls, "Well: " + written) and not takes(tokenizer, calls, written[:-1])


def test_a_template_whose_calls_cannot_be_read_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = template("<function={{ c.name }}>{% for k in c.arguments %}<{{ k }}>{% endfor %}")
    with pytest.raises(BadRequest, match="writes no name with the arguments as JSON behind it"):
        Calls(tokenizer, TOOLS, "auto")
    tokenizer.chat_template = template("")
    with pytest.raises(BadRequest, match="does not write calls of tools"):
        Calls(tokenizer, TOOLS, "auto")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tools")
    shutil.copytree(MODEL, folder / "model")
    (folder / "model/chat_template.jinja").write_text(template(CALLS["tags"]))
    make_adapters(folder / "adapters", model=str(folder / "model"))
    service = open_service(Settings(str(folder / "model"), folder=folder / "adapters", dtype="float32"))
    try:
        with listening(create_app(service, Access(), 1 << 20)) as url:
            yield Served(service, url, folder / "adapters")
    finally:
        service.engine.close()


def ask(served: Served, **fields: Any) -> Any:
    asked = {"model": "ends", "messages": [user("cat")], "tools": TOOLS, "max_tokens": 80, "temperature": 0, **fields}
    return served.openai.chat.completions.create(**asked)


WEATHER: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("model", ["model", "ends", "all"])
def test_a_call_that_is_asked_for_is_made(served: Served, model: str) -> None:
    answers = ask(served, model=model, tool_choice=WEATHER, temperature=1.2, n=4, seed=1)
    ids = set()
    for choice in answers.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.function.name == "weather" and json.loads(call.function.arguments)["in"] in ("Rome", "Oslo")
        ids.add(call.id)
    assert len(ids) == 4
    message = ask(served, model=model, tool_choice="required").choices[0].message
    talk = [user("cat"), message.model_dump(exclude_none=True)]
    talk += [{"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    assert ask(served, model=model, messages=talk).choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_a_call_is_streamed(served: Served) -> None:
    whole = ask(served, tool_choice="required").choices[0].message.tool_calls[0].function
    *_, last = parts = [part.choices[0] for part in ask(served, tool_choice="required", stream=True)]
    (call,) = [call for part in parts for call in part.delta.tool_calls or []]
    assert (call.index, call.function.name, call.function.arguments) == (0, whole.name, whole.arguments)
    assert last.finish_reason == "tool_calls" and not "".join(part.delta.content or "" for part in parts)


@pytest.mark.parametrize("model", ["model", "ends", "apart", "all", "new"])
def test_who_may_call_and_does_not_says_what_he_would_say(served: Served, model: str) -> None:
    free, may = (ask(served, model=model, tool_choice=choice, max_tokens=20).choices[0] for choice in ("none", "auto"))
    assert free.message.content == may.message.content and may.message.tool_calls is None
    assert free.finish_reason == may.finish_reason
    streamed = ask(served, model=model, max_tokens=20, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == free.message.content


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"tool_choice": {"type": "function", "function": {"name": "wind"}}}, "tool_choice"),
    "no tools": ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    "another choice": ({"tool_choice": "any"}, "tool_choice"),
    "no function": ({"tools": [{"type": "retrieval"}]}, "tools"),
    "no name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    "no object": ({"tools": [{**WEATHER, "function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools"),
    "keyword": (
        {"tools": [{**WEATHER, "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}]},
        "tools",
    ),
    "a form too": ({"response_format": {"type": "json_object"}}, "tools"),
    "without an end": ({"extra_body": {"ignore_eos": True}}, "ignore_eos"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_called_is_refused_by_name(served: Served, name: str) -> None:
    import openai

    fields, param = WRONG[name]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(served, **fields)
    assert refused.value.param == param, refused.value
    assert param in str(refused.value)
