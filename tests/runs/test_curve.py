"""The picture of a training: what is drawn, and what is said where nothing can be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.runs import curve

METRICS: dict[str, Any] = {
    "task": "plural",
    "score": "exact_match",
    "split": "test",
    "steps": 40,
    "untuned": {"exact_match": 0.1},
    "tuned": {"exact_match": 0.9},
    "curve": {"loss": [(10, 3.0), (20, 2.0), (40, 0.5)], "validation": [(10, 0.2), (20, 0.6)]},
}


@pytest.mark.parametrize("looks", [METRICS["curve"]["validation"], []])
def test_what_is_drawn(looks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    as_png = curve.as_png
    monkeypatch.setattr(curve, "as_png", lambda figure: figures.append(figure) or as_png(figure))
    curve.draw_curve({**METRICS, "curve": {**METRICS["curve"], "validation": looks}}, tmp_path / curve.CURVE)
    assert (tmp_path / curve.CURVE).read_bytes().startswith(b"\x89PNG")
    left, right = figures[0].axes
    drawn = {line.get_label(): np.asarray(line.get_xydata()).tolist() for axes in (left, right) for line in axes.lines}
    assert drawn.pop("training loss") == [list(point) for point in METRICS["curve"]["loss"]]
    assert drawn.pop("test, untuned and tuned") == [[0, 0.1], [40, 0.9]]
    assert drawn == ({"some of validation": [list(point) for point in looks]} if looks else {})


def test_without_matplotlib_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curve.draw_curve(METRICS, tmp_path / curve.CURVE)
    assert not list(tmp_path.iterdir())
