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


def table(*starts: str) -> list[str]:
    """Lines of the page's tables that begin so."""
    return [line for line in PAGE.splitlines() if line.startswith(tuple(f"| {start} |" for start in starts))]


def read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def row(*cells: object) -> str:
    return f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |"


def test_the_tables_of_steering_are_the_committed_ones() -> None:
    found = read("steering.json")
    assert table("plural", "french", "kind") == [
        row(
            own["task"],
            f"`{own['positions']}`",
            own["block"],
            *(f"{s['exact']:.2f} ({s['surprise']:.2f})" for s in own["sweep"]),
            own["instructed"],
        )
        for own in found["lines"]
    ]
    concepts = [
        row(
            own["concept"],
            f"`{own['positions']}`",
            own["block"],
            *(f"{s['success']:.2f} ({s['loss']:.2f})" for s in (*own["sweep"], own["real"])),
            own["judge"],
        )
        for own in found["concepts"]
    ]
    ends = [(of, at) for of in ("probe", "loss") for at in ("before", "after")]
    erased = [row(own["concept"], *(own[of][at] for of, at in ends)) for own in found["erased"]]
    assert table("novel", "speech", "communism") == concepts + erased


def test_the_tables_of_parts_are_the_committed_ones() -> None:
    found = read("parts.json")
    ways = dict.fromkeys(own["way"] for own in found["lines"])
    tasks = ("opposite", "past")
    means = [[o["way"], o["used"], *(sum(o[t]) / len(o[t]) for t in tasks)] for o in found["lines"]]
    assert table(*ways) == [row(*cells) for cells in means]
    names = ("novels", "textbooks", "judged_novel", "loss_under_base")
    scales = [f"{own['scale']:g}" for own in found["style"]]
    assert table(*scales) == [row(s, *(own[n] for n in names)) for s, own in zip(scales, found["style"], strict=True)]
