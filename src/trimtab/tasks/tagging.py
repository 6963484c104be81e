"""Token classification: words in, a tag for each of them out.

{"tokens": ["Ada", "met", "Alan"], "tags": ["B-PER", "O", "B-PER"]}, or both as texts: "Ada met Alan", "B-PER O B-PER".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from transformers import PreTrainedTokenizerBase

from trimtab.errors import DataError
from trimtab.tasks.base import Example
from trimtab.tasks.classification import LabelledSpec, LabelledTask, label_name
from trimtab.tasks.files import Row, as_text, is_missing, listed, needed
from trimtab.tasks.scores import TAG_SCORES, Score, Truth
from trimtab.tasks.spec import one_of
from trimtab.tasks.tokens import Encoded, encode_words


class TaggingSpec(LabelledSpec):
    """Words in, a tag for each of them out (`positions: all` edits each of them)."""

    SCORES = TAG_SCORES
    example_rows = (
        {"words": ["Ada", "met", "Alan"], "tags": ["B-PER", "O", "B-PER"]},
        {"words": ["it", "rains"], "tags": ["O", "O"]},
    )
    type: Literal["token_classification"]
    text: Annotated[
        list[str],
        BeforeValidator(lambda v: [v] if isinstance(v, str) else v),
        Field(min_length=1, max_length=1, examples=["words"]),
    ]
    """the field that holds the words, a list or a text with blanks between them"""
    label: Annotated[str, Field(examples=["tags"])]
    """the field that holds a tag for each word, a list or a text with blanks between them"""
    score: Annotated[str, one_of(TAG_SCORES)] = "accuracy"


class TaggingTask(LabelledTask[TaggingSpec]):
    """Predictions are lists of class numbers, one a word, read at the word's first token.

    Words beyond `max_length` get none, and count as missed.
    """

    spec_class = TaggingSpec
    task_type = "TOKEN_CLS"
    auto = "AutoModelForTokenClassification"
    read_by = """\
[
    base.config.id2label[int(logits[batch.char_to_token(start)].argmax())]
    for start, letter in enumerate(text)
    if letter != " " and text[start - 1 : start] in ("", " ")  # a tag for each word, read at its first token
]"""

    def question(self, row: Row, where: str) -> Example:
        words = self._parts(row, self.spec.text[0], where)
        return Example((" ".join(words),), "", (0,) * len(words), row)  # any tags, which mark the words' places

    def example(self, row: Row, where: str) -> Example:
        made, asked = super().example(row, where), self.question(row, where)
        tags, words = (len(self.places(e.label)) for e in (made, asked))
        if tags != words:
            raise DataError(f"{where}: {words} words but {tags} tags in {self.spec.label!r}; give one for each word")
        return made

    def named(self, row: Row, where: str) -> Sequence[str]:
        return self._parts(row, self.spec.label, where)

    def joined(self, names: Sequence[str]) -> str:
        return " ".join(names)

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        training: bool,
        max_length: int = 512,
        cut: bool = False,
    ) -> tuple[list[Encoded], int]:
        """Tokenise, tags included; what is longer than `max_length` is cut to it, and counted. Raises DataError."""
        name = self.spec.text[0]
        words = [self._parts(e.row, name, self.name) for e in examples]
        pairs = [
            encode_words(tokenizer, w, self.places(e.label), max_length) for w, e in zip(words, examples, strict=True)
        ]
        return [encoded for encoded, _ in pairs], sum(was_cut for _, was_cut in pairs)

    def read(self, outputs: Sequence[Sequence[Sequence[float]]]) -> list[list[int]]:
        return [[max(range(len(logits)), key=logits.__getitem__) for logits in words] for words in outputs]

    def majority(self, examples: Sequence[Example]) -> tuple[Any, float]:
        """The commonest tag of train, and the main score of giving it to each word of the examples."""
        answers = self.constants(examples, 1)[0]
        return self.labels[answers[0][0]], self.scores(answers, examples)[self.score.name]

    def constants(self, examples: Sequence[Example], most: int) -> list[list[Any]]:
        """One tag for all words of the examples: each of so many of train's commonest."""
        tags = Counter(place for e in self.examples("train") for place in self.places(e.label))
        return [[[tag] * len(self.places(e.label)) for e in examples] for tag, _ in tags.most_common(most)]

    def told(self, outputs: Sequence[Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
        """The tags, with blanks between them."""
        return [{"prediction": self.joined([self.labels[i] for i in places])} for places in self.read(outputs)]

    @property
    def shown(self) -> tuple[Score, ...]:
        truth = Truth([], choices=self.labels)
        return tuple(score for score in super().shown if not score.flaw("", truth))

    def _parts(self, row: Row, name: str, where: str) -> list[str]:
        value = listed(needed(row, name, where), name, where)
        if not isinstance(value, list):
            return as_text(value, name, where).split()
        if not value:
            raise DataError(f"{where}: the field {name!r} is empty; fill it or remove the row")
        if any(is_missing(part) and (part != "" or name == self.spec.label) for part in value):
            raise DataError(f"{where}: the field {name!r} has an empty place; fill it or remove the row")
        return [as_text(label_name(part) if isinstance(part, int | float) else part, name, where) for part in value]
