"""`trimtab compare`: every way to adapt on the same data, budget and seeds, one small file a trial.

A study that was interrupted, or gets more seeds or methods, runs only what is missing. Each seed of a method goes
through the whole procedure by itself: it tries every learning rate, goes on beyond the lowest or highest while that is
the best, and takes the one best on validation. So the spread of the seeds holds the luck of choosing too. Test is
looked at by the report alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from trimtab.errors import DataError
from trimtab.runs.experiment import Experiment, Trial, fingerprints
from trimtab.runs.together import joins, run_trials
from trimtab.runs.trial import Outcome, outcome_of
from trimtab.runs.ways import WAYS, Way, applicable, as_way
from trimtab.study.progress import Standing
from trimtab.study.workers import workers
from trimtab.tasks.spec import Section

MARGIN = 0.02
"""Differences below this are as good as none, where nothing else is said."""


def _a_share(value: Any) -> Any:
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"is {value!r}; give a share between 0 and 1, of which 0.02 is 2 points")
    return float(value)


def _several(value: Any) -> Any:
    if isinstance(value, list) and len(value) < 2:
        raise ValueError("holds fewer than two; name another to compare with, such as untuned")
    return value


class CompareSpec(Section):
    """What `trimtab compare` tries: all methods with the same seeds, steps and data."""

    methods: Annotated[
        Annotated[list[str | dict[str, dict[str, Any]]], BeforeValidator(_several)] | None,
        Field(examples=[["lora", "loreft", {"big": {"peft_type": "LORA", "r": 32}}]]),
    ] = None
    """Names, {name: {peft_type: LORA, r: 32, …}} or {name: {method: loreft, r: 8, …}}; the first is the reference.
    A LoRA without `lora_alpha` has twice its `r`. `peft_type: LORA_AT` is a LoRA at some tokens alone, with `positions`
    (those of `adapter`, where it gives none)."""
    learning_rates: Annotated[
        Annotated[list[PositiveFloat], Field(min_length=1)] | None, Field(examples=[[1e-3, 4e-3]])
    ] = None
    """Of all methods whose settings give none (`learning_rates` in them), instead of those usual for each."""
    reach: NonNegativeInt = 3
    """How far a seed goes on beyond the lowest or highest rate while that is the best, in steps of the rates' own."""
    seeds: PositiveInt = 5
    """How many, each of which goes through the whole choice of a rate; from the recipe's `seed` on, or from a `seed`
    in a method's settings, which shows how far a method is from itself."""
    margin: Annotated[PositiveFloat, BeforeValidator(_a_share)] = MARGIN
    """Differences below this share, 0.02 for 2 points, are as good as none; methods that are surely this alike are
    called equal."""
    budget: Annotated[PositiveInt | None, Field(examples=[50_000])] = None
    """Trained parameters, a new head aside: each method gets the largest rank, or the most layers, that fit."""
    held_out: Annotated[str | None, Field(examples=["data/text.txt"])] = None
    """A text file; how much the model's loss on it grows is reported as forgetting."""


@dataclass(eq=False)
class Group:
    """The trials of one way to adapt on one task with one number of examples."""

    experiment: Experiment
    way: Way
    examples: int | None
    rates: tuple[float, ...]
    """Those that each seed starts from."""
    tried: dict[int, dict[float | None, Outcome]] = field(default_factory=dict)
    """By seed and learning rate."""
    impossible: str | None = None
    """Why there is nothing to show."""

    @property
    def task(self) -> str:
        return self.experiment.name

    @property
    def first_seed(self) -> int:
        own = self.way.first_seed
        return self.experiment.seed if own is None else own

    @property
    def random(self) -> bool:
        """Whether another seed would come out otherwise."""
        return self.way.trains or self.way.shots > 0 or not self.experiment.task.generates

    @property
    def seeds(self) -> list[Outcome]:
        """The trials that the seeds chose, one a seed; a failed one where all of a seed's failed."""
        return [by_worth(tried)[0] for _, tried in sorted(self.tried.items())]

    @property
    def scores(self) -> list[float]:
        """The seeds' scores on test; a failed one has the worst."""
        name = self.experiment.task.score.name
        return [WORST if run.failed else run.test[name] for run in self.seeds]

    def at_edge(self, seed: int) -> bool:
        """Whether the rate that a seed chose is the lowest or highest that it tried, of several."""
        chosen, tried = by_worth(self.tried[seed])[0].learning_rate, sorted(float(r or 0) for r in self.tried[seed])
        return len(tried) > 1 and chosen in (tried[0], tried[-1])


