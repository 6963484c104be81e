"""Recipes written again with other values."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from trimtab.recipe.schema import Recipe
from trimtab.study.search import Found


def tuned_recipe(recipe: Recipe, best: Mapping[str, Found]) -> str:
    """The recipe as YAML with the settings found for each task in place of its own."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    for name, found in best.items():
        task, spec = raw["tasks"][name], recipe.tasks[name]
        rate = float(f"{found.learning_rate:.3g}")
        task["adapter"] = {**spec.adapter.model_dump(), **found.settings}
        task["training"] = {**spec.training.model_dump(mode="json", exclude_none=True), "learning_rate": rate}
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
