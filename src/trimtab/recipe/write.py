"""Recipes written again with other values, all else in them as it was: order, comments, what is not given."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import RecipeError
from trimtab.recipe.load import load_recipe, put_aside, recipe_file, resolved_files
from trimtab.recipe.schema import Recipe
from trimtab.recipe.yaml_lines import find, node_at, parse_yaml
from trimtab.runs.folder import write_text
from trimtab.study.search import Found

Change = tuple[Sequence[str], Any]


def write_tuned(
    output: Path,
    recipe: Recipe,
    best: Mapping[str, Found],
    file: Path,
    settings: Sequence[str] = (),
    data: Path | None = None,
) -> str:
    """Write the recipe with the settings found for each task in place of its own, for an output of its own.

    Args:
        output: the file to write.
        file, settings, data: what the recipe was read from.

    Returns:
        Where its runs go.
    """
    runs = _unused(f"{recipe.output}-tuned")
    wanted = tuned(recipe, best).model_copy(update={"output": runs})
    source = recipe_file(file)
    text = source.read_text(encoding="utf-8-sig").rstrip("\n") + "\n"
    moved = data is not None or output.parent.resolve() != source.parent.resolve()
    paths = resolved_files(text, source.parent if data is None else data) if moved else []
    if moved and Path(recipe.model).is_dir():
        paths.append((["model"], str(Path(recipe.model).resolve())))
    for place, value in [*_given(settings), *paths, (["output"], runs), *_found(recipe, best)]:
        text = with_value(text, place, value)
    write_text(output, text)
    if not _says(output, wanted):  # anchors, say, that show one text in two places: without comments, but right
        write_text(output, yaml.safe_dump(wanted.model_dump(mode="json", exclude_unset=True), sort_keys=False))
    return runs


def tuned(recipe: Recipe, best: Mapping[str, Found]) -> Recipe:
    """The recipe with what was found for its tasks."""
    tasks = dict(recipe.tasks)
    for name, found in best.items():
        task = tasks[name]
        adapter = task.adapter.model_validate({**task.adapter.model_dump(), **found.settings})
        rate = {"learning_rate": found.learning_rate}
        tasks[name] = task.model_copy(update={"adapter": adapter, "training": task.training.model_copy(update=rate)})
    return recipe.model_copy(update={"tasks": tasks})


def with_value(text: str, place: Sequence[str], value: Any) -> str:
    """YAML text that says `value` at `place`; where there is no such place, it is made after the first key above it."""
    _, root = parse_yaml(text)
    _, known = find(root, place)
    node, missing = node_at(root, known), list(place[len(known) :])
    said = json.dumps(value, ensure_ascii=False)
    for key in reversed(missing[1:]):
        said = f"{{{key}: {said}}}"
    if not missing:
        return _spliced(text, node, said)
    if not (isinstance(node, yaml.MappingNode) and node.value):
        return _spliced(text, node, f"{{{missing[0]}: {said}}}")
    entry, (key, first) = f"{missing[0]}: {said}", node.value[0]
    if node.flow_style:
        at = key.start_mark.index
        return f"{text[:at]}{entry}, {text[at:]}"
    at = text.index("\n", _end(first)) + 1
    return f"{text[:at]}{' ' * key.start_mark.column}{entry}\n{text[at:]}"


def _spliced(text: str, node: Any, said: str) -> str:
    start, end = node.start_mark.index, _end(node)
    return f"{text[:start]}{' ' * (start == end)}{said}{text[end:]}"


def _end(node: Any) -> int:
    """Where its text ends; a block's own mark is behind the comments that follow."""
    if isinstance(node, yaml.MappingNode) and node.value and not node.flow_style:
        return _end(node.value[-1][1])
    if isinstance(node, yaml.SequenceNode) and node.value and not node.flow_style:
        return _end(node.value[-1])
    return int(node.end_mark.index)


def _given(settings: Sequence[str]) -> Iterator[Change]:
    for setting in [*put_aside(settings), *settings]:
        path, _, value = setting.partition("=")
        yield path.split("."), parse_yaml(value)[0]


def _found(recipe: Recipe, best: Mapping[str, Found]) -> Iterator[Change]:
    """What is another value than the task's; at the top of the recipe where it has one task that says nothing."""
    for name, found in best.items():
        task = recipe.tasks[name]
        changes = {"adapter": found.settings, "training": {"learning_rate": found.learning_rate}}
        for section, values in changes.items():
            old = getattr(task, section)
            top = len(recipe.tasks) == 1 and not old.model_fields_set - getattr(recipe, section).model_fields_set
            for key, value in values.items():
                if getattr(old, key) != value:
                    yield [section, key] if top else ["tasks", name, section, key], value


def _unused(name: str) -> str:
    """The name, numbered where such a folder is there."""
    others = (f"{name}-{number}" for number in range(2, 1000))
    return next(one for one in (name, *others) if not Path(one).exists())


def _says(file: Path, wanted: Recipe) -> bool:
    """Whether a recipe's tasks are as wanted, but for how paths are written."""
    try:
        found = load_recipe(file)
    except RecipeError:
        return False
    return _compared(found) == _compared(wanted)


def _compared(recipe: Recipe) -> dict[str, Any]:
    said = recipe.model_dump(exclude={"model", "adapter", "training"})  # which each task holds
    for task in said["tasks"].values():
        task["data"] = {key: value for key, value in task["data"].items() if key not in ("train", "validation", "test")}
    return said
