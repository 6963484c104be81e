"""How sure a difference between two methods is, given the same test items and a few seeds each.

A method's score is the mean over its seeds. Two things make a difference uncertain: which items the test happens to
hold, told by a bootstrap over items that both methods share (paired), and which seeds were drawn, told by the spread
of the seeds' scores. Their variances add, and the interval is Student's with Satterthwaite's degrees of freedom, since
five seeds say little about their own spread. Variance that seeds and items share is counted in both: the interval errs
on the wide side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from trimtab.tasks.scores import Array

Weighted = Callable[[Any, Array], Array]
"""(predictions (n,), weights (B, n)) to the score of each resample (B,)."""
RESAMPLES = 2000
LEVEL = 0.95


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
    p: float
    test: str
    verdict: str
    """of A: better, worse, or not told apart"""


def compare_runs(
    a: Sequence[Any],
    b: Sequence[Any],
    score: Weighted,
    *,
    binary: bool = False,
    seed: int = 0,
    count: int = RESAMPLES,
) -> Difference:
    """Compare two methods on the same items.

    Args:
        a, b: what `score` takes (n,) of each seed, predictions or values; one seed for what has no randomness.
        score: the score of each resample.
        count: bootstrap samples.
        binary: the values are 0 or 1 and the score is their mean, so that McNemar's exact test applies to single runs.
    Raises:
        ValueError: the methods were not tested on the same number of items, or there are none.
    """
    sizes = {len(run) for run in (*a, *b)}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"all runs must have the same test items, at least one; they have {sorted(sizes)}")
    items = sizes.pop()
    once, resampled = np.ones((1, items)), resamples(items, seed, count)
    a_scores, b_scores = (np.array([score(run, once)[0] for run in runs]) for runs in (a, b))
    difference = float(a_scores.mean() - b_scores.mean())
    of_items = float(np.var(_mean_score(a, score, resampled) - _mean_score(b, score, resampled)))
    parts = [(of_items, items - 1.0)]
    parts += [(float(s.var(ddof=1)) / len(s), len(s) - 1.0) for s in (a_scores, b_scores) if len(s) > 1]
    found = _difference(difference, parts, "paired bootstrap over items, spread of seeds")
    if binary and len(a) == len(b) == 1:
        return _judged(replace(found, p=_mcnemar(np.asarray(a[0]), np.asarray(b[0])), test="McNemar, exact"))
    return found


def over_tasks(found: Sequence[Difference]) -> Difference:
    """The mean difference over tasks that share no test items, so that their variances add up.

    It is about these tasks: how the methods would differ on others is not in the interval.
    """
    parts = [((one.error / len(found)) ** 2, one.freedom) for one in found]
    return _difference(float(np.mean([one.difference for one in found])), parts, "tasks' variances added")


def _difference(difference: float, parts: Sequence[tuple[float, float]], test: str) -> Difference:
    """The verdict on a difference whose variance is the sum of parts, each with its degrees of freedom; items first."""
    variance = sum(v for v, _ in parts)
    if variance == 0:  # every item differs by as much; by chance their signs agree once in 2^(items - 1)
        freedom, margin, test = parts[0][1], 0.0, "sign test"
        p = 0.5**freedom if difference else 1.0
    else:
        freedom = variance**2 / sum(v**2 / max(f, 1.0) for v, f in parts)
        margin = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * variance**0.5
        p = 2 * float(stats.t.sf(abs(difference) / variance**0.5, freedom))
    low, high = difference - margin, difference + margin
    return _judged(Difference(difference, low, high, variance**0.5, freedom, p, test, ""))


def _judged(found: Difference) -> Difference:
    sure = found.p < 1 - LEVEL
    return replace(found, verdict="not told apart" if not sure else "better" if found.difference > 0 else "worse")


def _mcnemar(a: Array, b: Array) -> float:
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def resamples(items: int, seed: int, count: int) -> Array:
    """(count, items): how often each item is drawn in each bootstrap sample."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(items, np.full(items, 1 / items), size=count).astype(np.float64)


def _mean_score(runs: Sequence[Any], score: Weighted, weights: Array) -> Array:
    total: Array = np.mean([score(run, weights) for run in runs], axis=0)
    return total