WORST = 0.0
"""The score of what failed: that of a model which answers nothing, or always the same."""


def by_worth(tried: Mapping[float | None, Outcome]) -> list[Outcome]:
    """A seed's trials, the best on validation first; of those that tie, that with the lower validation loss.

    Where trials of an earlier version have no loss, the middle one of their rates comes first.
    """
    middle = sorted(float(rate or 0) for rate in tried)[(len(tried) - 1) // 2]

    def worth(run: Outcome) -> tuple[float, float, float]:
        score = -math.inf if run.validation is None else run.validation
        loss = math.inf if run.validation_loss is None else run.validation_loss
        off = abs(math.log((run.learning_rate or 1) / (middle or 1)))
        return (-score, loss, off)

    return sorted(tried.values(), key=worth)


def _rates_of(way: Way, settings: CompareSpec) -> tuple[float, ...]:
    """To start from: those of the method's settings, else those of all, else those usual for its kind."""
    return way.learning_rates if way.own_rates else tuple(sorted(set(settings.learning_rates or way.learning_rates)))


PROBE = "head"
"""The frozen model with a new head alone, without which nobody can tell what the other methods add."""
Watch = Callable[[Group], None]


def choose_ways(
    experiments: Mapping[str, Experiment], settings: CompareSpec, only: Sequence[str] | None = None
) -> dict[str, list[Way]]:
    """What to compare for each task: the recipe's methods, or all that fit; of a classifier the head alone too.

    Args:
        only: names of those to keep; rows of `WAYS` may be named that the recipe does not.
    Raises:
        ValueError: a method that is not there, or two of one name.
    """
    chosen = {}
    for name, experiment in experiments.items():
        entries = settings.methods or applicable(experiment.task.task_type)
        found = [as_way(entry, experiment.adapter) for entry in entries]
        for method in only or ():
            names = [way.name for way in found]
            if method not in names and method not in WAYS and (near := get_close_matches(method, [*names, *WAYS])):
                raise ValueError(f"--method {method!r} is no method; did you mean {' or '.join(near)}?")
            if method not in names:
                found.append(as_way(method, experiment.adapter))
        if not experiment.task.generates and not only and PROBE not in (way.name for way in found):
            found.append(as_way(PROBE, experiment.adapter))
        often, count = Counter(way.name for way in found).most_common(1)[0]
        if count > 1:
            raise ValueError(f"compare: methods: {count} are called {often!r}; give each a name of its own")
        chosen[name] = [way for way in found if not only or way.name in only]
    return chosen


@dataclass(frozen=True)
class Plan:
    """What a study has to run."""

    runs: int
    """At least, where it `reaches`: those past an edge come on top."""
    done: int
    seconds: float | None
    """Of training, at the median of those done; None where nothing trained yet."""
    reaches: bool = False
    """Whether there may be more, past an edge."""


class Study:
    """A comparison: which trials it needs, and those there are.

    Args:
        experiments: by task.
        ways: for each of the tasks to compare on.
        settings: learning rates, number of seeds, held-out text.
        folder: where the outcomes' files lie.
        sizes: numbers of training examples; None for all there are.
    Raises:
        DataError: a task's data cannot be read, or it has no test data or none to validate on.
    """

    def __init__(
        self,
        experiments: Mapping[str, Experiment],
        ways: Mapping[str, Sequence[Way]],
        settings: CompareSpec,
        folder: Path,
        sizes: Sequence[int | None] = (None,),
    ) -> None:
        for name in ways:
            if experiments[name].spec.data.test is None:
                raise DataError(
                    f"{name}: learning rates are chosen on validation and scores reported on test, which without data: "
                    "test: are the same; give test data"
                )
            experiments[name].task.examples("validation")
        self.settings, self.folder = settings, folder
        self.groups = [
            Group(experiments[task], way, n, _rates_of(way, settings))
            for n in sizes
            for task, own in ways.items()
            for way in own
        ]
        self.content = {task: fingerprints(experiments[task], settings.held_out) for task in ways}

    def run(self, jobs: int, watch: Watch = lambda group: None, standing: Standing | None = None) -> list[Group]:
        """Run what is missing, `jobs` at a time; returns the finished groups in the order of the recipe.

        Raises:
            DataError, RunError: a task cannot be read or trained; what was done until then is kept.
        """
        self.read()
        if not any(map(self.missing, self.groups)):  # which needs no process
            for group in self.groups:
                watch(group)
            return self.groups
        standing = standing or Standing(len(self.groups))
        with workers(jobs) as pool:
            waiting: dict[Future[list[Outcome]], tuple[Group, list[Trial]]] = {}

            def submit(group: Group) -> None:
                running = [trial for one, trials in waiting.values() if one is group for trial in trials]
                new = [trial for trial in self.missing(group) if trial not in running]
                for trials in self._jobs(group, new, jobs):
                    waiting[pool.submit(run_trials, trials, self.folder, self.content[group.task])] = (group, trials)
                if not running and not new:
                    watch(group)

            for group in self.groups:
                submit(group)
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    group, trials = waiting.pop(future)
                    for trial, outcome in zip(trials, future.result(), strict=True):
                        self._take(group, trial, outcome)
                        standing.ended()
                    submit(group)
        return self.groups

    def read(self) -> None:
        """Take the outcomes there are."""
        for group in self.groups:
            content = self.content[group.task]
            while found := [
                (trial, outcome)
                for trial in self.missing(group, self.settings.seeds)
                if (outcome := outcome_of(trial, self.folder, content)) is not None
            ]:
                for trial, outcome in found:
                    self._take(group, trial, outcome)

    def _jobs(self, group: Group, trials: list[Trial], jobs: int) -> list[list[Trial]]:
        """What one process runs at a time: trials of one batch together, all others each by itself, as the first seed's
        are, to be timed."""
        alone: list[Trial] = []
        rest: list[Trial] = []
        for trial in trials:
            (rest if trial.seed != group.first_seed and joins(trial) else alone).append(trial)
        size = min(group.experiment.training.together, -(-len(rest) // jobs)) or 1
        return [*([trial] for trial in alone), *(rest[at : at + size] for at in range(0, len(rest), size))]

    def plan(self) -> Plan:
        """What `run` would do; nothing is run."""
        self.read()
        left = sum(len(self.missing(group, self.settings.seeds)) + self._past_an_edge(group) for group in self.groups)
        done = [outcome for group in self.groups for tried in group.tried.values() for outcome in tried.values()]
        seconds = [outcome.seconds for outcome in done if outcome.seconds is not None]
        reaches = self.settings.reach > 0 and any(g.way.trains and len(g.rates) > 1 for g in self.groups)
        return Plan(left + len(done), len(done), median(seconds) if seconds else None, reaches)

    def _past_an_edge(self, group: Group) -> int:
        """Trials that are sure to come when others have: of two rates the better is at an edge."""
        if not (self.settings.reach and group.way.trains and len(group.rates) == 2) or group.impossible:
            return 0
        return self.settings.seeds - sum(len(tried) > 1 for tried in group.tried.values())

    def wanted(self, group: Group, seeds: int | None = None) -> list[Trial]:
        """The trials that a group needs, as far as what is known of it tells.

        Args:
            seeds: how many go through it; without it the first alone at first, and all once it is known to train.
        """
        if group.impossible:
            return []
        first, count = group.first_seed, seeds or (self.settings.seeds if group.tried else 1)
        held_out = self.settings.held_out
        return [
            Trial(group.experiment, group.way, rate, seed, group.examples, held_out=held_out)
            for seed in range(first, first + (count if group.random else 1))
            for rate in self._wanted_rates(group, seed)
        ]

    def missing(self, group: Group, seeds: int | None = None) -> list[Trial]:
        """Those of the `wanted` trials whose outcome is not known."""
        return [one for one in self.wanted(group, seeds) if one.learning_rate not in group.tried.get(one.seed, {})]

    def _wanted_rates(self, group: Group, seed: int) -> Sequence[float | None]:
        """A seed's learning rates: those to start from, then one more beyond the edge while that is the best."""
        if not group.way.trains:
            return [None]
        rates, tried = list(group.rates), group.tried.get(seed, {})
        for _ in range(self.settings.reach if len(rates) > 1 else 0):
            if not all(rate in tried for rate in rates):
                break
            best = by_worth({rate: tried[rate] for rate in rates})[0].learning_rate
            if best == rates[0]:
                rates.insert(0, float(f"{rates[0] ** 2 / rates[1]:.3g}"))
            elif best == rates[-1]:
                rates.append(float(f"{rates[-1] ** 2 / rates[-2]:.3g}"))
            else:
                break
        return rates

    def _take(self, group: Group, trial: Trial, result: Outcome) -> None:
        if result.impossible is not None:  # for one seed, so for the group: seeds chosen by what fits would not compare
            group.impossible = result.impossible
            group.tried.clear()
        elif not group.impossible:
            group.tried.setdefault(trial.seed, {})[trial.learning_rate] = result
