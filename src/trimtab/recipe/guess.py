"""What a file of rows seems to be for: the task that `init` writes, to be checked by whoever reads it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from trimtab.errors import DataError
from trimtab.tasks.classification import label_name
from trimtab.tasks.files import NO_HEADER, SEPARATED, Row, is_blank, is_missing, locate, read_rows
from trimtab.tasks.messages import FIELDS, Message, answers, messages_of, one_turn
from trimtab.tasks.scores import BIO, NUMBER

LOOKED_AT, CLASSES = 2000, 50
"""Rows that are read, and the most values of a column that names classes."""
SHORT = 40
"""Characters of an answer that can be expected word for word."""
ID = re.compile(r"(?i)(^|[^a-z])(id|idx|index|uuid|guid|nr|no|key)$|[a-z]I[dD]$")
DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?|\d{1,2}:\d{2}(:\d{2})?")
INSTRUCTIONS = (("instruction", "input"), ("instruction", "context"))
PROMPTS = ("prompt", "question", "input", "instruction", "query", "source", "problem")
ANSWERS = ("output", "completion", "answer", "response", "chosen", "target", "solution")
BETTER, WORSE = "chosen", "rejected"
"""The two answers of files of preferences; the worse is no example."""
LABELS = (
    "label",
    "labels",
    "gold_label",
    "class",
    "category",
    "sentiment",
    "intent",
    "topic",
    "team",
    "queue",
    "department",
    "score",
    "rating",
    "stars",
)
AMOUNTS = ("score", "rating", "stars")
"""Labels whose whole numbers are amounts, where they are many."""
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))


@dataclass(frozen=True)
class Guess:
    """A task's type, and its keys in a recipe."""

    type: str
    keys: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    """Keys of its data, beside the files."""
    said: str = ""
    """What whoever reads the recipe should know."""


UNKNOWN = {
    True: Guess(
        "generation", {"prompt": "{input}", "answer": "{output}", "score": "exact_match", "max_new_tokens": 32}
    ),
    False: Guess("classification", {"text": "sentence", "label": "label", "score": "accuracy"}),
}
"""Without a file, for a model that generates and one that does not."""


def guess(path: str, generates: bool, columns: Sequence[str] | None = None, separator: str | None = None) -> Guess:
    """The task of a file for a model that writes text, or one that only reads it; `columns` and `separator` as
    `read_rows` takes them.

    Raises:
        DataError: the file cannot be read, or no task can be made of it.
    """
    source = locate(path)
    rows = read_rows(source, columns=columns, separator=separator)
    if talk := next((name for name in FIELDS if isinstance(rows[0].get(name), list)), None):
        found: Guess | None = _conversation(path, rows[:LOOKED_AT], talk)
    else:
        rows = _some(rows)
        fields, lists = _columns(rows), _lists(rows)
        if columns is None and source.suffix.lower() in SEPARATED:
            _check_header(path, fields)
        named = any(c.name.lower() in LABELS and c.names_classes for c in fields.values())
        found = _tagged(lists) or (None if named else _several(lists, fields))
        if found is None and generates:
            found = _asked(fields) or _labelled(fields) or _two_texts(fields) or _amount(fields)
        elif found is None:
            found = _labelled(fields) or _amount(fields)
        if {BETTER, WORSE} <= fields.keys() and (found is None or found.keys.get("answer") != f"{{{BETTER}}}"):
            raise DataError(
                f"{path}: {BETTER} and {WORSE} are two answers of which one is better; training on preferences: "
                f"docs/guides/trl.md; to train on the better ones alone, give rows a prompt beside {BETTER}, both texts"
            )
        if found is not None:
            found = _with_unused(found, fields)
            found = replace(found, said="; ".join(filter(None, [found.said, _header_within(found, rows, columns)])))
    if found is None or (found.type == "generation" and not generates):
        kind = "a prompt and an answer, or a text and a label" if generates else "a text and a label"
        model = "" if generates else "the model writes no text, and "
        same = [str(name) for name, value in rows[0].items() if all(row.get(name) == value for row in rows)]
        told = f" ({', '.join(same)} with one value in all rows, which tells nothing)" if same else ""
        nested = [str(name) for name, value in rows[0].items() if isinstance(value, dict)]
        told += f"; {', '.join(nested)}: objects, whose fields are read once they are the row's own" if nested else ""
        several = [str(name) for name, value in rows[0].items() if isinstance(value, list)]
        told += f"; {', '.join(several)}: lists, which no task of this file's fields reads" if several else ""
        written = [name for name, column in _columns(rows).items() if column.written]
        told += f"; {', '.join(written)}: lists written as text: write the file as .jsonl" if written else ""
        raise DataError(
            f"{path}: {model}no columns look like {kind}; the fields are {', '.join(map(str, rows[0]))}{told}. "
            "Call them text and label, or write the task by hand: trimtab init --example classification, say, shows one"
        )
    for name in _fields_of(found):
        if found.type == "generation" and set(name) & set("{}!:"):
            raise DataError(f"{path}: the field {name!r} cannot stand in a template; rename it, without {{ }} ! and :")
    said = {"columns": list(columns) if columns else None, "separator": separator}
    return replace(found, data={**found.data, **{key: value for key, value in said.items() if value is not None}})


