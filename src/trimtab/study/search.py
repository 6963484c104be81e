"""`trimtab tune`: a search over rank, positions, layers and learning rate, scored on validation (optuna).

The default space is the paper's (tables 5 to 8), its layer subsets being all and each third of the blocks. A study is a
journal file beside the trials, named by all that decides what it would find, so that asking for more trials goes on
where the last search stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from trimtab.recipe.schema import Recipe, TuneSpec
from trimtab.runs.trial import RunError
from trimtab.runs.ways import as_contender
from trimtab.study.compare import Trial, describe, digest, fingerprints, run_trial

Watch = Callable[[int, dict[str, Any], float], None]


def tune(recipe: Recipe, task: str, blocks: int, trials: int, watch: Watch = lambda *_: None) -> dict[str, Any]:
    """Search until the study holds `trials` finished trials; returns the best settings and validation score.

    Args:
        blocks: how many the model has.
        watch: called after each trial with its number, settings and validation score.

    Raises:
        RunError: no trial trained.
    """
    folder = Path(recipe.output) / "tune"
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, content = recipe.tune, fingerprints(recipe, task)
    contender = as_contender({"tuned": {}}, recipe.tasks[task].adapter)
    searched = [describe(recipe, Trial(task, contender, None, recipe.seed, test=False), content), space.model_dump()]
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / f"{task}-{digest(searched)}.journal"))),
        study_name=task,
        direction="maximize",
        load_if_exists=True,
    )

    def objective(trial: optuna.Trial) -> float:
        settings, rate = suggested(trial, space, blocks)
        contender = as_contender({"tuned": settings}, recipe.tasks[task].adapter)
        result = run_trial(recipe, Trial(task, contender, rate, recipe.seed, test=False), folder / "trials", content)
        if "validation" not in result:
            raise optuna.TrialPruned(result.get("failed") or result["impossible"])
        watch(trial.number, {**settings, "learning_rate": rate}, result["validation"])
        return float(result["validation"])

    complete = optuna.trial.TrialState.COMPLETE
    tried = (complete, optuna.trial.TrialState.PRUNED)
    done = len(study.get_trials(deepcopy=False, states=tried))
    study.sampler = optuna.samplers.TPESampler(seed=recipe.seed + done)  # the same seed would draw the same again
    study.optimize(objective, n_trials=max(0, trials - done))
    if not study.get_trials(deepcopy=False, states=(complete,)):
        raise RunError(f"{task}: no trial trained; lower tune: learning_rates.")
    settings, rate = suggested(optuna.trial.FixedTrial(study.best_params), space, blocks)
    return {**settings, "learning_rate": rate, "validation": study.best_value}


def suggested(trial: Any, space: TuneSpec, blocks: int) -> tuple[dict[str, Any], float]:
    """The adapter's settings and the learning rate that a trial tries."""
    layers = layer_sets(blocks)
    names = [name for name in space.layers if name in layers]
    settings = {
        "r": trial.suggest_categorical("r", space.r),
        "positions": trial.suggest_categorical("positions", space.positions),
        "layers": layers[trial.suggest_categorical("layers", names)],
    }
    low, high = min(space.learning_rates), max(space.learning_rates)
    rate = trial.suggest_float("learning_rate", low, high, log=True) if low < high else low
    return settings, float(rate)


def layer_sets(blocks: int) -> dict[str, Any]:
    """The sets of blocks that `tune: layers:` names; those that a small model has no blocks for are left out."""
    third = max(1, blocks // 3)
    sets: dict[str, Any] = {"all": "all"}
    if blocks >= 3:
        sets |= {
            "lower": list(range(third)),
            "middle": list(range(third, blocks - third)),
            "upper": list(range(blocks - third, blocks)),
        }
    return sets


def tuned_recipe(recipe: Recipe, found: dict[str, dict[str, Any]]) -> str:
    """The recipe as YAML with the settings found for each task in place of its own."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    for name, best in found.items():
        task = raw["tasks"][name]
        spec = recipe.tasks[name]
        rate = float(f"{best['learning_rate']:.3g}")
        task["adapter"] = {**spec.adapter.model_dump(), **{k: best[k] for k in ("r", "positions", "layers")}}
        task["training"] = {**spec.training.model_dump(mode="json", exclude_none=True), "learning_rate": rate}
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
