"""`load_recipe`: the YAML that `trimtab train` reads, with one-screen errors that name the line.

recipe = load_recipe("words.yaml")
recipe = load_recipe("commonsense", ["training.epochs=3"], data="LLM-Adapters")     # one that comes with trimtab
recipe.tasks["plural"].training.learning_rate     # the task's own value, else the file's, else the default
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trimtab.adapter.config import ReftConfig
from trimtab.errors import DataError, RecipeError
from trimtab.recipe.foreign import FOREIGN
from trimtab.recipe.schema import ENTRIES, Recipe
from trimtab.recipe.yaml_lines import YamlError, find, parse_yaml
from trimtab.runs.trainer import TrainingSpec
from trimtab.runs.ways import AdapterSpec, as_way
from trimtab.study.compare import CompareSpec
from trimtab.study.search import TuneSpec
from trimtab.tasks.files import locate
from trimtab.tasks.spec import SPLITS, DataSpec, Limits, SetSpec

__all__ = ["SHIPPED", "Recipe", "RecipeError", "load_recipe"]

HERE = Path(__file__).parent
FOLDERS = [HERE / "shipped", *([HERE.parents[2] / "recipes"] if HERE.parents[1].name == "src" else [])]
"""Where recipes that have a name are: what the wheel takes from `recipes` lies there in a checkout."""
SHIPPED = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.yaml"))}
"""The recipes that come with trimtab, by name."""
SHOWN = 10  # problems listed before "and N more"
Place = tuple[str | int, ...]


def recipe_file(path: str | Path) -> Path:
    """A recipe's file, of a name that is none the one that comes with trimtab under it."""
    return Path(path) if Path(path).is_file() else SHIPPED.get(str(path), Path(path))


def load_recipe(
    path: str | Path,
    settings: Sequence[str] = (),
    *,
    data: str | Path | None = None,
    only: Collection[str] | None = None,
) -> Recipe:
    """Read and check a recipe, its adapters' values and the presence of its data files included.

    A relative `model` is looked for in the working directory, then beside the file and beside its
    folder; data files beside the file, then in the working directory.

    Args:
        path: a file, or the name of one of `SHIPPED`.
        settings: `key.path=value` each, which replaces what the file says.
        data: the folder where relative data files are, instead of the one beside the file.
        only: the tasks whose data files have to be there; all by default.

    Raises:
        RecipeError: listing what is wrong, each problem with its line, its place and what to do.
    """
    path = recipe_file(path)
    if data is not None and not Path(data).is_dir():
        raise RecipeError(f"the data folder {str(data)!r} is no folder.")
    try:
        raw, node = parse_yaml(path.read_text(encoding="utf-8-sig"), [*put_aside(settings), *settings])
    except OSError as error:
        shipped = f"; the recipes that go by a name are {', '.join(SHIPPED)}"
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}{shipped}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text; a recipe is a YAML file") from None
    except YamlError as error:
        raise RecipeError(f"{path}, {_line(error.line)}: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} is {'empty' if raw is None else 'not a mapping'}; a recipe starts with model: and tasks:"
        )
    folder = path.parent if data is None else Path(data)
    missing = _find_files(raw, folder, only)
    problems = _find_model(raw, path.parent) + missing + _adapter_problems(raw) + _method_problems(raw)
    looked = f"\nLooked in {folder} and the working directory. {raw.get('source') or ''}".rstrip() if missing else ""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_report(path, node, problems + _schema_problems(error, node)) + looked) from None
    if problems:
        raise RecipeError(_report(path, node, problems) + looked)
    return recipe


REPLACED = {"epochs": "max_steps", "max_steps": "epochs"}
"""Keys of which a recipe has one, so that one given on the command line puts the file's other aside."""


def put_aside(settings: Sequence[str]) -> list[str]:
    """The settings that make room for others."""
    given = dict(setting.partition("=")[::2] for setting in settings)
    paths = [(path.rpartition("."), value) for path, value in given.items()]
    others = [f"{section}.{REPLACED[key]}" for (section, _, key), value in paths if key in REPLACED and value != "null"]
    return [f"{other}=null" for other in others if other not in given]


