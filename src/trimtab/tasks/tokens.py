"""Text to batches: prompts and answers to tokens, tokens to padded tensors.

encoded = encode(tokenizer, "What is 2+2?", "4")      # token ids; labels are -100 on the prompt
batch = Collator(tokenizer)([encoded])                # input_ids, attention_mask, labels, prompt_lengths
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.errors import DataError

IGNORED = -100  # the label of a token that the loss skips
Chat = Literal[True, False, "auto"]
Turns = Literal["each", "first"]
"""What the prompt is in a conversation: of each answer all before it, or for all of them what is before the first."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids, before padding."""

    input_ids: list[int]
    prompt_length: int
    labels: list[int] | tuple[float, ...] | int | float | None
    """One label a token, or a class, 0 or 1 for each class, or a number; None for a prompt to generate from."""
    token_type_ids: list[int] | None = None
    """Which text of a pair each token is from, for the models that ask."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: str | None = None,
    *,
    chat: Chat = "auto",
    system: str | None = None,
) -> Encoded:
    """Tokenise a prompt, and the answer apart from it, so that training sees the tokens that generation will.

    Raises DataError when a chat template is asked for and the tokenizer has none, or refuses `system`.
    """
    text, special = rendered(tokenizer, prompt, chat=chat, system=system)
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    if special and ids and ids[-1] in ends and ids != token_ids(tokenizer, prompt):
        ids.pop()  # the tokenizer closes whole texts; a prompt goes on
    if answer is None:
        return Encoded(ids, len(ids), None)
    end = tokenizer.eos_token or "" if special else turn_end(tokenizer)
    answer_ids = token_ids(tokenizer, answer) + token_ids(tokenizer, end)
    return Encoded(ids + answer_ids, len(ids), [IGNORED] * len(ids) + answer_ids)


def rendered(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: Chat, system: str | None) -> tuple[str, bool]:
    """The text that a prompt becomes, and whether the tokenizer adds its special tokens to that; raises DataError."""
    if is_templated(tokenizer, chat):
        messages = with_system(system, [{"role": "user", "content": prompt}])
        remedy = "remove system: or set chat: false"
        return render_messages(tokenizer, messages, remedy, add_generation_prompt=True), False
    return prompt, True


def is_templated(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> bool:
    """Whether prompts are put into a chat template."""
    return tokenizer.chat_template is not None if chat == "auto" else chat


def cut(encoded: Encoded, length: int) -> Encoded:
    """The example's first `length` tokens, of a prompt with an answer."""
    labels = encoded.labels[:length] if isinstance(encoded.labels, list) else encoded.labels
    return replace(encoded, input_ids=encoded.input_ids[:length], labels=labels)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], label: Any, max_length: int
) -> tuple[Encoded, bool]:
    """Tokenise a text or a pair for classification; also say whether it was cut to `max_length`."""
    kept = tokenizer(*texts, truncation=True, max_length=max_length)
    ids, types = list(kept["input_ids"]), list(kept.get("token_type_ids", []))
    cut = len(ids) == max_length and len(tokenizer(*texts)["input_ids"]) > max_length
    return Encoded(ids, len(ids), label, types if any(types) else None), cut


def encode_words(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], labels: Sequence[int], max_length: int
) -> tuple[Encoded, bool]:
    """Tokenise words with blanks between them, each one's label at its first token; also whether they were cut.

    Raises DataError where a word becomes no token, or the tokenizer does not say which token is whose.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer does not say which word a token is of; give the model a tokenizer.json")
    text, starts = " ".join(words), list(accumulate((len(word) + 1 for word in words), initial=0))
    kept = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    ids, first, word = list(kept["input_ids"]), dict[int, int](), 0
    for token, (start, end) in enumerate(kept["offset_mapping"]):
        while word < len(words) and starts[word + 1] - 1 <= start:
            word += 1
        if word < len(words) and end > max(start, starts[word]):
            first.setdefault(word, token)
    was_cut = len(ids) == max_length and len(tokenizer(text)["input_ids"]) > max_length
    reached = max(first, default=-1) + 1 if was_cut else len(words)
    if lost := [words[i] for i in range(reached) if i not in first]:
        raise DataError(f"the word {lost[0]!r} in {text[:60]!r} becomes no token of this model; leave it out")
    placed = [IGNORED] * len(ids)
    for word, token in first.items():
        placed[token] = labels[word]
    types = list(kept.get("token_type_ids", []))
    return Encoded(ids, len(ids), placed, types if any(types) else None), was_cut


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text alone, without those that the tokenizer would add around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def with_system(text: str | None, messages: Sequence[Any]) -> list[Any]:
    """Messages behind one of the system, where there is a text for it."""
    return [*([] if text is None else [{"role": "system", "content": text}]), *messages]


def render_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], remedy: str, **how: Any) -> str:
    """What the chat template makes of messages; `how` as `apply_chat_template` takes it.

    Raises DataError, ending with `remedy`, where there is no template or it refuses them.
    """
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template; in a recipe set chat: false or auto")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **how))
    except Exception as error:  # jinja's errors, whose package need not be imported here
        raise DataError(f"the tokenizer's chat template refuses the prompt ({error}); {remedy}") from None


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after an answer, up to the token that ends it; eos where it writes nothing."""
    mark = "[answer]"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    _, _, rest = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition(mark)
    eos = str(tokenizer.eos_token or "")
    return rest[: rest.index(eos)] + eos if eos and eos in rest else rest.rstrip() or eos


class Collator:
    """Pads encoded examples into a batch, on the right; prompts to generate from, which end together, on the left.

    Training examples, and prompts that end before their tokens do, get `prompt_lengths` (B,). Without a pad token eos
    fills, and the mask tells them apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = int(next(i for i in ids if i is not None))

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        left = batch[0].labels is None
        rows = [e.input_ids for e in batch]
        out = {
            "input_ids": _pad(rows, self.pad_id, left),
            "attention_mask": _pad([[1] * len(r) for r in rows], 0, left),
        }
        if any(e.token_type_ids for e in batch):
            out["token_type_ids"] = _pad([e.token_type_ids or [0] * len(e.input_ids) for e in batch], 0, left)
        labels: list[Any] = [e.labels for e in batch]
        if isinstance(labels[0], list) or any(e.prompt_length < len(e.input_ids) for e in batch):
            out["prompt_lengths"] = torch.tensor([e.prompt_length for e in batch])
        if isinstance(labels[0], list):
            out["labels"] = _pad(labels, IGNORED, left)
        elif labels[0] is not None:
            whole = isinstance(labels[0], int)
            out["labels"] = torch.tensor(labels, dtype=torch.long if whole else torch.float)
        return out


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool) -> Tensor:
    """(B, T) from rows of different lengths."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor(
        [[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)], dtype=torch.long
    )
