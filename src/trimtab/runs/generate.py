"""Answers from one base model under several adapters at once: what `generate` and `chat` run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from trimtab.adapter.folder import did_you_mean, inspect_adapter, why_not_asked
from trimtab.adapter.forward import BASE
from trimtab.adapter.hub import local
from trimtab.adapter.weights import CONFIG
from trimtab.errors import AdapterError, ModelError, RunError
from trimtab.runs.folder import RunFolder
from trimtab.runs.models import ModelSource, load_model, load_tokenizer
from trimtab.runs.predict import check_context, context_of, predict
from trimtab.tasks.templates import parse_template
from trimtab.tasks.tokens import Encoded, Turns, encode, is_templated
from trimtab.tasks.turns import encode_messages

Message = dict[str, str]


def named_folder(asked: str) -> tuple[str, str, str]:
    """(name, "=", folder) of `NAME=FOLDER`; the first two are empty for a folder alone, which may have a = in it."""
    name, equals, folder = asked.partition("=")
    return (name, equals, folder) if equals and "/" not in name and not Path(asked).exists() else ("", "", asked)


def find_adapters(folders: Sequence[str], left_out: Callable[[str], None] | None = None) -> dict[str, Path]:
    """Adapter folders by name: each folder itself, or those that stand in it; a name on the Hub is fetched.

    `NAME=FOLDER` has an adapter go by another name than its folder's.

    Args:
        left_out: is told of those in a folder of several that answer no prompts, which are left out; else none is.

    Raises:
        AdapterError: a folder holds no adapter, or two adapters share a name.
    """
    found: dict[str, Path] = {}
    for asked in folders:
        own, named, given = named_folder(asked)
        folder = local(given)
        inside = [folder] if (folder / CONFIG).exists() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        if not inside:
            raise AdapterError(
                f"{folder}: no adapter there, nor in a folder inside it (no adapter_config.json){did_you_mean(folder)}"
            )
        if named and (len(inside) > 1 or not own):
            raise AdapterError(f"{asked}: give one name and the folder of one adapter; there are {len(inside)}.")
        for path in inside:
            if left_out and path != folder and (reason := why_not_asked(path)):
                left_out(f"{path} is left out: {reason}.")
                continue
            here = given.partition("@")[0] if folder != Path(given) else path.resolve()
            name = (own or Path(here).name).replace(".", "_")
            if name in found:
                raise AdapterError(
                    f"two adapters are called {name!r}, {found[name]} and {path}; name one, as in other={path}."
                )
            found[name] = path
    return found


class Answerer:
    """A base model with its adapters loaded; each row of a batch may use another one, or none (`__base__`)."""

    def __init__(self, adapters: dict[str, Path], model: str | None = None) -> None:
        """Load the base model and every adapter.

        Raises:
            AdapterError: an adapter is damaged, is of another base model, or does not generate text.
            ModelError: the base model cannot be loaded.
        """
        infos = {name: inspect_adapter(path) for name, path in adapters.items()}
        bases = {info.base_model for info in infos.values()}
        if model is None and not bases:
            raise AdapterError("nothing to answer with: give an adapter's folder with --adapter, or a --model.")
        if model is None and len(bases) > 1:
            raise AdapterError(
                f"the adapters name {len(bases)} base models ({', '.join(map(str, bases))}); say --model."
            )
        for path in adapters.values():
            if reason := why_not_asked(path):
                remedy = f"On a file: trimtab predict FILE -a {path}; here name only adapters that generate."
                raise AdapterError(f"{path}: {reason}. {remedy}")
        self.base_name = model if model is not None else str(bases.pop())
        try:
            self.tokenizer = load_tokenizer(self.base_name)
        except ModelError as error:
            if model is not None:
                raise
            raise ModelError(
                f"{error}\nThat is the base that the adapter was trained on; say where it is: --model"
            ) from None
        self.prompts = {name: _prompting(path) for name, path in adapters.items()}
        self.turns: dict[str, Turns] = {name: info.config.edit_turns for name, info in infos.items()}
        loaded = load_model(ModelSource(self.base_name, _dtype(list(adapters.values()))))
        for name, path in adapters.items():
            if isinstance(loaded, PeftModel):
                loaded.load_adapter(str(path), adapter_name=name)
            else:
                loaded = PeftModel.from_pretrained(loaded, str(path), adapter_name=name)
        self.model = loaded.eval()

    def answer(self, prompt: str, names: Sequence[str], max_new_tokens: int | None = None) -> list[str]:
        """The greedy answers to one prompt under each adapter named, worked out in a single batch."""
        encoded = [self.encode(prompt, name) for name in names]
        most = max_new_tokens or max(
            (self.prompts[n]["max_new_tokens"] for n in names if n in self.prompts), default=64
        )
        return self._run(encoded, names, most)

    def reply(self, messages: list[Message], name: str, max_new_tokens: int = 256) -> str:
        """The next turn of a conversation, each of whose user turns is put as the adapter's training put prompts.

        Where that was without a chat template, only the last turn is asked. What of it is edited, the adapter's
        `edit_turns` says. The answer is shorter than `max_new_tokens` where the model reads no more.

        Raises:
            DataError: the conversation is longer than the model reads.
        """
        how = self._prompts_of(name)
        if not is_templated(self.tokenizer, how["chat"]):
            encoded = _put(self.tokenizer, messages[-1]["content"], name, how)
        else:
            put = [
                {**m, "content": _filled(how["prompt"], m["content"], name)} if m["role"] == "user" else m
                for m in messages
            ]
            turns = self.turns.get(name, "each")
            encoded = encode_messages(self.tokenizer, put, system=how["system"], turns=turns)
        room = context_of(self.model)
        left = max_new_tokens if room is None else min(max_new_tokens, max(1, room - len(encoded.input_ids)))
        return self._run([encoded], [name], left)[0]

    def _run(self, encoded: Sequence[Encoded], names: Sequence[str], max_new_tokens: int) -> list[str]:
        check_context(self.model, encoded, max_new_tokens, names.__getitem__)
        adapter_names = names if isinstance(self.model, PeftModel) else None
        texts = predict(self.model, self.tokenizer, encoded, max_new_tokens=max_new_tokens, adapter_names=adapter_names)
        return [text.strip() for text in texts]

    def _prompts_of(self, name: str) -> dict[str, Any]:
        """How the adapter's training wrote prompts; for the base model how the first adapter's did."""
        return self.prompts.get(name) or next(iter(self.prompts.values()), _PLAIN)

    def encode(self, prompt: str, name: str, answer: str | None = None) -> Encoded:
        """The prompt as the adapter, or for the base model the first one, takes it; an answer as in its training."""
        return _put(self.tokenizer, prompt, name, self._prompts_of(name), answer)


def encode_as(folder: Path, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Encoded:
    """The prompt as the training of the adapter in a folder wrote its own; raises as `Answerer.encode`."""
    return _put(tokenizer, prompt, folder.name, _prompting(folder))


def _put(
    tokenizer: PreTrainedTokenizerBase, prompt: str, name: str, how: dict[str, Any], answer: str | None = None
) -> Encoded:
    return encode(tokenizer, _filled(how["prompt"], prompt, name), answer, chat=how["chat"], system=how["system"])


def _filled(template: str, text: str, name: str) -> str:
    """The template with the text in its field; the text alone where it has none."""
    parts = parse_template(template)
    fields = {field for _, field in parts if field is not None}
    if len(fields) > 1:
        raise AdapterError(
            f"{name}: was trained on prompts of several fields, {template!r}; put them in a file: trimtab predict FILE."
        )
    return "".join(before + (text if field is not None else "") for before, field in parts) if fields else text


_PLAIN: dict[str, Any] = {"prompt": "{prompt}", "chat": "auto", "system": None, "max_new_tokens": 64}


def _prompting(folder: Path) -> dict[str, Any]:
    """How a run of trimtab wrote its prompts; the chat template alone for adapters from elsewhere."""
    task = _run_of(folder).get("task")
    if not task:
        return _PLAIN
    how = {key: task.get(key, plain) for key, plain in _PLAIN.items()}
    prompts = how["prompt"] if isinstance(how["prompt"], list) else [how["prompt"]]
    return {**how, "prompt": prompts[-1]}  # of several, the one of the fewest fields


def _dtype(folders: list[Path]) -> str:
    """What the adapters were trained in, where they agree; else as the weights are stored."""
    dtypes = {_run_of(folder).get("dtype", "auto") for folder in folders}
    return str(dtypes.pop()) if len(dtypes) == 1 else "auto"


def _run_of(folder: Path) -> dict[str, Any]:
    try:
        return RunFolder(folder).run
    except RunError:
        return {}


__all__ = ["BASE", "Answerer", "Message", "encode_as", "find_adapters"]
