"""Sharding. FSDP2: edits are sharded with their block and stay in float32, whatever the precision of the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.edits import Edit
from trimtab.edits.orthonormal import Rotation


def shard_edits(model: nn.Module, **options: Any) -> None:
    """`fully_shard` each edit by itself, in float32, with the mesh and other options of `fully_shard`.

    To be called before `fully_shard` on blocks and model, where these have a `MixedPrecisionPolicy` and an edit is in
    the group of the whole model. Edits in a block that is sharded by itself stay in float32 without it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
    for edit in [module for module in model.modules() if isinstance(module, Edit)]:
        fully_shard(edit, mp_policy=policy, **options)


def refuse_parts(rotations: Iterable[Rotation]) -> None:
    """Training under DeepSpeed's ZeRO-3 or FSDP1: between forwards no process has an R that it could retract.

    Raises:
        RuntimeError: an R that is trained is partitioned: DeepSpeed has marked it with an id, or FSDP1 as flattened.
    """
    trained = [rotation.halved for rotation in rotations if rotation.halved.requires_grad]
    if any(_is_flat(halved) for halved in trained):
        raise RuntimeError(
            "FullyShardedDataParallel (FSDP1) leaves each process a part of R, so that nothing would make its rows "
            "orthonormal again after a step. Use FSDP2 (fully_shard; with accelerate fsdp_version: 2) or DDP."
        )
    if any(hasattr(halved, "ds_id") for halved in trained):
        raise RuntimeError(
            "DeepSpeed's ZeRO stage 3 leaves each process a part of R, so that nothing would make its rows "
            "orthonormal again after a step. Use ZeRO stage 2 or FSDP2 (fully_shard), or a "
            "method without R (method='direft')."
        )


def _is_flat(halved: Tensor) -> bool:
    """Whether FSDP1 holds it in a vector with others: as a mark on the parameter, or in a forward as a view of that."""
    return hasattr(halved, "_fsdp_flattened") or hasattr(getattr(halved, "_base", None), "_is_flat_param")


def keep_in_float32(model: nn.Module) -> None:
    """Take edits out of the mixed precision policy of the groups that they are sharded with.

    A policy is for a whole group, and the casts are set, parameter by parameter, when the first forward begins.
    """
    module: Any
    for module in model.modules():
        state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
        group = getattr(state, "_fsdp_param_group", None)
        own = {id(m) for edit in module.modules() if isinstance(edit, Edit) for m in edit.modules()} if group else ()
        for parameter in group.fsdp_params if group else ():
            if id(parameter._module_info.module) in own:
                parameter.param_dtype = parameter.reduce_dtype = None
