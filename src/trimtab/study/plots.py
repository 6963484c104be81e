"""Pictures of a comparison, one a task, as PNGs for a wide or a narrow window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter
from matplotlib.transforms import ScaledTranslation

from trimtab.runs.curve import as_png
from trimtab.study.report import Line, SizeReport, TaskReport

matplotlib.use("Agg")
DOT = 8.0
"""How far apart the middles of two dots are, in points, so that neither covers the other."""
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5), (1, 1.5))
Look = tuple[str, str, int]
"""Colour, marker, and which of `DASHES`."""


def draw(report: TaskReport, task: str, narrow: bool = False) -> bytes:
    """Score against parameters, time and memory, and the learning curves."""
    figure = Figure(figsize=(4.4, 15) if narrow else (11, 8), layout="constrained")
    axes = figure.subplots(4, 1).ravel() if narrow else figure.subplots(2, 2).ravel()
    lines = [line for line in report.methods if line.curve]  # those that were trained
    names = sorted(line.name for line in lines)
    looks = {name: (f"C{i % 10}", "os^"[i // 10 % 3], i // 10 % 3) for i, name in enumerate(names)}
    unit: Callable[[Line], float | None]
    for place, label, unit in (
        (axes[0], "trainable parameters", lambda line: line.parameters),
        (axes[1], "training time, seconds", lambda line: line.seconds),
        (axes[2], "memory of training above the model, MiB", lambda line: (line.memory or 0) / 2**20),
    ):
        place.set(xlabel=label, ylabel=f"test {report.score}", xscale="log")
        known = [(line, x) for line in lines if (x := unit(line)) is not None]
        _dots(place, [x for _, x in known], [line for line, _ in known], looks)
        Magnitude.label(place.xaxis)
        for line in report.methods:
            if line.name in ("untuned", "few-shot") and line.mean is not None:
                style = "--" if line.name == "untuned" else ":"
                place.axhline(line.mean, color="grey", lw=0.8, ls=style, label=line.name)
    _curves(axes[3], lines, looks)
    where = {"loc": "outside lower center", "ncols": 2} if narrow else {"loc": "outside right center"}
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, **where)
    over = "\n" if narrow else " "
    figure.suptitle(f"{task}: {report.test_items} test items;{over}{_bars(lines)}", fontsize=11 if narrow else 12)
    return as_png(figure)


def _bars(lines: Sequence[Line]) -> str:
    if any(line.sd is not None for line in lines):
        return "bars are one standard deviation over seeds"
    return "one seed, so no bars"


def _dots(place: Axes, xs: Sequence[float], lines: Sequence[Line], looks: dict[str, Look]) -> None:
    """A dot for each line; those that would cover one another stand side by side."""
    ys, errors = ([getattr(line, key) or 0.0 for line in lines] for key in ("mean", "sd"))
    for end in (np.subtract(ys, errors), np.add(ys, errors)):
        place.scatter(xs, end, alpha=0)  # for the limits, which say what covers what
    place.set(xlim=place.get_xlim(), ylim=place.get_ylim())
    figure = place.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    points = (place.transData.transform(np.column_stack([xs, ys])) * 72 / figure.dpi).tolist() if lines else []
    for line, x, y, error, aside in zip(lines, xs, ys, errors, asides(points), strict=True):
        colour, marker, _ = looks[line.name]
        moved = place.transData + ScaledTranslation(aside / 72, 0, figure.dpi_scale_trans)
        shown: dict[str, Any] = {"yerr": error} if line.sd is not None else {}
        place.errorbar(x, y, **shown, fmt=marker, color=colour, capsize=2, label=line.name, transform=moved)


def asides(points: Sequence[Sequence[float]]) -> list[float]:
    """How far each dot is moved sideways so that none is nearer than `DOT` to another: as little as does."""
    placed: list[tuple[float, float]] = []
    found: list[float] = []
    for x, y in points:
        tries = (DOT * n * side for n in range(len(points) + 1) for side in (1, -1))
        aside = next(d for d in tries if all(np.hypot(x + d - a, y - b) >= DOT * 0.99 for a, b in placed))
        placed.append((x + aside, y))
        found.append(aside)
    return found


def _curves(place: Axes, lines: Sequence[Line], looks: dict[str, Look]) -> None:
    """The training losses, the first ones wider, so that one shows at both sides of another that runs over it."""
    for i, line in enumerate(lines):
        steps, losses = zip(*line.curve, strict=True)
        colour, _, dash = looks[line.name]
        width = 1.2 + 3.3 * (1 - (i + 1) / len(lines))
        place.plot(steps, losses, color=colour, lw=width, dashes=DASHES[dash], alpha=0.85)
    place.set(xlabel="step", ylabel="training loss", yscale="log")
    Magnitude.label(place.yaxis)


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


def draw_sizes(report: SizeReport, task: str, narrow: bool = False) -> bytes:
    """Score against the number of training examples."""
    figure = Figure(figsize=(4.4, 5) if narrow else (8, 5), layout="constrained")
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
    over = "\n" if narrow else " "
    figure.suptitle(f"{task}: {report.test_items} test items;{over}bars are one standard deviation over seeds")
    return as_png(figure)
