"""Every guide runs as it is printed: top to bottom, in an empty folder beside the bundled model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import Command

from trimtab import METHODS

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
FENCE = re.compile(
    r'(?:<!-- needs (?P<needs>\w+) -->\n)?```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)```', re.DOTALL
)
THERE = {
    "models": ROOT / "models",
    "recipes": ROOT / "recipes",
    "old-pyreft": ROOT / "tests/golden/pyreft_checkpoint_loreft_tied",
    "old-base": ROOT / "tests/golden/model",
}
"""What the guides say lies in the folder."""
SLOW = {"devices", "lora"}


class Block(NamedTuple):
    needs: str | None
    """A package without which the block is not run."""
    kind: str
    title: str | None
    """The file that it is."""
    text: str


def blocks(guide: Path) -> list[Block]:
    return [Block(**found.groupdict()) for found in FENCE.finditer(guide.read_text())]


def check_file(block: Block) -> None:
    """As far as can be told without running it."""
    assert block.title is not None
    if block.kind == "python":
        compile(block.text, block.title, "exec")
    elif block.kind == "sh":
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    else:
        from accelerate.commands.config.config_args import load_config_from_file

        Path(block.title).write_text(block.text)
        config: Any = load_config_from_file(block.title)
        assert config.num_processes == yaml.safe_load(block.text)["num_processes"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, place in THERE.items():
        (tmp_path / name).symlink_to(place)
    # Without a GPU accelerate has to be told that processes are to meet.
    for name, value in {"PYTHONPATH": str(ROOT / "src"), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize(
    "guide", [pytest.param(g, id=g.stem, marks=[pytest.mark.slow] if g.stem in SLOW else []) for g in GUIDES]
)
@pytest.mark.filterwarnings("ignore")
def test_a_guide_runs(guide: Path, folder: Path, trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(guide)
    assert found
    main = types.ModuleType("guide")  # where classes of the guide are at home
    monkeypatch.setitem(sys.modules, "guide", main)
    monkeypatch.setitem(METHODS, "swap", METHODS["loreft"])  # so that the guide's own goes again
    for block in found:
        if block.needs and find_spec(block.needs) is None:
            continue
        if block.title:
            check_file(block)
            (folder / block.title).write_text(block.text)
        elif block.kind == "python":
            exec(compile(block.text, guide.name, "exec"), vars(main))
        else:
            for line in block.text.splitlines():
                run(shlex.split(line), trimtab)


def run(words: list[str], trimtab: Command) -> None:
    if words[0] == "trimtab":
        code, said = trimtab(*words[1:])
        assert code == 0, said
        return
    assert words[0] == "torchrun"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_table_of_precisions_is_the_committed_one() -> None:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.0e}" if 0 < value < 0.01 else f"{value:.3g}"
        return "not run" if value is None else str(value)

    lines = json.loads((ROOT / "benchmarks/results/precisions.json").read_text())["lines"]
    page = (ROOT / "docs/guides/quantised.md").read_text()
    assert [row for row in (f"| {' | '.join(map(cell, line.values()))} |" for line in lines) if row not in page] == []
