"""LEACE against its definition, and against the package of its authors where that is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.edits import directions
from trimtab.edits.directions import leace, principal_component, shrunk_covariance

D = 12


def kinds(plus: int = 30, minus: int = 20) -> tuple[Tensor, Tensor]:
    """Correlated states of two kinds, in float64."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=random, dtype=torch.float64)
    draw = torch.randn(plus + minus, D, generator=random, dtype=torch.float64) @ mix + 3
    draw[:plus] += torch.randn(D, generator=random, dtype=torch.float64)
    return draw[:plus], draw[plus:]


def erased(states: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
    rows, bias, basis, *_ = leace(plus, minus)
    return states + (states @ rows.mT + bias) @ basis


@pytest.mark.parametrize("counts", [(30, 20), (4, 3)])  # more than D, and fewer
def test_the_formula_of_the_paper(counts: tuple[int, int]) -> None:
    """h - W⁺ P W (h - μ), W = Σ^(-1/2), P the orthogonal projection on W Σ_xz."""
    plus, minus = kinds(*counts)
    states = torch.cat([plus, minus])
    mean = states.mean(0)
    values, vectors = torch.linalg.eigh(shrunk_covariance(states - mean))
    whiten, back = vectors * values.rsqrt() @ vectors.mT, vectors * values.sqrt() @ vectors.mT
    label = torch.cat([torch.ones(len(plus)), torch.zeros(len(minus))]).double()
    column = whiten @ ((states - mean).mT @ (label - label.mean()))
    projection = back @ (torch.outer(column, column) / column.dot(column)) @ whiten
    torch.testing.assert_close(erased(states, plus, minus), states - (states - mean) @ projection.mT)


def test_the_means_become_one_and_the_rest_stays() -> None:
    plus, minus = kinds()
    after = erased(plus, plus, minus), erased(minus, plus, minus)
    torch.testing.assert_close(after[0].mean(0), after[1].mean(0))
    torch.testing.assert_close(torch.cat(after).mean(0), torch.cat([plus, minus]).mean(0))
    torch.testing.assert_close(erased(after[0], plus, minus), after[0])  # a second time changes nothing


def test_as_the_package_of_its_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither shrinking the covariance, for which they have another formula."""
    package = pytest.importorskip("concept_erasure")
    monkeypatch.setattr(directions, "shrunk_covariance", lambda centred: centred.mT @ centred / len(centred))
    plus, minus = kinds()
    states, label = torch.cat([plus, minus]), torch.arange(50) < 30
    theirs = package.LeaceEraser.fit(states, label.double(), shrinkage=False, constrain_cov_trace=False, svd_tol=1e-9)
    torch.testing.assert_close(erased(states, plus, minus), theirs(states))


def test_the_covariance_is_shrunk_where_there_are_few_states() -> None:
    """To the share that Ledoit and Wolf's loop over the states gives."""
    states = kinds(5, 4)[0] - kinds(5, 4)[0].mean(0)
    n, eye = len(states), torch.eye(D, dtype=torch.float64)
    sample = states.mT @ states / n
    level = sample.trace() / D
    noise = sum((torch.outer(x, x) - sample).square().sum() for x in states) / n**2
    share = float(noise / (sample - level * eye).square().sum())
    assert 0.05 < share < 1
    torch.testing.assert_close(shrunk_covariance(states), (1 - share) * sample + share * level * eye)


def test_the_component_points_to_the_positives() -> None:
    plus, minus = kinds(20, 20)
    unit = principal_component(plus, minus)
    assert (plus - minus).mean(0) @ unit > 0 and unit.norm() == pytest.approx(1)
    torch.testing.assert_close(principal_component(minus, plus), -unit)