def _section(raw: Any, key: str) -> dict[Any, Any]:
    value = raw.get(key) if isinstance(raw, dict) else None
    return value if isinstance(value, dict) else {}


def _find_model(raw: dict[Any, Any], folder: Path) -> list[tuple[Place, str]]:
    """Replace a model's path in `raw` by that of the folder beside the file or its folder, if it is there."""
    model = raw.get("model")
    if isinstance(model, str) and not Path(model).expanduser().exists():
        beside = next((place / model for place in (folder, folder.parent) if (place / model).exists()), None)
        if beside is not None:
            raw["model"] = str(beside)
        elif model.startswith((".", "/", "~")) or model.count("/") > 1:
            return [(("model",), f"no folder {model!r} in the working directory or beside this file or its folder")]
    return []


def _find_files(raw: dict[Any, Any], folder: Path, only: Collection[str] | None) -> list[tuple[Place, str]]:
    """Replace the paths in `raw` by those of existing files; return what could not be found."""
    problems: list[tuple[Place, str]] = []
    for holder, key, place in _placed_files(raw, only):
        try:
            holder[key] = str(locate(holder[key], folder))
        except DataError as error:
            problems.append((place, str(error)))
    return problems


def resolved_files(text: str, folder: Path) -> list[tuple[list[str], str]]:
    """The place of each file that a recipe names, and its whole path. Raises DataError."""
    raw, _ = parse_yaml(text)
    found = _placed_files(raw, None)
    return [([*map(str, place)], str(locate(holder[key], folder).resolve())) for holder, key, place in found]


def _placed_files(raw: Any, only: Collection[str] | None) -> Iterator[tuple[dict[Any, Any], Any, Place]]:
    for name, task in _section(raw, "tasks").items():
        if only is None or name in only:
            for holder, key, place in _files(_section(task, "data")):
                yield holder, key, ("tasks", name, "data", *place)
    compare = _section(raw, "compare")
    if isinstance(compare.get("held_out"), str):
        yield compare, "held_out", ("compare", "held_out")


def _files(data: dict[Any, Any]) -> Iterator[tuple[dict[Any, Any], Any, Place]]:
    """The paths in a task's data: the mapping that each is in, its key there, and its place."""
    if data.get("name") is not None:
        return  # those are splits of a dataset on the Hub
    sets = _section(data, "test")
    yield from ((data, split, (split,)) for split in SPLITS if isinstance(data.get(split), str))
    yield from ((sets, name, ("test", name)) for name, one in sets.items() if isinstance(one, str))
    inner = ((one, name) for name, one in sets.items() if isinstance(one, dict) and isinstance(one.get("file"), str))
    yield from ((one, "file", ("test", name, "file")) for one, name in inner)


def _adapter_problems(raw: dict[Any, Any]) -> list[tuple[Place, str]]:
    """What `ReftConfig` says of each task's adapter, placed at the task's own value or else at the common one."""
    problems: list[tuple[Place, str]] = []
    common = _section(raw, "adapter")
    for name, task in _section(raw, "tasks").items():
        own = _section(task, "adapter")
        try:
            ReftConfig(**AdapterSpec.model_validate({**common, **own}).model_dump())
        except ValidationError:
            continue  # a wrong type or key, reported with the rest of the file
        except ValueError as error:
            field = str(error).partition("=")[0]
            place: Place = ("tasks", name, "adapter", field) if field in own else ("adapter", field)
            problems.append((place, str(error)))
    return problems


def _method_problems(raw: dict[Any, Any]) -> list[tuple[Place, str]]:
    """What is wrong with the methods to compare, at their places in the list or, where they share it, at `adapter`."""
    problems: list[tuple[Place, str]] = []
    common, methods = _section(raw, "adapter"), _section(raw, "compare").get("methods")
    for i, entry in enumerate(methods if isinstance(methods, list) else []):
        try:
            as_way(entry, AdapterSpec.model_validate(common))
        except (ValidationError, TypeError, AttributeError):
            continue  # a wrong type or key, reported with the rest of the file
        except ValueError as error:
            field = str(error).partition("=")[0]
            own = _section(entry, next(iter(entry))) if isinstance(entry, dict) else {}
            inherited = field in common and field not in own
            problems.append((("adapter", field) if inherited else ("compare", "methods", i), str(error)))
    return problems


