"""The notebook in examples/, cell by cell: its Python as Python, its commands as commands."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_from_a_file_to_answers(
    trimtab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    known: dict[str, Any] = {}
    for cell in json.loads((ROOT / "examples/from_your_file.ipynb").read_text())["cells"]:
        lines = "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else []
        commands = [line.removeprefix("!trimtab ") for line in lines if line.startswith("!trimtab ")]
        for command in commands:
            code, text = trimtab(*shlex.split(command.format(**known)))
            assert code == 0, text
        exec("\n".join(line for line in lines if not line.startswith("!")), known)
    assert capfd.readouterr().out.splitlines()[-1] == "delivery"
    assert Path("runs/tickets/training.png").exists()
    with Path("answers.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == 15 and sum(row["prediction"] == row["team"] for row in rows) > 10
