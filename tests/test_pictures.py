"""Pictures in the docs are what their scripts draw."""

from __future__ import annotations

import runpy
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs/images"


def test_what_is_edited() -> None:
    drawn = runpy.run_path(str(IMAGES / "edited.py"))["drawn"]()
    assert drawn == (IMAGES / "edited.svg").read_text(encoding="utf-8"), "run docs/images/edited.py"
