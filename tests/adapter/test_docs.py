"""docs/edits-without-training.md runs, top to bottom, and its table is the committed one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/edits-without-training.md").read_text()


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trimtab: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    words = ["cat", "dog", "tree", "house"]
    (tmp_path / "without.txt").write_text("\n".join(words))
    (tmp_path / "with.txt").write_text("\n".join(f"French: {word}" for word in words))
    blocks = re.findall(r"```(python|sh)\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for kind, block in blocks:
        if kind == "python":
            exec(block, names)
        for line in block.splitlines() if kind == "sh" else []:
            code, said = trimtab(*shlex.split(line)[1:])
            assert code == 0, said


def test_the_table_is_the_committed_one() -> None:
    found = json.loads((ROOT / "benchmarks/results/steering.json").read_text())
    lines = [line for line in PAGE.splitlines() if line.startswith(("| plural", "| french", "| kind"))]
    assert len(lines) == len(found["lines"])
    for line, own in zip(lines, found["lines"], strict=True):
        cells = [f"{s['exact']:.2f} ({s['surprise']:.2f})" for s in own["sweep"]]
        cells = [own["task"], f"`{own['positions']}`", str(own["block"]), *cells, f"{own['instructed']:.2f}"]
        assert line == f"| {' | '.join(cells)} |"