def _some(rows: list[Row]) -> list[Row]:
    """As many as are looked at, from all over the file, which may be sorted by class."""
    drawn = random.Random(0).sample(range(len(rows)), min(LOOKED_AT, len(rows)))
    return [rows[i] for i in sorted(drawn)]


def _check_header(path: str, columns: dict[str, Column]) -> None:
    """Raises DataError where the first line is a row: what heads a column of repeated values is one of them."""
    for name, column in columns.items():
        if name.strip() in column.texts and 2 * column.distinct <= column.rows:
            raise DataError(
                f"{path}, line 1: {name[:60]!r} heads a column and is a value in it too, so that the line looks like a "
                f"row; {NO_HEADER}; where it is a field's name, rename the field"
            )


def _header_within(found: Guess, rows: list[Row], columns: Sequence[str] | None) -> str:
    """What is odd where names are given for a file whose first line names the columns otherwise."""
    label = found.keys.get("label")
    if not columns or label is None or found.type != "classification":
        return ""
    values = [label_name(row.get(label)) for row in rows]
    if values.count(values[0]) > 1 or len(set(values)) == len(values):
        return ""
    line = ", ".join(str(value)[:40] for value in rows[0].values())
    return f"no other row has the first one's {label}, {values[0][:40]!r}: where {line!r} is a header, remove that line"


def _with_unused(found: Guess, columns: dict[str, Column]) -> Guess:
    """Said of it, which fields hold what no task of this kind reads."""
    unused = [name for name, column in columns.items() if column.nested and name not in found.keys.values()]
    told = f"{', '.join(unused)}: lists or objects, which are not used" if unused else ""
    pairs = f"{WORSE} is not read; training on preferences: docs/guides/trl.md" if WORSE in columns else ""
    return replace(found, said="; ".join(filter(None, [found.said, told, pairs])))


