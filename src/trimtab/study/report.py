"""What a comparison found: tables, plots and a sentence a pair, as Markdown, JSON, PNG and one HTML page."""

from __future__ import annotations

import base64
import platform
import statistics as plain
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter

from trimtab.recipe.schema import Recipe
from trimtab.runs.trial import versions, write_json
from trimtab.study.compare import Group
from trimtab.study.statistics import (
    Difference,
    Weighted,
    compare_runs,
    correlation_of,
    f1_of,
    mcc_of,
    mean_of,
    over_sets,
    over_tasks,
)
from trimtab.tasks import Task, build_task
from trimtab.tasks.classification import ClassificationTask, RegressionTask

matplotlib.use("Agg")
Row = dict[str, Any]


def write_report(recipe: Recipe, groups: Sequence[Group], folder: Path, name: str, command: str) -> Row:
    """Write `name`.json, .md, .html and one PNG a task into `folder`; returns what the JSON holds."""
    report = summarise(recipe, groups, command)
    folder.mkdir(parents=True, exist_ok=True)
    sized = report["by_size"]
    plots = {task: folder / f"{name}-{task}.png" for task in sized or report["tasks"]}
    for task, path in plots.items():
        if sized:
            draw_sizes(sized[task], task, path)
        else:
            draw(report["tasks"][task], task, path)
    write_json(folder / f"{name}.json", report)
    (folder / f"{name}.md").write_text(as_markdown(report, plots), encoding="utf-8")
    (folder / f"{name}.html").write_text(as_page(report, plots), encoding="utf-8")
    return report


def summarise(recipe: Recipe, groups: Sequence[Group], command: str = "") -> Row:
    """Every figure of the report, by task; the first group that finished in a task is its reference."""
    tasks: dict[str, Row] = {}
    for name in dict.fromkeys(group.task for group in groups):
        task, own = build_task(name, recipe.tasks[name]), [g for g in groups if g.task == name]
        for size in dict.fromkeys(g.examples for g in own):
            tasks[_title(name, size)] = _task_report(task, [g for g in own if g.examples == size], recipe)
    compared = [row for t in tasks.values() for row in t["methods"] if row.get("against_reference")]
    return {
        "model": Path(recipe.model).name,
        "command": command,
        "versions": _versions(groups),
        "machine": f"{platform.system()} {platform.machine()}",
        "learning_rates": recipe.compare.learning_rates,
        "seeds": recipe.compare.seeds,
        "comparisons": len(compared),
        "tasks": tasks,
        "overall": _overall(tasks, groups[0].contender.name if _distinct(recipe, groups) else None),
        "by_size": _by_size(groups, tasks),
    }


def _versions(groups: Sequence[Group]) -> dict[str, str]:
    """Those the trials ran with, which may be several."""
    runs = [run["versions"] for group in groups for run in (*group.rates, *group.seeds)] or [versions()]
    return {name: " and ".join(sorted({run[name] for run in runs if name in run})) for name in runs[0]}


def _by_size(groups: Sequence[Group], tasks: dict[str, Row]) -> dict[str, Row]:
    """Of a few-shot study, for each task and method: (examples, mean, standard deviation) by number of examples."""
    found: dict[str, Row] = {}
    for name, size in dict.fromkeys((g.task, g.examples) for g in groups if g.examples is not None):
        task = tasks[_title(name, size)]
        whole = found.setdefault(name, {"score": task["score"], "test_items": task["test_items"], "methods": {}})
        for row in task["methods"]:
            if "mean" in row:
                whole["methods"].setdefault(row["name"], []).append((size, row["mean"], row["sd"]))
    return found


def _title(task: str, size: int | None) -> str:
    return task if size is None else f"{task}, {size} examples"


