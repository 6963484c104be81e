"""What every key of a recipe means, read off the schema: docs/recipe.md, and the recipes of `trimtab init --example`.

python -m trimtab.recipe.reference > docs/recipe.md
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator

from trimtab.adapter.config import ReftConfig
from trimtab.errors import RecipeError
from trimtab.recipe.schema import ENTRIES, Recipe, Settings
from trimtab.runs.trainer import TrainingSpec
from trimtab.runs.ways import AdapterSpec
from trimtab.tasks.spec import DataSpec, Limits, SetSpec

HELP = {field.name: field.metadata["help"] for field in fields(ReftConfig) if field.metadata}
"""What `adapter:` says, which is said of the config's fields once."""
SHOWN: dict[type[BaseModel], tuple[str, ...]] = {
    AdapterSpec: ("method", "r", "positions", "layers"),
    TrainingSpec: ("learning_rate", "epochs"),
}
"""Keys that an example recipe gives though they have a default."""
WIDTH = 100


@dataclass(frozen=True)
class Key:
    """A key of a section."""

    name: str
    takes: str
    default: Any
    needed: bool
    shown: bool
    """In an example recipe without a `#`."""
    meaning: str
    example: Any
    section: type[BaseModel] | None
    """Where its value is a mapping of keys that are known."""


def keys(section: type[BaseModel]) -> Iterator[Key]:
    """A section's keys in order."""
    for name, info in section.model_fields.items():
        default = info.get_default(call_default_factory=True) if not info.is_required() else None
        kind = info.annotation
        inner = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        yield Key(
            name=name,
            takes=_takes(section, name),
            default=default,
            needed=info.is_required(),
            shown=info.is_required() or name in SHOWN.get(section, ()),
            meaning=_meaning(section, name),
            example=info.examples[0] if info.examples else default,
            section=inner,
        )


def _meaning(section: type[BaseModel], name: str) -> str:
    """The key's docstring, of the nearest class that has one."""
    if section is AdapterSpec:
        return str(HELP[name])
    lineage = [base for base in section.__mro__ if issubclass(base, BaseModel) and name in base.model_fields]
    said = " ".join(next((text for base in lineage if (text := base.model_fields[name].description)), "").split())
    said = said[:1].upper() + said[1:]
    return said if not said or said[-1] in ".\"'" else f"{said}."


def _takes(section: type[BaseModel], name: str) -> str:
    if name == "score" and hasattr(section, "SCORES"):
        return ", ".join(section.SCORES)
    info = section.model_fields[name]
    return _said(info.annotation, info.metadata)


WORDS = {str: "text", bool: "true or false", int: "whole number", float: "number", NoneType: "null", Any: "any value"}


def _said(kind: Any, marks: Any = ()) -> str:
    """A type in words."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _said(inside[0], [*marks, *inside[1:]])
    if origin is Literal:
        return ", ".join(json.dumps(value) if not isinstance(value, str) else value for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_said(one) for one in inside if one is not NoneType))
    if origin is list:
        alone = "text or " if any(isinstance(mark, BeforeValidator) for mark in marks) else ""
        return f"{alone}list, each {_said(inside[0])}"
    if origin is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return "mapping"
    return " ".join([WORDS[kind], *_bounds(marks)])


def _bounds(marks: Any) -> list[str]:
    said: list[str] = []
    for mark in marks:
        for one in [mark, *getattr(mark, "metadata", [])]:
            words = {Gt: "above {0.gt}", Ge: "from {0.ge}", Le: "to {0.le}", Lt: "and below {0.lt}"}.get(type(one))
            said += [words.format(one)] if words else []
    return said


def page() -> str:
    """The reference, in Markdown."""
    common = ("data", *Settings.model_fields)
    parts = [HEAD, _part("The file", Recipe, "At the top, in any order.")]
    for name in ("adapter", "training"):
        said = "At the top for all tasks, or in a task for that one alone, whose keys then go before those at the top."
        parts.append(_part(name, Recipe.model_fields[name].annotation, said))
    parts += ["## Tasks\n\nEach task has a name, that of its folder, and a `type`, which decides what else it takes.\n"]
    shared = [key for key in keys(next(iter(ENTRIES.values()))) if key.name in common]
    parts.append("All of them take:\n\n" + _table(shared))
    for kind, entry in ENTRIES.items():
        own = [key for key in keys(entry) if key.name not in common]
        rows = "\n".join(json.dumps(row, ensure_ascii=False) for row in entry.example_rows)
        said = f"{entry.__doc__} Rows of its data:\n\n```json\n{rows}\n```\n\n"
        parts.append(f"### {kind}\n\n{said}{_table(own)}")
    parts.append(
        _part(
            "data",
            DataSpec,
            "Of a task. Relative files are looked for beside the recipe, then in the working directory.",
        )
    )
    parts.append(_part("data: limit", Limits, ""))
    parts.append(_part("data: test, of several sets", SetSpec, "`test: {NAME: FILE, NAME: {file: FILE, score: ...}}`."))
    for name in ("compare", "tune"):
        section: Any = Recipe.model_fields[name].annotation
        parts.append(_part(name, section, section.__doc__))
    return "\n".join(parts)


HEAD = """\
<!-- Made by `python -m trimtab.recipe.reference`, from the docstrings of the schema. -->
# Every key of a recipe

