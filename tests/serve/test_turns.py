"""Several turns: the tokens that training edited are those that chat, a kept cache and the server edit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from peft import PeftModel
from served import MODEL, Served, listening, make_adapters
from talks import TEMPLATES, TOOLS, WITH_TOOLS, conversations
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from trimtab.runs.generate import Answerer
from trimtab.runs.trainer import pack
from trimtab.serve.answers import Chat, Tokens
from trimtab.serve.app import create_app
from trimtab.serve.guard import Access
from trimtab.serve.rows import Limits
from trimtab.serve.schemas import ChatRequest
from trimtab.serve.server import Settings, open_service
from trimtab.tasks.messages import answers
from trimtab.tasks.tokens import Collator, Turns
from trimtab.tasks.turns import encode_answers, encode_messages

POSITIONS = {"ends": "f2+l3", "prompt": "prompt", "generated": "generated", "all": "all"}
ADAPTERS: dict[str, dict[str, Any]] = {
    f"{turns}-{name}": {"positions": positions, "r": 2, "edit_turns": turns}
    for turns in ("each", "first")
    for name, positions in POSITIONS.items()
}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is a cat?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"in": "Rome"}}}],
    },
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "An animal."},
    {"role": "user", "content": "And a dog?"},
    {"role": "assistant", "content": "One too."},
]
TOLERANCE = 1e-3


@dataclass
class Used:
    """A model folder, adapters on it, and every way to use them."""

    served: Served
    tokenizer: PreTrainedTokenizerBase
    chat: Answerer


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Used]:
    """The bundled model with a chat template that writes tools."""
    folder = tmp_path_factory.mktemp("conversations")
    shutil.copytree(MODEL, folder / "model")
    (folder / "model/chat_template.jinja").write_text(TEMPLATES["tools"])
    make_adapters(folder / "adapters", ADAPTERS, str(folder / "model"))
    how: dict[str, Any] = {"folder": folder / "adapters", "dtype": "float32", "limits": Limits(block=4)}
    service = open_service(Settings(str(folder / "model"), **how))
    chat = Answerer({name: folder / "adapters" / name for name in ADAPTERS})
    chat.model.float()  # as the server runs it
    try:
        with listening(create_app(service, Access(), 1 << 20)) as url:
            yield Used(Served(service, url, folder / "adapters"), chat.tokenizer, chat)
    finally:
        service.engine.close()


def trained(model: Any, tokenizer: PreTrainedTokenizerBase, turns: Turns) -> dict[int, Tensor]:
    """By the place of each answer the distribution of its first token (V,), in the forward of a training step."""
    places, found = answers(TALK), {}
    rows = [[place] for place in places] if turns == "each" else [places]
    encoded = [encode_answers(tokenizer, TALK, own, tools=TOOLS, turns=turns) for own in rows]
    model.train()
    with torch.no_grad():
        padded, packed = model(**Collator(tokenizer)(encoded)).logits, model(**pack(encoded)).logits[0]
    model.eval()
    offset = 0
    for row, (own, example) in enumerate(zip(rows, encoded, strict=True)):
        for place in own:
            last = len(encode_messages(tokenizer, TALK[:place], tools=TOOLS).input_ids) - 1
            assert (padded[row, last] - packed[offset + last]).abs().max() < TOLERANCE
            found[place] = padded[row, last].log_softmax(-1)
        offset += len(example.input_ids)
    return found


def said(model: Any, call: Any) -> Tensor:
    """The distribution (V,) of the first token of what a call generates."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out[0, -1]))
    try:
        call()
    finally:
        hook.remove()
    return seen[0].log_softmax(-1)


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_training_edited_is_edited_in_use(used: Used, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: Turns = ADAPTERS[name]["edit_turns"]
    chat, tokenizer, model = used.chat, used.tokenizer, used.chat.model
    assert isinstance(model, PeftModel)
    model.set_adapter(name)
    cache, base = DynamicCache(config=model.config), model.get_base_model()
    for place, wanted in trained(model, tokenizer, turns).items():
        asked = encode_messages(tokenizer, TALK[:place], tools=TOOLS, turns=turns)
        # The server.
        top = int(wanted.argmax())
        body = {"model": name, "messages": TALK[:place], "tools": TOOLS, "tool_choice": "none"}
        more = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5}
        answer = used.served.client.post("/v1/chat/completions", json={**body, **more})
        (first,) = answer.json()["choices"][0]["logprobs"]["content"]
        assert first["token"] == tokenizer.decode([top])
        for one, value in zip(first["top_logprobs"], wanted.topk(5).values, strict=True):
            assert one["logprob"] == pytest.approx(float(value), abs=TOLERANCE)
        # Chat, which takes no tools by itself.
        monkeypatch.setattr(
            "trimtab.runs.generate.encode_messages", lambda *args, **how: encode_messages(*args, tools=TOOLS, **how)
        )
        mine = said(base, partial(chat.reply, TALK[:place], name, max_new_tokens=1))
        assert (mine - wanted).abs().max() < TOLERANCE
        # A cache that is kept.
        ids, length = torch.tensor([asked.input_ids]), asked.prompt_length
        how = {"past_key_values": cache, "prompt_lengths": [length], "max_new_tokens": 1, "do_sample": False}
        if name == "each-ends" and place > 2:  # its earlier end was edited, which is no end any more
            with pytest.raises(ValueError, match="the cache was filled for prompts of"):
                model.generate(ids, **how)
        else:
            kept = said(base, partial(model.generate, ids, **how))
            assert (kept - wanted).abs().max() < TOLERANCE
            assert cache.get_seq_length() == ids.shape[1]


@given(conversations())
def test_the_server_asks_what_was_trained(messages: list[dict[str, Any]]) -> None:
    tokens = Tokens(WITH_TOOLS)
    for place in answers(messages):
        body = ChatRequest(model="a", messages=messages[:place], tools=TOOLS, tool_choice="none")
        form = Chat(body, tokens)
        for turns in ("each", "first"):
            trained = encode_answers(WITH_TOOLS, messages, [place], tools=TOOLS, turns=turns)
            assert form.prompts == [trained.input_ids[: len(form.prompts[0])]]
            assert form.prompt_ends(turns) == [trained.prompt_length]


def test_one_prompt_for_all_answers_shares_what_is_cached(used: Used) -> None:
    """With `first` a conversation's blocks are found again in its next request; with `each` a new suffix is edited."""
    cached = {"each": 0, "first": 0}
    for turns, count in product(cached, range(4)):  # prompts that end at every place of a block
        opening = {"role": "user", "content": f"Say {turns}{' please' * count}."}
        for later in ([], TALK[4:6]):
            body = {"model": f"{turns}-ends", "messages": [opening, *later], "max_tokens": 1}
            answer = used.served.client.post("/v1/chat/completions", json=body).json()
        cached[turns] += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached["first"] > cached["each"]
