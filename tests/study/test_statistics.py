"""The verdicts are right as often as they claim, and resampled scores are the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from trimtab.study.statistics import compare_runs, over_tasks, resamples
from trimtab.tasks.scores import CORRELATION, F1, MCC, PEARSON, SPEARMAN, Truth, mean_of


def runs(rng: np.random.Generator, rate: float, seeds: int, items: int, hard: np.ndarray, spread: float = 0.2) -> list:
    """A method's right and wrong answers, right at `rate`: items differ in difficulty, seeds in skill."""
    skill = stats.norm.ppf(rate) * np.sqrt(1 + 1.5**2 + spread**2)
    return [
        (skill + spread * rng.normal() + rng.normal(size=items) > hard).astype(float).tolist() for _ in range(seeds)
    ]


def test_equal_methods_are_not_told_apart_93_times_in_100() -> None:
    rng = np.random.default_rng(0)
    verdicts = []
    for trial in range(400):
        hard = rng.normal(0, 1.5, 300)
        a, b = (runs(rng, 0.7, 5, 300, hard) for _ in range(2))
        verdicts.append(compare_runs(a, b, mean_of, binary=True, seed=trial, count=300).verdict)
    assert verdicts.count("not told apart") >= 0.93 * 400


@pytest.mark.parametrize("score", ["mcc", "f1"])
def test_equal_methods_are_not_told_apart_by_scores_that_are_no_means(score: str) -> None:
    rng = np.random.default_rng(1)
    apart = 0
    for trial in range(200):
        wanted = rng.integers(0, 2, 200)
        hard = rng.normal(0, 1.5, 200)
        methods = [
            [np.where(np.array(right) > 0, wanted, 1 - wanted) for right in runs(rng, 0.7, 5, 200, hard)]
            for _ in range(2)
        ]
        truth, of = Truth(wanted.tolist(), classes=2), {"mcc": MCC, "f1": F1}[score]

        def weighted(p: Any, w: Any, of: Any = of, truth: Truth = truth) -> Any:
            return of.weighted(p, truth, w)

        apart += compare_runs(*methods, weighted, seed=trial, count=300).verdict != "not told apart"
    assert apart <= 0.07 * 200


def test_five_points_are_found_with_a_thousand_items() -> None:
    rng = np.random.default_rng(2)
    found = []
    for trial in range(40):
        hard = rng.normal(0, 1.5, 1000)
        better, worse = (runs(rng, rate, 5, 1000, hard, spread=0.05) for rate in (0.8, 0.75))
        found.append(compare_runs(better, worse, mean_of, binary=True, seed=trial, count=300))
    assert [f.verdict for f in found].count("better") >= 38
    assert np.mean([f.difference for f in found]) == pytest.approx(0.05, abs=0.01)
    assert np.mean([f.low <= 0.05 <= f.high for f in found]) >= 0.9
    assert compare_runs(worse, better, mean_of, binary=True).verdict == "worse"


def test_single_runs_are_compared_by_mcnemar() -> None:
    a, b = [1.0] * 30 + [0.0] * 10 + [1.0] * 60, [0.0] * 30 + [1.0] * 10 + [1.0] * 60
    found = compare_runs([a], [b], mean_of, binary=True)
    assert found.test.startswith("McNemar")
    assert found.p == pytest.approx(stats.binomtest(30, 40).pvalue)
    assert found.difference == pytest.approx(0.2)
    assert found.low < 0.2 < found.high
    same = compare_runs([a], [a], mean_of, binary=True)
    assert (same.verdict, same.difference, same.p) == ("not told apart", 0.0, 1.0)


def test_all_right_against_all_wrong_is_as_sure_as_there_are_items() -> None:
    for items, verdict in ((3, "not told apart"), (8, "better")):
        found = compare_runs([[1.0] * items] * 2, [[0.0] * items] * 2, mean_of, binary=True)
        assert (found.p, found.verdict) == (pytest.approx(stats.binomtest(items, items).pvalue), verdict)
        assert over_tasks([found, found]).verdict == verdict  # two such tasks are no surer for having no spread


def test_different_test_sets_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same test items"):
        compare_runs([[1.0, 0.0]], [[1.0]], mean_of)
    with pytest.raises(ValueError, match="at least one"):
        compare_runs([[]], [[]], mean_of)


@pytest.mark.parametrize("classes", [2, 4])
def test_weighted_scores_are_those_of_the_repeated_items(classes: int) -> None:
    rng = np.random.default_rng(3)
    wanted, guess = rng.integers(0, classes, 60), rng.integers(0, classes, 60)
    weights = resamples(60, 0, 5)
    for score in (MCC, F1):
        found = score.weighted(guess, Truth(wanted.tolist(), classes), weights)
        for i, row in enumerate(weights):
            picked = np.repeat(np.arange(60), row.astype(int))
            assert found[i] == pytest.approx(score.value(guess[picked], Truth(wanted[picked].tolist(), classes)))
    assert MCC.weighted(guess, Truth([1] * 60), weights).tolist() == [0.0] * 5


def test_the_correlation_is_the_mean_of_both() -> None:
    rng = np.random.default_rng(4)
    wanted = rng.normal(size=80)
    guess, truth = wanted + rng.normal(size=80), Truth(wanted.tolist())
    both = (stats.pearsonr(guess, wanted).statistic + stats.spearmanr(guess, wanted).statistic) / 2
    assert CORRELATION.value(guess, truth) == pytest.approx(both)
    assert PEARSON.value(guess, truth) != SPEARMAN.value(guess, truth)
    assert CORRELATION.value(np.full(80, np.nan), truth) == 0


def test_tasks_together_find_what_each_alone_does_not() -> None:
    rng = np.random.default_rng(7)
    alone = together = equal = 0
    for trial in range(60):
        planted, none = [], []
        for _ in range(6):
            hard = rng.normal(0, 1.5, 150)
            a, b, c = (runs(rng, rate, 5, 150, hard, spread=0.05) for rate in (0.8, 0.75, 0.75))
            planted.append(compare_runs(a, b, mean_of, seed=trial, count=200))
            none.append(compare_runs(c, b, mean_of, seed=trial, count=200))
        found = over_tasks(planted)
        assert found.difference == pytest.approx(np.mean([one.difference for one in planted]))
        alone += sum(one.verdict == "better" for one in planted)
        together += found.verdict == "better"
        equal += over_tasks(none).verdict == "not told apart"
    assert together >= 54 > alone / 6
    assert equal >= 55