A recipe is a YAML file: a model, how to edit it, how to train, and tasks. `trimtab init` writes one for your model and
file; `trimtab init --example TYPE` prints one of a type of task with every key there is. An unknown key or a wrong
value is refused with its line and what to do; on the command line `--set key.path=value` replaces any.

```yaml
model: models/tiny-llama
adapter: {r: 4, positions: f1+l2}
training: {learning_rate: 4e-3, epochs: 20}
tasks:
  plural:
    type: generation
    data: {train: data/train.jsonl}
    prompt: "{input}"
    answer: "{output}"
```
"""


def _part(title: str, section: Any, said: str) -> str:
    return f"## {title}\n\n{said}\n\n{_table(list(keys(section)))}".replace("\n\n\n\n", "\n\n")


def _table(found: list[Key]) -> str:
    lines = ["| key | meaning | value | default | example |", "|---|---|---|---|---|"]
    for key in found:
        default = "needed" if key.needed else "none" if key.default is None else _code(_default(key))
        example = "" if key.section or key.example is None else _code(f"{key.name}: {as_yaml(key.example)}")
        cells = [f"`{key.name}`", key.meaning, key.takes, default, example]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _default(key: Key) -> str:
    return "" if key.section else as_yaml(key.default)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def as_yaml(value: Any) -> str:
    """A value on one line, as people write it."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {as_yaml(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./+-]*", value) and value not in ("true", "false", "null"):
        return value
    return json.dumps(value, ensure_ascii=False)


def example_recipe(kind: str, model: str | None = None) -> str:
    """A recipe with one task of a type and every key that it can have, those not needed behind a `#`.

    Raises RecipeError for a type that is not there.
    """
    if kind not in ENTRIES:
        raise RecipeError(f"--example {kind!r}: there is no such type of task; there are {', '.join(ENTRIES)}.")
    entry = ENTRIES[kind]
    rows = [f"#   {json.dumps(row, ensure_ascii=False)}" for row in entry.example_rows]
    lines = [
        f"# {entry.__doc__} Rows of its training file, data/train.jsonl:",
        *rows,
        "# Every key there is; take the '#' away from one that you want. See them all: docs/recipe.md",
        "",
    ]
    for key in keys(Recipe):
        if key.name == "tasks":
            lines += ["tasks:", "  mine:"]
            lines += [line for own in _ordered(entry) for line in _lines(own, 2)]
        elif key.name == "model" and model:
            lines += _lines(key, 0, model)
        else:
            lines += _lines(key, 0)
    return "\n".join(lines) + "\n"


def _ordered(entry: type[BaseModel]) -> list[Key]:
    """The type and the data first; what a task shares with the top of the file is said there."""
    own = [key for key in keys(entry) if key.name not in ("adapter", "training")]
    return sorted(own, key=lambda key: (key.name != "type", key.name != "data"))


def _lines(key: Key, depth: int, value: Any = None) -> list[str]:
    indent = "  " * depth
    room = WIDTH - len(indent)
    said = [f"{indent}# {line}" for line in textwrap.wrap(key.meaning, room)]
    if key.section is not None:
        inside = [line for one in keys(key.section) for line in _lines(one, depth + 1)]
        live = any(not line.lstrip().startswith("#") for line in inside)
        return [*said, f"{indent}{'' if live else '#'}{key.name}:", *inside]
    if key.name == "type":
        return [f"{indent}type: {key.takes}"]
    return [*said, f"{indent}{'' if key.shown else '#'}{key.name}: {as_yaml(value or key.example)}"]


if __name__ == "__main__":
    print(page(), end="")
