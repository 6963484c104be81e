"""FSDP2 on two processes: losses and adapter of one process. ZeRO-3, of which no process sees a whole R, is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import tiny
from peft import get_peft_model
from torch import Tensor, nn

from trimtab import ReftConfig, shard_edits
from trimtab.edits.orthonormal import Rotation, orthonormality_error
from trimtab.errors import AdapterError

STEPS = 4


def batch(rank: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(10 + rank))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 5, -100)}


def adapted() -> Any:
    torch.manual_seed(5)
    config = ReftConfig(task_type="CAUSAL_LM", r=3, positions="f2+l2", init_weights="paper")
    return get_peft_model(tiny("llama"), config).train()


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)


def trained_alone() -> tuple[list[float], dict[str, Tensor]]:
    """One process that accumulates both batches of each step."""
    model, losses = adapted(), []
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        parts = [model(**batch(rank)).loss / 2 for rank in (0, 1)]
        sum(parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(sum(parts)))
    return losses, {key: value for key, value in model.state_dict().items() if "reft" in key}


def train_sharded(rank: int, folder: str, low: bool, edits_first: bool) -> None:
    """The same in one of two processes, each with a batch of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        model, losses = adapted(), []
        options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (2,))}
        if edits_first:
            shard_edits(model, **options)
        if low:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for block in model.base_model.model.model.layers:
            fully_shard(block, **options)
        fully_shard(model, **options)
        optimizer = optimizer_of(model)
        for _ in range(STEPS):
            loss = model(**batch(rank)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().float().clone()
            dist.all_reduce(total)
            losses.append(float(total) / 2)
        if rank == 0:  # PEFT would pickle this process's part
            with pytest.raises(AdapterError, match=r"weight is a DTensor .* Save whole tensors"):
                model.save_pretrained(Path(folder) / "adapter", safe_serialization=False)
        adapter = {key: value.full_tensor() for key, value in model.state_dict().items() if "reft" in key}
        if rank == 0:
            torch.save({"losses": losses, "adapter": adapter}, Path(folder) / "trained")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, Tensor]]:
    return trained_alone()


@pytest.mark.slow
@pytest.mark.parametrize("edits_first", [False, True])
@pytest.mark.parametrize(("low", "tolerance"), [(False, 1e-5), (True, 0.05)])
def test_two_processes_train_what_one_trains(
    low: bool, tolerance: float, edits_first: bool, alone: Any, tmp_path: Path
) -> None:
    mp.spawn(train_sharded, args=(str(tmp_path), low, edits_first), nprocs=2)
    got = torch.load(tmp_path / "trained", weights_only=True)
    losses, adapter = alone
    assert max(abs(a - b) for a, b in zip(got["losses"], losses, strict=True)) < tolerance
    assert got["adapter"].keys() == adapter.keys()
    for key, value in got["adapter"].items():
        assert value.dtype == torch.float32 and (value - adapter[key]).abs().max() < tolerance
        assert "halved" not in key or orthonormality_error(2 * value) < 1e-6


@pytest.mark.parametrize("where", ["a parameter", "a view"])
def test_fsdp_1_is_refused(where: str) -> None:
    """It marks parameters that it flattened into one, and in a forward puts views of that in their place."""
    model = adapted()
    rotation = next(module for module in model.modules() if isinstance(module, Rotation))
    if where == "a parameter":
        rotation.halved._fsdp_flattened = True
    else:
        whole = nn.Parameter(rotation.halved.detach().flatten().clone())
        whole._is_flat_param, shape = True, rotation.halved.shape
        del rotation.halved
        rotation.halved = whole.split(shape.numel())[0].view(shape)
    with pytest.raises(RuntimeError, match=r"FSDP1.*FSDP2.*DDP"):
        model(**batch(0))


def test_zero_3_is_refused() -> None:
    """DeepSpeed empties the parameters that it partitions, and marks them."""
    model = adapted()
    rotation = next(p for name, p in model.named_parameters() if name.endswith("halved"))
    rotation.ds_id, rotation.data = 3, torch.empty(0)
    with pytest.raises(RuntimeError, match=r"ZeRO stage 3.*stage 2.*FSDP2"):
        model(**batch(0))
