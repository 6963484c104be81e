"""What a comparison found: every figure of it, as dataclasses."""

from __future__ import annotations

import platform
import statistics as plain
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from trimtab.runs.folder import versions
from trimtab.runs.summary import odd_data
from trimtab.runs.trial import Outcome
from trimtab.study.compare import WORST, CompareSpec, Group, by_worth
from trimtab.study.statistics import ALPHA, Difference, Sample, chosen_scores, compare, judged, over_tasks, resamples
from trimtab.tasks import Example, Task
from trimtab.tasks.scores import Array

PROCEDURE = 2
"""Counts up when the same trials would get other verdicts. In the first one seed chose the learning rate for all."""
SHOWN = 3
"""Items on which methods disagree that are shown."""
COMMONEST = 10
"""Answers of train that are tried as the one given to all."""
FLIPPED = 30
"""Answers that are changed one at a time, to see what one item does to the score."""


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
    """One a seed; a failed one has the worst."""
    parameters: int = 0
    share: float = 0.0
    validation: float | None = None
    learning_rates: list[float | None] = field(default_factory=list)
    """That each seed chose."""
    at_edge: int = 0
    """How many seeds chose the lowest or highest rate they tried."""
    rates: dict[str, float | str | None] = field(default_factory=dict)
    """Mean validation by learning rate, over the seeds that trained at it, or why none did."""
    seconds: float | None = None
    memory: int | None = None
    steps: int | None = None
    tokens: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    failed_seeds: int = 0
    failure: str | None = None
    """Why the first of them did."""
    constant_seeds: int = 0
    """How many gave all test items the same answer."""
    moving_seeds: int = 0
    """Of how many the training loss was still falling at the end."""
    late_move: float | None = None
    """By how much the score on validation moved in the last quarter of the steps, where that is surely not nothing."""
    forgetting: float | None = None
    against_reference: Difference | None = None
    sentence: str | None = None


@dataclass(frozen=True)
class Disagreement:
    """A test item that some methods get right and others do not."""

    input: str
    expected: str
    answers: dict[str, str]
    """By method, of its first seed."""


@dataclass(frozen=True)
class TaskReport:
    """All methods on one task, the best first."""

    score: str
    reference: str | None
    train_items: int
    validation_items: int
    test_items: int
    methods: list[Line]
    constant: float
    """The best test score of one answer given to all, of the commonest of train."""
    earlier: dict[str, int] = field(default_factory=dict)
    """By method, trials of versions that kept neither the loss nor the predictions on validation."""
    telling: bool = True
    """Whether some method is better than that; if none is, the task tells nothing of methods."""
    odd: list[str] = field(default_factory=list)
    """What is odd about the data."""
    disagreements: list[Disagreement] = field(default_factory=list)
    """Those on which methods differ most."""

    @property
    def finished(self) -> list[Line]:
        return [line for line in self.methods if line.mean is not None]


@dataclass(frozen=True)
class Total:
    """One method over all telling tasks that it could do."""

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
    learning_rates: list[float] | None
    seeds: int
    margin: float
    comparisons: int
    tasks: dict[str, TaskReport]
    overall: list[Total]
    by_size: dict[str, SizeReport]
    reach: int = 0
    """How far seeds could go on past the lowest or highest rate."""
    procedure: int = PROCEDURE
    """By which the verdicts were reached."""


def procedure_of(report: Mapping[str, Any]) -> int:
    """Of a report's JSON, by which procedure its verdicts were reached."""
    return int(report.get("procedure", 2 if "margin" in report else 1))


def summarise(groups: Sequence[Group], settings: CompareSpec, command: str = "") -> Report:
    """Every figure of the report, by task; the first group that finished in a task is its reference."""
    tasks: dict[str, TaskReport] = {}
    sized: dict[str, SizeReport] = {}
    for name in dict.fromkeys(group.task for group in groups):
        own = [g for g in groups if g.task == name]
        for size in dict.fromkeys(g.examples for g in own):
            found = _task_report([g for g in own if g.examples == size], settings)
            tasks[title_of(name, size)] = found
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
        margin=settings.margin,
        comparisons=sum(line.against_reference is not None for task in tasks.values() for line in task.methods),
        tasks=tasks,
        overall=_overall(tasks, groups[0].way.name if _distinct(groups) else None),
        by_size=sized,
        reach=settings.reach,
    )


