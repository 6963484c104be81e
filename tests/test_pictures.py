"""Pages and pictures in the docs are what their scripts write."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_what_is_edited() -> None:
    drawn = runpy.run_path(str(DOCS / "images/edited.py"))["drawn"]()
    assert drawn == (DOCS / "images/edited.svg").read_text(encoding="utf-8"), "run docs/images/edited.py"


@pytest.mark.slow
def test_how_it_works(tmp_path: Path) -> None:
    """The words are the same; numbers may differ in their last places on another machine."""
    number = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
    written = runpy.run_path(str(DOCS / "how_it_works.py"))["page"](tmp_path)
    there = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    assert number.sub("N", written) == number.sub("N", there), "run docs/how_it_works.py"
    read = [float(x) for x in number.findall(written)]
    assert sum(abs(a - float(b)) > 0.05 * max(1, abs(a)) for a, b in zip(read, number.findall(there), strict=True)) < 5
    assert {file.name for file in tmp_path.iterdir()} == {"plane.png", "next.png"}
