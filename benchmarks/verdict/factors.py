"""What is changed, where, and with how many parameters, each averaged over the others.

    python benchmarks/verdict/factors.py CONFIG --model MODEL --data DATA

Of a comparison that `trimtab compare CONFIG` has run, whose methods are named HOW-WHERE or HOW-WHERE-large. Each row of
the result is a mean of differences between methods that are alike in all but one of the three, with its interval over
items and seeds as in the report; rows about all methods are corrected as one table, those with one of the other two
fixed as another, and those with both, of two methods each, as a third.
Writes factors.json and .png beside the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from trials import asked_for

from trimtab.runs.folder import write_json
from trimtab.study.compare import Group
from trimtab.study.report import Items, sample
from trimtab.study.statistics import Difference, Sample, compare, judged, over_tasks
from trimtab.study.tables import MARKS

Cell = tuple[str, str, str]
"""What is changed, where, and how large it is."""
LEVELS = (("loreft", "lora", "direft"), ("all", "prompt", "some"), ("large", "small"))


@dataclass(frozen=True)
class Contrast:
    """The cells that two levels of one factor share, of all or where another factor is at one level."""

    title: str
    pairs: list[tuple[Cell, Cell]]


def cell_of(name: str) -> Cell | None:
    """The cell that a method's name says, if any."""
    found = re.fullmatch(r"(\w+?)-(\w+?)(-large)?", name)
    return (found[1], found[2], "large" if found[3] else "small") if found else None


def contrasts(cells: set[Cell], fixed: int) -> Iterator[Contrast]:
    """Each two levels of each factor: over all cells, or for each level of so many other factors."""
    for factor, levels in enumerate(LEVELS):
        others = [other for other in range(len(LEVELS)) if other != factor]
        for one, twin in combinations(levels, 2):
            for held in combinations(others, fixed):
                for at in product(*(LEVELS[other] for other in held)):
                    pairs = [
                        (cell, (*cell[:factor], twin, *cell[factor + 1 :]))
                        for cell in sorted(cells)
                        if cell[factor] == one and all(cell[o] == level for o, level in zip(held, at, strict=True))
                    ]
                    there = [(cell, other) for cell, other in pairs if other in cells]
                    yield Contrast(", ".join([f"{one} − {twin}", *at]), there)


def mean_sample(samples: list[Sample]) -> Sample:
    """The mean of several methods, seed by seed, so that what seeds share across methods is in their spread."""
    return Sample(np.mean([one.scores for one in samples], axis=0), min(one.items for one in samples))


def differences(contrast: Contrast, tasks: dict[str, dict[Cell, Sample]], margin: float) -> list[Difference]:
    """By task."""
    ones, others = zip(*contrast.pairs, strict=True)
    return [
        compare(mean_sample([of[c] for c in ones]), mean_sample([of[c] for c in others]), margin)
        for of in tasks.values()
    ]


def samples_of(groups: list[Group]) -> dict[str, dict[Cell, Sample]]:
    """Each task's cells."""
    tasks: dict[str, dict[Cell, Sample]] = {}
    items: dict[str, tuple[Items, Items]] = {}
    for group in groups:
        task, cell = group.experiment.task, cell_of(group.way.name)
        if cell is not None:
            if group.task not in items:
                items[group.task] = Items.of(task, "validation"), Items.of(task, "test")
            tasks.setdefault(group.task, {})[cell] = sample(group, task, *items[group.task])
    return tasks


def draw(titles: list[str], found: list[Difference], path: Path) -> None:
    """A line a contrast, with its interval."""
    figure = Figure(figsize=(7.5, 0.8 + 0.28 * len(found)), layout="constrained")
    panel = figure.subplots()
    for place, one in enumerate(reversed(found)):
        colour = {"better": "tab:green", "worse": "tab:red"}.get(one.verdict, "tab:gray")
        panel.plot([100 * one.low, 100 * one.high], [place, place], color=colour, lw=2)
        panel.plot([100 * one.difference], [place], "o", color=colour)
    panel.axvline(0, color="black", lw=0.8)
    panel.set_yticks(range(len(found)), titles[::-1], fontsize=8)
    panel.set_xlabel("points, mean over the tasks, with the 95% interval (grey: not told apart)", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command."""
    folder, settings, groups = asked_for(__doc__)
    tasks = samples_of(groups)
    shared = set.intersection(*({*of} for of in tasks.values()))
    written, drawn = [], []
    for fixed in range(len(LEVELS)):
        rows = [row for row in contrasts(shared, fixed) if row.pairs]
        by_task = [differences(row, tasks, settings.margin) for row in rows]
        whole = judged([over_tasks(found) for found in by_task])
        columns = [judged(list(column)) for column in zip(*by_task, strict=True)]
        print(f"\n| | {' | '.join(tasks)} | all, 95% interval | p | would have found |")
        print("|---" * (len(tasks) + 4) + "|")
        for i, (row, total) in enumerate(zip(rows, whole, strict=True)):
            cells = [f"{100 * c[i].difference:+.1f}{MARKS.get(c[i].verdict, '')}" for c in columns]
            interval = f"{100 * total.difference:+.1f} ({100 * total.low:+.1f} to {100 * total.high:+.1f})"
            p, least = f"{total.corrected or 0:.3f}", f"{100 * (total.detectable or 0):.1f}"
            print(f"| {row.title} | {' | '.join(cells)} | {interval}{MARKS.get(total.verdict, '')} | {p} | {least} |")
            of_tasks = {name: asdict(column[i]) for name, column in zip(tasks, columns, strict=True)}
            written.append({"contrast": row.title, "pairs": row.pairs, "all": asdict(total), "tasks": of_tasks})
            if fixed < 2:
                drawn.append((row.title, total))
    write_json(folder / "factors.json", {"contrasts": written})
    titles, found = zip(*drawn, strict=True)
    draw(list(titles), list(found), folder / "factors.png")


if __name__ == "__main__":
    main()
