"""R with orthonormal rows: made, kept so under any optimizer, saved as it is used.

`Rotation` keeps R / 2 in its parameter, `halved`. An optimizer step of a given size then moves R twice as far, which is
how far pyreft's Householder map moves it, whatever the optimizer and without a parameter group of its own. Halving and
doubling are exact in floating point. A module's `state_dict` holds the parameter itself, so that whoever writes through
it (averages, offloading, sharding) reaches it; files hold R, and the tuner converts between the two.

The gradient is projected to the tangent space of {R : R Rᵀ = I}, and a step's departure from it is undone by the polar
retraction (R Rᵀ)^(-1/2) R, the nearest matrix with orthonormal rows (Absil et al., Optimization Algorithms on Matrix
Manifolds, sections 3.6 and 4.1). It costs O(d r²) a step, against O(d² r) for a Householder map.
"""

from __future__ import annotations

import itertools
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
    return _errors(rotation).amax()


def _errors(rotation: Tensor) -> Tensor:
    """The same (...) of each R."""
    wide = _in_double(rotation)
    gram = wide @ wide.mT
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax((-2, -1))


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
    """The identity, whose gradient G becomes G - sym(G Rᵀ) R: its part along the manifold.

    An optimizer that steps a copy of the weights (ZeRO's, say) never learns of the retraction, and tangent steps alone
    would carry its copy further from the manifold each time. So the gradient also points back along `drift`, what the
    last retraction took away, by at most its own length.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rotation: Tensor, drift: Tensor | None) -> Tensor:
        return rotation.view_as(rotation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(output, *([] if inputs[1] is None else inputs[1:]))
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rotation, *drifts = ctx.saved_tensors
        normal = grad @ rotation.mT
        tangent: Tensor = grad - 0.5 * (normal + normal.mT) @ rotation
        for drift in drifts:
            tangent = tangent + drift * (tangent.norm() / drift.norm().clamp(min=1))
        return tangent, None


class _TangentBothWays(_TangentGradient):
    """The same in forward mode too (`torch.func.jvp`), which torch.compile takes of no function of one's own."""

    @staticmethod
    def jvp(ctx: Any, change: Tensor, _: Any) -> Tensor:
        rotation, *_ = ctx.saved_tensors
        normal = change @ rotation.mT
        tangent: Tensor = change - 0.5 * (normal + normal.mT) @ rotation
        return tangent


class Rotation(nn.Module):
    """R of shape (r, d) with orthonormal rows, as the module's output; saved in files under the key `rotation`.

    Args:
        start: at a random R; else at zeros, which a saved one takes the place of.
    """

    def __init__(self, r: int, width: int, start: bool = True) -> None:
        super().__init__()
        rows = torch.zeros(r, width, device="cpu", dtype=torch.float32)
        if start:
            rows = retract(nn.init.orthogonal_(rows))
        self.halved = nn.Parameter(rows / 2)
        self._checked_version = -1
        self._drift: Tensor | None = None
        self.family: Family = ()
        """Those that this one is kept orthonormal with, itself among them; empty for it alone."""
        self.number = next(_NUMBERS)
        _LIVE.add(self)

    def forward(self) -> Tensor:
        function = _TangentGradient if torch.compiler.is_compiling() else _TangentBothWays
        rotation: Tensor = function.apply(self.halved * 2, self._drift)
        return rotation

    def changed(self) -> bool:
        """Whether the parameter was written to since it was last found orthonormal."""
        return self.here() and self.halved._version != self._checked_version

    def here(self) -> bool:
        """Whether the parameter holds values that can be read and mended; ZeRO-3 empties it between forwards."""
        halved = self.halved
        traced = torch._C._functorch.is_functorch_wrapped_tensor(halved)
        return not (halved.is_meta or halved.is_inference() or halved.numel() == 0 or traced)

    def set(self, rotation: Tensor) -> None:
        """Write R (r, d), into each process's share where fully_shard distributed the parameter."""
        half = rotation / 2
        if hasattr(self.halved, "full_tensor"):
            half = _distributed_like(half, self.halved)
        self.halved.copy_(half)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not hasattr(self.halved, "full_tensor"):  # of which one process cannot see the whole
            restore([self])
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _LIVE.add(self)


