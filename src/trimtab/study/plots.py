"""Pictures of a comparison, one a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter

from trimtab.study.report import Line, SizeReport, TaskReport

matplotlib.use("Agg")


def draw(report: TaskReport, task: str, path: Path) -> None:
    """Score against parameters, time and memory, and the learning curves."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    rows = [row for row in report.methods if row.seconds is not None]
    looks = {name: (f"C{i % 10}", "os^"[i // 10 % 3]) for i, name in enumerate(sorted(row.name for row in rows))}
    unit: Callable[[Line], float]
    for place, label, unit in (
        (axes[0, 0], "trainable parameters", lambda row: row.parameters),
        (axes[0, 1], "training time, seconds", lambda row: row.seconds),
        (axes[1, 0], "memory of training above the model, MiB", lambda row: row.memory / 2**20),
    ):
        for row in rows:
            colour, marker = looks[row.name]
            where = {"x": unit(row), "y": row.mean, "yerr": row.sd or 0}
            place.errorbar(**where, fmt=marker, color=colour, capsize=2, label=row.name)
        place.set(xlabel=label, ylabel=f"test {report.score}", xscale="log")
        Magnitude.label(place.xaxis)
        for row in report.methods:
            if row.name in ("untuned", "few-shot") and row.mean is not None:
                style = "--" if row.name == "untuned" else ":"
                place.axhline(row.mean, color="grey", lw=0.8, ls=style, label=row.name)
    for row in rows:
        steps, losses = zip(*row.curve, strict=True)
        colour, marker = looks[row.name]
        axes[1, 1].plot(steps, losses, color=colour, ls={"o": "-", "s": "--", "^": ":"}[marker])
    axes[1, 1].set(xlabel="step", ylabel="training loss", yscale="log")
    Magnitude.label(axes[1, 1].yaxis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{task}: {report.test_items} test items; bars are one standard deviation over seeds")
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


def draw_sizes(report: SizeReport, task: str, path: Path) -> None:
    """Score against the number of training examples."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    place = figure.subplots()
    sizes = sorted({size for points in report.methods.values() for size, _, _ in points})
    for i, (name, points) in enumerate(sorted(report.methods.items())):
        xs, means, sds = zip(*points, strict=True)
        shifted = [x * 1.02 ** (i - len(report.methods) / 2) for x in xs]  # so that bars do not hide one another
        style = ("-", "--")[i // 10 % 2]
        place.errorbar(shifted, means, yerr=[sd or 0 for sd in sds], label=name, capsize=2, ls=style, marker="o", ms=3)
    place.set(xlabel="training examples", ylabel=f"test {report.score}", xscale="log")
    place.set_xticks(sizes, [str(size) for size in sizes])
    place.minorticks_off()
    place.legend(fontsize=8, ncols=2)
    figure.suptitle(f"{task}: {report.test_items} test items; bars are one standard deviation over seeds")
    figure.savefig(path, dpi=110)
