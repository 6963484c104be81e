"""The rules of the house: imports go down, none goes round, and a new variant is written in one place."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/trimtab"
STOREYS = [{"edits", "where", "tasks"}, {"adapter"}, {"runs"}, {"study", "serve", "interop"}, {"recipe"}, {"cli"}]
"""From the ground up."""
GROUND = {"errors"}
"""Files that every storey may import."""


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Modules of trimtab that a file imports, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {m for m in members if m in MODULES} or {node.module}
        assert not isinstance(node, ast.ImportFrom) or not node.level, f"{path}: relative import"
    return {name for name in found if name.split(".")[0] == "trimtab" and name in MODULES}


def storey_of(module: str) -> int | None:
    folder = module.split(".")[1] if "." in module else ""
    return next((height for height, folders in enumerate(STOREYS) if folder in folders), None)


def test_imports_go_down() -> None:
    wrong = []
    for module, path in MODULES.items():
        own = storey_of(module)
        if own is None:
            continue  # errors.py, and what makes the package itself
        for other in imports_of(path):
            same_folder = module.split(".")[1] == other.split(".")[1:2][0] if "." in other else False
            height = storey_of(other)
            if not same_folder and other.split(".")[1:2] != ["errors"] and (height is None or height >= own):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_every_folder_has_a_storey() -> None:
    folders = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set().union(*STOREYS)


def test_no_imports_go_round() -> None:
    graph = {module: imports_of(path) - {module} for module, path in MODULES.items() if module != "trimtab"}
    for module in graph:  # importing a package's own __init__ on the way is not a circle
        graph[module] = {m for m in graph[module] if not module.startswith(f"{m}.")}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in graph.get(module, ()):
                walk(other, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_the_command_line_does_not_load_what_help_does_not_need() -> None:
    heavy = {"torch", "peft", "transformers", "pydantic"}
    script = f"import sys; import trimtab.cli; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


VARIANTS = """
from typing import Literal
import torch
from trimtab.edits import METHODS
from trimtab.edits.base import Edit
from trimtab.tasks import TASKS, generation
from trimtab.tasks.scores import GENERATION_SCORES, Score

class Shift(Edit):  # a method: one class and one row
    takes = frozenset()
    @classmethod
    def shapes(cls, width, r):
        return {"shift": (width,)}
    def start(self, identity):
        return {"shift": torch.zeros(self.width)}
    def delta(self, h):
        return self.shift.expand_as(h)
METHODS["shift"] = Shift

GENERATION_SCORES["short"] = Score("short", lambda p, w, truth: 1 / (1 + len(p)))  # a score: one object

class Spec(generation.GenerationSpec):  # a task: one file and one row
    type: Literal["shouting"]
class Shouting(generation.GenerationTask):
    spec_class = Spec
    def read(self, outputs):
        return [text.upper() for text in outputs]
TASKS["shouting"] = Shouting

if __name__ == "__main__":
    import sys
    from trimtab import cli
    for arguments in (["train", "recipe.yaml"], ["show", "runs/words"], ["compare", "recipe.yaml", "--jobs", "1"]):
        sys.argv = ["trimtab", *arguments]
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code, arguments
"""


def test_a_new_method_score_and_task_are_each_written_in_one_place(tmp_path: Path) -> None:
    """Registered in a process of its own, then trained, shown and compared by the ordinary commands."""
    rows = [{"input": a, "output": b} for a, b in (("cat", "cats"), ("dog", "dogs"), ("box", "boxes"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"type": "shouting", "score": "short", "prompt": "{input}", "answer": "{output}", "max_new_tokens": 2}
    recipe = {
        "model": str(SOURCE.parents[1] / "models/tiny-llama"),
        "output": str(tmp_path / "runs"),
        "training": {"max_steps": 1, "batch_size": 3},
        "adapter": {"method": "shift", "positions": "f1+l1", "layers": [0]},
        "compare": {"methods": ["shift", "untuned"], "learning_rates": [1e-3], "seeds": 1},
        "tasks": {"words": {**task, "data": dict.fromkeys(("train", "validation", "test"), "rows.jsonl")}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "variants.py").write_text(VARIANTS)
    found = subprocess.run([sys.executable, "variants.py"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    trial = json.loads(next((tmp_path / "runs/compare/trials/words/shift").iterdir()).read_text())
    assert trial["predictions"] == [text.upper() for text in trial["predictions"]]
    report = json.loads((tmp_path / "runs/compare/report.json").read_text())["tasks"]["words"]
    assert report["score"] == "short"
    lines = {line["name"]: line for line in report["methods"]}
    assert lines["shift"]["mean"] == pytest.approx(sum(1 / (1 + len(p)) for p in trial["predictions"]) / 3)
    assert lines["shift"]["parameters"] == 192  # the width, which no rank multiplies
