"""What is shipped runs: every recipe loads, and README's Python and shell blocks do what they say."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.recipe.load import load_recipe
from trimtab.study.compare import choose_ways

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_recipe(path).tasks


def python_blocks() -> list[str]:
    return re.findall(r"(?<!-->\n)```python\n(.*?)```", README, re.DOTALL)


def test_readme_python(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    assert python_blocks()
    for block in python_blocks():
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, capture_output=True)


def test_readme_commands_exist(capfd: pytest.CaptureFixture[str]) -> None:
    """Every `trimtab` line of README parses: the command and its options are there (test_cli runs them)."""
    from typer.main import get_command

    from trimtab.cli import app

    group = get_command(app)
    shell = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    lines = [line.split("#")[0].strip() for line in shell.splitlines() if re.match("trimtab [a-z]", line)]
    assert len(lines) >= 6
    for line in lines:
        _, name, *arguments = shlex.split(line)
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments, resilient_parsing=False)


@pytest.mark.parametrize(
    "name", ["skills", "sets", "minilm", "sts-b", "where", "length", "facts", "topics", "topics-steps"]
)
def test_the_study_and_its_report_are_of_one_config(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    config = ROOT / f"benchmarks/verdict/{name}.yaml"
    folders = "glue|llm-adapters|text|ladder|pairs|topics"
    not_ours = re.findall(rf"(?:{folders})/[\w./-]+\.(?:jsonl|json|tsv|txt)", config.read_text())
    for file in not_ours:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    recipe = load_recipe(config, data=tmp_path)
    methods = {
        task: [c.name for c in found] for task, found in choose_ways(recipe.experiments(), recipe.compare).items()
    }
    report = json.loads((ROOT / recipe.output / "compare/report.json").read_text())
    assert (report["seeds"], report["learning_rates"]) == (recipe.compare.seeds, recipe.compare.learning_rates)
    assert {t: sorted(row["name"] for row in found["methods"]) for t, found in report["tasks"].items()} == {
        task: sorted(names) for task, names in methods.items()
    }
    for found in report["tasks"].values():
        assert all(len(row["scores"]) == recipe.compare.seeds for row in found["methods"] if row.get("seconds"))
