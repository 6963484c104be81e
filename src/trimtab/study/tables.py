"""The tables and words of a report, for the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path

from trimtab.study.compare import Plan
from trimtab.study.report import Disagreement, Line, Report, SizeReport, TaskReport
from trimtab.study.statistics import Difference

MARKS = {"better": " ▲", "worse": " ▼", "equal": " ="}
"""What stands behind a score, by its verdict."""
FEW = 30
"""Validation items below which it is remarked that rates are chosen on little."""


def introduction(report: Report) -> str:
    """How the figures came about."""
    rates = report.learning_rates
    own = ", ".join(f"{rate:g}" for rate in rates) if rates else "rates of the method's own"
    many, reach = report.seeds > 1, report.reach
    means = f"mean ± standard deviation over {report.seeds} seeds" if many else "of one seed"
    past = f", going on up to {reach} past the lowest or highest while that was the best" if reach else ""
    if rates and len(rates) == 1:
        searched, lucks = f"All trained at a learning rate of {own}", ["the items"]
    else:
        best = "took the one best on validation (of those that tie, that with the lowest validation loss)"
        searched = f"{'Each' if many else 'The'} seed tried {own}{past}, and {best}"
        lucks = ["the items", "choosing the rate"]
    lucks += ["training"] if many else []
    held = " and ".join(filter(None, [", ".join(lucks[:-1]), lucks[-1]]))
    held = f"the luck of {held}" + ("" if many else ", but not of other seeds")
    searched = f"{searched}. Intervals hold {held}."
    return (
        f"Scores in points, {means}, on test. Every method had the same data, batches and steps. {searched} Marks are "
        "after Holm's correction: by chance alone, a table has a wrong ▲ or ▼ at most 5 times in 100, and so a wrong =."
    )


def explained(report: Report) -> str:
    """What the columns and marks mean."""
    return (
        '"Better" (▲) and "worse" (▼) are than the reference, the row of its task in bold; "equal" (=) is surely '
        f'within {100 * report.margin:g} points of it; "not told apart" is neither, and says only that this much data '
        'does not tell. Parameters are all that is trained, a new head among them. "Finds" is the difference that '
        "would have been found 80 times in 100. Over all tasks the "
        "difference is the mean of the tasks', and its interval is about these tasks, not others; tasks on which no "
        "method is surely better than one constant answer tell nothing and are left out of it. Seconds and MiB are of "
        "training: the median over seeds; what autograd keeps on the longest batch, with gradients and the "
        'optimizer\'s moments, above the model. "(edge)": of so many seeds the best rate was the last one allowed, so '
        "a better one may lie beyond. Forgetting is the growth of the loss a token on held-out text, past the edits."
    )


def overview(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table over all tasks."""
    lines = []
    for total in report.overall:
        mean = "" if total.mean is None else f"{100 * total.mean:.1f}"
        scores = (_brief(total.name, task) for task in report.tasks.values())
        lines.append([total.name, str(total.tasks), mean, *_against(total.against_reference), *scores])
    names = [name if task.telling else f"({name})" for name, task in report.tasks.items()]
    return ["method", "tasks", "mean", "against reference", "verdict", *names], lines


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
    return f"{100 * line.mean:.1f}" + MARKS.get(verdict, "")


def _against(found: Difference | None) -> list[str]:
    """The difference from the reference in points with its interval, and the verdict."""
    if found is None:
        return ["", ""]
    difference, low, high = (100 * value for value in (found.difference, found.low, found.high))
    return [f"{difference:+.1f} ({low:+.1f} to {high:+.1f})", found.verdict]


def table_of(task: TaskReport) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a task's table, without the columns in which no line has anything."""
    head, lines = heads(task), [cells(line) for line in task.finished]
    filled = [any(column) for column in zip(*lines, strict=True)] or [True] * len(head)
    return list(compress(head, filled)), [list(compress(line, filled)) for line in lines]


def heads(task: TaskReport) -> list[str]:
    """The columns that a task's table can have."""
    against = [f"against {task.reference}", "verdict", "p", "p, Holm", "finds"]
    return ["method", "test", *against, "parameters", "share", "seconds", "MiB", "forgetting", "rate"]


def cells(line: Line) -> list[str]:
    """A line of a task's table."""
    found, seeds = line.against_reference, len(line.scores)
    counts = {"failed": line.failed_seeds, "constant": line.constant_seeds}
    remarks = "".join(f" ({_of(count, seeds)}{what})" for what, count in counts.items() if count)
    return [
        line.name,
        _score(line.mean or 0.0, line.sd) + remarks,
        *_against(found),
        "" if found is None or found.p is None else f"{found.p:.2g}",
        "" if found is None or found.corrected is None else f"{found.corrected:.2g}",
        _finds(found),
        f"{line.parameters:,}",
        f"{100 * line.share:.3g}%" if line.parameters else "",
        "" if line.seconds is None else f"{line.seconds:.1f}",
        "" if line.memory is None else f"{line.memory / 2**20:.1f}",
        "" if line.forgetting is None else f"{line.forgetting:+.3f}",
        _rates(line),
    ]