def _versions(groups: Sequence[Group]) -> dict[str, str]:
    """Those the trials ran with, which may be several."""
    runs = [run.versions for group in groups for run in group.seeds] or [versions()]
    return {name: " and ".join(sorted({run[name] for run in runs if name in run})) for name in runs[0]}


def title_of(task: str, size: int | None) -> str:
    """What a report calls a task, of so many examples in a few-shot study."""
    return task if size is None else f"{task}, {size} examples"


@dataclass(frozen=True)
class Items:
    """A split's examples, and how often each counts in each resample."""

    examples: list[Example]
    weights: Array
    """(1 + B, n)"""
    sources: list[Hashable]
    """Of each; those of one source are not independent."""

    @property
    def groups(self) -> int:
        """How many are independent."""
        return len(set(self.sources))

    @classmethod
    def of(cls, task: Task[Any], split: str) -> Items:
        examples = task.examples(split)
        sources = task.sources(examples, split)
        return cls(examples, resamples(len(examples), sources), sources)

    @property
    def said(self) -> str:
        """Their number, and where they are fewer, that of those which are independent."""
        count = len(self.examples)
        return f"{count} test items" if self.groups == count else f"{count} test items of {self.groups} sources"

    def scores(self, task: Task[Any], predictions: Sequence[Any]) -> Array:
        """(1 + B,)"""
        return task.weighted(self.examples)(predictions, self.weights)


def _task_report(groups: list[Group], settings: CompareSpec) -> TaskReport:
    task: Task[Any] = groups[0].experiment.task
    validation, test = (Items.of(task, split) for split in ("validation", "test"))
    finished = [group for group in groups if group.tried]
    samples = {group.way.name: sample(group, task, validation, test) for group in finished}
    lines = {group.way.name: _line(group, settings.margin) for group in groups}
    reference = finished[0].way.name if finished else None
    others = [name for name in samples if name != reference]
    found = judged([compare(samples[name], samples[str(reference)], settings.margin) for name in others])
    for name, one in zip(others, found, strict=True):
        said = sentence(lines[name], one, lines[str(reference)], test.said)
        lines[name] = replace(lines[name], against_reference=one, sentence=said)
    constant = _constant(task, test)
    return TaskReport(
        score=task.score_said,
        reference=reference,
        train_items=(groups[0].examples if finished else None) or len(task.examples("train")),
        validation_items=len(validation.examples),
        test_items=len(test.examples),
        methods=sorted(lines.values(), key=lambda line: float("inf") if line.mean is None else -line.mean),
        constant=float(constant.scores[0, 0]),
        earlier={group.way.name: count for group in finished if (count := earlier_trials(group))},
        telling=not samples or _some_surely_better(list(samples.values()), constant),
        odd=odd_data(task),
        disagreements=_disagreements(finished, task, test.examples),
    )


def _disagreements(groups: Sequence[Group], task: Task[Any], examples: list[Example]) -> list[Disagreement]:
    """The items on which the methods' first seeds are most unequally right; of those alike, ones of another pattern
    first."""
    given = {group.way.name: group.seeds[0].predictions for group in groups if not group.seeds[0].failed}
    if len(given) < 2:
        return []
    faults = np.array([task.faults(own, examples) for own in given.values()])
    spread, often, order = faults.var(0), Counter[bytes](), list[tuple[int, float, int]]()
    for place in np.argsort(-spread, kind="stable"):
        pattern = (faults[:, place] > faults[:, place].mean()).tobytes()
        order.append((often[pattern], -float(spread[place]), int(place)))
        often[pattern] += 1
    chosen = [place for _, spread_out, place in sorted(order) if spread_out < 0][:SHOWN]
    wanted = task.truth(examples).wanted

    def read(answer: Any) -> str:
        return str(task.readable(answer))

    return [
        Disagreement("\n".join(examples[i].texts), read(wanted[i]), {name: read(own[i]) for name, own in given.items()})
        for i in chosen
    ]


def earlier_trials(group: Group) -> int:
    """How many of its trials are of versions that kept neither the loss nor the predictions on validation."""
    runs = [run for tried in group.tried.values() for run in tried.values() if run.validation is not None]
    lossless = [group.way.trains and run.validation_loss is None for run in runs]
    return sum(less or not run.validation_predictions for less, run in zip(lossless, runs, strict=True))


