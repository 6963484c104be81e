"""The recipe: the whole YAML file as pydantic models, composed of what the storeys below say of themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union

from pydantic import AfterValidator, Field, NonNegativeInt, ValidationInfo, create_model, field_validator

from trimtab.runs.experiment import Experiment
from trimtab.runs.models import ModelSource
from trimtab.runs.trainer import TrainingSpec
from trimtab.runs.ways import AdapterSpec
from trimtab.study.compare import CompareSpec
from trimtab.study.search import TuneSpec
from trimtab.tasks import TASKS, TaskSpec
from trimtab.tasks.spec import Section


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
        raise ValueError(
            "a task's name becomes a folder: letters, digits, '_', '-' and '.', not starting with '.' or '-'"
        )
    return value


class Settings(Section):
    """How a task's adapter is made and trained, beside what the task says of itself."""

    adapter: AdapterSpec = AdapterSpec()
    """Keys of `adapter` for this task alone."""
    training: TrainingSpec = TrainingSpec()
    """Keys of `training` for this task alone."""


def _entry(spec: Any) -> Any:
    """A kind of task with its settings."""
    return create_model(spec.__name__, __base__=(spec, Settings), __doc__=spec.__doc__)


ENTRIES: dict[str, type[TaskSpec]] = {kind: _entry(task.spec_class) for kind, task in TASKS.items()}
"""What stands under a task's name, by its type."""
if TYPE_CHECKING:

    class Entry(TaskSpec, Settings):
        """Any of `ENTRIES`."""
else:
    Entry = Annotated[Union[tuple(ENTRIES.values())], Field(discriminator="type")]  # noqa: UP007 (built from the table)

S = TypeVar("S", AdapterSpec, TrainingSpec)


def _merged(common: S | None, own: S) -> S:
    given = common.model_dump(exclude_unset=True) if common else {}
    return own.model_validate({**given, **own.model_dump(exclude_unset=True)})


class Recipe(Section):
    """The whole file. Each task's `adapter` and `training` already hold what the top level says."""

    model: Annotated[str, Field(examples=["models/tiny-llama"])]
    """a local model folder or a Hub name"""
    source: Annotated[str | None, Field(examples=["our ticket system, exported in May"])] = None
    """Where the data comes from; said when a file is missing."""
    output: str = "runs"
    """The folder in which each task leaves one of its own, which PEFT loads."""
    seed: NonNegativeInt = 0
    """Of the order of examples, dropout, random starts and the rows drawn for validation."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen model; auto is as its weights are stored. Edits compute in float32 in any case."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """The implementation of transformers; auto is its choice. The flash ones need a package and a GPU."""
    adapter: AdapterSpec = AdapterSpec()
    """The edit: how, at which tokens, in which blocks."""
    training: TrainingSpec = TrainingSpec()
    """How it is trained."""
    compare: CompareSpec = CompareSpec()
    """What `trimtab compare` tries."""
    tune: TuneSpec = TuneSpec()
    """Where `trimtab tune` looks."""
    tasks: dict[Annotated[str, AfterValidator(_folder_name)], Entry] = Field(min_length=1)
    """a mapping of task names to tasks"""

    def chosen(self, only: Sequence[str] | None) -> list[str]:
        """The names of the tasks asked for; of all by default. Raises ValueError for one that is not there."""
        unknown = [name for name in only or () if name not in self.tasks]
        if unknown:
            raise ValueError(f"task {unknown[0]!r} is not in the recipe; it has {', '.join(self.tasks)}.")
        return list(only or self.tasks)

    def experiments(self, only: Sequence[str] | None = None) -> dict[str, Experiment]:
        """The tasks asked for, each with its model and settings. Raises ValueError for one that is not there."""
        source = ModelSource(self.model, self.dtype, self.attention)
        found = {}
        for name in self.chosen(only):
            entry = self.tasks[name]
            said = entry.model_dump(exclude=set(Settings.model_fields))
            spec = TASKS[entry.type].spec_class.model_validate(said)
            found[name] = Experiment(name, source, spec, entry.adapter, entry.training, self.seed)
        return found

    @field_validator("tasks")
    @classmethod
    def _inherit(cls, tasks: dict[str, Entry], info: ValidationInfo) -> dict[str, Entry]:
        def merge(task: Entry) -> Entry:
            sections = {key: _merged(info.data.get(key), getattr(task, key)) for key in ("adapter", "training")}
            return task.model_copy(update=sections)

        return {name: merge(task) for name, task in tasks.items()}
