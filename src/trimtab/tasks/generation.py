"""Generation: a prompt in, text out, scored as a whole, by its last number, or by the choice it names.

{"input": "cat", "output": "cats"} with prompt "{input}" and answer "{output}" asks `cat` and expects `cats`.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from trimtab.data import DataError, Encoded, Row, encode
from trimtab.schema import GenerationSpec, parse_template
from trimtab.tasks.base import Example, Task, field, is_missing, needed
from trimtab.tasks.scoring import last_number, named_choice, same_number


def render(template: str, row: Row, where: str, *, full: bool = False) -> str:
    """Fill a template from a row; null and NaN give the empty string, or with `full` an error.

    Raises DataError for a field that is not there and, with `full`, for an empty one.
    """
    get = needed if full else field
    parts = [(text, get(row, name, where) if name is not None else "") for text, name in parse_template(template)]
    return "".join(text + ("" if is_missing(value) else str(value)) for text, value in parts)


class GenerationTask(Task[GenerationSpec]):
    """Predictions are the generated texts."""

    def example(self, row: Row, where: str) -> Example:
        prompt = render(self.spec.prompt, row, where)
        if not prompt.strip():
            raise DataError(
                f"{where}: the prompt {self.spec.prompt!r} comes out empty; fill the field or remove the row"
            )
        answer = render(self.spec.answer, row, where, full=True)
        if self.spec.score == "number" and last_number(answer) is None:
            raise DataError(f"{where}: score: number needs a number in the answer, which is {answer[:60]!r}")
        if self.spec.choices and named_choice(answer, self.spec.choices) is None:
            raise DataError(f"{where}: the answer {answer[:60]!r} names none of choices: {self.spec.choices}")
        return Example((prompt,), answer, None, row)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, training: bool
    ) -> tuple[list[Encoded], int]:
        """Tokenise; in training the examples longer than `max_length` are left out and counted.

        Raises DataError when none is left.
        """
        encoded = [
            encode(tokenizer, e.texts[0], e.answer if training else None, chat=self.spec.chat, system=self.spec.system)
            for e in examples
        ]
        longest = self.spec.training.max_length
        kept = [e for e in encoded if len(e.input_ids) <= longest] if training else encoded
        if not kept:
            shortest = min((len(e.input_ids) for e in encoded), default=0)
            raise DataError(
                f"{self.name}: none of {len(encoded)} training examples fits in max_length {longest}; the shortest has "
                f"{shortest} tokens. Raise training: max_length:"
            )
        return kept, len(encoded) - len(kept)

    def scores(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """The share of right answers and, for number and choice, of outputs that hold an answer at all."""
        scores = {self.main_score: sum(self.per_item(predictions, examples)) / len(examples)}
        if self.main_score != "exact_match":
            scores["answered"] = sum(self._parse(p) is not None for p in predictions) / len(examples)
        return scores

    def per_item(self, predictions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        return [float(self._right(p, e.answer)) for p, e in zip(predictions, examples, strict=True)]

    def _right(self, prediction: str, answer: str) -> bool:
        if self.spec.score == "number":
            return same_number(prediction, answer)
        if self.spec.score == "choice":
            return self._parse(prediction) == self._parse(answer)
        return prediction.strip() == answer.strip()

    def _parse(self, text: str) -> float | int | None:
        return named_choice(text, self.spec.choices) if self.spec.choices else last_number(text)
