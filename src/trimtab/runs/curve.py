"""The picture that a training leaves: its loss and what it scored, by step."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.runs.folder import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE = "training.png"
NO_PLOT = "No picture of the loss was made, since matplotlib is not installed: pip install 'trimtab[bench]'"


def draw_curve(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw a run's `metrics.json` to a PNG file; where matplotlib is not installed, nothing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    curve, score, end = metrics["curve"], metrics["score"], metrics["steps"]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    (loss,) = left.plot(*zip(*curve["loss"], strict=True), color="C0", lw=1.2, label="training loss")
    left.set(xlabel="step", ylabel="training loss", xlim=(0, end * 1.02), ylim=(0, None))
    scored = (metrics["untuned"][score], metrics["tuned"][score])
    ends = right.plot((0, end), scored, "o", color="C1", clip_on=False, label=f"{metrics['split']}, untuned and tuned")
    looks = []
    if curve["validation"]:
        looks = right.plot(*zip(*curve["validation"], strict=True), "s--", color="C3", label="some of validation")
    low = min([0.0, *scored, *(value for _, value in curve["validation"])])
    right.set(ylabel=score.replace("_", " "), ylim=(low, 1.03))
    found = [loss, *looks, *ends]
    figure.legend(handles=found, title=metrics["task"], loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    write_bytes(path, as_png(figure))


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a file."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    return held.getvalue()
