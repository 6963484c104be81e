"""How sure a difference between two methods is, given the same items and a few seeds each.

What is compared is a whole procedure: train at several learning rates, keep the one best on validation, test it. A seed
goes through all of it by itself, so the seeds' scores differ by the luck of choosing as well as that of training. Two
variances add: that of the items, from a bootstrap in which validation and test items are drawn anew, the same for both
methods, and every seed chooses its rate anew; and that of the seeds, from the spread of their scores. The interval is
Student's with Satterthwaite's degrees of freedom, since five seeds say little about their own spread. What items and
seeds share is counted in both, so that the interval errs on the wide side.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from trimtab.study.compare import MARGIN
from trimtab.tasks.scores import Array

RESAMPLES = 2000
ALPHA, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Sample:
    """A method's test scores."""

    scores: Array
    """(seeds, 1 + B): on all items, and on each of B resamples."""
    items: int
    """How many of test are independent."""
    random: bool = True
    """Whether another seed could score otherwise."""
    step: float = 0.0
    """By how much one item alone, or one source, can change the score."""

    @property
    def lone(self) -> bool:
        """Whether nothing is known of other seeds."""
        return self.random and len(self.scores) == 1


@dataclass(frozen=True)
class Difference:
    """Method A's score minus method B's."""

    difference: float
    low: float
    high: float
    """The ends of the 95% interval."""
    error: float
    """The difference's standard error, and the degrees of freedom that it is known with."""
    freedom: float
    p: float | None
    """That chance alone gives as much; None with one seed."""
    equal_p: float | None
    """That chance alone makes methods look this alike that are `margin` apart (two one-sided tests)."""
    margin: float = MARGIN
    corrected: float | None = None
    """p after Holm's correction over all methods of a table, and `equal_p` likewise."""
    equal_corrected: float | None = None
    detectable: float | None = None
    """The difference that would have been found 80 times in 100."""
    verdict: str = "not told apart"
    """of A: better, worse, equal (within the margin), not told apart, or one seed"""


def resamples(items: int, groups: Sequence[Hashable] | None = None, seed: int = 0, count: int = RESAMPLES) -> Array:
    """(1 + count, items): how often each item counts, in the sample itself and in each bootstrap sample.

    Args:
        groups: of each item; items of one group are drawn together.
    """
    places: dict[Hashable, int] = {}
    group = [places.setdefault(one, len(places)) for one in groups or range(items)]
    share = np.full(len(places), 1 / len(places))
    drawn = np.random.default_rng(seed).multinomial(len(places), share, count)
    return np.concatenate([np.ones((1, items)), drawn[:, group].astype(np.float64)])


def chosen_scores(validation: Array, test: Array) -> Array:
    """(1 + B,): a seed's test score at the rate best on validation, which each resample chooses anew.

    Args:
        validation, test: (rates, 1 + B); of rates that tie, the first is chosen.
    """
    best = validation.argmax(0)
    found: Array = test[best, np.arange(len(best))]
    return found


def compare(a: Sample, b: Sample, margin: float = MARGIN) -> Difference:
    """Two methods on the same items; what of it is sure, `judged` says.

    The items' variance is never less than if one item alone told the methods apart: that all of few items came out the
    same does not show that all others would. With scores that are no mean of the items', as F1 and Matthews
    correlation, one item may tell much.
    """
    items = min(a.items, b.items)
    of_items = float(np.var(a.scores[:, 1:].mean(0) - b.scores[:, 1:].mean(0)))
    parts = [(max(of_items, max(1 / items, a.step, b.step) ** 2), items - 1.0)]
    for one in (a, b):
        if len(one.scores) > 1:
            parts.append((float(one.scores[:, 0].var(ddof=1)) / len(one.scores), len(one.scores) - 1.0))
    return _difference(float(a.scores[:, 0].mean() - b.scores[:, 0].mean()), parts, margin, a.lone or b.lone)


def over_tasks(found: Sequence[Difference]) -> Difference:
    """The mean difference over tasks that share no test items, so that their variances add up.

    It is about these tasks: how the methods would differ on others is not in the interval.
    """
    parts = [((one.error / len(found)) ** 2, one.freedom) for one in found]
    mean = float(np.mean([one.difference for one in found]))
    return _difference(mean, parts, found[0].margin, any(one.p is None for one in found))


def _difference(difference: float, parts: Sequence[tuple[float, float]], margin: float, lone: bool) -> Difference:
    """The interval of a difference whose variance is the sum of parts, each with its degrees of freedom."""
    variance = sum(v for v, _ in parts)
    error, freedom = variance**0.5, variance**2 / sum(v**2 / max(f, 1.0) for v, f in parts)
    reach = float(stats.t.ppf(1 - ALPHA / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(difference) / error, freedom))
    equal_p = float(stats.t.sf((margin - abs(difference)) / error, freedom))
    found = Difference(difference, difference - reach, difference + reach, error, freedom, p, equal_p, margin)
    return replace(found, p=None, equal_p=None) if lone else found


def judged(found: Sequence[Difference]) -> list[Difference]:
    """The differences of one table with their verdicts: by chance at most 5 in 100 such tables have a wrong better or
    worse, and as many a wrong equal."""
    corrected, equal = holm([one.p for one in found]), holm([one.equal_p for one in found])
    return [_judged(one, p, e, len(found)) for one, p, e in zip(found, corrected, equal, strict=True)]


def _judged(one: Difference, p: float | None, equal: float | None, pairs: int) -> Difference:
    if p is None or equal is None:
        return replace(one, verdict="one seed")
    reach = stats.t.ppf(1 - ALPHA / 2 / pairs, one.freedom) + stats.t.ppf(POWER, one.freedom)
    found = replace(one, corrected=p, equal_corrected=equal, detectable=float(reach * one.error))
    if p < ALPHA:
        return replace(found, verdict="better" if one.difference > 0 else "worse")
    return replace(found, verdict="equal" if equal < ALPHA else "not told apart")


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Each p as it stands beside the others (Holm 1979); None stays None."""
    found: list[float | None] = [None] * len(ps)
    tested = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    most = 0.0
    for rank, (p, i) in enumerate(tested):
        found[i] = most = max(most, min(1.0, (len(tested) - rank) * p))
    return found
