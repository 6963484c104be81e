"""The fields of the YAML that `trimtab train` reads, as pydantic models."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

SPLITS = ("train", "validation", "test")


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split `"Q: {question}\\nA:"` into `[("Q: ", "question"), ("\\nA:", None)]`: text, then the field after it.

    Raises ValueError for an unbalanced brace, an empty `{}`, and a conversion or format such as `{a!r}` or `{a:>9}`.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}: a field is written {{name}}, a plain brace is doubled, {{{{ or }}}}") from None
    for _, field, spec, conversion in parts:
        if field is not None and (not field or spec or conversion):
            raise ValueError("a field is a bare name in braces, as in {question}: no conversion, no format, not empty")
    return [(text, field) for text, field, _, _ in parts]


def _template(value: str) -> str:
    parse_template(value)
    return value


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
        raise ValueError(
            "a task's name becomes a folder: letters, digits, '_', '-' and '.', not starting with '.' or '-'"
        )
    return value


def _as_text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value


def _different(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise ValueError("the same name appears twice")
    return values


Template = Annotated[str, AfterValidator(_template)]
Templates = Annotated[
    Annotated[Template, Tag("one")] | Annotated[list[Template], Field(min_length=1), Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
]
GenerationScore = Literal["exact_match", "number", "choice", "overlap"]
Names = Annotated[list[Annotated[str, BeforeValidator(_as_text)]], Field(min_length=2), AfterValidator(_different)]
FieldNames = Annotated[
    list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1, max_length=2)
]


def _check_choices(score: str | None, choices: list[str] | None) -> None:
    if (score == "choice") != (choices is not None):
        raise ValueError("score: choice and a choices: list go together; give both or neither")


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class AdapterSpec(_Section):
    """What `trimtab.ReftConfig` is made of; the values are checked there."""

    method: str = "loreft"
    r: int = 4
    positions: str = "f7+l7"
    layers: str | list[int] = "all"
    site: str = "block"
    tied: bool = True
    dropout: float = 0.0
    activation: str | None = None
    init_weights: bool | str = True


class TrainingSpec(_Section):
    """How a task is trained. `epochs` and `max_steps` replace each other; the one not used is None."""

    learning_rate: PositiveFloat = 4e-3
    epochs: PositiveFloat | None = 20.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 16
    gradient_accumulation: PositiveInt = 1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The share of the steps over which the rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    max_length: PositiveInt = 512
    too_long: Literal["leave_out", "cut"] = "leave_out"
    """What is done with generation examples longer than that: left out of training, or their answers cut short."""
    eval_batch_size: PositiveInt = 64
    checkpoint_every: PositiveInt | None = None
    """In steps; None is once an epoch."""
    gradient_checkpointing: bool = False
    packing: Literal[True, False, "auto"] = "auto"
    """Pack a batch into one row instead of padding it; auto: where attention is a flash kernel, which profits."""
    reuse: bool = True
    """Compute once what the frozen model makes the same at every step, where the adapter leaves any such part."""
    reuse_memory_gb: NonNegativeFloat = 4.0
    """What is kept for reuse beyond this goes to disk, in the task's folder."""

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        epochs, max_steps = data.get("epochs"), data.get("max_steps")
        if epochs is not None and max_steps is not None:
            raise ValueError("epochs and max_steps are both given; keep one, and remove the other or make it null")
        if max_steps is not None:
            return {**data, "epochs": None}
        return {**data, "max_steps": None} if epochs is not None else {k: v for k, v in data.items() if k != "epochs"}


class Limits(_Section):
    """At most so many rows of a split (of test: of each of its sets), from its start."""

    train: PositiveInt | None = None
    validation: PositiveInt | None = None
    test: PositiveInt | None = None


class SetSpec(_Section):
    """One of several test sets; what it says of answer and score holds instead of what the task says."""

    file: str
    """a .jsonl, .json, .csv, .tsv or .parquet file, or in data with name: the Hub dataset's split"""
    answer: Template | None = None
    score: GenerationScore | None = None
    choices: Names | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_choices(self.score, self.choices)
        return self


