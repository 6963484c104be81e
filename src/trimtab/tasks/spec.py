"""What a task says of itself in a recipe: its data, and what every kind of task has."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    model_validator,
)

from trimtab.tasks.scores import Score
from trimtab.tasks.templates import Template

SPLITS = ("train", "validation", "test")


class Section(BaseModel):
    """A mapping of a recipe: no unknown key, no value of another type, nothing changed after it was read."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    IDLE: ClassVar[frozenset[str]] = frozenset()
    """Keys that change nothing of what comes of a run, by which runs are not told apart."""

    def deciding(self) -> dict[str, Any]:
        """What decides a run, as JSON has it."""
        return self.model_dump(mode="json", exclude=set(self.IDLE))


def _as_text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value


def _different(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise ValueError("the same name appears twice")
    return values


Names = Annotated[list[Annotated[str, BeforeValidator(_as_text)]], Field(min_length=2), AfterValidator(_different)]
FieldNames = Annotated[
    list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1, max_length=2)
]


def one_of(names: Collection[str]) -> AfterValidator:
    """A word that must be one of a table's rows."""

    def check(value: str) -> str:
        if value not in names:
            *most, last = map(repr, names)
            near = difflib.get_close_matches(value, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"must be {', '.join(most)} or {last}{hint}")
        return value

    return AfterValidator(check)


class Limits(Section):
    """At most so many rows of a split (of test: of each of its sets), from its start."""

    train: Annotated[PositiveInt | None, Field(examples=[1000])] = None
    """Rows to train on."""
    validation: Annotated[PositiveInt | None, Field(examples=[100])] = None
    """Rows to validate on."""
    test: Annotated[PositiveInt | None, Field(examples=[200])] = None
    """Rows to test on, of each set."""


class SetSpec(Section):
    """One of several test sets; what it says of answer and score holds instead of what the task says."""

    file: Annotated[str, Field(examples=["data/test.jsonl"])]
    """a .jsonl, .json, .csv, .tsv or .parquet file, or in data with name: the Hub dataset's split"""
    answer: Annotated[Template | None, Field(examples=["{output}"])] = None
    """A template, instead of the task's (generation)."""
    score: Annotated[str | None, Field(examples=["overlap"])] = None
    """A score, instead of the task's (generation, conversation)."""
    choices: Annotated[Names | None, Field(examples=[["yes", "no"]])] = None
    """What `score: choice` chooses from in this set."""


def _set(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


Sets = Annotated[
    dict[Annotated[str, BeforeValidator(_as_text)], Annotated[SetSpec, BeforeValidator(_set)]],
    BeforeValidator(lambda sets: {name: one for name, one in sets.items() if one is not None}),
    Field(min_length=1),
]
"""A set that is null is left out."""


class DataSpec(Section):
    """Files, or with `name` the splits of a dataset on the Hub."""

    train: Annotated[str, Field(examples=["data/train.jsonl"])]
    """a .jsonl, .json, .csv, .tsv or .parquet file, or with name: the Hub dataset's split"""
    validation: Annotated[str | Literal[False] | None, Field(examples=["data/validation.jsonl"])] = None
    """Without it some of train validates; with false nothing does."""
    test: Annotated[
        Annotated[
            Annotated[str, Tag("file")] | Annotated[Sets, Tag("sets")],
            Discriminator(lambda value: "sets" if isinstance(value, dict) else "file"),
        ]
        | None,
        Field(examples=["data/test.jsonl"]),
    ] = None
    """A file; or several, each with its name: the main score is then the plain mean of theirs."""
    name: Annotated[str | None, Field(examples=["stanfordnlp/imdb"])] = None
    """A dataset on the Hub, whose splits train, validation and test then name."""
    config: Annotated[str | None, Field(examples=["plain_text"])] = None
    """The dataset's configuration, where it has several."""
    columns: Annotated[Names | None, Field(examples=[["sentence", "label"]])] = None
    """The field names of a CSV or TSV file that has no header line."""
    separator: Annotated[Annotated[str, Field(min_length=1, max_length=1)] | None, Field(examples=[";"])] = None
    """What stands between the cells of a CSV or TSV file; without it, found by looking: a comma, ; | ^ ~ or a tab."""
    conversation: Annotated[str | None, Field(examples=["messages"])] = None
    """The field that holds a conversation (`messages`, or ShareGPT's `conversations`). To a task of another type than
    conversation it has one turn, whose texts become the fields `system`, `user` and `assistant`."""
    group: Annotated[str | None, Field(examples=["author"])] = None
    """The field that says which rows are of one source (a document, a person): `compare` counts them as one, and the
    share of train that validates takes all of a source or none."""
    skip_bad_rows: bool = False
    """Leave out lines of any CSV or TSV file with too many or too few cells, and rows of train that cannot be used; how
    many, is said."""
    limit: Limits = Limits()
    """At most so many rows of each split, the first there are, for a trial; shuffle a file that is sorted."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if self.config is not None and self.name is None:
            raise ValueError("config goes with a Hub dataset; add name, or remove config")
        if self.columns is not None and self.name is not None:
            raise ValueError("columns are for files without a header; remove it, or name")
        if self.separator is not None and self.name is not None:
            raise ValueError("separator is for files; remove it, or name")
        if self.validation is False and self.test is None:
            raise ValueError("validation: false leaves nothing to score; give test, or remove it")
        return self

    @property
    def sets(self) -> dict[str, SetSpec]:
        """The test sets by name; empty where there is one without a name, or none."""
        return self.test if isinstance(self.test, dict) else {}


class TaskSpec(Section):
    """What every kind of task has; a kind adds its own keys, its table of scores and what a test set may say."""

    SCORES: ClassVar[dict[str, Score]]
    set_fields: ClassVar[frozenset[str]] = frozenset()
    """The keys that a test set may give instead of the task's."""
    example_rows: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Of a training file, for the reference and `trimtab init --example`."""
    type: str
    """The kind of task."""
    score: str
    """What counts as right."""
    data: DataSpec
    """a mapping such as {train: data/train.jsonl, test: data/test.jsonl}"""

    def for_set(self, name: str) -> Self:
        """The task with only one of its test sets."""
        chosen = self.data.sets[name]
        own = chosen.model_dump(include=set(self.set_fields), exclude_none=True)
        if chosen.score:
            own["choices"] = chosen.choices
        return self.model_copy(update={"data": self.data.model_copy(update={"test": chosen.file}), **own})

    @model_validator(mode="after")
    def _named_sets(self) -> Self:
        if self.score in self.data.sets:
            raise ValueError(f"a test set is called {self.score!r}, as the score is; give it another name")
        for name, one in self.data.sets.items():
            if foreign := one.model_dump(exclude={"file"}, exclude_none=True).keys() - self.set_fields:
                raise ValueError(f"the test set {name!r} has {', '.join(sorted(foreign))} of its own; remove it")
        return self