SECTIONS: dict[Any, type[BaseModel]] = {
    "adapter": AdapterSpec,
    "training": TrainingSpec,
    "data": DataSpec,
    "limit": Limits,
    "compare": CompareSpec,
    "tune": TuneSpec,
    **ENTRIES,
}


def _schema_problems(error: ValidationError, node: Any) -> list[tuple[Place, str]]:
    """Pydantic's complaints by place in the file; the branches of a union, which it reports one by one, are joined."""
    by_place: dict[Place, list[str]] = {}
    values: dict[Place, str] = {}
    for each in error.errors():
        place = tuple(find(node, each["loc"])[1]) + (each["loc"][-1:] if each["type"] == "missing" else ())
        by_place.setdefault(place, []).append(_explain(each))
        if each["type"] != "missing" and not isinstance(each["input"], dict | list):
            values[place] = f" (given: {str(each['input'])[:60]!r})"
    return [
        (place, " or ".join(texts).replace(" or must be ", " or ") + values.get(place, ""))
        for place, texts in by_place.items()
    ]


def _explain(error: ErrorDetails) -> str:
    kind, loc = error["type"], error["loc"]
    model = SetSpec if loc[-3:-2] == ("sets",) else SECTIONS.get(loc[-2], Recipe) if len(loc) > 1 else Recipe
    if kind == "missing":
        return f"is missing: give {model.model_fields[str(loc[-1])].description}".rstrip()
    if kind == "extra_forbidden":
        return _unknown_key(str(loc[-1]), model)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = error["input"].get("type")
        missing = " (it has none; is the task's name right?)" if given is None else f", not {given!r}"
        return f"type must be {_any_of(ENTRIES)}{missing}"
    if kind == "invalid_key":
        return f"the key {loc[-1]} is a number: decimals take a point, as in 0.0015, and a comma ends an entry"
    if kind == "dict_type" and loc == ("tasks",):
        return "must have a name for each task, as in tasks: {NAME: {type: generation, …}}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return "must be a mapping of keys to values"
    if kind == "string_type" and isinstance(error["input"], dict):
        return 'must be text, not a mapping, as YAML reads braces without quotes: write "{input}" with them'
    if kind == "too_short" and loc == ("tasks",):
        return "has no task: give at least one"
    text = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    near = (
        difflib.get_close_matches(str(error["input"]), re.findall(r"'(\w+)'", text), 1)
        if kind == "literal_error"
        else []
    )
    return text.replace("True, False", "true, false") + (f"; did you mean {near[0]!r}?" if near else "")


OWN: dict[str, type[BaseModel]] = {"adapter": AdapterSpec, "training": TrainingSpec, "data": DataSpec}
"""The sections whose keys are put elsewhere by mistake."""


def _any_of(names: Collection[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


def _unknown_key(key: str, model: type[BaseModel]) -> str:
    near = difflib.get_close_matches(key, model.model_fields, 1)
    owners = [name for name, spec in ENTRIES.items() if key in spec.model_fields]
    sections = [name for name, spec in OWN.items() if key in spec.model_fields]
    if model in ENTRIES.values() and owners:
        return f"belongs to type: {' or '.join(owners)}"
    if sections:
        return f"belongs under {sections[0]}:"
    if key in FOREIGN:
        return f"is not a known key; here {FOREIGN[key]}"
    if near:
        return f"is not a known key; did you mean {near[0]!r}?"
    if owners:
        return "belongs to a task, under its name in tasks:"
    return f"is not a known key; there are {', '.join(model.model_fields)}"


def _line(number: int) -> str:
    return f"line {number}" if number else "command line"


def _report(path: Path, node: Any, problems: list[tuple[Place, str]]) -> str:
    lines = sorted({(find(node, place)[0], ".".join(map(str, place)), text) for place, text in problems})
    shown = [f"  {_line(line)}, {place or 'the whole file'}: {text}" for line, place, text in lines[:SHOWN]]
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([f"{path} has {len(lines)} problem{'s' if len(lines) > 1 else ''}:", *shown, *more])
