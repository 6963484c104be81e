"""Generation: a prompt in, text out, scored as a whole, by its last number, or by the choice it names.

{"input": "cat", "output": "cats"} with prompt "{input}" and answer "{output}" asks `cat` and expects `cats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from transformers import PreTrainedTokenizerBase

from trimtab.errors import DataError
from trimtab.tasks.base import Example, Head, Task, crossed
from trimtab.tasks.files import Row
from trimtab.tasks.scores import GENERATION_SCORES, Truth, named_choice
from trimtab.tasks.spec import Names, TaskSpec, one_of
from trimtab.tasks.templates import Template, Templates, chosen_template, render
from trimtab.tasks.tokens import Encoded, encode, rendered
from trimtab.tasks.tokens import cut as cut_to


class WritingSpec(TaskSpec):
    """What tasks whose answers are text share."""

    SCORES = GENERATION_SCORES
    set_fields = frozenset({"score", "choices"})
    system: Annotated[str | None, Field(examples=["Answer in one word."])] = None
    """The system message before every prompt, for models with a chat template."""
    choices: Annotated[Names | None, Field(examples=[["yes", "no"]])] = None
    """What `score: choice` chooses from: the one that an answer names first counts."""
    score: Annotated[str, one_of(GENERATION_SCORES)] = "exact_match"
    max_new_tokens: PositiveInt = 16
    """The most tokens of a generated answer."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1 makes tokens that are there already less likely in what is generated; 1 does nothing."""
    no_repeat_ngram_size: NonNegativeInt = 0
    """No run of so many tokens is generated twice; 0 allows it."""

    @model_validator(mode="after")
    def _choices_go_with_choice(self) -> Self:
        if GENERATION_SCORES[self.score].takes_choices != (self.choices is not None):
            raise ValueError("score: choice and a choices: list go together; give both or neither")
        for name, one in self.data.sets.items():
            if one.score is None and one.choices is None:
                continue
            if one.score not in GENERATION_SCORES:
                raise ValueError(f"data.test.{name}: score must be one of {', '.join(GENERATION_SCORES)}")
            if GENERATION_SCORES[one.score].takes_choices != (one.choices is not None):
                raise ValueError(f"data.test.{name}: score: choice and a choices: list go together")
        return self


WritingSpecT = TypeVar("WritingSpecT", bound=WritingSpec)


class WritingTask(Task[WritingSpecT]):
    """A task whose answers are text. Predictions are the generated texts."""

    task_type = "CAUSAL_LM"
    generates = True
    head = Head("AutoModelForCausalLM")

    def fitting(self, encoded: Sequence[Encoded], max_length: int, cut: bool) -> list[Encoded]:
        """Training examples of at most `max_length` tokens; with `cut` the others too, cut to that.

        What leaves no token of the answer is left out in any case.

        Raises DataError when none is left.
        """
        kept = [
            cut_to(e, max_length)
            for e in encoded
            if len(e.input_ids) <= max_length or (cut and e.prompt_length < max_length)
        ]
        if not kept:
            shortest = min((len(e.input_ids) for e in encoded), default=0)
            raise DataError(
                f"{self.name}: none of {len(encoded)} training examples fits in max_length {max_length}; the shortest "
                f"has {shortest} tokens. Raise training: max_length:"
            )
        return kept

    def checked(self, example: Example, where: str) -> Example:
        """The example; raises DataError for an answer that the score could never find right."""
        if self.sets:
            return example  # a row to train on; each set checks its own
        if flaw := self.score.flaw(example.answer, self.truth([])):
            raise DataError(f"{where}: {flaw}")
        return example

    def decoding(self) -> dict[str, Any]:
        return self.spec.model_dump(include={"max_new_tokens", "repetition_penalty", "no_repeat_ngram_size"})

    def read(self, outputs: Sequence[str]) -> list[str]:
        return list(outputs)

    def confusion(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, dict[str, int]]:
        choices = self.spec.choices or ()
        if not choices:
            return {}

        def named(text: str) -> str:
            place = named_choice(text, choices)
            return "none of them" if place is None else choices[place]

        return crossed((named(e.answer), named(p)) for e, p in zip(examples, predictions, strict=True))

    def truth(self, examples: Sequence[Example]) -> Truth:
        return Truth([e.answer for e in examples], choices=self.spec.choices or ())


class GenerationSpec(WritingSpec):
    """Prompt in, text out."""

    set_fields = WritingSpec.set_fields | {"answer"}
    example_rows = ({"input": "cat", "output": "cats"}, {"input": "dog", "output": "dogs"})
    type: Literal["generation"]
    prompt: Annotated[Templates, Field(examples=["{input}"])]
    """a template over the row's fields such as "{question}", or several: the first whose fields all hold something"""
    answer: Annotated[Template, Field(examples=["{output}"])]
    """a template over the row's fields such as "{output}" """
    chat: Literal[True, False, "auto"] = "auto"
    """Whether the model's chat template goes around the prompt; auto: where the model has one."""

    @model_validator(mode="after")
    def _system_goes_with_chat(self) -> GenerationSpec:
        if self.chat is False and self.system is not None:
            raise ValueError("system needs the chat template; remove it or chat: false")
        return self


class GenerationTask(WritingTask[GenerationSpec]):
    """One prompt and one answer a row."""

    spec_class = GenerationSpec
    takes_shots = True

    def question(self, row: Row, where: str) -> Example:
        prompt = render(chosen_template(self.spec.prompt, row), row, where)
        if not prompt.strip():
            raise DataError(
                f"{where}: the prompt {self.spec.prompt!r} comes out empty; fill the field or remove the row"
            )
        return Example((prompt,), "", None, row)

    def example(self, row: Row, where: str) -> Example:
        asked = self.question(row, where)
        answer = render(self.spec.answer, row, where, full=not self.score.takes_empty)
        return self.checked(replace(asked, answer=answer), where)

    def rendered(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[str, bool]:
        return rendered(tokenizer, example.texts[0], chat=self.spec.chat, system=self.spec.system)

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        training: bool,
        max_length: int = 512,
        cut: bool = False,
    ) -> tuple[list[Encoded], int]:
        """Tokenise; training examples longer than `max_length` are left out or, with `cut`, cut; and counted.

        Raises DataError when none is left.
        """
        encoded = [
            encode(tokenizer, e.texts[0], e.answer if training else None, chat=self.spec.chat, system=self.spec.system)
            for e in examples
        ]
        if not training:
            return encoded, 0
        return self.fitting(encoded, max_length, cut), sum(len(e.input_ids) > max_length for e in encoded)
