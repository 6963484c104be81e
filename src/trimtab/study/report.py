"""What a comparison found: every figure of it, as dataclasses."""

from __future__ import annotations

import platform
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.runs.folder import versions
from trimtab.study.compare import CompareSpec, Group
from trimtab.study.statistics import Difference, compare_runs, over_tasks
from trimtab.tasks import Task
from trimtab.tasks.scores import mean_of


@dataclass(frozen=True)
class Line:
    """One method on one task."""

    name: str
    settings: dict[str, Any]
    impossible: str | None = None
    """Why there are no scores."""
    mean: float | None = None
    sd: float | None = None
    scores: list[float] = field(default_factory=list)
    """One a seed."""
    parameters: int = 0
    share: float = 0.0
    validation: float | None = None
    learning_rate: float | None = None
    at_edge: bool = False
    """Whether the learning rate is the lowest or highest tried."""
    rates: dict[str, float | str | None] = field(default_factory=dict)
    """Validation by learning rate, or why it failed."""
    seconds: float | None = None
    memory: int | None = None
    steps: int | None = None
    tokens: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    missing_seeds: int = 0
    forgetting: float | None = None
    against_reference: Difference | None = None
    sentence: str | None = None


@dataclass(frozen=True)
class TaskReport:
    """All methods on one task, the best first."""

    score: str
    reference: str | None
    train_items: int
    validation_items: int
    test_items: int
    methods: list[Line]

    @property
    def finished(self) -> list[Line]:
        return [line for line in self.methods if line.mean is not None]


@dataclass(frozen=True)
class Total:
    """One method over all tasks that it could do."""

    name: str
    tasks: int
    mean: float | None
    against_reference: Difference | None = None


@dataclass(frozen=True)
class SizeReport:
    """Of a few-shot study, one task by number of examples."""

    score: str
    test_items: int
    methods: dict[str, list[tuple[int, float, float | None]]] = field(default_factory=dict)
    """(examples, mean, standard deviation) of each method."""


@dataclass(frozen=True)
class Report:
    """Every figure of a comparison."""

    model: str
    command: str
    versions: dict[str, str]
    machine: str
    learning_rates: list[float]
    seeds: int
    comparisons: int
    tasks: dict[str, TaskReport]
    overall: list[Total]
    by_size: dict[str, SizeReport]


def summarise(groups: Sequence[Group], settings: CompareSpec, command: str = "") -> Report:
    """Every figure of the report, by task; the first group that finished in a task is its reference."""
    tasks: dict[str, TaskReport] = {}
    sized: dict[str, SizeReport] = {}
    for name in dict.fromkeys(group.task for group in groups):
        own = [g for g in groups if g.task == name]
        for size in dict.fromkeys(g.examples for g in own):
            found = _task_report([g for g in own if g.examples == size], settings)
            tasks[_title(name, size)] = found
            if size is not None:
                whole = sized.setdefault(name, SizeReport(found.score, found.test_items))
                for line in found.finished:
                    whole.methods.setdefault(line.name, []).append((size, line.mean or 0.0, line.sd))
    return Report(
        model=Path(groups[0].experiment.source.name).name,
        command=command,
        versions=_versions(groups),
        machine=f"{platform.system()} {platform.machine()}",
        learning_rates=settings.learning_rates,
        seeds=settings.seeds,
        comparisons=sum(line.against_reference is not None for task in tasks.values() for line in task.methods),
        tasks=tasks,
        overall=_overall(tasks, groups[0].way.name if _distinct(groups) else None),
        by_size=sized,
    )


def _versions(groups: Sequence[Group]) -> dict[str, str]:
    """Those the trials ran with, which may be several."""
    runs = [run.versions for group in groups for run in (*group.rates, *group.seeds)] or [versions()]
    return {name: " and ".join(sorted({run[name] for run in runs if name in run})) for name in runs[0]}


def _title(task: str, size: int | None) -> str:
    return task if size is None else f"{task}, {size} examples"


