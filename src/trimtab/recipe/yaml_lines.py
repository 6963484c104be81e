"""YAML read strictly, with the line of every value: no key twice, `4e-3` a number, `no` a word (as in YAML 1.2).

Settings such as `training.epochs=3` are grafted into the text's tree as if they stood there, on line 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml


class YamlError(ValueError):
    """Text that is not YAML, or has a key twice; `line` counts from 1, and is 0 for a setting."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (own ones, instead of YAML 1.1's)


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str, settings: Sequence[str] = ()) -> tuple[Any, yaml.Node | None]:
    """Return the value and the tree of nodes that `find` looks lines up in.

    Args:
        settings: `key.path=value` each, the value in YAML; it replaces what the text holds there.

    Raises YamlError for bad syntax, a key given twice, an alias inside its own anchor, a tag for an object, and a
    setting without a path or below something that is no mapping.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        for mapping in _mappings(node, ()):
            _no_key_twice(mapping)
        for setting in settings:
            node = _set(loader, node, setting)
        return (loader.construct_document(node) if node else None), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        tab = re.match(r" *\t", "".join(text.split("\n")[line : line + 1]))
        said = "a tab; YAML is indented with spaces" if tab else f"not valid YAML: {error.problem or error.context}"
        said += "; are this line and those above it indented alike?" if "<block" in said else ""
        raise YamlError(line + 1, said) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"not valid YAML: character #x{error.character:04x} is not allowed") from None


def find(node: yaml.Node | None, path: Sequence[str | int]) -> tuple[int, list[str | int]]:
    """The line of the deepest part of `path` in the tree (0: from a setting), and the parts found.

    Unknown parts are passed over.
    """
    line = 1
    found: list[str | int] = []
    for part in path:
        step = next((s for s in _children(node) if s[0] == part), None)
        if step is not None:
            _, line, node = step
            found.append(part)
    return line, found


def node_at(node: yaml.Node | None, path: Sequence[str | int]) -> yaml.Node | None:
    """The part of the tree at a path that is there."""
    for part in path:
        node = next(child for name, _, child in _children(node) if name == part)
    return node


def _set(loader: _Loader, node: yaml.Node | None, setting: str) -> yaml.Node:
    path, sep, text = setting.partition("=")
    if not sep or not all(path.split(".")):
        raise YamlError(0, f"{setting!r} is no setting; write key.path=value, as in training.epochs=3")
    inner = _Loader(text)
    inner.line = -1  # which is reported as line 0
    try:
        value = inner.get_single_node() or yaml.ScalarNode("tag:yaml.org,2002:null", "", inner.get_mark())
    except yaml.MarkedYAMLError as error:
        raise YamlError(0, f"{setting!r}: not valid YAML behind the =: {error.problem or error.context}") from None
    for mapping in _mappings(value, ()):
        _no_key_twice(mapping)
    return _grafted(loader, node, path.split("."), value, setting)


def _grafted(loader: _Loader, node: Any, path: list[str], value: yaml.Node, setting: str) -> yaml.Node:
    """A copy of `node` with `value` at `path`: a copy, since an alias may show the same node elsewhere."""
    if not path:
        return value
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):
        node = yaml.MappingNode("tag:yaml.org,2002:map", [], value.start_mark, value.end_mark)
    if not isinstance(node, yaml.MappingNode):
        raise YamlError(0, f"{setting!r}: there is no mapping to set {path[0]!r} in")
    loader.flatten_mapping(node)
    index = max((i for i, (key, _) in enumerate(node.value) if key.value == path[0]), default=len(node.value))
    old = node.value[index][1] if index < len(node.value) else None
    key = yaml.ScalarNode("tag:yaml.org,2002:str", path[0], value.start_mark, value.end_mark)
    pairs = [*node.value[:index], (key, _grafted(loader, old, path[1:], value, setting)), *node.value[index + 1 :]]
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)


def _children(node: yaml.Node | None) -> Iterator[tuple[str | int, int, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):  # a merged `<<` comes first and is overridden
            name = int(key.value) if key.tag.endswith(":int") else key.value
            yield name, key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield index, value.start_mark.line + 1, value


def _mappings(node: yaml.Node | None, above: tuple[yaml.Node, ...]) -> Iterator[yaml.MappingNode]:
    if node is None:
        return
    if node in above:
        raise YamlError(node.start_mark.line + 1, "an alias stands inside its own anchor")
    if isinstance(node, yaml.MappingNode):
        yield node
    for _, _, child in _children(node):
        yield from _mappings(child, (*above, node))


def _no_key_twice(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key.value, str) and lines.setdefault(key.value, line) != line:
            raise YamlError(
                line, f"the key {key.value!r} is already given on line {lines[key.value]}; keep one of them"
            )
