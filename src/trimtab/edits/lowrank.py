"""LoReFT and its relatives: edits of low rank (paper, section 3 and table 17)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trimtab.edits.base import Edit


class LoReFT(Edit):
    """h + Rᵀ(W h + b - R h), eq. 2: the part of h that R reads becomes W h + b."""

    orthonormal, subtracts = True, True

    def delta(self, h: Tensor, basis: Tensor) -> Tensor:
        if self.activation is None:  # one product, and exactly zero at W = R, b = 0
            return F.linear(h, self.weight - basis, self.bias) @ basis
        return (self.read(h) - F.linear(h, basis)) @ basis


class NoReFT(LoReFT):
    """h + W₂ᵀ(W₁ h + b - W₂ h), table 17: LoReFT without the orthonormality."""

    orthonormal, subtracts = False, True


class DiReFT(Edit):
    """h + W₂ᵀ(W₁ h + b), eq. 3 (pyreft's `NodireftIntervention`)."""

    orthonormal, subtracts = False, False

    def delta(self, h: Tensor, basis: Tensor) -> Tensor:
        return self.read(h) @ basis


class DiReFTOrthonormal(DiReFT):
    """h + Rᵀ(W h + b), table 17 (pyreft's `DireftIntervention`)."""

    orthonormal, subtracts = True, False


class ConsReFT(Edit):
    """h + Rᵀ(b - R h), table 17: what R reads becomes a constant. It cannot start at the identity."""

    orthonormal, subtracts, has_weight = True, True, False

    def delta(self, h: Tensor, basis: Tensor) -> Tensor:
        return (self.bias - F.linear(h, basis)) @ basis


class LobiReFT(Edit):
    """h + Rᵀb, table 17: one learned vector of r degrees of freedom."""

    orthonormal, subtracts, has_weight = True, False, False

    def delta(self, h: Tensor, basis: Tensor) -> Tensor:
        return (self.bias @ basis).expand_as(h)
