"""`trimtab compare`: every way to adapt on the same data, budget, seeds and learning rates, one small file a trial.

A study that was interrupted, or gets more seeds or methods, runs only what is missing. The learning rate of each method
is chosen on validation with the first seed; the other seeds run at the rate chosen; test is looked at by the report
alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from trimtab.errors import DataError
from trimtab.runs.trial import Experiment, Outcome, Trial, fingerprints
from trimtab.runs.ways import Way, applicable, as_way
from trimtab.study.progress import Counted, Standing
from trimtab.study.workers import workers
from trimtab.tasks.spec import Section


class CompareSpec(Section):
    """What `trimtab compare` tries: all methods at the same learning rates, seeds, steps and data."""

    methods: Annotated[list[str | dict[str, dict[str, Any]]], Field(min_length=2)] | None = None
    """Names, {name: {peft_type: LORA, r: 32, …}} or {name: {method: loreft, r: 8, …}}; the first is the reference."""
    learning_rates: list[PositiveFloat] = Field([1e-4, 4e-4, 1.6e-3, 6.4e-3, 2.5e-2], min_length=1)
    seeds: PositiveInt = 5
    held_out: str | None = None
    """A text file; how much the model's loss on it grows is reported as forgetting."""


@dataclass(eq=False)
class Group:
    """The trials of one way to adapt on one task with one number of examples."""

    experiment: Experiment
    way: Way
    examples: int | None
    rates: list[Outcome] = field(default_factory=list)
    """The first seed's trials, one a learning rate."""
    seeds: list[Outcome] = field(default_factory=list)
    """The trials at the learning rate chosen, one a seed, the first seed's among them."""
    impossible: str | None = None
    """Why there is nothing to show."""

    @property
    def task(self) -> str:
        return self.experiment.name

    @property
    def chosen(self) -> float | None:
        """The learning rate with the best validation score; the middle one of those that are equally good."""
        done = [(r.validation, r.learning_rate) for r in self.rates if r.validation is not None]
        best = [rate for score, rate in done if score == max(score for score, _ in done)]
        return best[(len(best) - 1) // 2] if best else None


Watch = Callable[[Group], None]


def choose_ways(
    experiments: Mapping[str, Experiment], settings: CompareSpec, only: Sequence[str] | None = None
) -> dict[str, list[Way]]:
    """What to compare for each task: the recipe's methods, or all that fit the kind of task.

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
            if method not in (way.name for way in found):
                found.append(as_way(method, experiment.adapter))
        often, count = Counter(way.name for way in found).most_common(1)[0]
        if count > 1:
            raise ValueError(f"compare: methods: {count} are called {often!r}; give each a name of its own")
        chosen[name] = [way for way in found if not only or way.name in only]
    return chosen


class Study:
    """A comparison: which trials it needs, and those there are.

    Args:
        experiments: by task.
        ways: for each of the tasks to compare on.
        settings: learning rates, number of seeds, held-out text.
        folder: where the outcomes' files lie.
        sizes: numbers of training examples; None for all there are.
    Raises:
        DataError: a task's data cannot be read, or it has no test data.
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
        self.settings, self.folder = settings, folder
        self.rates = sorted(set(settings.learning_rates))
        self.groups = [Group(experiments[task], way, n) for n in sizes for task, own in ways.items() for way in own]
        self.content = {task: fingerprints(experiments[task], settings.held_out) for task in ways}

    def expected(self) -> int:
        """About how many trials there will be."""
        rates, seeds = len(self.rates), self.settings.seeds
        ways = [group.way for group in self.groups]
        return sum(rates + seeds - 1 if way.trains else seeds if way.shots else 1 for way in ways)

    def run(self, jobs: int, watch: Watch = lambda group: None, standing: Standing | None = None) -> list[Group]:
        """Run what is missing, `jobs` at a time; returns the finished groups in the order of the recipe.

        Raises:
            DataError, RunError: a task cannot be read or trained; what was done until then is kept.
        """
        with workers(jobs) as processes:
            pool = Counted(processes, standing or Standing(self.expected()))
            waiting: dict[Future[Outcome], Group] = {}
            for group in self.groups:
                self._submit(pool, waiting, group, self._first_trials(group))
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    group = waiting.pop(future)
                    self._take(group, future.result())
                    if group not in waiting.values():
                        self._submit(pool, waiting, group, self._later_trials(group))
                    if group not in waiting.values():
                        watch(group)
        return self.groups

    def _submit(self, pool: Counted, waiting: dict[Future[Outcome], Group], group: Group, trials: list[Trial]) -> None:
        for trial in trials:
            waiting[pool.submit(trial, self.folder, self.content[group.task])] = group

    def _first_trials(self, group: Group) -> list[Trial]:
        first = self._trial(group, None)
        return [replace(first, learning_rate=rate) for rate in self.rates] if group.way.trains else [first]

    def _later_trials(self, group: Group) -> list[Trial]:
        """Once the learning rates are tried: the other seeds. Once those are run too, or cannot be: none."""
        if group.impossible:
            return []
        done = [r for r in group.rates if r.validation is not None]
        if group.seeds or not (group.way.trains or group.way.shots):
            group.seeds = group.seeds or done
            if not group.seeds:
                group.impossible = group.rates[0].failed
            return []
        rate = group.chosen
        group.seeds = [r for r in done if r.learning_rate == rate]
        if not group.seeds:
            failures = [f"at {r.learning_rate} {r.failed}" for r in group.rates]
            group.impossible = f"no learning rate trained: {'; '.join(failures)}"
            return []
        first = self._trial(group, rate)
        return [replace(first, seed=first.seed + i) for i in range(1, self.settings.seeds)]

    def _trial(self, group: Group, rate: float | None) -> Trial:
        seed, held_out = group.experiment.seed, self.settings.held_out
        return Trial(group.experiment, group.way, rate, seed, group.examples, held_out=held_out)

    def _take(self, group: Group, result: Outcome) -> None:
        if result.impossible is not None:
            group.impossible, group.seeds = result.impossible, []
        elif group.impossible:
            return  # for one seed, so for the group: seeds chosen by what fits would not compare
        elif group.seeds:
            if result.failed is not None:
                return  # one seed less, which the report shows
            group.seeds = sorted([*group.seeds, result], key=lambda r: r.seed)
        else:  # in the order of the rates, not of the processes that came first
            group.rates = sorted([*group.rates, result], key=lambda r: float(r.learning_rate or 0))