class Column:
    """A field's values, and what they look like."""

    def __init__(self, name: str, values: Sequence[Any]) -> None:
        self.name, self.rows = name, len(values)
        there = [value for value in values if not is_missing(value)]
        if (named := [v for v in there if not is_blank(str(v))]) and all(NUMBER.fullmatch(str(v)) for v in named):
            there = named  # what R and pandas write for a number that is not there is no class
        self.written = bool(there) and all(
            isinstance(value, str) and value[:1] == "[" and value[-1:] == "]" for value in there
        )
        """Whether these are lists written as text."""
        self.nested = self.written or any(isinstance(value, list | dict) for value in there)
        self.texts = [label_name(value) for value in there]
        self.distinct = len(set(self.texts))
        self.full = len(there) == len(values)

    @cached_property
    def is_number(self) -> bool:
        return all(re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", text) for text in self.texts)

    @cached_property
    def has_fractions(self) -> bool:
        """Decimal points; or commas, if they do not seem to be of thousands."""
        if self.is_number:
            return any("." in text for text in self.texts)
        commas = all(re.fullmatch(r"[-+]?\d+(,\d+)?", text) for text in self.texts)
        return commas and any(re.search(r"^[-+]?0,|,(?!\d{3}$)", text) for text in self.texts)

    @cached_property
    def has_amounts(self) -> bool:
        """Whether there are halves or the like, and not whole numbers alone that are written with a point."""
        return self.has_fractions and any(float(text.replace(",", ".")) % 1 for text in self.texts)

    @cached_property
    def is_name_of_row(self) -> bool:
        """An id, a date, or always the same: nothing to learn from."""
        numbered = self.distinct == self.rows > 2 and all(re.fullmatch(r"\S*\d\S*", text) for text in self.texts)
        dated = all(DATE.fullmatch(text) for text in self.texts)
        return self.distinct < 2 or dated or bool(ID.search(self.name)) or (numbered and not self.has_fractions)

    @cached_property
    def is_text(self) -> bool:
        return not (self.nested or self.is_number or self.has_fractions or self.is_name_of_row)

    @cached_property
    def numbers_classes(self) -> bool:
        """Whole numbers without a gap from 0 or 1, with several rows each: names of many classes, not amounts."""
        found = {int(text) for text in self.texts if text.isdecimal()}
        without_gap = found in (set(range(self.distinct)), set(range(1, self.distinct + 1)))
        return without_gap and 2 * self.distinct <= self.rows and self.name.lower() not in AMOUNTS

    @cached_property
    def packs_names(self) -> bool:
        """Whether some cells name several of a few things, with commas or the like between them."""
        parts = [[one.strip() for one in re.split(r"[,;|]", text)] for text in self.texts]
        names = {one for some in parts for one in some}
        least = 3 if all(NUMBER.fullmatch(one) for one in names) else 2  # 8,5 may be a number
        few = 2 <= len(names) <= min(CLASSES, self.rows // 4) and len(names) <= self.distinct
        return few and "" not in names and max(map(len, parts)) >= least and max(map(len, names)) <= SHORT

    @property
    def length(self) -> float:
        return sum(map(len, self.texts)) / max(1, len(self.texts))

    @property
    def longest(self) -> int:
        return max(map(len, self.texts), default=0)

    @property
    def names_classes(self) -> bool:
        few = 2 <= self.distinct <= min(CLASSES, self.rows // 4)
        return few and not self.is_name_of_row and not self.nested and self.longest <= SHORT


def _columns(rows: list[Row]) -> dict[str, Column]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: Column(name, [row.get(name) for row in rows]) for name in names}


def _fields_of(found: Guess) -> list[str]:
    texts = [text for value in found.keys.values() for text in ([value] if isinstance(value, str) else [])]
    return [name for text in texts for name in re.findall(r"\{(.*)\}", text)]


def _conversation(path: str, rows: list[Row], name: str) -> Guess:
    turns, told, flaw = [], [], None
    for number, row in enumerate(rows, 1):
        try:
            where = f"{path}, row {number}"
            told.append(messages_of(row, name, where))
            turns.append(one_turn(row, name, where))
        except DataError as error:
            flaw = flaw or error
    if not told and flaw:
        raise flaw
    if len(turns) < len(told) or any(row.get("tools") for row in rows):
        return _turns(path, name, told, len(rows))
    columns = _columns(turns)
    systems = set(columns["system"].texts)
    prompt: Any = "{user}" if len(systems) < 2 else ["{system}\n\n{user}", "{user}"]
    made = _generation(prompt, columns["assistant"])
    if len(systems) == 1 and columns["system"].full:
        made.keys["system"] = systems.pop()
    left_out = len(rows) - len(turns)
    made.data.update({"conversation": name, **({"skip_bad_rows": True} if left_out else {})})
    said = f"{left_out} of {len(rows)} conversations have several turns and are left out" if left_out else made.said
    return Guess(made.type, made.keys, made.data, said)


def _turns(path: str, name: str, told: list[list[Message]], rows: int) -> Guess:
    """Of conversations that are not all of one turn."""
    said = [messages[place]["content"] for messages in told for place in answers(messages)]
    if not said:
        raise DataError(f"{path}: no conversation has an answer: an assistant's message behind a user's or a tool's")
    made = _generation("", Column("assistant", said))
    keys = {key: value for key, value in made.keys.items() if key not in ("prompt", "answer")}
    left_out = rows - sum(bool(answers(messages)) for messages in told)
    data = {"conversation": name, **({"skip_bad_rows": True} if left_out else {})}
    note = f"{left_out} of {rows} rows are no conversation with an answer, and are left out" if left_out else ""
    return Guess("conversation", {"train_turns": "all", "edit_turns": "each", **keys}, data, note)


def _asked(columns: dict[str, Column]) -> Guess | None:
    """By the names that files of prompts and answers have."""
    columns = {name: column for name, column in columns.items() if column.texts and not column.nested}
    answer = next((columns[name] for name in ANSWERS if name in columns), None)
    if answer is None:
        return None
    for first, second in INSTRUCTIONS:
        if first in columns and second in columns:
            both = f"{{{first}}}\n\n{{{second}}}"
            return _generation(both if columns[second].full else [both, f"{{{first}}}"], answer)
    prompt = next((name for name in PROMPTS if name in columns and name != answer.name), None)
    left = [name for name, c in columns.items() if c.is_text and name not in (prompt, answer.name, *ANSWERS, WORSE)]
    said = f"{', '.join(left)} might belong in the prompt too, each in braces" if left else ""
    return _generation(f"{{{prompt}}}", answer, said) if prompt else None


def _generation(prompt: Any, answer: Column, said: str = "") -> Guess:
    reasoned = all(re.search(rf"{NUMBER.pattern}\W*$", text) for text in answer.texts)  # up to a number
    score = "exact_match" if answer.longest <= SHORT else "number" if reasoned else "overlap"
    most = min(256, max(16, answer.longest // 2))
    keys = {"prompt": prompt, "answer": f"{{{answer.name}}}", "score": score, "max_new_tokens": most}
    return Guess("generation", keys, {}, said)


def _labelled(columns: dict[str, Column]) -> Guess | None:
    """A text and a class or a number: by the label's name, else the last column with few different values."""
    named = [c for c in columns.values() if c.name.lower() in LABELS and c.distinct > 1 and not c.nested]
    others = [c for c in reversed(columns.values()) if c.names_classes]
    words_first = sorted(others, key=lambda c: (not c.full, c.is_number))  # what every row has, before that
    label = next(iter([*named, *words_first]), None)
    texts = [c for c in columns.values() if c.is_text and c is not label]
    if label is None or not texts:
        return None
    pair = _pair([c.name for c in texts])
    longest = max(texts, key=lambda c: c.length).name
    keys = {"text": pair or longest, "label": label.name}
    if label.packs_names:
        said = f"cells of {label.name} name several at once; as lists they are several labels: docs/your-own-file.md"
        return Guess("classification", {**keys, "score": "accuracy"}, {}, said)
    if label.has_amounts or (label.is_number and not (label.names_classes or label.numbers_classes)):
        return Guess("regression", {**keys, "score": "correlation"})
    others = [c for c in others if c is not label and c.name not in (pair or [longest])]
    names = ", ".join(c.name for c in others)
    said = f"{names} could stand at label: instead of {label.name}" if names and (not named or label.is_number) else ""
    marked = sum(set(c.texts) == {"0", "1"} for c in [*others, label]) > 1
    several = (
        "of several labels at once make one field, a list of those that are 1: docs/your-own-file.md" if marked else ""
    )
    unread = [c.name for c in texts if c.name not in (pair or [longest]) and not c.names_classes]
    more = ""
    if unread:
        could = f"could be read too: text: [{unread[0]}, {longest}]"
        more = f"{', '.join(unread)} {'not read: a text is of one field or two' if pair else could}"
    return Guess("classification", {**keys, "score": "accuracy"}, {}, "; ".join(filter(None, [said, several, more])))


def _pair(names: Sequence[str]) -> list[str] | None:
    """Two that are known to belong together, or whose names differ by 1 and 2, or a and b, alone."""
    for pair in (*PAIRS, *((name, twin) for name in names for twin in _twins(name))):
        if set(pair) <= set(names):
            return list(pair)
    return None


def _twins(name: str) -> list[str]:
    """The names with a 2 for a 1, or a b for an a that stands alone, at one place."""
    ends = re.finditer(r"1|(?<![^\W_])[aA](?![^\W_])", name)
    return [f"{name[: at.start()]}{'2bB'['1aA'.index(at[0])]}{name[at.end() :]}" for at in ends]


def _tagged(lists: dict[str, list[Any]]) -> Guess | None:
    """Words, and in another list as many tags as there are words."""
    texts = {name: _different(values) for name, values in lists.items() if _are_texts(values)}
    words = max(texts, key=texts.__getitem__, default=None)
    if words is None:
        return None
    lengths, most = [len(value) for value in lists[words]], min(CLASSES, texts[words] - 1)
    alike = [name for name, values in lists.items() if [len(value) for value in values] == lengths]
    tags = sorted(filter(lambda n: 2 <= _different(lists[n]) <= most, alike), key=lambda n: "ner" not in n.lower())
    if not tags:
        return None
    bio = all(BIO.fullmatch(label_name(tag)) for value in lists[tags[0]] for tag in value)
    said = f"{', '.join(tags[1:])} could be tags too" if tags[1:] else ""
    keys = {"text": words, "label": tags[0], "score": "f1" if bio else "accuracy", "adapter": {"positions": "all"}}
    return Guess("token_classification", keys, {}, said)


def _several(lists: dict[str, list[Any]], columns: dict[str, Column]) -> Guess | None:
    """A text, and a list of few different names."""
    texts = [c for c in columns.values() if c.is_text]
    for name, values in lists.items():
        numbered = name.lower() in LABELS and all(type(one) is int for value in values for one in value)
        if texts and (numbered or _are_texts(values)) and 2 <= _different(values) <= min(CLASSES, len(values) // 2):
            text = _pair([c.name for c in texts]) or max(texts, key=lambda c: c.length).name
            return Guess("multi_label_classification", {"text": text, "label": name, "score": "f1"})
    return None


def _lists(rows: list[Row]) -> dict[str, list[Any]]:
    """The fields that hold a list in every row."""
    found = {name: [row.get(name) for row in rows] for name in rows[0]}
    return {name: values for name, values in found.items() if all(isinstance(value, list) for value in values)}


def _different(lists: list[Any]) -> int:
    return len({str(part) for value in lists for part in value})


def _are_texts(lists: list[Any]) -> bool:
    return all(isinstance(part, str) for value in lists for part in value)


def _two_texts(columns: dict[str, Column]) -> Guess | None:
    """The two longest texts, in the file's order."""
    texts = [c for c in columns.values() if c.is_text]
    longest = sorted(texts, key=lambda c: -c.length)[:2]
    if len(longest) < 2:
        return None
    prompt, answer = (c for c in texts if c in longest)
    names = f"{prompt.name!r} and {answer.name!r}"
    said = f"a guess: the two longest texts; swap them if need be, and give --columns if {names} are no fields' names"
    return _generation(f"{{{prompt.name}}}", answer, said)


def _amount(columns: dict[str, Column]) -> Guess | None:
    """A text, and the only numbers with fractions."""
    texts = [c for c in columns.values() if c.is_text]
    amounts = [c.name for c in columns.values() if c.has_fractions and not c.is_name_of_row]
    if not texts or len(amounts) != 1:
        return None
    keys = {"text": max(texts, key=lambda c: c.length).name, "label": amounts[0], "score": "correlation"}
    return Guess("regression", keys, {}, f"a guess: {amounts[0]} has the only numbers with fractions")
