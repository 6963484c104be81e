"""Tables of the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Column, Table

from trimtab.cli.common import console, size_of

if TYPE_CHECKING:
    from trimtab.study.progress import Standing


WIDE = 0.2
"""From here on it is remarked how wide a score's interval is."""


def progress_table(rows: dict[str, Any]) -> Table:
    """Where each task stands."""
    table = Table("task", "state", "step", "loss", "validation", "tokens/s", "time left")
    for name, p in rows.items():
        rate = p.tokens / p.seconds if p.seconds else 0.0
        left = (p.steps - p.step) * p.seconds / p.step if p.step else 0.0
        table.add_row(
            name,
            p.state,
            f"{p.step}/{p.steps}" if p.steps else "",
            "" if p.loss is None else f"{p.loss:.4f}",
            "" if p.score is None else f"{p.score:.3f}",
            f"{rate:,.0f}" if rate else "",
            f"{left // 60:.0f}:{left % 60:02.0f}" if p.state == "training" else "",
        )
    return table


@contextmanager
def shown(table: Callable[[], Table]) -> Iterator[None]:
    """The table below what is printed, made anew twice a second; nothing where there is no terminal."""
    if not console.is_terminal:
        yield
        return
    with Live(console=console, refresh_per_second=2, transient=True, get_renderable=table):
        yield


def progress_said(standing: Standing) -> str:
    """How many runs are there, and about how long the rest takes."""
    from trimtab.runs.forecast import duration

    left = "" if standing.left is None else f", about {duration(standing.left)} left"
    return f"{standing.done} of about {standing.of} runs{left}"


def elsewhere(standing: Standing) -> str:
    """The same behind a line, where there is no terminal to show it in."""
    return "" if console.is_terminal else f"; {progress_said(standing)}"


def results_table(metrics: dict[str, dict[str, Any]]) -> Table:
    """Scores and costs of finished runs."""
    name_column = Column("task", overflow="fold")  # never cut
    table = Table(name_column, "score", "majority", "untuned", "tuned", "parameters\non disk", "seconds")
    for name, m in metrics.items():
        score = f"{score_name(m)}\n{m['split']} ({m['examples']})"
        scores = (f"{m[which][m['score']]:.3f}" for which in ("untuned", "tuned"))
        head = m.get("head_parameters")  # runs of earlier versions do not say
        sizes = [f"{m['parameters']:,}", *([f"(head {head:,})"] if head else []), size_of(m["bytes"])]
        table.add_row(name, score, majority_of(m), *scores, "\n".join(sizes), f"{m['seconds']:.1f}")
        for label, row in indented(m.get("sets", {})).items():
            table.add_row(label, row["score"], "", f"{row['untuned']:.3f}", f"{row['tuned']:.3f}")
    return table


def scores_table(results: dict[str, dict[str, Any]]) -> Table:
    """What `eval` found."""
    table = Table("task", "score", "split", "examples", "majority", "untuned", "tuned")
    for name, result in results.items():
        for label, row in {name: result, **indented(result["sets"])}.items():
            scores = (f"{row[which]:.3f}" for which in ("untuned", "tuned"))
            table.add_row(label, score_name(row), result["split"], str(row["examples"]), majority_of(row), *scores)
    return table


def majority_of(result: dict[str, Any]) -> str:
    """What always giving the commonest answer of train scores; runs of earlier versions do not say."""
    return f"{result['majority']['score']:.3f}" if "majority" in result else ""


CLASSES = 12
"""Classes of which a confusion is shown."""


def failure_tables(name: str, result: dict[str, Any], most: int) -> Iterator[Table]:
    """Where a task's adapter fails: its worst examples, and the classes that are taken for others."""
    found = result.get("failures", {"worst": [], "confusion": {}})  # runs of earlier versions do not say
    counts = f"the worst of {result['examples']} on {result['split']}"
    worst = Table("input", "expected", "got", title=f"{name}: {counts}", title_justify="left")
    for miss in found["worst"][:most]:
        worst.add_row(*(shortened(str(miss[key])) or "(nothing)" for key in ("input", "expected", "got")))
    if worst.rows:
        yield worst
    classes = [(expected, of, of.get(expected, 0) / sum(of.values())) for expected, of in found["confusion"].items()]
    missed = sorted((one for one in classes if one[2] < 1), key=lambda one: one[2])
    table = Table("expected", "rows", "right", "taken for", title=f"{name}: by class", title_justify="left")
    for expected, of, right in missed[:CLASSES]:
        others = sorted(((n, other) for other, n in of.items() if other != expected), reverse=True)
        taken = ", ".join(f"{other} {n}" for n, other in others[:3]) + ", ..." * (len(others) > 3)
        table.add_row(expected, str(sum(of.values())), f"{right:.0%}", taken)
    if table.rows:
        all_right = len(classes) - len(missed)
        rest = [f"{all_right} more without a mistake"] if all_right else []
        rest += [f"{len(missed) - CLASSES} more not shown"] if len(missed) > CLASSES else []
        table.caption = "; ".join(rest) or None
        yield table


def result_remarks(metrics: dict[str, Any]) -> list[str]:
    """What is wrong with a finished run's metrics, and what to try."""
    untuned, tuned = (metrics[which][metrics["score"]] for which in ("untuned", "tuned"))
    said = []
    if tuned == 0 and metrics["score"] == "f1":
        said.append("no row's class was found: more training: epochs:, or another learning_rate:")
    elif tuned < untuned:
        said.append(f"{tuned:.3f} is worse than untuned, {untuned:.3f}: lower training: learning_rate:, or more rows")
    majority = metrics.get("majority", {"answer": "", "score": 0.0})  # runs of earlier versions do not say
    if 0 < tuned <= majority["score"]:
        always = f"always answering {majority['answer']!r} would score {majority['score']:.3f}"
        remedy = "" if said else ": more training: epochs:, or a higher learning_rate:"
        said.append(f"{tuned:.3f} is no better than a constant, since {always}{remedy}")
    low, high = metrics.get("interval") or (tuned, tuned)
    if high - low > WIDE:
        rows, split = metrics["examples"], metrics["split"]
        said.append(
            f"{tuned:.3f} is of {rows} {split} rows: on new ones it may be anything from {low:.2f} to {high:.2f}; give "
            f"more rows to score (data: {split}:)"
        )
    start, end = metrics.get("loss_at_start"), metrics.get("loss_at_end")
    if start is not None and end is not None and end > start:
        said.append(f"the loss rose from {start:.3f} to {end:.3f}: lower training: learning_rate:, or try trimtab tune")
    return said


def shortened(text: str, most: int = 120) -> str:
    """A text on one line, its middle left out where it is long."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def score_name(result: dict[str, Any]) -> str:
    """What the main score is: over several test sets their mean."""
    return f"mean of {len(result['sets'])}" if result.get("sets") else str(result["score"])


def indented(sets: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Test sets under their task."""
    return {f" {name}": row for name, row in sets.items()}
