"""The trials that `trimtab compare CONFIG` left, for scripts that read more out of them than its report does."""

from __future__ import annotations

import argparse
from pathlib import Path

from trimtab.recipe.load import load_recipe
from trimtab.study.compare import CompareSpec, Group, Study, choose_ways


def asked_for(description: str | None) -> tuple[Path, CompareSpec, list[Group]]:
    """The folder of the reports, the settings and the groups of the config that the command line names.

    What is missing is run.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    asked = parser.parse_args()
    recipe = load_recipe(asked.config, [f"model={asked.model}"] if asked.model else [], data=asked.data)
    folder, experiments = Path(recipe.output) / "compare", recipe.experiments()
    study = Study(experiments, choose_ways(experiments, recipe.compare), recipe.compare, folder / "trials")
    return folder, recipe.compare, study.run(jobs=1)
