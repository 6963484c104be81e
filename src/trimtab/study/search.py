"""`trimtab tune`: a search over rank, positions, layers and learning rate, scored on validation (optuna).

The default space is the paper's (tables 5 to 8), its layer subsets being all and each third of the blocks. A study is a
journal file beside the trials, named by all that decides what it would find, so that asking for more trials goes on
where the last search stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from trimtab.errors import RunError
from trimtab.runs.trial import Experiment, Trial, digest, fingerprints, run_trial
from trimtab.runs.ways import as_way
from trimtab.tasks.spec import Section
from trimtab.where.layers import layer_sets


class TuneSpec(Section):
    """Where `trimtab tune` looks: the paper's search space, at the ranks of small and large models."""

    r: list[PositiveInt] = Field([1, 2, 4, 8, 16, 32], min_length=1)
    positions: list[str] = Field([f"f{n}+l{n}" for n in (1, 3, 5, 7, 9, 11)], min_length=1)
    layers: list[Literal["all", "lower", "middle", "upper"]] = Field(["all", "lower", "middle", "upper"], min_length=1)
    """all, or a third of the blocks"""
    learning_rates: list[PositiveFloat] = Field([9e-5, 2e-2], min_length=1, max_length=2)
    """lowest and highest, between which the search is logarithmic; the paper's highest, 3e-3, is for large models"""


@dataclass(frozen=True)
class Found:
    """Settings that a search tried, and what they scored."""

    settings: dict[str, Any]
    """Of the adapter: r, positions and layers."""
    learning_rate: float
    validation: float


Watch = Callable[[int, Found], None]


def tune(
    experiment: Experiment,
    space: TuneSpec,
    folder: Path,
    blocks: int,
    trials: int,
    watch: Watch = lambda *_: None,
) -> Found:
    """Search until the study holds `trials` finished trials; returns the best.

    Args:
        folder: where the study and its trials lie.
        blocks: how many the model has.
        watch: called after each trial with its number and what it found.

    Raises:
        RunError: no trial trained.
    """
    import optuna  # not at the top, since a recipe names what is searched whether or not optuna is there
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    content, name = fingerprints(experiment), experiment.name

    def trial_of(settings: dict[str, Any], rate: float | None) -> Trial:
        way = as_way({"tuned": settings}, experiment.adapter)
        return Trial(experiment, way, rate, experiment.seed, splits=("validation",))

    searched = [trial_of({}, None).described(content), space.model_dump()]
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / f"{name}-{digest(searched)}.journal"))),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )

    def objective(trial: Any) -> float:
        settings, rate = suggested(trial, space, blocks)
        outcome = run_trial(trial_of(settings, rate), folder / "trials", content)
        if outcome.validation is None:
            raise optuna.TrialPruned(outcome.failed or outcome.impossible)
        watch(trial.number, Found(settings, rate, outcome.validation))
        return outcome.validation

    complete = optuna.trial.TrialState.COMPLETE
    tried = (complete, optuna.trial.TrialState.PRUNED)
    done = len(study.get_trials(deepcopy=False, states=tried))
    for number in range(done, trials):  # seeded by its number, so that a resumed search draws the same
        study.sampler = optuna.samplers.TPESampler(seed=experiment.seed + number)
        study.optimize(objective, n_trials=1)
    if not study.get_trials(deepcopy=False, states=(complete,)):
        raise RunError(f"{name}: no trial trained; lower tune: learning_rates.")
    settings, rate = suggested(optuna.trial.FixedTrial(study.best_params), space, blocks)
    return Found(settings, rate, study.best_value)


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
