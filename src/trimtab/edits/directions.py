"""Directions read off hidden states that have something (x⁺) and that lack it (x⁻), and what takes them away.

Shapes: plus, minus (n, d), the i-th of both a pair where pairs count · direction u (d,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.edits.base import Term


def difference_of_means(plus: Tensor, minus: Tensor) -> Tensor:
    """u along the mean of x⁺ - x⁻ (Marks and Tegmark 2023, arXiv:2310.06824), of length 1; 0 where there is none."""
    return F.normalize((plus - minus).mean(0), dim=0)


def principal_component(plus: Tensor, minus: Tensor) -> Tensor:
    """The first principal component of the differences and their negatives (Zou et al. 2023, arXiv:2310.01405), which
    is the first right singular vector of the matrix of differences, turned so that positives lie further along it."""
    unit: Tensor = torch.linalg.svd(plus - minus, full_matrices=False).Vh[0]
    return unit * torch.sign(unit @ (plus - minus).mean(0))


def leace(plus: Tensor, minus: Tensor) -> Term:
    """The smallest affine edit after which no linear probe tells the two apart (LEACE, Belrose et al. 2023,
    arXiv:2306.03819, for one binary concept).

    With W = Σ^(-1/2) and P the projection on W Σ_xz the paper's h - W⁺ P W (h - μ) has rank 1 here, as Σ_xz lies along
    δ, the difference of the class means: h - δ wᵀ(h - μ) / wᵀδ, w = Σ⁻¹ δ. The means of both classes become μ exactly,
    whatever Σ; Σ says which of the edits that do so moves hidden states least.

    Args:
        plus, minus: (n⁺, d), (n⁻, d); their numbers may differ.
    Returns:
        Bᵀ(A h + b) of rank 1, in float64.
    """
    states = torch.cat([plus, minus]).double()
    mean, delta = states.mean(0), plus.double().mean(0) - minus.double().mean(0)
    weight = torch.linalg.solve(shrunk_covariance(states - mean), delta)
    length = delta.norm()
    rows = -weight / (weight @ delta) * length
    return Term(rows[None], -(rows @ mean)[None], (delta / length)[None])


def shrunk_covariance(centred: Tensor) -> Tensor:
    """Σ (d, d) of states (n, d) of mean 0, drawn to a multiple of the identity as far as their number asks for (Ledoit
    and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4), so that it has an inverse also for n < d."""
    n, d = centred.shape
    sample = centred.mT @ centred / n
    level = sample.trace() / d
    spread = sample.square().sum() - d * level.square()
    noise = (centred.square().sum(1).square().mean() - sample.square().sum()) / n
    share = (noise / spread).clamp(1e-6, 1)
    return (1 - share) * sample + share * level * torch.eye(d).to(sample)