def _set(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


Sets = Annotated[
    dict[Annotated[str, BeforeValidator(_as_text)], Annotated[SetSpec, BeforeValidator(_set)]],
    BeforeValidator(lambda sets: {name: one for name, one in sets.items() if one is not None}),
    Field(min_length=1),
]
"""A set that is null is left out."""


class DataSpec(_Section):
    """Files, or with `name` the splits of a dataset on the Hub."""

    train: str
    """a .jsonl, .json, .csv, .tsv or .parquet file, or with name: the Hub dataset's split"""
    validation: str | Literal[False] | None = None
    """Without it some of train validates; with false nothing does."""
    test: (
        Annotated[
            Annotated[str, Tag("file")] | Annotated[Sets, Tag("sets")],
            Discriminator(lambda value: "sets" if isinstance(value, dict) else "file"),
        ]
        | None
    ) = None
    """A file; or several, each with its name: the main score is then the plain mean of theirs."""
    name: str | None = None
    config: str | None = None
    columns: Names | None = None
    """The field names of a CSV or TSV file that has no header line."""
    skip_bad_rows: bool = False
    """Leave out lines of a CSV or TSV file with too many or too few cells, and rows of train that cannot be used."""
    limit: Limits = Limits()

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if self.config is not None and self.name is None:
            raise ValueError("config goes with a Hub dataset; add name, or remove config")
        if self.columns is not None and self.name is not None:
            raise ValueError("columns are for files without a header; remove it, or name")
        if self.validation is False and self.test is None:
            raise ValueError("validation: false leaves nothing to score; give test, or remove it")
        return self

    @property
    def sets(self) -> dict[str, SetSpec]:
        """The test sets by name; empty where there is one without a name, or none."""
        return self.test if isinstance(self.test, dict) else {}


class _TaskSpec(_Section):
    task_type: ClassVar[str]
    score: str
    data: DataSpec
    """a mapping such as {train: data/train.jsonl, test: data/test.jsonl}"""
    adapter: AdapterSpec = AdapterSpec()
    training: TrainingSpec = TrainingSpec()

    def adapter_fields(self) -> dict[str, Any]:
        """The keyword arguments of this task's `ReftConfig`."""
        return {"task_type": self.task_type, **self.adapter.model_dump()}

    def for_set(self, name: str) -> Self:
        """The task with only one of its test sets."""
        chosen = self.data.sets[name]
        own = chosen.model_dump(include={"answer", "score", "choices"}, exclude_none=True)
        if chosen.score:
            own["choices"] = chosen.choices
        return self.model_copy(update={"data": self.data.model_copy(update={"test": chosen.file}), **own})

    @model_validator(mode="after")
    def _named_sets(self) -> Self:
        if self.score in self.data.sets:
            raise ValueError(f"a test set is called {self.score!r}, as the score is; give it another name")
        if self.task_type != "CAUSAL_LM" and any(s.answer or s.score for s in self.data.sets.values()):
            raise ValueError("a test set has an answer or a score of its own, which is for type: generation; remove it")
        return self


class GenerationSpec(_TaskSpec):
    """Prompt in, text out."""

    task_type: ClassVar[str] = "CAUSAL_LM"
    type: Literal["generation"]
    prompt: Templates
    """a template over the row's fields such as "{question}", or several: the first whose fields all hold something"""
    answer: Template
    """a template over the row's fields such as "{output}" """
    chat: Literal[True, False, "auto"] = "auto"
    system: str | None = None
    choices: Names | None = None
    score: GenerationScore = "exact_match"
    max_new_tokens: PositiveInt = 16
    repetition_penalty: PositiveFloat = 1.0
    no_repeat_ngram_size: NonNegativeInt = 0

    @model_validator(mode="after")
    def _consistent(self) -> GenerationSpec:
        _check_choices(self.score, self.choices)
        if self.chat is False and self.system is not None:
            raise ValueError("system needs the chat template; remove it or chat: false")
        return self


class ClassificationSpec(_TaskSpec):
    """Text (or a pair of texts) in, one of several classes out."""

    task_type: ClassVar[str] = "SEQ_CLS"
    type: Literal["classification"]
    text: FieldNames
    """the text's field, or [first, second] for a pair"""
    label: str
    """the field that holds the class"""
    labels: Names | None = None
    """The classes in order; without it, those of the training file, sorted."""
    score: Literal["accuracy", "f1", "mcc"] = "accuracy"


class RegressionSpec(_TaskSpec):
    """Text (or a pair of texts) in, one number out."""

    task_type: ClassVar[str] = "SEQ_CLS"
    type: Literal["regression"]
    text: FieldNames
    """the text's field, or [first, second] for a pair"""
    label: str
    """the field that holds the number"""
    score: Literal["correlation", "pearson", "spearman"] = "correlation"


TaskSpec = GenerationSpec | ClassificationSpec | RegressionSpec
S = TypeVar("S", AdapterSpec, TrainingSpec)


def _merged(common: S | None, own: S) -> S:
    given = common.model_dump(exclude_unset=True) if common else {}
    return own.model_validate({**given, **own.model_dump(exclude_unset=True)})


class CompareSpec(_Section):
    """What `trimtab compare` tries: all methods at the same learning rates, seeds, steps and data."""

    methods: Annotated[list[str | dict[str, dict[str, Any]]], Field(min_length=2)] | None = None
    """Names, {name: {peft_type: LORA, r: 32, …}} or {name: {method: loreft, r: 8, …}}; the first is the reference."""
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)] = [1e-4, 4e-4, 1.6e-3, 6.4e-3, 2.5e-2]
    seeds: PositiveInt = 5
    held_out: str | None = None
    """A text file; how much the model's loss on it grows is reported as forgetting."""


