"""`trimtab tune`: a search over rank, positions, layers and learning rate, scored on validation (optuna).

The default space is the paper's (tables 5 to 8), its layer subsets being all and each third of the blocks. A study is a
journal file beside the trials, named by all that decides what it would find, so that asking for more trials goes on
where the last search stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from trimtab.errors import RunError
from trimtab.runs.experiment import Experiment, Trial, digest, fingerprints
from trimtab.runs.summary import PLAUSIBLE_RATES
from trimtab.runs.together import run_together
from trimtab.runs.trial import run_trial
from trimtab.runs.ways import as_way
from trimtab.tasks.spec import Section
from trimtab.where.layers import layer_sets


class TuneSpec(Section):
    """Where `trimtab tune` looks: the paper's search space, at the ranks of small and large models."""

    r: list[PositiveInt] = Field([1, 2, 4, 8, 16, 32], min_length=1)
    """ranks"""
    positions: list[str] = Field([f"f{n}+l{n}" for n in (1, 3, 5, 7, 9, 11)], min_length=1)
    """each as `adapter: positions:` takes it"""
    layers: list[Literal["all", "lower", "middle", "upper"]] = Field(["all", "lower", "middle", "upper"], min_length=1)
    """all, or a third of the blocks"""
    learning_rates: list[PositiveFloat] = Field(list(PLAUSIBLE_RATES), min_length=1, max_length=2)
    """lowest and highest, between which the search is logarithmic; the paper's highest, 3e-3, is for large models"""


@dataclass(frozen=True)
class Found:
    """Settings that a search tried, and what they scored."""

    settings: dict[str, Any]
    """Of the adapter: r, positions and layers."""
    learning_rate: float
    validation: float
    own: bool = False
    """They are the recipe's."""


STARTUP = 10
"""Trials that are drawn at random, whatever others found, before the sampler goes by what was found."""
Watch = Callable[[int, Found], None]


class Search:
    """The trials of one task under other settings, and their study.

    Args:
        folder: where both lie.
        blocks: how many the model has.

    Raises:
        DataError: there is nothing to validate on.
    """

    def __init__(self, experiment: Experiment, space: TuneSpec, folder: Path, blocks: int) -> None:
        self.experiment, self.space, self.folder, self.blocks = experiment, space, folder, blocks
        experiment.task.examples("validation")
        self.content = fingerprints(experiment)

    def own(self) -> Found | None:
        """What the recipe's own settings score; None where they do not train."""
        adapter, rate = self.experiment.adapter, self.experiment.training.learning_rate
        score = run_trial(self._trial({}, None), self.folder / "trials", self.content).validation
        settings = {key: getattr(adapter, key) for key in ("r", "positions", "layers")}
        return None if score is None else Found(settings, rate, score, own=True)

    def study(self) -> Any:
        """Opened where there is one; named by all that decides what it finds."""
        import optuna  # not at the top, since a recipe names what is searched whether or not optuna is there
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        searched = [self._trial({}, None).described(self.content), self.space.model_dump()]
        file = self.folder / f"{self.experiment.name}-{digest(searched)}.journal"
        storage, name = JournalStorage(JournalFileBackend(str(file))), self.experiment.name
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)

    def suggested(self, trial: Any) -> Found:
        """What an optuna trial says, scored."""
        import optuna

        settings, rate = suggested(trial, self.space, self.blocks)
        outcome = run_trial(self._trial(settings, rate), self.folder / "trials", self.content)
        if outcome.validation is None:
            raise optuna.TrialPruned(outcome.failed or outcome.impossible)
        return Found(settings, rate, outcome.validation)

    def sampler(self, number: int) -> Any:
        """Seeded by the trial's number, so that a resumed search draws the same."""
        import optuna

        return optuna.samplers.TPESampler(seed=self.experiment.seed + number - 1, n_startup_trials=STARTUP)

    def run_ahead(self, numbers: Sequence[int]) -> None:
        """Train trials that are drawn at random together, where that can be, before they come up one by one."""
        import optuna

        drawn = (optuna.create_study(sampler=self.sampler(number)).ask() for number in numbers)
        trials = [self._trial(*suggested(trial, self.space, self.blocks)) for trial in drawn]
        run_together(trials, self.folder / "trials", [self.content] * len(trials))

    def _trial(self, settings: dict[str, Any], rate: float | None) -> Trial:
        way = as_way({"tuned": settings}, self.experiment.adapter)
        return Trial(self.experiment, way, rate, self.experiment.seed, splits=("validation",))


def tune(
    experiment: Experiment,
    space: TuneSpec,
    folder: Path,
    blocks: int,
    trials: int,
    watch: Watch = lambda *_: None,
) -> Found:
    """Search until there are `trials` finished trials, the first of the recipe's own settings; returns the best.

    Of equally good ones that is the recipe's own, so that what is returned is never worse than those on validation.

    Args:
        folder: where the study and its trials lie.
        blocks: how many the model has.
        watch: called after each trial with its number, from 0, and what it found.

    Raises:
        RunError: no trial trained.
    """
    import optuna

    search = Search(experiment, space, folder, blocks)
    own = search.own()
    if own is not None:
        watch(0, own)
    study, states = search.study(), optuna.trial.TrialState
    done = len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))
    search.run_ahead(range(done + 1, min(trials, STARTUP + 1)))
    for number in range(done + 1, trials):

        def objective(trial: Any, number: int = number) -> float:
            found = search.suggested(trial)
            watch(number, found)
            return found.validation

        study.sampler = search.sampler(number)
        study.optimize(objective, n_trials=1)
    found = study.get_trials(deepcopy=False, states=(states.COMPLETE,))
    if own is not None and (not found or study.best_value <= own.validation):
        return own
    if not found:
        raise RunError(f"{experiment.name}: no trial trained; lower tune: learning_rates.")
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
    return settings, float(f"{rate:.3g}")  # as it is written into a recipe
