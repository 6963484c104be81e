"""Generation: a prompt in, text out, scored as a whole, by its last number, or by the choice it names.

{"input": "cat", "output": "cats"} with prompt "{input}" and answer "{output}" asks `cat` and expects `cats`.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from trimtab.recipe.schema import GenerationSpec, parse_template
from trimtab.tasks.base import Example, Task, field, is_missing, needed
from trimtab.tasks.scores import last_number, named_choice, overlap, same_number
from trimtab.tasks.tokens import DataError, Encoded, Row, cut, encode


def render(template: str, row: Row, where: str, *, full: bool = False) -> str:
    """Fill a template from a row; null and NaN give the empty string, or with `full` an error.

    Raises DataError for a field that is not there and, with `full`, for an empty one.
    """
    get = needed if full else field
    parts = [(text, get(row, name, where) if name is not None else "") for text, name in parse_template(template)]
    return "".join(text + ("" if is_missing(value) else str(value)) for text, value in parts)


def chosen_template(templates: str | list[str], row: Row) -> str:
    """The template itself or, of several, the first whose fields all hold something, else the last."""
    if isinstance(templates, str):
        return templates
    for template in templates:
        if not any(is_missing(row.get(name)) for _, name in parse_template(template) if name is not None):
            return template
    return templates[-1]


class GenerationTask(Task[GenerationSpec]):
    """Predictions are the generated texts."""

    def example(self, row: Row, where: str) -> Example:
        prompt = render(chosen_template(self.spec.prompt, row), row, where)
        if not prompt.strip():
            raise DataError(
                f"{where}: the prompt {self.spec.prompt!r} comes out empty; fill the field or remove the row"
            )
        answer = render(self.spec.answer, row, where, full=self.spec.score != "overlap")  # which has a value for ""
        if self.sets:
            return Example((prompt,), answer, None, row)  # a row to train on; each set checks its own
        if self.spec.score == "number" and last_number(answer) is None:
            raise DataError(f"{where}: score: number needs a number in the answer, which is {answer[:60]!r}")
        if self.spec.choices and named_choice(answer, self.spec.choices) is None:
            raise DataError(f"{where}: the answer {answer[:60]!r} names none of choices: {self.spec.choices}")
        return Example((prompt,), answer, None, row)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, training: bool
    ) -> tuple[list[Encoded], int]:
        """Tokenise; training examples longer than `max_length` are left out or, with `too_long: cut`, cut; and counted.

        What leaves no token of the answer is left out in any case.

        Raises DataError when none is left.
        """
        encoded = [
            encode(tokenizer, e.texts[0], e.answer if training else None, chat=self.spec.chat, system=self.spec.system)
            for e in examples
        ]
        if not training:
            return encoded, 0
        longest, cuts = self.spec.training.max_length, self.spec.training.too_long == "cut"
        kept = [cut(e, longest) for e in encoded if len(e.input_ids) <= longest or (cuts and e.prompt_length < longest)]
        if not kept:
            shortest = min((len(e.input_ids) for e in encoded), default=0)
            raise DataError(
                f"{self.name}: none of {len(encoded)} training examples fits in max_length {longest}; the shortest has "
                f"{shortest} tokens. Raise training: max_length:"
            )
        return kept, sum(len(e.input_ids) > longest for e in encoded)

    def scores(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """The share of right answers and, for number and choice, of outputs that hold an answer at all."""
        scores = {self.main_score: sum(self.per_item(predictions, examples)) / len(examples)}
        if self.main_score in ("number", "choice"):
            scores["answered"] = sum(self._parse(p) is not None for p in predictions) / len(examples)
        return scores

    def item(self, prediction: str, example: Example) -> float:
        if self.spec.score == "number":
            return float(same_number(prediction, example.answer))
        if self.spec.score == "choice":
            wanted = self._parse(example.answer)
            return float(wanted is not None and self._parse(prediction) == wanted)
        if self.spec.score == "overlap":
            return overlap(prediction, example.answer)
        return float(prediction.strip() == example.answer.strip())

    def _parse(self, text: str) -> float | int | None:
        return named_choice(text, self.spec.choices) if self.spec.choices else last_number(text)
