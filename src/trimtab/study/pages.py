"""The files of a report: JSON, Markdown, one PNG a task, and one HTML page that holds it all."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader

from trimtab.runs.folder import write_bytes, write_json, write_text
from trimtab.study import tables
from trimtab.study.compare import CompareSpec, Group
from trimtab.study.plots import draw, draw_sizes
from trimtab.study.report import PROCEDURE, Line, Report, TaskReport, procedure_of, summarise, title_of
from trimtab.study.tables import as_markdown


def write_report(groups: Sequence[Group], settings: CompareSpec, folder: Path, name: str, command: str) -> Report:
    """Write `name`.json, .md, .html and one PNG a task into `folder`.

    One that is there and was made by an earlier procedure is not written over: it is moved to a folder of its own, in
    which its pages say so.
    """
    report = summarise(groups, settings, command)
    folder.mkdir(parents=True, exist_ok=True)
    _set_aside(folder, name)
    plots = {task: folder / f"{name}-{task}.png" for task in report.by_size or report.tasks}
    wide = {task: _picture(report, task) for task in plots}
    for task, path in plots.items():
        write_bytes(path, wide[task])
    write_json(folder / f"{name}.json", asdict(report))
    write_text(folder / f"{name}.md", as_markdown(report, plots))
    write_text(folder / f"{name}.html", as_page(report, wide))
    return report


def holds_more(report: Path, groups: Sequence[Group]) -> bool:
    """Whether a report's JSON is there and has tasks, or methods of them, that these groups have not."""
    if not report.exists():
        return False
    tasks = json.loads(report.read_text(encoding="utf-8"))["tasks"]
    there = {(title, line["name"]) for title, task in tasks.items() for line in task["methods"]}
    return not there <= {(title_of(group.task, group.examples), group.way.name) for group in groups}


EARLIER = (
    "Made by an earlier procedure, in which one seed chose the learning rate for all: it tells identical methods apart "
    "more often than it says. The same command reports what trimtab finds now."
)


def _set_aside(folder: Path, name: str) -> None:
    there = folder / f"{name}.json"
    if not there.exists() or procedure_of(json.loads(there.read_text(encoding="utf-8"))) == PROCEDURE:
        return
    aside = folder / "earlier"
    aside.mkdir(exist_ok=True)
    for file in [*folder.glob(f"{name}.*"), *folder.glob(f"{name}-*.png")]:
        file.replace(aside / file.name)
    for kind, before, mark in (("md", "", f"> {EARLIER}\n\n"), ("html", "<body>", f"<body><p><b>{EARLIER}</b></p>")):
        page = aside / f"{name}.{kind}"
        if page.exists():
            write_text(page, page.read_text(encoding="utf-8").replace(before, mark, 1))


def _picture(report: Report, task: str, narrow: bool = False) -> bytes:
    """A PNG."""
    return draw_sizes(report.by_size[task], task, narrow) if report.by_size else draw(report.tasks[task], task, narrow)


def as_page(report: Report, wide: Mapping[str, bytes]) -> str:
    """The report as one HTML page that holds its pictures, those for wide windows and others for narrow ones."""
    pictures = {
        task: [base64.b64encode(png).decode() for png in (drawn, _picture(report, task, narrow=True))]
        for task, drawn in wide.items()
    }
    loader = PackageLoader("trimtab.study", "")
    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    made.globals |= {name: getattr(tables, name) for name in ("table_of", "sizes", "by_size", "remarks")}
    made.globals |= {name: getattr(tables, name) for name in ("answered", "shortened")}
    made.filters |= {"verdict": _class_of}
    words = {
        "introduction": tables.introduction(report),
        "explained": tables.explained(report),
        "overview": tables.overview(report),
        "ran": tables.ran(report),
    }
    return made.get_template("report.html.jinja").render(report=report, pictures=pictures, **words)


def _class_of(line: Line, task: TaskReport) -> str:
    if line.name == task.reference:
        return "reference"
    return line.against_reference.verdict if line.against_reference else ""
