"""RED: scaling and bias (Wu et al. 2024, arXiv:2402.15179)."""

import torch
from torch import Tensor

from trimtab.edits.base import Edit, Term


class RED(Edit):
    """s ⊙ h + b, eq. 2. It has no rank, and the paper too starts it at the identity."""

    takes = frozenset()
    scale: Tensor
    bias: Tensor

    @classmethod
    def shapes(cls, width: int, r: int | None) -> dict[str, tuple[int, ...]]:
        return {"scale": (width,), "bias": (width,)}

    def start(self, identity: bool) -> dict[str, Tensor]:
        return {
            "scale": torch.ones(self.width, dtype=torch.float32),
            "bias": torch.zeros(self.width, dtype=torch.float32),
        }

    def delta(self, h: Tensor) -> Tensor:
        return (self.scale - 1) * h + self.bias

    def terms(self) -> tuple[Term, ...]:
        none = torch.zeros_like(self.bias)[None]
        return (Term(none, torch.ones_like(none[:, 0]), self.bias[None], diagonal=self.scale - 1),)