class TuneSpec(_Section):
    """Where `trimtab tune` looks: the paper's search space, at the ranks of small and large models."""

    r: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 2, 4, 8, 16, 32]
    positions: Annotated[list[str], Field(min_length=1)] = [f"f{n}+l{n}" for n in (1, 3, 5, 7, 9, 11)]
    layers: Annotated[list[Literal["all", "lower", "middle", "upper"]], Field(min_length=1)] = [
        "all",
        "lower",
        "middle",
        "upper",
    ]
    """all, or a third of the blocks"""
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1, max_length=2)] = [9e-5, 2e-2]
    """lowest and highest, between which the search is logarithmic; the paper's highest, 3e-3, is for large models"""


class Recipe(_Section):
    """The whole file. Each task's `adapter` and `training` already hold what the top level says."""

    model: str
    """a local model folder or a Hub name"""
    source: str | None = None
    """Where the data comes from; said when a file is missing."""
    output: str = "runs"
    seed: NonNegativeInt = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    adapter: AdapterSpec = AdapterSpec()
    training: TrainingSpec = TrainingSpec()
    compare: CompareSpec = CompareSpec()
    tune: TuneSpec = TuneSpec()
    tasks: dict[Annotated[str, AfterValidator(_folder_name)], Annotated[TaskSpec, Field(discriminator="type")]] = Field(
        min_length=1
    )
    """a mapping of task names to tasks"""

    def chosen(self, only: Sequence[str] | None) -> list[str]:
        """The names of the tasks asked for; of all by default. Raises ValueError for one that is not there."""
        unknown = [name for name in only or () if name not in self.tasks]
        if unknown:
            raise ValueError(f"task {unknown[0]!r} is not in the recipe; it has {', '.join(self.tasks)}.")
        return list(only or self.tasks)

    @field_validator("tasks")
    @classmethod
    def _inherit(cls, tasks: dict[str, TaskSpec], info: ValidationInfo) -> dict[str, TaskSpec]:
        def merge(task: TaskSpec) -> TaskSpec:
            sections = {key: _merged(info.data.get(key), getattr(task, key)) for key in ("adapter", "training")}
            return task.model_copy(update=sections)

        return {name: merge(task) for name, task in tasks.items()}
