"""Rows from files (JSON, JSONL, CSV, TSV, Parquet) or the Hub; every mistake in a file has its line and a remedy."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trimtab.errors import BrokenLine, DataError, NoField

Row = dict[str, Any]


class Broken(Row):
    """What stands for a line with too many or too few cells that `skip_bad_rows` lets pass: a row without fields."""

    def __init__(self, flaw: str) -> None:
        super().__init__()
        self.flaw = flaw


def locate(path: str | Path, folder: str | Path = ".") -> Path:
    """The file at `path`, looked for in `folder` and then in the working directory.

    Raises DataError naming similar files when it is in neither.
    """
    name = Path(path).expanduser()
    tried = [Path(folder) / name, name]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    if any(candidate.is_dir() for candidate in tried):
        folder = next(candidate for candidate in tried if candidate.is_dir())
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            raise DataError(f"{str(path)!r} is a folder that `datasets` wrote; {TO_PARQUET}")
        raise DataError(
            f"{str(path)!r} is a folder; name a file of rows in it, or make one of a folder of texts for each class: "
            "docs/your-own-file.md"
        )
    near = [
        str(name.with_name(close))
        for parent in {p.parent for p in tried if p.parent.is_dir()}
        for close in difflib.get_close_matches(name.name, [p.name for p in parent.iterdir() if p.is_file()])
    ]
    missing_folder = "" if any(p.parent.is_dir() for p in tried) else f"; there is no folder {name.parent}"
    hint = f"; did you mean {' or '.join(sorted(set(near)))}?" if near else missing_folder
    raise DataError(f"no file {str(path)!r}{hint or '; check the path'}")


def read_texts(path: str | Path) -> list[str]:
    """The field `text` of the rows of a file that has rows, or the lines of a text file that hold more than blanks.

    Raises DataError for a file that is missing or damaged, or rows without that field.
    """
    file = locate(path)
    if file.suffix.lower() in READERS:
        rows = read_rows(file)
        if any(not isinstance(row.get("text"), str) for row in rows):
            raise DataError(f"{file}: every row needs a field 'text' that holds one; or give lines in a .txt file.")
        return [row["text"] for row in rows]
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{file}: not a text file in UTF-8; give one text a line.") from None
    return [line for line in lines if line]


def read_rows(
    source: str | Path,
    split: str | None = None,
    *,
    config: str | None = None,
    columns: Sequence[str] | None = None,
    skip_bad_rows: bool = False,
    separator: str | None = None,
) -> list[Row]:
    """Read a .json, .jsonl, .csv, .tsv or .parquet file or, when `split` is given, a split of a dataset on the Hub.

    `columns` names the fields of a CSV or TSV file that has no header line; with `skip_bad_rows` lines of one that
    have too many or too few cells are `Broken` rows instead of an error; `separator` stands between its cells, found
    by looking where not given.

    Raises DataError for a file that is missing, empty, damaged or of another kind, and when the Hub cannot be reached.
    """
    if split is not None:
        return _read_hub(str(source), config, split)
    path = locate(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        with path.open("rb") as opened:
            table = "tsv" if b"\t" in opened.readline(2**16) else "csv"
        remedy = (
            "Lines without a separator, a file a class, blocks of tagged words: docs/your-own-file.md; cells with a "
            f"separator between them are read from a copy called {path.stem}.{table}"
        )
        remedy = REMEDIES.get(path.suffix.lower(), remedy)
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; use one of {', '.join(READERS)}. {remedy}")
    for name, given in (("columns", columns), ("separator", separator)):
        if given and path.suffix.lower() not in SEPARATED:
            raise DataError(f"{path}: {name}: is for .csv and .tsv files; this one names its own fields, remove it")
    if separator is not None and len(separator) != 1:
        raise DataError(f"{path}: separator: {separator!r} is not one character")
    rows = reader(path, columns, skip_bad_rows, separator)
    if not rows:
        raise DataError(f"{path}: the file holds no rows")
    return rows


def _read_hub(name: str, config: str | None, split: str) -> list[Row]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(name, config, split=split)
        features = getattr(loaded, "features", None)
        return _with_names([dict(row) for row in loaded], features.to_dict() if features else {})
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"could not load {split!r} of the Hub dataset {name!r} ({type(error).__name__}: {reason}). Without a "
            "network, save it to a file where there is one, and give that path under data: train: instead of name:"
        ) from None


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw[:2].count(0) == 1:  # half of an ASCII character is 0
        kind = "UTF-16LE" if raw[1:2] == b"\0" else "UTF-16BE" if raw[:1] == b"\0" else "UTF-16"
        raise DataError(f"{path}: UTF-16 text; convert it: iconv -f {kind} -t UTF-8 {path.name} > utf8-{path.name}")
    if not raw.strip():
        raise DataError(f"{path}: the file is empty")
    for magic, kind in BINARY.items():
        if raw.startswith(magic):
            raise DataError(f"{path}: its content is {kind}, whatever its name says; export the rows as .jsonl")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        remedy = f"convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8-{path.name}"
        raise DataError(f"{path}, line {line}: not UTF-8 text; {remedy}") from None


TO_PARQUET = "in Python, load_from_disk(FOLDER) gives its splits, and each has to_parquet(FILE)"
REMEDIES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "Export the sheet as CSV"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz"), "Unpack it first"),
    ".arrow": f"`datasets` wrote its folder: {TO_PARQUET}",
}
"""By the suffix of a file that is not read."""
NO_HEADER = "without a header line, name the fields: columns: in a recipe's data, or init --columns"
BINARY = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"BZh": "bzip2",
    b"\xd0\xcf\x11\xe0": "Excel",
    **{bytes([0x80, version]): "pickle (which trimtab does not open)" for version in range(2, 6)},
}


def _read_json(path: Path, *_: Any) -> list[Row]:
    text = _text(path)
    try:
        data = json.loads(text)
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be rows; expected a list of objects with named fields") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, as in .jsonl
            return _json_lines(path, text)
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); is the file cut short?") from None
    rows = data.get("data") if isinstance(data, dict) and "data" in data else data
    if not isinstance(rows, list):
        found = "one object" if isinstance(rows, dict) else type(rows).__name__
        remedy = 'write [{...}, {...}], or {"data": [...]}; with pandas, to_json(orient="records")'
        if isinstance(rows, dict) and (lists := [key for key, value in rows.items() if isinstance(value, list)]):
            remedy = f"it holds lists, {', '.join(lists[:8])}: write each to a file of its own, a list of objects"
        raise DataError(f"{path}: expected a list of rows, not {found}; {remedy}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected an object with named fields, not {type(row).__name__}")
    return rows


def _read_jsonl(path: Path, *_: Any) -> list[Row]:
    return _json_lines(path, _text(path))


def _json_lines(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise DataError(f"{path}, line {number}: nested too deeply to be a row") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not a whole JSON object ({error.msg}); is the file cut short? "
                "Repair or remove the line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object with named fields, not {type(row).__name__}")
        rows.append(row)
    return rows


def _read_csv(path: Path, columns: Sequence[str] | None, skip: bool, separator: str | None) -> list[Row]:
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator or find_separator(text))
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if cells:
                _check_swallowed(path, reader, cells)
                lines.append((reader.line_num, cells))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; check the quotes, or use .jsonl") from None
    return _table(path, lines, columns, skip)


def _check_swallowed(path: Path, reader: Any, cells: list[str]) -> None:
    """Raises DataError for a cell that seems to be several rows of a file in which quotes are plain characters."""
    if reader.dialect.delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
        raise DataError(
            f"{path}, line {reader.line_num}: a cell in quotes holds tabs and ends of lines, as whole rows do; where "
            "quotes are plain characters, make a copy called .tsv"
        )


def find_separator(text: str) -> str:
    """The first of `SEPARATORS` by which a CSV's first lines all have as many cells.

    Where there is none, that by which the first line has most.
    """
    for separator in SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        try:
            counts = {len(cells) for cells in islice(reader, LOOKED_AT) if cells}
        except csv.Error:
            continue
        if len(counts) == 1 and counts != {1}:
            return separator
    first = text.partition("\n")[0]
    return max(SEPARATORS, key=first.count)


SEPARATORS, LOOKED_AT = ",;\t|^~", 50
SEPARATED = (".csv", ".tsv")
"""Suffixes of files whose cells have a separator between them."""


def _read_tsv(path: Path, columns: Sequence[str] | None, skip: bool, separator: str | None) -> list[Row]:
    """Tabs separate and quotes are plain characters, as in GLUE's files; with a separator of its own, it is a CSV."""
    if separator not in (None, "\t"):
        return _read_csv(path, columns, skip, separator)
    lines = enumerate((line.rstrip("\r").split("\t") for line in _text(path).split("\n")), 1)
    return _table(path, [(number, cells) for number, cells in lines if cells != [""]], columns, skip)


