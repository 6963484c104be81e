"""LoReFT and its relatives: edits of low rank (Wu et al. 2024, arXiv:2404.03592, section 3 and table 17).

Shapes: h (n, d) · rotation R or projection, the basis (r, d) · weight W (r, d) · bias b (r,).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.edits.base import Edit, Term, uniform
from trimtab.edits.orthonormal import Rotation


class LowRank(Edit):
    """Φ(h) = h + Bᵀ u(h): each method says what its basis B is called and gives u(h) (n, r)."""

    rows: ClassVar[str] = "rotation"
    """`rotation`, orthonormal, or `projection`, free."""
    has_weight: ClassVar[bool] = True
    subtracts: ClassVar[bool] = False
    """Whether u(h) takes away what the rows read of h: Φ then replaces it instead of adding to it."""

    rotation: Rotation
    projection: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def shapes(cls, width: int, r: int | None) -> dict[str, tuple[int, ...]]:
        assert r is not None
        return {cls.rows: (r, width), **({"weight": (r, width)} if cls.has_weight else {}), "bias": (r,)}

    def start(self, identity: bool) -> dict[str, Tensor]:
        assert self.r is not None
        bound = 1 / math.sqrt(self.width)  # nn.Linear's default, which pyreft takes for W and b
        basis = self.basis() if self.rows == "rotation" else uniform(bound, self.r, self.width)
        bias, weight = uniform(bound, self.r), uniform(bound, self.r, self.width)
        if identity:
            bias, weight = torch.zeros_like(bias), basis.clone() if self.subtracts else torch.zeros_like(weight)
        return {self.rows: basis, "weight": weight, "bias": bias}

    @property
    def starts_at_identity(self) -> bool:
        return not self.subtracts or (self.has_weight and self.activation is None)

    def basis(self) -> Tensor:
        """The rows (r, d) that span the edit: R, or the free projection."""
        return self.rotation() if self.rows == "rotation" else self.projection

    @torch.no_grad()
    def follow(self, before: Tensor) -> None:
        if self.subtracts and self.has_weight:
            self.weight += self.basis() - before  # so that W - R, zero at the start, is as it was

    def read(self, h: Tensor) -> Tensor:
        """W h + b, through the activation: (n, r)."""
        source = F.linear(h, self.weight, self.bias)
        return self.activation(source) if self.activation else source

    def inner(self, h: Tensor, basis: Tensor) -> Tensor:
        """u(h): (n, d) -> (n, r)."""
        raise NotImplementedError

    def delta(self, h: Tensor) -> Tensor:
        basis = self.basis()
        return self.inner(h, basis) @ basis

    def terms(self) -> tuple[Term, ...]:
        basis = self.basis()
        read = Term(self.weight if self.has_weight else torch.zeros_like(basis), self.bias, basis, self.activation)
        if not self.subtracts:
            return (read,)
        if self.activation is None:
            return (read._replace(rows=read.rows - basis),)
        return read, Term(-basis, torch.zeros_like(self.bias), basis)

    @torch.no_grad()
    def size(self) -> float:
        basis = self.basis()
        columns = torch.cat([torch.zeros_like(basis[:1]), torch.eye(self.width).to(basis)])
        constant, *linear = self.inner(columns, basis).double().split([1, self.width])
        source = torch.cat([constant, *(rows - constant for rows in linear)])
        gram = basis.double() @ basis.double().mT  # |X B|² = tr(X B Bᵀ Xᵀ), in r dimensions instead of d
        return float(torch.einsum("ki,ij,kj->", source, gram, source).clamp(min=0).sqrt())


class LoReFT(LowRank):
    """h + Rᵀ(W h + b - R h), eq. 2: the part of h that R reads becomes W h + b."""

    subtracts = True

    def inner(self, h: Tensor, basis: Tensor) -> Tensor:
        if self.activation is None:  # one product, and exactly zero at W = R, b = 0
            return F.linear(h, self.weight - basis, self.bias)
        return self.read(h) - F.linear(h, basis)


class NoReFT(LoReFT):
    """h + W₂ᵀ(W₁ h + b - W₂ h), table 17: LoReFT without the orthonormality."""

    rows = "projection"


class DiReFT(LowRank):
    """h + W₂ᵀ(W₁ h + b), eq. 3 (pyreft's `NodireftIntervention`)."""

    rows = "projection"

    def inner(self, h: Tensor, basis: Tensor) -> Tensor:
        return self.read(h)


class DiReFTOrthonormal(DiReFT):
    """h + Rᵀ(W h + b), table 17 (pyreft's `DireftIntervention`)."""

    rows = "rotation"


class ConsReFT(LowRank):
    """h + Rᵀ(b - R h), table 17: what R reads becomes a constant. It cannot start at the identity."""

    takes, has_weight, subtracts = frozenset({"r"}), False, True

    def inner(self, h: Tensor, basis: Tensor) -> Tensor:
        return self.bias - F.linear(h, basis)


class LobiReFT(LowRank):
    """h + Rᵀb, table 17: one learned vector of r degrees of freedom."""

    takes, has_weight = frozenset({"r"}), False

    def inner(self, h: Tensor, basis: Tensor) -> Tensor:
        return self.bias.expand(h.shape[0], -1)

    def delta(self, h: Tensor) -> Tensor:
        return (self.bias @ self.basis()).expand_as(h)  # one vector, whatever the number of tokens
