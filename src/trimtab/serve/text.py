"""The text of an answer as its tokens come: whole characters only, and nothing that a stop string may yet take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\N{REPLACEMENT CHARACTER}"


class AnswerText:
    """Decodes one answer.

    Args:
        tokenizer: of the model; None gives no text.
        stop: strings before which the text ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._context = self._read = 0  # tokens that the next are decoded behind, since a first one loses its space
        self._held = ""

    def add(self, token: int) -> tuple[str, str | None]:
        """What the text grows by, and the stop string that was reached."""
        self._ids.append(token)
        return self._cut(self._decoded())

    def end(self) -> str:
        """What was held back, when no more tokens come; half characters are shown as such."""
        rest = self._held + self._decoded(last=True)
        self._held = ""
        return rest

    def _decoded(self, last: bool = False) -> str:
        if self._tokenizer is None:
            return ""
        before = self._decode(self._ids[self._context : self._read])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before) or (now.endswith(_HALF) and not last):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _cut(self, new: str) -> tuple[str, str | None]:
        if not self._stop:
            return new, None
        text = self._held + new
        found = min(((text.find(stop), stop) for stop in self._stop if stop in text), default=None)
        if found is not None:
            self._held, self._ids, self._context, self._read = "", [], 0, 0
            return text[: found[0]], found[1]
        held = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
