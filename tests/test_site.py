"""The documentation site (mkdocs.yml)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """As `make lint` does every time."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "editing its hidden states" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "repository/recipes/words.yaml").read_text() == (ROOT / "recipes/words.yaml").read_text()
    assert "Rank of the edit" in (tmp_path / "api/index.html").read_text()


def test_the_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: trimtab\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(shown) == sorted(set(trimtab.__all__) - {"__version__"})
    assert set(dir(trimtab)) == set(trimtab.__all__), "completion shows the API, not modules"
