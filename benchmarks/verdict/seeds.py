"""Every seed of a study whose tasks differ by a number: examples, tokens of an answer, pairs to learn.

    python benchmarks/verdict/seeds.py benchmarks/results/verdict/stability/compare/few-shot.json --label "examples"

Writes REPORT-seeds.png beside the report (seeds as dots, their mean as a line), and prints tables in Markdown: mean,
then worst, median and best seed; and each method's spread, with the chance that seeds as unlike come of equal spreads
(Brown and Forsythe's test against the reference, corrected by Holm's over a column).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import levene

from trimtab.study.statistics import holm
from trimtab.study.tables import MARKS


def sizes(report: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """The tasks by their name without the number, and by the number."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for name, task in report["tasks"].items():
        number = re.search(r"\d+", name)
        assert number, f"{name} has no number"
        found[re.sub(r"[-,] ?\d+.*", "", name)][int(number[0])] = {line["name"]: line for line in task["methods"]}
    return found


def table(by_size: dict[int, dict[str, Any]], reference: str) -> str:
    """A line a method, a column a size."""
    names = list(dict.fromkeys(name for lines in by_size.values() for name in lines))
    rows = [["method", "parameters", *map(str, sorted(by_size))], ["---"] * (2 + len(by_size))]
    for name in names:
        row = [name, f"{max(lines[name]['parameters'] for lines in by_size.values() if name in lines):,}"]
        for _, lines in sorted(by_size.items()):
            line = lines.get(name)
            if not line or not line["scores"]:
                row.append("–")
                continue
            points = [100 * score for score in line["scores"]]
            against = line["against_reference"]
            mark = MARKS.get(against["verdict"], "") if against and name != reference else ""
            edge = f" ({line['at_edge']}/{len(points)} edge)" if line["at_edge"] else ""
            spread = f" ({min(points):.1f} / {median(points):.1f} / {max(points):.1f})" if len(points) > 1 else ""
            row.append(f"{mean(points):.1f}{mark}{spread}{edge}")
        rows.append([f"**{cell}**" for cell in row] if name == reference else row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def spreads(by_size: dict[int, dict[str, Any]], reference: str) -> str:
    """A line a method, a column a size."""
    columns = [{name: line["scores"] for name, line in lines.items()} for _, lines in sorted(by_size.items())]
    rows = [["spread", *map(str, sorted(by_size))], ["---"] * (1 + len(by_size))]
    found = []
    for of in columns:
        names = [name for name, scores in of.items() if name != reference and len(scores) > 1]
        ps = holm([float(levene(of[name], of[reference], center="median").pvalue) for name in names])
        found.append(dict(zip(names, ps, strict=True)))
    for name in dict.fromkeys(name for of in columns for name, scores in of.items() if len(scores) > 1):
        cells = [f"{100 * stdev(of[name]):.1f}" for of in columns]
        told = [f" (p {column[name]:.3f})" if name in column else "" for column in found]
        rows.append([name, *(cell + p for cell, p in zip(cells, told, strict=True))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(found: dict[str, dict[int, dict[str, Any]]], label: str, path: Path) -> None:
    """A panel a task."""
    figure = Figure(figsize=(1 + 4.6 * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    names = sorted({name for by_size in found.values() for lines in by_size.values() for name in lines})
    for panel, (task, by_size) in zip(panels, found.items(), strict=True):
        xs = sorted(by_size)
        for i, name in enumerate(names):
            scores = [[100 * s for s in by_size[x].get(name, {"scores": []})["scores"]] for x in xs]
            places = [j + (i - (len(names) - 1) / 2) * 0.09 for j in range(len(xs))]
            told = [(place, some) for place, some in zip(places, scores, strict=True) if some]
            panel.plot([p for p, _ in told], [mean(some) for _, some in told], color=f"C{i}", label=name)
            for place, some in told:
                panel.plot([place] * len(some), some, "o", color=f"C{i}", ms=4, alpha=0.6)
        panel.set(title=task, xlabel=label, ylabel="test score, points", ylim=(-3, 103), xlim=(-0.5, len(xs) - 0.5))
        panel.set_xticks(range(len(xs)), list(map(str, xs)))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("a dot is a seed, the line their mean", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--label", required=True, help="what the number is")
    chosen = parser.parse_args()
    report = json.loads(chosen.report.read_text(encoding="utf-8"))
    found = sizes(report)
    for task, by_size in found.items():
        print(f"{task}, by {chosen.label}: mean (worst / median / best of the seeds)\n")
        reference = next(iter(report["tasks"].values()))["reference"]
        print(table(by_size, reference), "\n", spreads(by_size, reference), "\n", sep="\n")
    draw(found, chosen.label, chosen.report.with_name(f"{chosen.report.stem}-seeds.png"))


if __name__ == "__main__":
    main()
