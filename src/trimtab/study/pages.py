"""The files of a report: JSON, Markdown, one PNG a task, and one HTML page that holds it all."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader

from trimtab.runs.folder import write_json, write_text
from trimtab.study import tables
from trimtab.study.compare import CompareSpec, Group
from trimtab.study.plots import draw, draw_sizes
from trimtab.study.report import Line, Report, TaskReport, summarise
from trimtab.study.tables import as_markdown


def write_report(groups: Sequence[Group], settings: CompareSpec, folder: Path, name: str, command: str) -> Report:
    """Write `name`.json, .md, .html and one PNG a task into `folder`."""
    report = summarise(groups, settings, command)
    folder.mkdir(parents=True, exist_ok=True)
    plots = {task: folder / f"{name}-{task}.png" for task in report.by_size or report.tasks}
    for task, path in plots.items():
        if report.by_size:
            draw_sizes(report.by_size[task], task, path)
        else:
            draw(report.tasks[task], task, path)
    write_json(folder / f"{name}.json", asdict(report))
    write_text(folder / f"{name}.md", as_markdown(report, plots))
    write_text(folder / f"{name}.html", as_page(report, plots))
    return report


def as_page(report: Report, plots: Mapping[str, Path]) -> str:
    """The report as one HTML page that holds its pictures."""
    pictures = {name: base64.b64encode(path.read_bytes()).decode() for name, path in plots.items()}
    loader = PackageLoader("trimtab.study", "")
    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    made.globals |= {"heads": tables.heads, "sizes": tables.sizes, "by_size": tables.by_size, "remarks": tables.remarks}
    made.filters |= {"cells": tables.cells, "verdict": _class_of}
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
