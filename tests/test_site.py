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
    assert all((tmp_path / page).is_file() for page in pages_for_agents())


def pages_for_agents() -> list[str]:
    """What llms.txt links to; each link is followed by a sentence."""
    return re.findall(r"^- \[[^]]+\]\(([^)]+)\): \S.*\.$", (ROOT / "docs/llms.txt").read_text(), re.M)


def test_llms_txt_has_every_page() -> None:
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages_for_agents()) == sorted(["index.md", *there])
    assert (ROOT / "docs/llms.txt").read_text().count("](") == len(there) + 1


def test_the_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: trimtab\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(shown) == sorted(set(trimtab.__all__) - {"__version__"})
    assert set(dir(trimtab)) == set(trimtab.__all__), "completion shows the API, not modules"