def _table(path: Path, lines: list[tuple[int, list[str]]], columns: Sequence[str] | None, skip: bool) -> list[Row]:
    first = lines[0][1] if lines else []
    if columns:
        header = list(columns)
        lines = lines[1:] if first == header else lines  # a header line that is there after all is no row
    else:
        header, lines = [first[0] or "Unnamed: 0", *first[1:]], lines[1:]  # as pandas calls its index, written without
    if len(set(header)) < len(header) or "" in header:
        raise DataError(f"{path}, line 1: the header {header} has an empty or repeated name; {NO_HEADER}")
    if path.suffix.lower() == ".tsv" and all(_is_quoted(name) for name in header):
        raise DataError(f"{path}, line 1: the names are in quotes; {QUOTES_OF_TSV}")
    rows: list[Row] = []
    for number, cells in lines:
        if len(cells) == len(header):
            rows.append(dict(zip(header, cells, strict=True)))
            continue
        flaw = f"{path}, line {number}: {len(cells)} cells where there are {len(header)} columns"
        if skip:
            rows.append(Broken(flaw))
            continue
        other = " or, where it is another, name it (data: separator:, init's --separator)" if len(header) == 1 else ""
        quotes = QUOTES_OF_TSV if any('"' in cell for cell in cells) and path.suffix.lower() == ".tsv" else ""
        remedy = quotes or f"quote cells that hold the separator{other}"
        raise DataError(f"{flaw} ({', '.join(header)[:200]}); {remedy}; {NO_HEADER}")
    return rows


