"""`Edit`: what every method declares, and what follows from that for all of them.

Shapes: hidden states h (n, d) and the change Φ(h) - h (n, d), in the precision of the edit's own parameters.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
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


_NUMBERS = itertools.count()


class Term(NamedTuple):
    """Bᵀ f(A h + b) + c ⊙ h, of which an edit is a sum."""

    rows: Tensor
    """A (r, d)."""
    bias: Tensor
    """b (r,)."""
    basis: Tensor
    """B (r, d)."""
    activation: Callable[[Tensor], Tensor] | None = None
    """f, one of `ACTIVATIONS`, or None for none."""
    diagonal: Tensor | None = None
    """c (d,), or None for zeros."""


class Edit(nn.Module):
    """One edit. A method is a subclass that gives `shapes`, `start` and `delta`, and names the fields it `takes`.

    Args:
        init_weights: as in `ReftConfig`; None where saved tensors are about to be loaded.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"r", "activation"})
    """Which of the fields that only some methods have a use for."""

    def __init__(
        self,
        width: int,
        r: int | None = None,
        *,
        dropout: float = 0.0,
        activation: str | None = None,
        init_weights: InitWeights | None = True,
    ) -> None:
        super().__init__()
        self.width, self.r = width, r
        self.number = next(_NUMBERS)
        self.activation = ACTIVATIONS[activation] if activation else None
        self.dropout = nn.Dropout(dropout)
        shapes = self.shapes(width, r)
        if "rotation" in shapes:
            rank, columns = shapes["rotation"]
            self.rotation = Rotation(rank, columns, start=init_weights is not None)
        identity = init_weights is True
        if identity and not self.starts_at_identity:
            warnings.warn(
                f"{type(self).__name__}{' with an activation' if self.activation else ''} has no start that leaves "
                "the model unchanged: an untrained adapter already edits. init_weights='paper' starts as pyreft's.",
                stacklevel=2,
            )
        if init_weights is None:
            start = {name: torch.zeros(shape, dtype=torch.float32, device="cpu") for name, shape in shapes.items()}
        else:
            start = self.start(identity)
        for name, shape in shapes.items():
            if name != "rotation":
                self.register_parameter(name, nn.Parameter(start[name].detach().reshape(shape)))

    @classmethod
    def shapes(cls, width: int, r: int | None) -> dict[str, tuple[int, ...]]:
        """The saved tensors by name. One called `rotation` has orthonormal rows, and is kept so."""
        raise NotImplementedError

    def start(self, identity: bool) -> dict[str, Tensor]:
        """The first values of all tensors but the rotation: for Φ(h) = h where there are such, or the paper's."""
        raise NotImplementedError

    def delta(self, h: Tensor) -> Tensor:
        """Φ(h) - h: (n, d) -> (n, d)."""
        raise NotImplementedError

    @property
    def starts_at_identity(self) -> bool:
        """Whether `start(identity=True)` leaves hidden states as they are."""
        return True

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name not in self.shapes(self.width, self.r):
            raise TypeError(f"{type(self).__name__}.{name}: a parameter that `shapes` does not declare.")
        super().register_parameter(name, param)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def version(self) -> tuple[int, ...]:
        """Another one once somebody wrote into its parameters, and of an edit that was made anew."""
        return self.number, *map(written, self.parameters())

    def follow(self, before: Tensor) -> None:
        """Make up for R having been moved from `before` (r, d) by hand, where the method can."""

    def terms(self) -> tuple[Term, ...]:
        """Φ(h) - h as a sum of terms Bᵀ f(A h + b) + c ⊙ h, for whoever runs the edits of many adapters as one.

        Raises:
            NotImplementedError: the method is of another form.
        """
        raise NotImplementedError(f"{type(self).__name__} is no sum of terms Bᵀ f(A h + b) + c ⊙ h.")

    @torch.no_grad()
    def affine(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Φ(h) - h as Bᵀ(A h + c): B and A (r, d) and c (r,) in float64; None where it is not of that form."""
        try:
            terms = self.terms()
        except NotImplementedError:
            return None
        if any(term.activation is not None or term.diagonal is not None for term in terms):
            return None
        basis, rows, bias = (
            torch.cat([getattr(t, part).double() for t in terms]) for part in ("basis", "rows", "bias")
        )
        return basis, rows, bias

    def forward(self, h: Tensor) -> Tensor:
        """Φ(h) - h for rows h (n, d), with dropout on the edit (never on the hidden state)."""
        dtype = self.dtype
        if dtype.itemsize < 4:
            raise TypeError(
                f"a {type(self).__name__} edit in {dtype}: edits must stay in float32, as R is orthonormal in no "
                "less. Under a mixed precision policy call trimtab.shard_edits(model) before fully_shard."
            )
        with torch.autocast(h.device.type, enabled=False):
            change: Tensor = self.dropout(self.delta(h.to(dtype)))
        return change

    @torch.no_grad()
    def size(self) -> float:
        """The Frobenius norm of [A c], where the edit without its activation is h + A h + c."""
        eye = torch.eye(self.width).to(next(self.parameters()))
        constant = self.delta(torch.zeros_like(eye[:1])).double()
        squares = [(self.delta(rows) - constant).double().square().sum() for rows in eye.split(256)]
        return math.sqrt(float(sum(squares) + constant.square().sum()))

    @classmethod
    def check(
        cls, where: str, tensors: Mapping[str, Tensor], r: int | None, width: int | None = None
    ) -> dict[str, Tensor]:
        """Saved tensors as an edit of rank r uses them, whatever file they come from.

        Args:
            where: what stands before a tensor's name in a message: the file and the edited module.
            width: of the model; None takes the file's own.
        Raises:
            ValueError: names or shapes that are not this method's, NaN, infinity, integers, or an R that is none.
        """
        if set(tensors) != set(cls.shapes(1, r)):
            raise ValueError(
                f"{where} holds {', '.join(sorted(tensors)) or 'nothing'}, but the config (method {cls.__name__}) asks "
                f"for {', '.join(sorted(cls.shapes(1, r)))}: {APART}"
            )
        width = cls.width_of(tensors, r) if width is None else width
        for name, shape in cls.shapes(width, r).items():
            check_tensor(f"{where}.{name}", tensors[name], shape, r)
        return {
            name: as_rotation(f"{where}.{name}", tensor) if name == "rotation" else tensor
            for name, tensor in tensors.items()
        }

    @classmethod
    def width_of(cls, tensors: Mapping[str, Tensor], r: int | None) -> int:
        """What stands where `shapes` puts the width."""
        sizes = [
            tensors[name].shape[axis]
            for name, shape in cls.shapes(-1, r).items()
            for axis, size in enumerate(shape)
            if size == -1 and axis < tensors[name].dim()
        ]
        return min(sizes, default=0)

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
        """Takes tensors as files hold them, and as `state_dict` does."""
        own = {name: state_dict.pop(prefix + name) for name in ("rotation",) if prefix + name in state_dict}
        for name, tensor in own.items():
            check_tensor(prefix + name, tensor, self.shapes(self.width, self.r)[name], self.r)
            own[name] = as_rotation(prefix + name, tensor)
        state_dict.update({prefix + name: tensor for name, tensor in as_parameters(own).items()})
        for name, parameter in self.named_parameters():
            tensor = state_dict.get(prefix + name)
            if tensor is not None:
                check_tensor(prefix + name, tensor, parameter.shape, self.r)
                state_dict[prefix + name] = tensor.to(self.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


APART = "the two files do not belong together. Copy both from one save."


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], r: int | None) -> None:
    """Whether a saved tensor can be one of an edit's.

    Raises:
        ValueError: another shape or type, NaN or infinity.
    """
    if tuple(tensor.shape) != tuple(shape):
        owner = f"the config's r={r}" if r else "the config"
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but {owner} asks for "
            f"{tuple(shape)}: {APART} Or the adapter was trained on another base model."
        )
    check_dtype(name, tensor)
    if not tensor.is_meta and not bool(tensor.float().isfinite().all()):
        raise ValueError(
            f"{name} holds NaN or infinity: the run it comes from diverged. Use an earlier checkpoint, or train again "
            "with a lower learning rate."
        )


def check_dtype(name: str, tensor: Tensor) -> None:
    """Whether a saved tensor holds numbers as precise as a parameter's: float16, bfloat16, float32 or float64.

    Raises:
        ValueError: integers, booleans, complex numbers, or floats of a byte, which mean nothing without their scales.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(f"{name} holds {tensor.dtype}, not floats of at least 16 bits. Save the adapter again.")


def as_parameters(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From what a file holds to what parameters hold, by their names: half of R, for the reason `Rotation` gives."""
    return {f"{k}.halved" if k == "rotation" else k: t / 2 if k == "rotation" else t for k, t in saved.items()}


def written(tensor: Tensor) -> int:
    """How often somebody wrote into a tensor, as far as autograd knows."""
    return 0 if tensor.is_inference() else tensor._version


def uniform(bound: float, *shape: int) -> Tensor:
    """Uniform on ±bound, in float32 whatever the default."""
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound)
