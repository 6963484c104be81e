"""The tables and words of a report, for the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.study.report import Line, Report, SizeReport, TaskReport
from trimtab.study.statistics import Difference


def introduction(report: Report) -> str:
    """How the figures came about."""
    rates = ", ".join(f"{rate:g}" for rate in report.learning_rates)
    return (
        f"Scores in points, mean ± standard deviation over {report.seeds} seeds. Every method had the same data, "
        f"batches and steps, and the learning rates {rates}, of which one was chosen on validation with the first "
        "seed (the middle one of those equally good); scores are on test. At 95%, one in twenty of the "
        f"{report.comparisons} differences would look real by chance."
    )


EXPLAINED = (
    '"Better" (▲) and "worse" (▼) are than the reference, the row of its task in bold. Over all tasks the difference '
    "is the mean of the tasks', and its interval is about these tasks, not others. Seconds and MiB are of "
    "training: the median over seeds; what autograd keeps on the longest batch, with gradients and the "
    'optimizer\'s moments, above the model. "(edge)": the best learning rate was the lowest or highest tried, '
    "so a better one may lie outside. Forgetting is the growth of the loss a token on held-out text."
)


def overview(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table over all tasks."""
    lines = []
    for total in report.overall:
        mean = "" if total.mean is None else f"{100 * total.mean:.1f}"
        scores = (_brief(total.name, task) for task in report.tasks.values())
        lines.append([total.name, str(total.tasks), mean, *_against(total.against_reference), *scores])
    return ["method", "tasks", "mean", "against reference", "verdict", *report.tasks], lines


def by_size(whole: SizeReport) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a task's scores by number of training examples."""
    sizes = sorted({size for points in whole.methods.values() for size, _, _ in points})
    lines = []
    for name, points in whole.methods.items():
        scores = {size: _score(mean, sd) for size, mean, sd in points}
        lines.append([name, *(scores.get(size, "") for size in sizes)])
    return ["method", *map(str, sizes)], lines


def _score(mean: float, sd: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def _brief(name: str, task: TaskReport) -> str:
    line = next((line for line in task.finished if line.name == name), None)
    if line is None or line.mean is None:
        return ""
    verdict = line.against_reference.verdict if line.against_reference else ""
    return f"{100 * line.mean:.1f}" + {"better": " ▲", "worse": " ▼"}.get(verdict, "")


def _against(found: Difference | None) -> list[str]:
    """The difference from the reference in points with its interval, and the verdict."""
    if found is None:
        return ["", ""]
    difference, low, high = (100 * value for value in (found.difference, found.low, found.high))
    return [f"{difference:+.1f} ({low:+.1f} to {high:+.1f})", found.verdict]


def heads(task: TaskReport) -> list[str]:
    """The columns of a task's table."""
    against = f"against {task.reference}"
    return ["method", "test", against, "verdict", "parameters", "share", "seconds", "MiB", "forgetting", "rate"]


def cells(line: Line) -> list[str]:
    """A line of a task's table."""
    failed = f" ({line.missing_seeds} seeds failed)" if line.missing_seeds else ""
    rate = "" if line.learning_rate is None else f"{line.learning_rate:g}" + (" (edge)" if line.at_edge else "")
    return [
        line.name,
        _score(line.mean or 0.0, line.sd) + failed,
        *_against(line.against_reference),
        f"{line.parameters:,}",
        f"{100 * line.share:.3g}%",
        "" if line.seconds is None else f"{line.seconds:.1f}",
        "" if line.memory is None else f"{line.memory / 2**20:.1f}",
        "" if line.forgetting is None else f"{line.forgetting:+.3f}",
        rate,
    ]


def sizes(task: TaskReport) -> str:
    """What a task was trained and tested on."""
    return (
        f"{task.score}; {task.train_items} training, {task.validation_items} validation and {task.test_items} test "
        "items."
    )


def ran(report: Report) -> str:
    """Versions and machine."""
    return ", ".join([*(f"{name} {number}" for name, number in report.versions.items()), report.machine])


def as_markdown(report: Report, plots: dict[str, Path]) -> str:
    """The report as Markdown; pictures are beside it."""
    lines = [f"# {report.model}: methods compared", "", introduction(report), ""]
    lines += [f"`{report.command}`; {ran(report)}.", ""]
    for name, whole in report.by_size.items():
        lines += [f"## {name} by number of examples", "", *_markdown_table(*by_size(whole)), ""]
        lines += [f"![{name}]({plots[name].name})", ""]
    if not report.by_size:
        lines += ["## All tasks", "", *_markdown_table(*overview(report)), ""]
    lines += [EXPLAINED]
    for name, task in report.tasks.items():
        lines += ["", f"## {name}", "", sizes(task), ""]
        rows = [_bold(cells(line)) if line.name == task.reference else cells(line) for line in task.finished]
        lines += _markdown_table(heads(task), rows)
        lines += [
            f"\nLeft out: {_cell(line.name)}: {_cell(line.impossible)}." for line in task.methods if line.impossible
        ]
        lines += ["", *(f"- {_cell(line.sentence)}" for line in task.finished if line.sentence)]
        if name in plots:
            lines += ["", f"![{name}]({plots[name].name})"]
    return "\n".join(lines) + "\n"


def _bold(line: list[str]) -> list[str]:
    return [f"**{cell}**" if cell else "" for cell in line]


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in (head, ["---"] * len(head), *rows)]


def _cell(text: str) -> str:
    """What would end a cell or a line, or open a tag, is written so that it does not."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