QUOTES_OF_TSV = "quotes are plain characters in a .tsv file; of one that a spreadsheet wrote make a copy called .csv"


def _is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def quoted_cells(rows: Sequence[Row]) -> int:
    """How many cells look as spreadsheets write those that hold quotes: in quotes, and all within doubled."""
    texts = (value for row in rows for value in row.values() if isinstance(value, str) and _is_quoted(value))
    return sum('""' in text[1:-1] and '"' not in text[1:-1].replace('""', "") for text in texts)


def _read_parquet(path: Path, *_: Any) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        rows: list[Row] = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a whole parquet file ({str(error).splitlines()[0]}); write or fetch it again"
        ) from None
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):  # not written by `datasets`
        return rows
    return _with_names(rows, features)


def _with_names(rows: list[Row], features: Mapping[str, Any]) -> list[Row]:
    """The rows with the names of classes instead of their numbers, in columns of which `datasets` knows those."""
    for column, names in ((column, _class_names(kind)) for column, kind in features.items()):
        for row in rows if names else ():
            row[column] = _named(row.get(column), names)
    return rows


def _class_names(kind: Any) -> list[str]:
    """Of a column of classes, or of lists of classes, as `datasets` describes it; none for any other."""
    match kind:
        case {"_type": "ClassLabel", "names": list(names)}:
            return names
        case {"feature": inner} | [inner]:  # a list of such, as written today and by earlier versions
            return _class_names(inner)
        case _:
            return []


def _named(value: Any, names: Sequence[str]) -> Any:
    """A class's name; what is no class, as the -1 of a row without a label, stays as it is."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


READERS: dict[str, Callable[[Path, Sequence[str] | None, bool, str | None], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def field(row: Row, name: str, where: str) -> Any:
    """The value of a field; raises NoField naming the fields there are, BrokenLine where the row is none."""
    if isinstance(row, Broken):
        raise BrokenLine(row.flaw)
    if name not in row:
        near = difflib.get_close_matches(name.casefold(), {str(one).casefold(): one for one in row}, 1)
        outer = name.partition(".")[0]
        hint = f"; {outer!r} is an object: make its fields the row's" if isinstance(row.get(outer), dict) else ""
        hint += "; is data: separator: right?" if len(row) == 1 and set(SEPARATORS) & set(str(*row)) else ""
        hint += "".join(f"; did you mean {one!r}?" for one in row if near and str(one).casefold() == near[0])
        error = NoField(f"{where}: no field {name!r}; the fields are {', '.join(map(str, row))}{hint}")
        error.name = name
        raise error
    return row[name]


def is_missing(value: Any) -> bool:
    """Whether a value is null, NaN or the empty string."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def is_blank(text: str) -> bool:
    """Whether a text is how spreadsheets and statistics programs write that nothing is there."""
    return text.casefold() in {"nan", "na", "n/a", "#n/a", "null", "<na>"}


def listed(value: Any, name: str, where: str) -> Any:
    """A field's value; of text that is a JSON list, as `predict` writes lists into a CSV, the list.

    Raises DataError for lists that are written in another way, such as Python's.
    """
    if not (isinstance(value, str) and value[:1] == "[" and value[-1:] == "]"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise DataError(
            f"{where}: the field {name!r} is a list written as text, {value[:60]}; write the file as .jsonl (pandas: "
            'to_json(FILE, orient="records", lines=True))'
        ) from None


def needed(row: Row, name: str, where: str) -> Any:
    """The value of a field that must hold something; raises DataError for null, NaN and the empty string."""
    value = field(row, name, where)
    if is_missing(value):
        raise DataError(f"{where}: the field {name!r} is {value!r}; fill it or remove the row")
    return value


def as_text(value: Any, name: str, where: str) -> str:
    """A field's value as a model reads it; nothing for null and NaN.

    Raises DataError for what is no text or number, and for text with half a character.
    """
    if is_missing(value):
        return ""
    if not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise DataError(f"{where}: the field {name!r} holds a {kind}, not text or a number: {str(value)[:60]}")
    text = str(value)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: the field {name!r} has half a character (a lone surrogate); write the row again")
    return text
