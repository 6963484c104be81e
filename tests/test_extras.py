"""Commands run with the extra that they are said to need: packages that only others bring are hidden."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).parents[1]
RUN = """
import shlex, sys
from importlib.machinery import PathFinder

hidden, find = set(sys.argv[1].split(",")), PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *where: None if name.partition(".")[0] in hidden else find(name, *where)
)
from trimtab.cli import main

for command in sys.argv[2:]:
    sys.argv = ["trimtab", *shlex.split(command)]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""
TRAIN = [
    f"init {ROOT}/models/tiny-llama --task pairs.csv",
    "train recipe.yaml --set training.max_steps=2",
    "eval recipe.yaml --set training.max_steps=2",
    "predict pairs.csv -a runs/pairs",
    "generate a -a runs",
    "show runs/pairs runs/pairs",
    "explain runs/pairs a",
]


def needed(name: str, extra: str, found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The distributions, each with its extras, that one brings, itself included."""
    if (canonical(name), extra) in found:
        return found
    found.add((canonical(name), extra))
    try:
        asked = [Requirement(line) for line in distribution(name).requires or []]
    except PackageNotFoundError:  # of another system or Python
        return found
    for one in asked:
        if one.marker is None or one.marker.evaluate({"extra": extra}):
            for own in ("", *one.extras):
                needed(one.name, own, found)
    return found


@pytest.mark.parametrize(("extras", "commands"), [(("train",), TRAIN), (("serve",), ["serve --help"])])
def test_an_extra_brings_what_its_commands_need(extras: tuple[str, ...], commands: list[str], tmp_path: Path) -> None:
    there = {name for extra in ("", *extras) for name, _ in needed("trimtab", extra, set())}
    hidden = {top for top, owners in packages_distributions().items() if not there & set(map(canonical, owners))}
    assert {"scipy", "optuna", "pytest"} <= hidden and not {"torch", "peft", "trimtab"} & hidden
    (tmp_path / "pairs.csv").write_text("question,answer\n" + "".join(f"w{i},v{i}\n" for i in range(20)))
    command = [sys.executable, "-c", RUN, ",".join(hidden), *commands]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