def _some_surely_better(samples: Sequence[Sample], constant: Sample) -> bool:
    """Whether a method is better than one answer to all, beside the others; of one seed, by the luck of the items."""
    found = judged([compare(sample, constant) for sample in samples])
    return any(one.low > 0 if one.p is None else one.verdict == "better" for one in found)


def sample(group: Group, task: Task[Any], validation: Items, test: Items) -> Sample:
    """A group's test scores by seed and resample, in each of which every seed chooses its learning rate anew."""

    def on_validation(run: Outcome) -> Array:
        if not run.validation_predictions:  # failed, or of an earlier version, which did not keep them
            return np.full(len(validation.weights), -np.inf if run.validation is None else run.validation)
        return validation.scores(task, run.validation_predictions)

    def on_test(run: Outcome) -> Array:
        return np.full(len(test.weights), WORST) if run.failed else test.scores(task, run.predictions)

    seeds = [by_worth(tried) for _, tried in sorted(group.tried.items())]
    scores = [chosen_scores(*(np.array(list(map(on, runs))) for on in (on_validation, on_test))) for runs in seeds]
    return Sample(np.array(scores), test.groups, group.random, _step(task, [runs[0] for runs in seeds], test))


def _step(task: Task[Any], runs: Sequence[Outcome], test: Items) -> float:
    """By how much one item can change the score of a run, wrong put right or right put wrong: the most of some, one of
    each kind. Items of one source go together."""
    if task.score.whole is None:
        share = Counter[Hashable]()  # what a source weighs in the mean of the sets' means
        sets = list(task.by_set(test.examples).values()) or [list(range(len(test.examples)))]
        for places in sets:
            for place in places:
                share[test.sources[place]] += 1 / len(places) / len(sets)  # type: ignore[assignment]
        return max(share.values())
    wanted = list(task.truth(test.examples).wanted)
    score, ones, most = task.weighted(test.examples), test.weights[:1], 0.0
    names = [str(task.readable(one)) for one in wanted]
    for run in (one for one in runs if not one.failed):
        said = list(run.predictions)
        kinds = {(str(task.readable(one)), names[i]): i for i, one in enumerate(said)}
        now = float(score(said, ones)[0])
        for (answer, right), place in list(kinds.items())[:: max(1, len(kinds) // FLIPPED)]:
            others = [w for w, name in zip(wanted, names, strict=True) if name != right]
            others = wanted[place : place + 1] if answer != right else others[:1]
            if others:
                own = test.sources[place]
                changed = [
                    p if one != own else wanted[i] if answer != right else others[0]
                    for i, (p, one) in enumerate(zip(said, test.sources, strict=True))
                ]
                most = max(most, abs(float(score(changed, ones)[0]) - now))
    return most


def _constant(task: Task[Any], test: Items) -> Sample:
    """The scores of the answer that is best given to all of test, of the commonest of train."""
    each = [test.scores(task, answers) for answers in task.constants(test.examples, COMMONEST)]
    return Sample(max(each, key=lambda scores: float(scores[0]))[None], test.groups, random=False)


def _line(group: Group, margin: float) -> Line:
    line = Line(group.way.name, dict(group.way.settings))
    if not group.tried:
        return replace(line, impossible=group.impossible)
    chosen, scores = group.seeds, group.scores
    trained = [run for run in chosen if not run.failed]
    first, lost = (trained or chosen)[0], [run.forgetting for run in trained if run.forgetting is not None]
    line = replace(
        line,
        mean=plain.mean(scores),
        sd=plain.stdev(scores) if len(scores) > 1 else None,
        scores=scores,
        parameters=first.parameters,
        share=first.parameters / max(1, first.model_parameters),
        validation=plain.mean(WORST if run.validation is None else run.validation for run in chosen),
        forgetting=plain.mean(lost) if lost else None,
        failed_seeds=len(chosen) - len(trained),
        failure=next((run.failed for run in chosen if run.failed), None),
        constant_seeds=sum(_same_answers(run.predictions) for run in trained),
    )
    if not group.way.trains:
        return line
    # Of those trained by themselves, as the first seed's are: the others have no time of their own, nor count memory.
    timed = [run.seconds for run in chosen if run.seconds is not None]
    return replace(
        line,
        learning_rates=[run.learning_rate for run in chosen],
        at_edge=sum(group.at_edge(seed) for seed in group.tried),
        rates=_rates(group),
        seconds=plain.median(timed) if timed else None,
        memory=max(run.memory for run in chosen),
        steps=first.steps,
        tokens=first.tokens,
        curve=first.curve,
        moving_seeds=sum(still_falling([loss for _, loss in run.curve]) for run in trained),
        late_move=late_move([run.late_move for run in trained], margin),
    )


def _rates(group: Group) -> dict[str, float | str | None]:
    found: dict[str, float | str | None] = {}
    for rate in sorted({rate for tried in group.tried.values() for rate in tried}, key=lambda rate: rate or 0):
        runs = [tried[rate] for tried in group.tried.values() if rate in tried]
        scores = [run.validation for run in runs if run.validation is not None]
        found[str(rate)] = plain.mean(scores) if scores else runs[0].failed
    return found


def _same_answers(predictions: Sequence[Any]) -> bool:
    return len(predictions) > 1 and len(set(map(str, predictions))) == 1


def still_falling(losses: Sequence[float]) -> bool:
    """Whether more steps look worth it: the last quarter is surely below the one before, by a tenth of the whole fall.

    Args:
        losses: over the training, evenly spread.
    """
    part = len(losses) // 4
    if part < 3:
        return False
    first, before, last = losses[:part], losses[-2 * part : -part], losses[-part:]
    fall = plain.mean(before) - plain.mean(last)
    error = ((plain.variance(before) + plain.variance(last)) / part) ** 0.5
    return fall > 2 * error and fall > (plain.mean(first) - plain.mean(last)) / 10


def late_move(seeds: Sequence[float | None], margin: float) -> float | None:
    """How far the seeds' scores on validation moved on average, where that is more than `margin` and than chance."""
    moves = [move for move in seeds if move is not None]
    if len(moves) < 2:
        return None
    mean, error = plain.mean(moves), plain.stdev(moves) / len(moves) ** 0.5
    chance = float(stats.t.ppf(1 - ALPHA / 2, len(moves) - 1)) * error
    return mean if abs(mean) > max(margin, chance) else None


def sentence(line: Line, found: Difference, reference: Line, items: str) -> str:
    """The verdict in words, and what difference could have been found."""
    seeds, reference_seeds = len(line.scores), len(reference.scores)
    points, low, high = (100 * value for value in (found.difference, found.low, found.high))
    text = (
        f"{line.name} {SAID[found.verdict].format(100 * found.margin)} {reference.name}: "
        f"{points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}, {items}, {seeds} against "
        f"{_counted(reference_seeds, 'seed')}."
    )
    if found.detectable is None:
        return f"{text} One seed says nothing of other seeds."
    least = f"A difference of {100 * found.detectable:.1f} points" if found.detectable < 1 else "No difference"
    return (
        f"{text} p {found.p:.2g}, and {found.corrected:.2g} beside the table's others (Holm). {least} would have been "
        "found 80 times in 100."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


SAID = {
    "better": "is better than",
    "worse": "is worse than",
    "equal": "is equal, to within {:g} points, to",
    "not told apart": "is not told apart (which is not: equal) from",
    "one seed": "is not compared with",
}


def _distinct(groups: Sequence[Group]) -> bool:
    """Whether no two tasks share test items, so that there is an interval for their mean."""
    tasks = {group.task: group.experiment.task for group in groups}
    items = [{task.told_apart(e) for e in task.examples("test")} for task in tasks.values()]
    apart = all(one.isdisjoint(other) for one, other in combinations(items, 2))
    return apart and all(group.examples is None for group in groups)


def _overall(tasks: Mapping[str, TaskReport], reference: str | None) -> list[Total]:
    """Each method over all telling tasks that it could do.

    Args:
        reference: what to compare with, in the tasks where it is the reference; None to leave that out.
    """
    totals = []
    for name in dict.fromkeys(line.name for task in tasks.values() for line in task.methods):
        own = [(task, line) for task in tasks.values() if task.telling for line in task.finished if line.name == name]
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
    found = iter(judged([total.against_reference for total in totals if total.against_reference is not None]))
    totals = [replace(t, against_reference=next(found)) if t.against_reference else t for t in totals]
    return sorted(totals, key=lambda total: (-total.tasks, -(total.mean or 0)))
