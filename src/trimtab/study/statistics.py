"""How sure a difference between two methods is, given the same test items and a few seeds each.

A method's score is the mean over its seeds. Two things make a difference uncertain: which items the test happens to
hold, told by a bootstrap over items that both methods share (paired), and which seeds were drawn, told by the spread
of the seeds' scores. Their variances add, and the interval is Student's with Satterthwaite's degrees of freedom, since
five seeds say little about their own spread. Variance that seeds and items share is counted in both: the interval errs
on the wide side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        a, b: one array of per-item values (n,) for each seed; one seed for what has no randomness.
        score: the score of each resample; `mean_of` where it is the mean over items.
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


def mean_of(values: Any, weights: Array) -> Array:
    """The mean over items."""
    return _ratio(weights @ np.asarray(values, dtype=np.float64), weights.sum(1))


def mcc_of(wanted: Sequence[int]) -> Weighted:
    """Matthews correlation of predicted classes."""
    truth = np.asarray(wanted)

    def score(predicted: Any, weights: Array) -> Array:
        guess = np.asarray(predicted)
        classes = np.unique(np.concatenate([truth, guess]))
        right = weights @ (truth == guess)
        p, w = (weights @ (x[:, None] == classes) for x in (guess, truth))
        n = weights.sum(1)
        below = np.sqrt((n**2 - (p**2).sum(1)) * (n**2 - (w**2).sum(1)))
        return _ratio(right * n - (p * w).sum(1), below)

    return score


def f1_of(wanted: Sequence[int], classes: int) -> Weighted:
    """F1 of class 1 when there are two classes, else the mean over those seen."""
    truth = np.asarray(wanted)

    def score(predicted: Any, weights: Array) -> Array:
        guess = np.asarray(predicted)
        of = np.array([1]) if classes == 2 else np.unique(np.concatenate([truth, guess]))
        right = weights @ ((truth == guess)[:, None] & (truth[:, None] == of))
        seen = weights @ ((guess[:, None] == of).astype(float) + (truth[:, None] == of))
        total: Array = _ratio(2 * right, seen).sum(1) / np.maximum(1, (seen > 0).sum(1))
        return total

    return score


def over_sets(parts: Sequence[tuple[Sequence[int], Weighted]]) -> Weighted:
    """The plain mean of several test sets' scores, each over its own items, whose indices come with it."""

    def score(values: Any, weights: Array) -> Array:
        each = [of([values[i] for i in where], weights[:, where]) for where, of in parts]
        return np.asarray(np.mean(each, axis=0))

    return score


def correlation_of(wanted: Sequence[float], kind: str = "correlation") -> Weighted:
    """Pearson's or Spearman's, or as `correlation` their mean; ranks are the whole sample's in every resample."""
    truth = np.asarray(wanted, dtype=np.float64)

    def score(predicted: Any, weights: Array) -> Array:
        guess = np.asarray(predicted, dtype=np.float64)
        if not np.isfinite(guess).all():
            return np.zeros(len(weights))
        linear = _pearson(guess, truth, weights)
        rank = _pearson(stats.rankdata(guess), stats.rankdata(truth), weights)
        return {"pearson": linear, "spearman": rank, "correlation": (linear + rank) / 2}[kind]

    return score


def _pearson(x: Array, y: Array, weights: Array) -> Array:
    n = weights.sum(1, keepdims=True)
    x_off, y_off = (v - (weights @ v)[:, None] / n for v in (x, y))
    below = np.sqrt((weights * x_off**2).sum(1) * (weights * y_off**2).sum(1))
    return _ratio((weights * x_off * y_off).sum(1), below)


def _ratio(above: Array, below: Array) -> Array:
    """Quotients, 0 where there is nothing to divide by."""
    found: Array = np.divide(above, below, out=np.zeros_like(below), where=below > 0)
    return found
