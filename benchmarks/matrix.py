"""The tests under other versions of Python, torch, transformers and PEFT: what passes is written to docs/versions.md.

    make matrix              # or: python benchmarks/matrix.py [--rows oldest,newest] [pytest's options]

Each row gets an environment of its own in .venv-matrix, from constraints.txt but for what the row says. Rows that were
not run keep what is written of them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/versions.md", ROOT / "benchmarks/results/versions.json"
FOLLOW = ("huggingface_hub", "tokenizers", "trl", "numpy")
"""What is left to pip where transformers is another version than the constraints'."""
FOLDERS = ("adapter", "edits", "interop", "recipe", "runs", "tasks", "where")


@dataclass(frozen=True)
class Row:
    """Which Python, and what is installed instead of the constraints' version."""

    python: str = "3.11"
    pins: dict[str, str] = field(default_factory=dict)


ROWS = {
    "oldest": Row(pins={"transformers": "5.22.0", "peft": "0.21.2", "torch": "2.6.0"}),
    "oldest transformers and PEFT": Row(pins={"transformers": "5.22.0", "peft": "0.21.2"}),
    "constraints": Row(),
    "next, not let in yet": Row(pins={"transformers": "5.24.0", "peft": "0.21.2"}),
    "Python 3.12": Row(python="3.12"),
    "Python 3.13": Row(python="3.13"),
}


def install(name: str, row: Row) -> Path:
    """The row's Python, with trimtab and its tests' packages."""
    folder = ROOT / ".venv-matrix" / name.replace(" ", "-")
    python = folder / "bin/python"
    if not python.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([f"python{row.python}", "-m", "venv", str(folder)], check=True)
    free = {*row.pins, *(FOLLOW if "transformers" in row.pins else ())}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in free]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*kept, *(f"{name}=={pin}" for name, pin in row.pins.items())]) + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints)]
    subprocess.run([*pip, "-e", f"{ROOT}[train,serve,bench,dev]"], check=True)
    return python


def run(python: Path, options: list[str]) -> dict[str, object]:
    """The tests, counted."""
    tests = [str(ROOT / "tests" / folder) for folder in FOLDERS]
    command = [str(python), "-m", "pytest", "-W", "ignore", "-p", "no:cacheprovider", *tests, *options]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", out.splitlines()[-1])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", out, re.M)
    versions = subprocess.run(
        [
            str(python),
            "-c",
            "import platform, torch, transformers, peft; "
            "print(platform.python_version(), torch.__version__, transformers.__version__, peft.__version__)",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    names = ("python", "torch", "transformers", "peft")
    return {**dict(zip(names, versions, strict=True)), **counts, "which": failed, "at": f"{datetime.now(UTC):%Y-%m-%d}"}


def page(results: dict[str, dict[str, object]]) -> str:
    """The results as a page."""
    head = """# Versions

trimtab asks for Python 3.11, torch 2.6, transformers 5.22 or 5.23 and PEFT 0.21.2 or later. Before 5.22
transformers does not project a mask of positions alone (`logits_to_keep`); 5.24 renames `past_key_values` to
`cache`, and to load an adapter it asks for PEFT 0.22; before 0.21.2 PEFT does not generate with T5 on
such a transformers. torch 2.6 does not compile a PEFT model with `fullgraph=True`, of whatever method. What
`make matrix` found, on the CPU; a row that is not here was not run:

| | Python | torch | transformers | PEFT | passed | failed | skipped | on |
|---|---|---|---|---|---|---|---|---|
"""
    rows = [
        f"| {name} | {r['python']} | {r['torch']} | {r['transformers']} | {r['peft']} | {r.get('passed', 0)} "
        f"| {r.get('failed', 0)} | {r.get('skipped', 0)} | {r['at']} |"
        for name, r in results.items()
    ]
    return head + "\n".join(rows) + f"\n\nWhich tests failed: `{RESULTS.relative_to(ROOT)}`.\n"


def main() -> None:
    """Run the rows asked for, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    arguments, options = parser.parse_known_args()
    chosen = arguments.rows.split(",")
    if unknown := [name for name in chosen if name not in ROWS]:
        sys.exit(f"--rows: no {unknown[0]!r}; there are {', '.join(ROWS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in chosen:
        try:
            results[name] = run(install(name, ROWS[name]), options)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name}: not run: {error}")
            continue
        print(name, {k: v for k, v in results[name].items() if k != "which"})
        results = {row: results[row] for row in ROWS if row in results}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