def _task_report(groups: list[Group], settings: CompareSpec) -> TaskReport:
    task: Task[Any] = groups[0].experiment.task
    examples = task.examples("test")
    finished = [group for group in groups if group.seeds]
    reference = finished[0] if finished else None
    lines = []
    for group in groups:
        line = _line(group, task, settings)
        if reference is not None and group.seeds and group is not reference:
            found = _difference(task, group, reference)
            said = sentence(line, found, reference, len(examples))
            line = replace(line, against_reference=found, sentence=said)
        lines.append(line)
    return TaskReport(
        score=task.score.name,
        reference=reference.way.name if reference else None,
        train_items=groups[0].examples or len(task.examples("train")),
        validation_items=len(task.examples("validation")),
        test_items=len(examples),
        methods=sorted(lines, key=lambda line: float("inf") if line.mean is None else -line.mean),
    )


def _difference(task: Task[Any], group: Group, reference: Group) -> Difference:
    examples = task.examples("test")
    a, b = ([run.predictions for run in g.seeds] for g in (group, reference))
    if not task.binary:
        return compare_runs(a, b, task.weighted(examples))
    truth = task.truth(examples)
    a, b = ([task.score.per_item(predictions, truth) for predictions in runs] for runs in (a, b))
    return compare_runs(a, b, mean_of, binary=True)


def _line(group: Group, task: Task[Any], settings: CompareSpec) -> Line:
    line = Line(group.way.name, dict(group.way.settings))
    if not group.seeds:
        return replace(line, impossible=group.impossible)
    first, scores = group.seeds[0], [run.test[task.score.name] for run in group.seeds]
    lost = [run.forgetting for run in group.seeds if run.forgetting is not None]
    line = replace(
        line,
        mean=plain.mean(scores),
        sd=plain.stdev(scores) if len(scores) > 1 else None,
        scores=scores,
        parameters=first.parameters,
        share=first.parameters / first.model_parameters,
        validation=plain.mean(run.validation for run in group.seeds if run.validation is not None),
        forgetting=plain.mean(lost) if lost else None,
    )
    if not group.way.trains:
        return line
    tried = sorted(run.learning_rate or 0.0 for run in group.rates)
    return replace(
        line,
        learning_rate=group.chosen,
        at_edge=group.chosen in (tried[0], tried[-1]),
        rates={str(r.learning_rate): r.failed if r.validation is None else r.validation for r in group.rates},
        seconds=plain.median(run.seconds or 0.0 for run in group.seeds),
        memory=first.memory,
        steps=first.steps,
        tokens=first.tokens,
        curve=first.curve,
        missing_seeds=settings.seeds - len(group.seeds),
    )


def sentence(line: Line, found: Difference, reference: Group, items: int) -> str:
    """The verdict in words."""
    seeds, reference_seeds = len(line.scores), len(reference.seeds)
    said = {"better": "is better than", "worse": "is worse than", "not told apart": "is not told apart from"}
    points, low, high = (100 * value for value in (found.difference, found.low, found.high))
    text = (
        f"{line.name} {said[found.verdict]} {reference.way.name}"
        f"{' with this much data' if found.verdict == 'not told apart' else ''}: "
        f"{points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}, {items} test items, {seeds} against "
        f"{reference_seeds} seeds."
    )
    lone = (line.parameters and seeds == 1) or (reference.way.trains and reference_seeds == 1)
    return text + (" One seed says nothing of other seeds." if lone else "")


def _distinct(groups: Sequence[Group]) -> bool:
    """Whether no two tasks share test items, so that there is an interval for their mean."""
    specs = {group.task: group.experiment.spec.data for group in groups}
    sources = {data.model_dump_json(include={"name", "config", "train", "test"}) for data in specs.values()}
    return len(sources) == len(specs) and all(group.examples is None for group in groups)


def _overall(tasks: Mapping[str, TaskReport], reference: str | None) -> list[Total]:
    """Each method over all tasks that it could do.

    Args:
        reference: what to compare with, in the tasks where it is the reference; None to leave that out.
    """
    totals = []
    for name in dict.fromkeys(line.name for task in tasks.values() for line in task.methods):
        own = [(task, line) for task in tasks.values() for line in task.finished if line.name == name]
        means = [line.mean for _, line in own if line.mean is not None]
        against = [line.against_reference for task, line in own if task.reference == reference]
        differences = [found for found in against if found is not None]
        totals.append(
            Total(
                name,
                len(means),
                plain.mean(means) if means else None,
                over_tasks(differences) if differences else None,
            )
        )
    return sorted(totals, key=lambda total: (-total.tasks, -(total.mean or 0)))