Family = tuple[Rotation, ...]
"""Rotations whose rows are orthonormal all together."""


def _distributed_like(whole: Tensor, parameter: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=parameter.placements)


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
def restore(rotations: Iterable[Rotation], stepped: bool = False) -> None:
    """Retract, in place, every rotation that anyone moved off the manifold; the others keep their bits.

    Rotations of one shape and device share one batched computation and one look at the result from the host. A family
    is retracted as one matrix; members that are frozen, if others are not, stay where they are.

    Args:
        stepped: an optimizer has just stepped the parameters themselves, so that it goes on from what is written here.
    """
    groups = defaultdict(list)
    for family in dict.fromkeys(module.family or (module,) for module in rotations):
        if all(module.here() for module in family):
            halves = [module.halved for module in family]
            shapes = tuple(half.shape for half in halves)
            groups[shapes, _learning(family), halves[0].device, halves[0].dtype].append(family)
    for (shapes, free, *_), families in groups.items():
        _restore_alike(families, [shape[0] for shape in shapes], free, stepped)


def _restore_alike(families: list[Family], rows: list[int], free: tuple[bool, ...], stepped: bool) -> None:
    """Those of like members, of so many rows each, of which the free ones may be moved."""
    stack = torch.stack([torch.cat([_whole(module.halved) for module in family]) for family in families]) * 2
    moved = (~(_errors(stack) <= TOLERANCE)).tolist()  # one look from the host; NaN has moved
    after = _retract_some(stack, rows, free) if any(moved) else stack
    for family, whole, before, off in zip(families, after, stack, moved, strict=True):
        for module, movable, rotation, was in zip(family, free, whole.split(rows), before.split(rows), strict=True):
            module._drift = None
            if off and movable:
                module.set(rotation)
                module._drift = None if stepped else was - rotation
            module._checked_version = module.halved._version


def _learning(family: Family) -> tuple[bool, ...]:
    """Which members may be moved: those that learn, or all where none does."""
    learn = tuple(module.halved.requires_grad for module in family)
    return learn if any(learn) else (True,) * len(family)


def _retract_some(stack: Tensor, rows: list[int], free: tuple[bool, ...]) -> Tensor:
    """`retract` of the free parts of (..., r, d) beside the others, which are kept."""
    if all(free):
        return retract(stack)
    chosen = torch.tensor(free).repeat_interleave(torch.tensor(rows)).to(stack.device)
    result = stack.clone()
    result[..., chosen, :] = retract_beside(stack[..., chosen, :], stack[..., ~chosen, :])
    return result


def retract_beside(matrix: Tensor, kept: Tensor) -> Tensor:
    """The nearest matrix whose rows are orthonormal and orthogonal to those of `kept` (..., k, d), which are too."""
    rows = _in_double(kept)
    return retract(_in_double(matrix) - _in_double(matrix) @ rows.mT @ rows).to(matrix)


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


_LIVE: weakref.WeakSet[Rotation] = weakref.WeakSet()
_NUMBERS = itertools.count()
"""In the order of which processes that share parameters go through them together; a set has none of its own."""


def _after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """What keeps R orthonormal where no forward pre-hook runs: inside a compiled model, or on a save after a step.

    By value, since a fused optimizer leaves no trace in the version.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    mine = (rotation for rotation in _LIVE if id(rotation.halved) in own and rotation.halved.dim() == 2)
    live = sorted(mine, key=lambda rotation: rotation.number)
    restore(live, stepped=True)
    if live:  # an average of what was stepped may be written through `.data`, which leaves no trace either
        for rotation in _LIVE:
            if id(rotation.halved) not in own:
                rotation._checked_version = -1


register_optimizer_step_post_hook(_after_optimizer_step)
