"""The edits Φ of the ReFT family, as in the paper (Wu et al. 2024, arXiv:2404.03592, section 3 and table 17).

Each maps selected hidden states h (n, d) to the change Φ(h) - h (n, d), in the precision of its own parameters.

Shapes: h (n, d) · rotation R or projection (r, d) · weight W (r, d) · bias b (r,).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.edits.orthonormal import Rotation, as_rotation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""On W h + b. Each maps 0 to 0, so that an edit that starts at the identity can."""

InitWeights = bool | Literal["paper"]


class Term(NamedTuple):
    """Bᵀ f(A h + b), of which an edit is a sum."""

    rows: Tensor
    """A (r, d)."""
    bias: Tensor
    """b (r,)."""
    basis: Tensor
    """B (r, d)."""
    activation: Callable[[Tensor], Tensor] | None = None
    """f, one of `ACTIVATIONS`, or None for none."""


class Edit(nn.Module):
    """One edit. Subclasses say whether their rows are orthonormal, whether they read W h, and give `delta`."""

    orthonormal: ClassVar[bool]
    has_weight: ClassVar[bool] = True
    subtracts: ClassVar[bool]
    """Whether what the rows read of h is subtracted: Φ then replaces it instead of adding to it."""

    def __init__(
        self,
        width: int,
        r: int,
        *,
        dropout: float = 0.0,
        activation: str | None = None,
        init_weights: InitWeights = True,
    ) -> None:
        super().__init__()
        self.width, self.r = width, r
        self.activation = ACTIVATIONS[activation] if activation else None
        self.dropout = nn.Dropout(dropout)
        bound = 1 / math.sqrt(width)  # nn.Linear's default, which pyreft takes for W and b
        if self.orthonormal:
            self.rotation = Rotation(r, width)
        else:
            self.projection = nn.Parameter(_uniform(bound, r, width))
        bias, weight = _uniform(bound, r), _uniform(bound, r, width)
        if init_weights is True:
            bias.zero_()
            weight = self.basis().detach().clone() if self.subtracts else weight.zero_()
            if self.subtracts and (self.activation or not self.has_weight):
                warnings.warn(
                    f"{type(self).__name__}{' with an activation' if self.activation else ''} has no start that leaves "
                    "the model unchanged: an untrained adapter already edits. init_weights='paper' starts as pyreft's.",
                    stacklevel=2,
                )
        if self.has_weight:
            self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def basis(self) -> Tensor:
        """The rows (r, d) that span the edit: R, or the free projection."""
        return self.rotation() if self.orthonormal else self.projection

    def read(self, h: Tensor) -> Tensor:
        """W h + b, through the activation: (n, r)."""
        source = F.linear(h, self.weight, self.bias)
        return self.activation(source) if self.activation else source

    def delta(self, h: Tensor, basis: Tensor) -> Tensor:
        """Φ(h) - h: (n, d) -> (n, d)."""
        raise NotImplementedError

    def terms(self) -> tuple[Term, ...]:
        """Φ(h) - h as a sum of terms Bᵀ f(A h + b), for whoever runs the edits of many adapters as one.

        A method whose `delta` is another must override this too (or raise NotImplementedError, and is then not served).
        """
        basis = self.basis()
        read = Term(self.weight if self.has_weight else torch.zeros_like(basis), self.bias, basis, self.activation)
        if not self.subtracts:
            return (read,)
        if self.activation is None:
            return (read._replace(rows=read.rows - basis),)
        return read, Term(-basis, torch.zeros_like(self.bias), basis)

    def forward(self, h: Tensor) -> Tensor:
        """Φ(h) - h for rows h (n, d), with dropout on the edit (never on the hidden state)."""
        with torch.autocast(h.device.type, enabled=False):
            change: Tensor = self.dropout(self.delta(h.to(self.bias.dtype), self.basis()))
        return change

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Edit:
        """Move with the model, but never round down: R in bf16 is no longer orthonormal."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype.itemsize >= tensor.dtype.itemsize:
                return moved
            if moved.is_meta or tensor.is_meta:
                return torch.empty_like(tensor, device=moved.device)
            return tensor.to(moved.device)

        super()._apply(keep_precision, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = [name for name in ("rotation", "projection", "weight", "bias") if hasattr(self, name)]
        for name in own:
            tensor = state_dict.get(prefix + name)
            if tensor is None:
                continue
            expected = (self.r,) if name == "bias" else (self.r, self.width)
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{prefix}{name}: the file holds shape {tuple(tensor.shape)}, this model and config need "
                    f"{expected}: the adapter was trained on another base model or with another rank."
                )
            if not tensor.is_meta and not bool(tensor.isfinite().all()):
                raise ValueError(f"{prefix}{name}: holds NaN or infinity: the adapter was saved from a diverged run.")
            state_dict[prefix + name] = tensor.to(self.bias.dtype)
        if prefix + "rotation" in state_dict:
            full = as_rotation(prefix + "rotation", state_dict.pop(prefix + "rotation"))
            state_dict[prefix + "rotation.halved"] = full / 2
        super()._load_from_state_dict(state_dict, prefix, *args)


def _uniform(bound: float, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound)
