"""Edits along one learned direction: a vector with a strength, and one that comes as far as a gate lets it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.edits.base import Edit, Term, uniform

STRENGTH = 4.0
"""What α starts at: moderately large, as PrOSV's analysis of training direction and strength together asks."""


class Vector(Edit):
    """h + α v: a steering vector whose strength α is trained with it (PrOSV, Bao et al. 2026, arXiv:2605.05983)."""

    takes = frozenset()
    vector: Tensor
    strength: Tensor

    @classmethod
    def shapes(cls, width: int, r: int | None) -> dict[str, tuple[int, ...]]:
        return {"vector": (width,), "strength": (1,)}

    def start(self, identity: bool) -> dict[str, Tensor]:
        vector = F.normalize(uniform(1, self.width), dim=0)
        strength = torch.full((1,), STRENGTH, dtype=torch.float32)
        return {"vector": torch.zeros_like(vector) if identity else vector, "strength": strength}

    def delta(self, h: Tensor) -> Tensor:
        return (self.strength * self.vector).expand_as(h)

    def terms(self) -> tuple[Term, ...]:
        return (Term(torch.zeros_like(self.vector)[None], self.strength, self.vector[None]),)


class Gated(Edit):
    """h + ReLU(w·h) v: a vector, for each token as far as its gate opens (PSR, 2026, arXiv:2605.03907)."""

    takes = frozenset()
    gate: Tensor
    vector: Tensor

    @classmethod
    def shapes(cls, width: int, r: int | None) -> dict[str, tuple[int, ...]]:
        return {"gate": (width,), "vector": (width,)}

    def start(self, identity: bool) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.width)
        gate, vector = uniform(bound, self.width), uniform(bound, self.width)
        return {"gate": gate, "vector": torch.zeros_like(vector) if identity else vector}

    def delta(self, h: Tensor) -> Tensor:
        return F.relu(F.linear(h, self.gate[None])) * self.vector

    def terms(self) -> tuple[Term, ...]:
        return (Term(self.gate[None], self.gate.new_zeros(1), self.vector[None], F.relu),)