def _task_report(task: Task[Any], groups: list[Group], recipe: Recipe) -> Row:
    examples = task.examples("test")
    score, column, binary = scoring_of(task)
    rows: list[Row] = [_method_row(g, task, recipe) for g in groups]
    finished = [g for g in groups if g.seeds]
    reference = finished[0] if finished else None
    for row, group in zip(rows, groups, strict=True):
        if reference is not None and group.seeds and group is not reference:
            a, b = ([run[column] for run in g.seeds] for g in (group, reference))
            found = compare_runs(a, b, score, binary=binary).as_dict()
            row["against_reference"] = found
            row["sentence"] = sentence(row, found, reference, len(examples))
    rows.sort(key=lambda row: -row["mean"] if "mean" in row else float("inf"))
    return {
        "score": task.main_score,
        "reference": reference.contender.name if reference else None,
        "train_items": groups[0].examples or len(task.examples("train")),
        "validation_items": len(task.examples("validation")),
        "test_items": len(examples),
        "methods": rows,
    }


def scoring_of(task: Task[Any]) -> tuple[Weighted, str, bool]:
    """The task's main score for resampled items, which of a trial's lists it is taken from, and whether items are 0/1.

    Scores that no mean over items gives are taken from predictions.
    """
    examples = task.examples("test")
    if task.sets:  # one type of task, so all sets are scored from the same list
        parts = [scoring_of(one) for one in task.sets.values()]
        places = [[i for i, e in enumerate(examples) if e.set == name] for name in task.sets]
        return (
            over_sets([(where, score) for where, (score, _, _) in zip(places, parts, strict=True)]),
            parts[0][1],
            False,
        )
    wanted = [e.label for e in examples]
    if isinstance(task, RegressionTask):
        return correlation_of([float(v or 0) for v in wanted], task.main_score), "predictions", False
    if isinstance(task, ClassificationTask) and task.main_score != "accuracy":
        classes = [int(v or 0) for v in wanted]
        score = mcc_of(classes) if task.main_score == "mcc" else f1_of(classes, task.num_labels)
        return score, "predictions", False
    return mean_of, "per_item", task.main_score != "overlap"


def _method_row(group: Group, task: Task[Any], recipe: Recipe) -> Row:
    row: Row = {"name": group.contender.name, "settings": dict(group.contender.settings)}
    if not group.seeds:
        return {**row, "impossible": group.impossible}
    scores = [run["test"][task.main_score] for run in group.seeds]
    row |= {
        "mean": plain.mean(scores),
        "sd": plain.stdev(scores) if len(scores) > 1 else None,
        "scores": scores,
        "parameters": group.seeds[0]["parameters"],
        "share": group.seeds[0]["parameters"] / group.seeds[0]["model_parameters"],
        "validation": plain.mean(run["validation"] for run in group.seeds),
    }
    if group.contender.trains:
        tried = sorted(run["run"]["learning_rate"] for run in group.rates)
        row |= {
            "learning_rate": group.chosen,
            "at_edge": group.chosen in (tried[0], tried[-1]),
            "rates": {str(r["run"]["learning_rate"]): r.get("validation", r.get("failed")) for r in group.rates},
            "seconds": plain.median(run["seconds"] for run in group.seeds),
            "memory": group.seeds[0]["memory"],
            "steps": group.seeds[0]["steps"],
            "tokens": group.seeds[0]["tokens"],
            "curve": group.seeds[0]["curve"],
            "missing_seeds": recipe.compare.seeds - len(group.seeds),
        }
    if "forgetting" in group.seeds[0]:
        row["forgetting"] = plain.mean(run["forgetting"] for run in group.seeds)
    return row


def sentence(row: Row, found: Row, reference: Group, items: int) -> str:
    """The verdict in words."""
    seeds, reference_seeds = len(row["scores"]), len(reference.seeds)
    said = {"better": "is better than", "worse": "is worse than", "not told apart": "is not told apart from"}
    points, low, high = (100 * found[k] for k in ("difference", "low", "high"))
    text = (
        f"{row['name']} {said[found['verdict']]} {reference.contender.name}"
        f"{' with this much data' if found['verdict'] == 'not told apart' else ''}: "
        f"{points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}, {items} test items, {seeds} against "
        f"{reference_seeds} seeds."
    )
    lone = (row["parameters"] and seeds == 1) or (reference.contender.trains and reference_seeds == 1)
    return text + (" One seed says nothing of other seeds." if lone else "")


def _distinct(recipe: Recipe, groups: Sequence[Group]) -> bool:
    """Whether no two tasks share test items, so that there is an interval for their mean."""
    names = dict.fromkeys(group.task for group in groups)
    sources = {recipe.tasks[name].data.model_dump_json(include={"name", "config", "train", "test"}) for name in names}
    return len(sources) == len(names) and all(group.examples is None for group in groups)


