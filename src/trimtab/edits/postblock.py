"""The post-block adapter (Adila et al. 2026, arXiv:2603.00425)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.edits.base import Edit, Term, uniform


class PostBlock(Edit):
    """h + W_u φ(W_d h), φ linear or an activation (the paper's: SiLU). The paper edits every token: positions='all'.

    Shapes: down W_d (r, d) · up, the rows of W_uᵀ (r, d).
    """

    down: Tensor
    up: Tensor

    @classmethod
    def shapes(cls, width: int, r: int | None) -> dict[str, tuple[int, ...]]:
        assert r is not None
        return {"down": (r, width), "up": (r, width)}

    def start(self, identity: bool) -> dict[str, Tensor]:
        assert self.r is not None
        bound = 1 / math.sqrt(self.width)
        down, up = uniform(bound, self.r, self.width), uniform(bound, self.r, self.width)
        return {"down": down, "up": torch.zeros_like(up) if identity else up}

    def delta(self, h: Tensor) -> Tensor:
        source = F.linear(h, self.down)
        return (self.activation(source) if self.activation else source) @ self.up

    def terms(self) -> tuple[Term, ...]:
        return (Term(self.down, self.down.new_zeros(len(self.down)), self.up, self.activation),)
