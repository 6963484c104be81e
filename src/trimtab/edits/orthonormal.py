"""R with orthonormal rows: made, kept so under any optimizer, saved as it is used.

`Rotation` keeps R / 2 in its parameter. An optimizer step of a given size then moves R twice as far, which is how far
pyreft's Householder map moves it, whatever the optimizer and without a parameter group of its own. Halving and doubling
are exact in floating point, so `state_dict` shows the very R that the forward pass uses.

The gradient is projected to the tangent space of {R : R Rᵀ = I}, and a step's departure from it is undone by the polar
retraction (R Rᵀ)^(-1/2) R, the nearest matrix with orthonormal rows (Absil et al., Optimization Algorithms on Matrix
Manifolds, sections 3.6 and 4.1). It costs O(d r²) a step, against O(d² r) for a Householder map.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

TOLERANCE = 1e-6
"""Largest entry of |R Rᵀ - I| that is left alone: rounding to float32 costs at most about 1e-7 of it."""


def orthonormality_error(rotation: Tensor) -> Tensor:
    """Largest entry of |R Rᵀ - I| for R of shape (..., r, d)."""
    wide = _in_double(rotation)
    gram = wide @ wide.mT
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax()


def retract(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows, (P Pᵀ)^(-1/2) P, for P of shape (..., r, d) with independent rows.

    Raises:
        FloatingPointError: P holds NaN or infinity, or its rows are linearly dependent.
    """
    wide = _in_double(matrix)
    gram = wide @ wide.mT
    if not bool(gram.isfinite().all()):
        raise FloatingPointError(
            "a rotation holds NaN or infinity after an optimizer step: training diverged. "
            "Lower the learning rate, clip gradients, or look for NaN in the loss."
        )
    squares, vectors = torch.linalg.eigh(gram)
    if bool((squares <= 1e-12 * squares.amax(-1, keepdim=True)).any()):
        raise FloatingPointError(
            "the rows of a rotation became linearly dependent: the learning rate or the weight decay is far too high."
        )
    nearest: Tensor = vectors * squares.rsqrt().unsqueeze(-2) @ vectors.mT @ wide
    return nearest.to(matrix)


def _in_double(matrix: Tensor) -> Tensor:
    """In float64, which autocast leaves alone; on the CPU where the device has none."""
    return matrix.cpu().double() if matrix.device.type == "mps" else matrix.double()


class _TangentGradient(torch.autograd.Function):
    """The identity, whose gradient G becomes G - sym(G Rᵀ) R: its part along the manifold."""

    @staticmethod
    def forward(rotation: Tensor) -> Tensor:
        return rotation.view_as(rotation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rotation,) = ctx.saved_tensors
        normal = grad @ rotation.mT
        tangent: Tensor = grad - 0.5 * (normal + normal.mT) @ rotation
        return tangent


class Rotation(nn.Module):
    """R of shape (r, d) with orthonormal rows, as the module's output; saved under the key `rotation`."""

    def __init__(self, r: int, width: int) -> None:
        super().__init__()
        rows = retract(nn.init.orthogonal_(torch.empty(r, width, device="cpu", dtype=torch.float32)))
        self.halved = nn.Parameter(rows / 2)
        self._checked_version = -1
        _LIVE.add(self)

    def forward(self) -> Tensor:
        rotation: Tensor = _TangentGradient.apply(self.halved * 2)
        return rotation

    def changed(self) -> bool:
        """Whether the parameter was written to since it was last found orthonormal."""
        halved = self.halved
        return not halved.is_meta and not halved.is_inference() and halved._version != self._checked_version

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        restore([self])
        halved = self.halved if keep_vars else self.halved.detach()
        destination[prefix.removesuffix(".")] = halved * 2

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing: list[str] = args[2]
        missing[:] = [prefix.removesuffix(".") if key == prefix + "halved" else key for key in missing]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _LIVE.add(self)


def as_rotation(name: str, tensor: Tensor) -> Tensor:
    """A loaded R, bit for bit where it is orthonormal; one that was stored in bf16 or fp16 is mended.

    Raises:
        ValueError: it is not a rotation at all.
    """
    rotation = tensor if tensor.dtype == torch.float64 else tensor.float()
    if rotation.is_meta:
        return rotation
    error = float(orthonormality_error(rotation))
    if error <= TOLERANCE:
        return rotation
    if not error < 0.05:  # NaN too
        raise ValueError(
            f"{name}: the rows are not orthonormal (off by {error:.2g}): the file is damaged or is not a ReFT adapter."
        )
    return retract(rotation)


@torch.no_grad()
def restore(rotations: Iterable[Rotation]) -> None:
    """Retract, in place, every rotation that anyone moved off the manifold; the others keep their bits.

    Rotations of one shape and device share one batched computation and one look at the result from the host.
    """
    groups = defaultdict(list)
    for module in rotations:
        if not module.halved.is_meta and not module.halved.is_inference():
            groups[module.halved.shape, module.halved.device, module.halved.dtype].append(module)
    for modules in groups.values():
        stack = torch.stack([module.halved for module in modules]) * 2
        if not float(orthonormality_error(stack)) <= TOLERANCE:
            for module, rotation, before in zip(modules, retract(stack), stack, strict=True):
                if not float(orthonormality_error(before)) <= TOLERANCE:
                    module.halved.copy_(rotation / 2)
        for module in modules:
            module._checked_version = module.halved._version


_LIVE: weakref.WeakSet[Rotation] = weakref.WeakSet()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """What keeps R orthonormal where no forward pre-hook runs: inside a compiled model, or on a save after a step."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    restore([rotation for rotation in _LIVE if id(rotation.halved) in own and rotation.changed()])


register_optimizer_step_post_hook(_after_optimizer_step)
