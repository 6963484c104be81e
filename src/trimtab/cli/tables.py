"""Tables of the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table

from trimtab.cli.common import size_of


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
            "" if p.score is None or p.state == "done" else f"{p.score:.3f}",
            f"{rate:,.0f}" if rate else "",
            f"{left // 60:.0f}:{left % 60:02.0f}" if p.state == "training" else "",
        )
    return table


def results_table(metrics: dict[str, dict[str, Any]]) -> Table:
    """Scores and costs of finished runs."""
    name_column = Column("task", overflow="fold")  # never cut
    table = Table(name_column, "score", "untuned", "tuned", "parameters", "on disk", "seconds")
    for name, m in metrics.items():
        score = f"{score_name(m)}\n{m['split']} ({m['examples']})"
        scores = (f"{m[which][m['score']]:.3f}" for which in ("untuned", "tuned"))
        table.add_row(name, score, *scores, f"{m['parameters']:,}", size_of(m["bytes"]), f"{m['seconds']:.1f}")
        for label, row in indented(m.get("sets", {})).items():
            table.add_row(label, row["score"], f"{row['untuned']:.3f}", f"{row['tuned']:.3f}")
    return table


def score_name(result: dict[str, Any]) -> str:
    """What the main score is: over several test sets their mean."""
    return f"mean of {len(result['sets'])}" if result.get("sets") else str(result["score"])


def indented(sets: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Test sets under their task."""
    return {f" {name}": row for name, row in sets.items()}
