"""The verdicts are right as often as they claim, and resampled scores are the scores."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from trimtab.study.statistics import Difference, Sample, chosen_scores, compare, holm, judged, over_tasks, resamples
from trimtab.tasks.scores import CORRELATION, F1, MCC, PEARSON, SPEARMAN, Truth, mean_of


def runs(rng: np.random.Generator, rate: float, seeds: int, items: int, hard: np.ndarray, spread: float = 0.2) -> list:
    """A method's right and wrong answers, right at `rate`: items differ in difficulty, seeds in skill."""
    skill = stats.norm.ppf(rate) * np.sqrt(1 + 1.5**2 + spread**2)
    return [
        (skill + spread * rng.normal() + rng.normal(size=items) > hard).astype(float).tolist() for _ in range(seeds)
    ]


@cache
def drawn(items: int, groups: tuple[int, ...] | None, count: int) -> np.ndarray:
    return resamples(items, groups, count=count)


def sample(
    seeds: list, score: Any = mean_of, *, random: bool = True, groups: tuple[int, ...] | None = None, count: int = 300
) -> Sample:
    weights = drawn(len(seeds[0]), groups, count)
    return Sample(np.array([score(run, weights) for run in seeds]), len(seeds[0]), random)


def verdict(a: list, b: list, score: Any = mean_of, **how: Any) -> Difference:
    return judged([compare(sample(a, score, **how), sample(b, score, **how))])[0]


def test_equal_methods_are_not_told_apart_93_times_in_100() -> None:
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(400):
        hard = rng.normal(0, 1.5, 300)
        a, b = (runs(rng, 0.7, 5, 300, hard) for _ in range(2))
        verdicts.append(verdict(a, b).verdict)
    assert sum(found in ("better", "worse") for found in verdicts) <= 0.07 * 400


@pytest.mark.parametrize("score", ["mcc", "f1"])
def test_equal_methods_are_not_told_apart_by_scores_that_are_no_means(score: str) -> None:
    rng = np.random.default_rng(1)
    apart = 0
    for _ in range(200):
        wanted = rng.integers(0, 2, 200)
        hard = rng.normal(0, 1.5, 200)
        methods = [
            [np.where(np.array(right) > 0, wanted, 1 - wanted) for right in runs(rng, 0.7, 5, 200, hard)]
            for _ in range(2)
        ]
        truth, of = Truth(wanted.tolist(), classes=2), {"mcc": MCC, "f1": F1}[score]

        def weighted(p: Any, w: Any, of: Any = of, truth: Truth = truth) -> Any:
            return of.weighted(p, truth, w)

        apart += verdict(*methods, weighted).verdict in ("better", "worse")
    assert apart <= 0.07 * 200


def test_five_points_are_found_with_a_thousand_items() -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(40):
        hard = rng.normal(0, 1.5, 1000)
        better, worse = (runs(rng, rate, 5, 1000, hard, spread=0.05) for rate in (0.8, 0.75))
        found.append(verdict(better, worse))
    assert [f.verdict for f in found].count("better") >= 38
    assert np.mean([f.difference for f in found]) == pytest.approx(0.05, abs=0.01)
    assert np.mean([f.low <= 0.05 <= f.high for f in found]) >= 0.9
    assert verdict(worse, better).verdict == "worse"


def test_what_has_one_seed_is_never_marked() -> None:
    right, wrong = [[1.0] * 400], [[0.0] * 400]
    found = verdict(right, wrong)
    assert (found.verdict, found.p, found.detectable) == ("one seed", None, None)
    assert verdict(right * 2, wrong).verdict == "one seed"
    assert judged([compare(sample(right, random=False), sample(wrong, random=False))])[0].verdict == "better"
    assert judged([over_tasks([found, verdict(right * 2, wrong * 2)])])[0].verdict == "one seed"


def test_all_right_against_all_wrong_is_as_sure_as_there_are_items() -> None:
    for items, said in ((3, "not told apart"), (8, "better")):
        found = verdict([[1.0] * items] * 2, [[0.0] * items] * 2)
        assert found.verdict == said
    assert verdict([[1.0] * 8] * 2, [[1.0] * 8] * 2).verdict == "not told apart"  # 8 items do not show equality
    assert verdict([[1.0] * 400] * 2, [[1.0] * 400] * 2).verdict == "equal"