def _finds(found: Difference | None) -> str:
    """The difference that would have been found, if any could."""
    if found is None or found.detectable is None:
        return ""
    return f"{100 * found.detectable:.1f}" if found.detectable < 1 else "none"


def _of(count: int, seeds: int) -> str:
    return "" if seeds == 1 else f"{count}/{seeds} "


def _rates(line: Line) -> str:
    """The lowest and highest that seeds chose, where they differ."""
    rates = sorted({rate for rate in line.learning_rates if rate is not None})
    edge = f" ({_of(line.at_edge, len(line.scores))}edge)" if line.at_edge else ""
    return " to ".join(f"{rate:g}" for rate in dict.fromkeys((*rates[:1], *rates[-1:]))) + edge


def remarks(task: TaskReport) -> list[str]:
    """What speaks against reading a task's table as it stands."""
    if not task.finished:
        return task.odd
    said = list(task.odd)
    if task.validation_items < FEW:
        said.append(f"Rates are chosen on {task.validation_items} validation items alone: mostly by luck.")
    if not task.telling:
        said.append(
            "This task tells nothing of methods: none is surely better than one and the same answer to every item "
            f"({100 * (task.constant or 0):.1f})."
        )
    moving = [line.name for line in task.finished if 2 * line.moving_seeds > len(line.scores)]
    if moving:
        said.append(f"The training loss still fell at the end, so more steps may change this: {', '.join(moving)}.")
    moved = [f"{line.name} ({100 * line.late_move:+.1f})" for line in task.finished if line.late_move is not None]
    if moved:
        said.append(
            "The score on validation still moved in the last quarter of the steps, so another number of them may "
            f"change this: {', '.join(moved)}."
        )
    if task.earlier:
        said.append(f"{of_before(task.earlier)} The luck of choosing their learning rates is not wholly in the table.")
    said += [f"{line.name}: failed: {line.failure}" for line in task.finished if line.failure]
    return said


def of_before(earlier: Mapping[str, int]) -> str:
    """Which trials of a task, by method, were made before validation's loss and predictions were kept."""
    each = ", ".join(f"{count} of {name}" for name, count in earlier.items())
    return (
        f"Trials of an earlier version, which kept neither loss nor predictions on validation: {each}. Of these, ties "
        "on validation go to the middle rate, and validation items are not drawn anew. Remove their files to run "
        "them anew."
    )


def asked(one: Disagreement) -> str:
    """What of a test item was asked and expected."""
    return f"{shortened(one.input)} (expected: {shortened(one.expected)})"


def answered(one: Disagreement) -> list[tuple[str, list[str]]]:
    """Each answer to it with the methods that gave it, the right one first, then the commonest."""
    by: dict[str, list[str]] = {}
    for name, answer in one.answers.items():
        by.setdefault(answer, []).append(name)
    order = sorted(by.items(), key=lambda pair: (pair[0] != one.expected, -len(pair[1])))
    return [(shortened(answer) or "nothing", names) for answer, names in order]


def shortened(text: str, most: int = 300) -> str:
    """A text, its middle left out where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def sizes(task: TaskReport) -> str:
    """What a task was trained and tested on."""
    return (
        f"{task.score}; {task.train_items} training, {task.validation_items} validation and {task.test_items} test "
        "items."
    )


def planned(plan: Plan) -> str:
    """What there is to run."""
    more = ", and more where a best rate is at an edge" if plan.reaches else ""
    text = f"{plan.runs} trials{more}; {plan.done} are done."
    if plan.seconds is None:
        return text
    minutes = (plan.runs - plan.done) * plan.seconds / 60
    return f"{text} These trained for {plan.seconds:.1f} s at the median: about {minutes:.0f} minutes of it are left."


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
    if len(report.tasks) > 1 and not report.by_size:
        lines += ["## All tasks", "", *_markdown_table(*overview(report)), ""]
    lines += [explained(report)]
    for name, task in report.tasks.items():
        lines += ["", f"## {name}", "", sizes(task), ""]
        if task.finished:
            head, rows = table_of(task)
            lines += _markdown_table(head, [_bold(row) if row[0] == task.reference else row for row in rows])
        lines += [
            f"\nLeft out: {_cell(line.name)}: {_cell(line.impossible.removesuffix('.'))}."
            for line in task.methods
            if line.impossible
        ]
        lines += [f"\n{_cell(remark)}" for remark in remarks(task)]
        lines += ["", *(f"- {_cell(line.sentence)}" for line in task.finished if line.sentence)]
        for one in task.disagreements:
            lines += [
                "",
                f"{_cell(asked(one))}",
                "",
                *(f"- {_cell(said)}: {_cell(', '.join(who))}" for said, who in answered(one)),
            ]
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