def _overall(tasks: dict[str, Row], reference: str | None) -> list[Row]:
    """Each method over all tasks that it could do.

    Args:
        reference: what to compare with, in the tasks where it is the reference; None to leave that out.
    """
    rows: dict[str, Row] = {}
    differences: dict[str, list[Difference]] = {}
    for task in tasks.values():
        for method in task["methods"]:
            row = rows.setdefault(method["name"], {"name": method["name"], "tasks": 0, "total": 0.0})
            if "mean" in method:
                row["tasks"] += 1
                row["total"] += method["mean"]
            if "against_reference" in method and task["reference"] == reference:
                differences.setdefault(method["name"], []).append(Difference(**method["against_reference"]))
    for row in rows.values():
        row["mean"] = row.pop("total") / row["tasks"] if row["tasks"] else None
        if row["name"] in differences:
            row["against_reference"] = over_tasks(differences[row["name"]]).as_dict()
    return sorted(rows.values(), key=lambda row: (-row["tasks"], -(row["mean"] or 0)))


def draw(report: Row, task: str, path: Path) -> None:
    """Score against parameters, time and memory, and the learning curves."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    rows = [row for row in report["methods"] if row.get("seconds") is not None]
    looks = {name: (f"C{i % 10}", "os^"[i // 10 % 3]) for i, name in enumerate(sorted(row["name"] for row in rows))}
    unit: Callable[[Row], float]
    for place, label, unit in (
        (axes[0, 0], "trainable parameters", lambda row: row["parameters"]),
        (axes[0, 1], "training time, seconds", lambda row: row["seconds"]),
        (axes[1, 0], "memory of training above the model, MiB", lambda row: row["memory"] / 2**20),
    ):
        for row in rows:
            colour, marker = looks[row["name"]]
            where = {"x": unit(row), "y": row["mean"], "yerr": row["sd"] or 0}
            place.errorbar(**where, fmt=marker, color=colour, capsize=2, label=row["name"])
        place.set(xlabel=label, ylabel=f"test {report['score']}", xscale="log")
        Magnitude.label(place.xaxis)
        for row in report["methods"]:
            if row["name"] in ("untuned", "few-shot") and "mean" in row:
                style = "--" if row["name"] == "untuned" else ":"
                place.axhline(row["mean"], color="grey", lw=0.8, ls=style, label=row["name"])
    for row in rows:
        steps, losses = zip(*row["curve"], strict=True)
        colour, marker = looks[row["name"]]
        axes[1, 1].plot(steps, losses, color=colour, ls={"o": "-", "s": "--", "^": ":"}[marker])
    axes[1, 1].set(xlabel="step", ylabel="training loss", yscale="log")
    Magnitude.label(axes[1, 1].yaxis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{task}: {report['test_items']} test items; bars are one standard deviation over seeds")
    figure.savefig(path, dpi=110)


class Magnitude(LogFormatter):
    """Ticks of a logarithmic axis as 0.1, 10k and 1M; between powers of ten where there are few."""

    @classmethod
    def label(cls, axis: Axis) -> None:
        for which in (axis.set_major_formatter, axis.set_minor_formatter):
            which(cls(labelOnlyBase=False, minor_thresholds=(1, 0.4)))

    def __call__(self, x: float, pos: int | None = None) -> str:
        if not super().__call__(x, pos):
            return ""
        return EngFormatter(sep="")(x) if x >= 1000 else f"{x:g}"


def draw_sizes(report: Row, task: str, path: Path) -> None:
    """Score against the number of training examples."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    place = figure.subplots()
    sizes = sorted({size for points in report["methods"].values() for size, _, _ in points})
    for i, (name, points) in enumerate(sorted(report["methods"].items())):
        xs, means, sds = zip(*points, strict=True)
        shifted = [x * 1.02 ** (i - len(report["methods"]) / 2) for x in xs]  # so that bars do not hide one another
        style = ("-", "--")[i // 10 % 2]
        place.errorbar(shifted, means, yerr=[sd or 0 for sd in sds], label=name, capsize=2, ls=style, marker="o", ms=3)
    place.set(xlabel="training examples", ylabel=f"test {report['score']}", xscale="log")
    place.set_xticks(sizes, [str(size) for size in sizes])
    place.minorticks_off()
    place.legend(fontsize=8, ncols=2)
    figure.suptitle(f"{task}: {report['test_items']} test items; bars are one standard deviation over seeds")
    figure.savefig(path, dpi=110)


def introduction(report: Row) -> str:
    """How the figures came about."""
    rates = ", ".join(f"{rate:g}" for rate in report["learning_rates"])
    return (
        f"Scores in points, mean ± standard deviation over {report['seeds']} seeds. Every method had the same data, "
        f"batches and steps, and the learning rates {rates}, of which one was chosen on validation with the first "
        "seed (the middle one of those equally good); scores are on test. At 95%, one in twenty of the "
        f"{report['comparisons']} differences would look real by chance."
    )


EXPLAINED = (
    '"Better" (▲) and "worse" (▼) are than the reference, the row of its task in bold. Over all tasks the difference '
    "is the mean of the tasks', and its interval is about these tasks, not others. Seconds and MiB are of "
    "training: the median over seeds; what autograd keeps on the longest batch, with gradients and the "
    'optimizer\'s moments, above the model. "(edge)": the best learning rate was the lowest or highest tried, '
    "so a better one may lie outside. Forgetting is the growth of the loss a token on held-out text."
)


def overview(report: Row) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table over all tasks."""
    lines = []
    for row in report["overall"]:
        mean = "" if row["mean"] is None else f"{100 * row['mean']:.1f}"
        scores = (_brief(row["name"], task) for task in report["tasks"].values())
        lines.append([row["name"], str(row["tasks"]), mean, *_against(row), *scores])
    return ["method", "tasks", "mean", "against reference", "verdict", *report["tasks"]], lines


def by_size(whole: Row) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a task's scores by number of training examples."""
    sizes = sorted({size for points in whole["methods"].values() for size, _, _ in points})
    lines = []
    for name, points in whole["methods"].items():
        scores = {size: _score(mean, sd) for size, mean, sd in points}
        lines.append([name, *(scores.get(size, "") for size in sizes)])
    return ["method", *map(str, sizes)], lines


def _score(mean: float, sd: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def _brief(name: str, task: Row) -> str:
    row = next((row for row in task["methods"] if row["name"] == name and "mean" in row), None)
    if row is None:
        return ""
    verdict = row.get("against_reference", {}).get("verdict")
    return f"{100 * row['mean']:.1f}" + {"better": " ▲", "worse": " ▼"}.get(verdict, "")


def _against(row: Row) -> list[str]:
    """The difference from the reference in points with its interval, and the verdict."""
    found = row.get("against_reference")
    if not found:
        return ["", ""]
    difference, low, high = (100 * found[key] for key in ("difference", "low", "high"))
    return [f"{difference:+.1f} ({low:+.1f} to {high:+.1f})", found["verdict"]]


def heads(task: Row) -> list[str]:
    """The columns of a task's table."""
    against = f"against {task['reference']}"
    return ["method", "test", against, "verdict", "parameters", "share", "seconds", "MiB", "forgetting", "rate"]


def cells(row: Row) -> list[str]:
    """A line of a task's table."""
    failed = f" ({row['missing_seeds']} seeds failed)" if row.get("missing_seeds") else ""
    rate = f"{row['learning_rate']:g}" + (" (edge)" if row["at_edge"] else "") if "learning_rate" in row else ""
    return [
        row["name"],
        _score(row["mean"], row["sd"]) + failed,
        *_against(row),
        f"{row['parameters']:,}",
        f"{100 * row['share']:.3g}%",
        f"{row['seconds']:.1f}" if "seconds" in row else "",
        f"{row['memory'] / 2**20:.1f}" if "memory" in row else "",
        f"{row['forgetting']:+.3f}" if "forgetting" in row else "",
        rate,
    ]


def sizes(task: Row) -> str:
    """What a task was trained and tested on."""
    return (
        f"{task['score']}; {task['train_items']} training, {task['validation_items']} validation and "
        f"{task['test_items']} test items."
    )


def ran(report: Row) -> str:
    """Versions and machine."""
    return ", ".join([*(f"{name} {number}" for name, number in report["versions"].items()), report["machine"]])


def as_markdown(report: Row, plots: dict[str, Path]) -> str:
    """The report as Markdown; pictures are beside it."""
    lines = [f"# {report['model']}: methods compared", "", introduction(report), ""]
    lines += [f"`{report['command']}`; {ran(report)}.", ""]
    for name, whole in report["by_size"].items():
        lines += [f"## {name} by number of examples", "", *_markdown_table(*by_size(whole)), ""]
        lines += [f"![{name}]({plots[name].name})", ""]
    if not report["by_size"]:
        lines += ["## All tasks", "", *_markdown_table(*overview(report)), ""]
    lines += [EXPLAINED]
    for name, task in report["tasks"].items():
        lines += ["", f"## {name}", "", sizes(task), ""]
        rows = [row for row in task["methods"] if "mean" in row]
        bold = [
            [f"**{c}**" if c else "" for c in cells(r)] if r["name"] == task["reference"] else cells(r) for r in rows
        ]
        lines += _markdown_table(heads(task), bold)
        lines += [f"\nLeft out: {row['name']}: {row['impossible']}." for row in task["methods"] if "impossible" in row]
        lines += ["", *(f"- {row['sentence']}" for row in rows if "sentence" in row)]
        if name in plots:
            lines += ["", f"![{name}]({plots[name].name})"]
    return "\n".join(lines) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def as_page(report: Row, plots: dict[str, Path]) -> str:
    """The report as one HTML page that holds its pictures."""
    pictures = {name: base64.b64encode(path.read_bytes()).decode() for name, path in plots.items()}
    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.globals |= {"heads": heads, "sizes": sizes, "by_size": by_size}
    made.filters |= {"cells": cells, "verdict": _class_of}
    words = {
        "introduction": introduction(report),
        "explained": EXPLAINED,
        "overview": overview(report),
        "ran": ran(report),
    }
    return made.from_string(PAGE).render(report=report, pictures=pictures, **words)


def _class_of(row: Row, task: Row) -> str:
    if row["name"] == task["reference"]:
        return "reference"
    return str(row.get("against_reference", {}).get("verdict", ""))


PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ report.model }}: methods compared</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr.reference { font-weight: 600 }
tr.better td:nth-child(4) { color: #0a6b2d }
tr.worse td:nth-child(4) { color: #a32015 }
img { max-width: 100% } .note { color: #555 } code { font-size: 13px }
</style></head><body>
{% macro table(head, lines, names) %}
<table><thead><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for line in lines %}
<tr class="{{ names[loop.index0] }}">{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
{% endmacro %}
{% macro picture(name) %}
<img alt="{{ name }}: scores and costs of all methods" src="data:image/png;base64,{{ pictures[name] }}">
{% endmacro %}
<h1>{{ report.model }}: methods compared</h1>
<p>{{ introduction }}</p>
{% for name, whole in report.by_size.items() %}
<h2>{{ name }} by number of examples</h2>
{{ table(by_size(whole)[0], by_size(whole)[1], []) }}
{{ picture(name) }}
{% else %}
<h2>All tasks</h2>
{{ table(overview[0], overview[1], []) }}
{% endfor %}
<p class="note">{{ explained }}</p>
{% for name, task in report.tasks.items() %}
<h2>{{ name }}</h2>
<p>{{ sizes(task) }}</p>
{% set rows = task.methods | selectattr("mean", "defined") | list %}
{{ table(heads(task), rows | map("cells"), rows | map("verdict", task) | list) }}
{% for row in task.methods if row.impossible is defined %}
<p class="note">Left out: {{ row.name }}: {{ row.impossible }}.</p>
{% endfor %}
<details><summary>In words</summary><ul>
{% for row in rows if row.sentence is defined %}<li>{{ row.sentence }}</li>{% endfor %}
</ul></details>
{% if name in pictures %}{{ picture(name) }}{% endif %}
{% endfor %}
<p class="note"><code>{{ report.command }}</code>; {{ ran }}</p>
</body></html>
"""