def test_a_resample_chooses_its_rate_anew_and_ties_go_to_the_first() -> None:
    validation = np.array([[0.8, 0.7, 0.8], [0.8, 0.9, 0.7], [-np.inf, -np.inf, -np.inf]])
    test = np.array([[0.5, 0.5, 0.5], [0.6, 0.6, 0.6], [1.0, 1.0, 1.0]])
    assert chosen_scores(validation, test).tolist() == [0.5, 0.6, 0.5]


def test_equality_is_claimed_of_equal_methods_only() -> None:
    """Of methods that are the margin apart at most 5 times in 100; of equal ones most times, with data enough."""
    rng = np.random.default_rng(8)
    said = {0.0: 0, 0.02: 0}
    for _ in range(60):
        hard = rng.normal(0, 1.5, 2000)
        a = runs(rng, 0.8, 5, 2000, hard, spread=0.02)
        for gap in said:
            b = runs(rng, 0.8 - gap, 5, 2000, hard, spread=0.02)
            said[gap] += verdict(a, b, count=50).verdict == "equal"
    assert said[0.02] <= 0.1 * 60 < 0.6 * 60 <= said[0.0]


def test_the_power_stated_is_the_power_there_is() -> None:
    rng = np.random.default_rng(9)
    hard = rng.normal(0, 1.5, 400)
    found = [verdict(*(runs(rng, 0.8, 5, 400, hard) for _ in range(2))) for i in range(40)]
    stated = float(np.median([one.detectable for one in found]))
    hits = []
    for _ in range(150):
        hard = rng.normal(0, 1.5, 400)
        a, b = runs(rng, 0.8, 5, 400, hard), runs(rng, 0.8 - stated, 5, 400, hard)
        hits.append(verdict(a, b).verdict == "better")
    assert 0.65 <= np.mean(hits) <= 0.95


def test_items_of_one_source_count_as_one() -> None:
    """Twenty copies of each of twenty items tell no more than the twenty."""
    rng = np.random.default_rng(10)
    apart = {True: 0, False: 0}
    for _ in range(150):
        once = [runs(rng, 0.7, 3, 20, rng.normal(0, 1.5, 20)) for _ in range(2)]
        a, b = ([np.repeat(run, 20).tolist() for run in method] for method in once)
        for grouped in apart:
            groups = tuple(np.repeat(np.arange(20), 20).tolist()) if grouped else None
            apart[grouped] += verdict(a, b, groups=groups, count=100).verdict in ("better", "worse")
    assert apart[True] <= 0.07 * 150 < apart[False]


def test_holm_is_that_of_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, None, 0.005]) == pytest.approx([0.03, 0.06, 0.06, None, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_many_equal_methods_make_no_wrong_mark_more_often_than_one() -> None:
    rng = np.random.default_rng(11)
    wrong = 0
    for _ in range(150):
        hard = rng.normal(0, 1.5, 100)
        first, *others = (sample(runs(rng, 0.7, 4, 100, hard), count=100) for _ in range(8))
        wrong += any(one.verdict in ("better", "worse") for one in judged([compare(o, first) for o in others]))
    assert wrong <= 0.07 * 150


@pytest.mark.parametrize("classes", [2, 4])
def test_weighted_scores_are_those_of_the_repeated_items(classes: int) -> None:
    rng = np.random.default_rng(3)
    wanted, guess = rng.integers(0, classes, 60), rng.integers(0, classes, 60)
    weights = resamples(60, count=5)
    for score in (MCC, F1):
        found = score.weighted(guess, Truth(wanted.tolist(), classes), weights)
        for i, row in enumerate(weights):
            picked = np.repeat(np.arange(60), row.astype(int))
            assert found[i] == pytest.approx(score.value(guess[picked], Truth(wanted[picked].tolist(), classes)))
    assert MCC.weighted(guess, Truth([1] * 60), weights).tolist() == [0.0] * 6


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
    for _ in range(60):
        planted, none = [], []
        for _ in range(6):
            hard = rng.normal(0, 1.5, 150)
            a, b, c = (runs(rng, rate, 5, 150, hard, spread=0.05) for rate in (0.8, 0.75, 0.75))
            planted.append(verdict(a, b, count=200))
            none.append(verdict(c, b, count=200))
        found = judged([over_tasks(planted)])[0]
        assert found.difference == pytest.approx(np.mean([one.difference for one in planted]))
        alone += sum(one.verdict == "better" for one in planted)
        together += found.verdict == "better"
        equal += judged([over_tasks(none)])[0].verdict not in ("better", "worse")
    assert together >= 54 > alone / 6
    assert equal >= 55
