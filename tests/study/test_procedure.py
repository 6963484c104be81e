"""The whole comparison, search for rates and choice included, on trials that are made up: right as often as it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import importable

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks/results/verdict/simulation.json"


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with importable(monkeypatch, ROOT / "benchmarks/verdict"):
        import simulation

        yield simulation


def test_identical_methods_whose_rates_differ_in_worth_are_rarely_told_apart(simulation: Any) -> None:
    cell = simulation.Cell("gentle", 36, 2, False)
    assert simulation.apart(cell, 40) <= 7 < simulation.before(cell, 40)
    assert simulation.apart(replace(cell, validation=150, gap=12), 20) >= 80  # and others are


def test_a_study_comes_out_the_same_again(simulation: Any) -> None:
    cell = simulation.Cell("steep", 36, 8, True)
    assert list(simulation.verdicts(cell, 3)) == list(simulation.verdicts(cell, 3))


def test_the_table_has_every_cell_within_what_is_promised(simulation: Any) -> None:
    table = json.loads(TABLE.read_text())
    cells = [
        simulation.Cell(**{k: line[k] for k in ("shape", "validation", "spread", "unstable")})
        for line in table["cells"]
    ]
    assert cells == simulation.CELLS and table["studies"] >= 400
    assert (
        max(line["apart"] for line in table["cells"])
        <= 7
        < max(line["apart_first_seed_chooses"] for line in table["cells"])
    )


@pytest.mark.slow
def test_the_table_comes_out_the_same_again(simulation: Any) -> None:
    table = json.loads(TABLE.read_text())
    for cell, line in list(zip(simulation.CELLS, table["cells"], strict=True))[::5]:
        assert simulation.apart(cell, table["studies"]) == line["apart"], cell
