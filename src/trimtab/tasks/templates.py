"""Templates: text with a row's fields in braces, such as "Q: {question}\\nA:"."""

from __future__ import annotations

import string
from typing import Annotated

from pydantic import AfterValidator, Discriminator, Field, Tag

from trimtab.tasks.files import Row, as_text, field, is_missing, needed


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split `"Q: {question}\\nA:"` into `[("Q: ", "question"), ("\\nA:", None)]`: text, then the field after it.

    Raises ValueError for an unbalanced brace, an empty `{}`, and a conversion or format such as `{a!r}` or `{a:>9}`.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}: a field is written {{name}}, a plain brace is doubled, {{{{ or }}}}") from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion):
            raise ValueError("a field is a bare name in braces, as in {question}: no conversion, no format, not empty")
    return [(text, name) for text, name, _, _ in parts]


def _checked(value: str) -> str:
    parse_template(value)
    return value


Template = Annotated[str, AfterValidator(_checked)]
Templates = Annotated[
    Annotated[Template, Tag("one")] | Annotated[list[Template], Field(min_length=1), Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
]


def render(template: str, row: Row, where: str, *, full: bool = False) -> str:
    """Fill a template from a row; null and NaN give the empty string, or with `full` an error.

    Raises DataError for a field that is not there and, with `full`, for an empty one.
    """
    get = needed if full else field
    parts = parse_template(template)
    if any(name and name not in row for _, name in parts):
        where = f"{where}, for {template!r}"
    return "".join(text + (as_text(get(row, name, where), name, where) if name else "") for text, name in parts)


def chosen_template(templates: str | list[str], row: Row) -> str:
    """The template itself or, of several, the first whose fields all hold something, else the last."""
    if isinstance(templates, str):
        return templates
    for template in templates:
        if not any(is_missing(row.get(name)) for _, name in parse_template(template) if name is not None):
            return template
    return templates[-1]
