"""The processes that train together, as torchrun or `accelerate launch` starts them: all train, the first writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from trimtab.errors import RunError

_ELSEWHERE = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which one this is; the first is 0."""
    return int(os.environ.get("RANK", 0))


def meet() -> None:
    """Join the others, each on a device of its own.

    Raises:
        RunError: they were asked to share out the model, which `trimtab train` does not do.
    """
    for variable, name in _ELSEWHERE.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise RunError(
                f"trimtab train keeps a whole frozen model in each process, and {name} was asked to share it out. "
                "Choose MULTI_GPU or MULTI_CPU in accelerate's config (plain torchrun does), or train a ReftConfig in "
                "a Trainer of your own, which takes both."
            )
    if count() > 1 and (met := _state().num_processes) != count():
        raise RunError(f"{count()} processes were started and {met} met; is each told of the others (torchrun does)?")


def once(write: Callable[..., Any], *args: Any) -> None:
    """Let the first write, and all go on when it has."""
    if rank() == 0:
        write(*args)
    wait()


def wait() -> None:
    """For the slowest."""
    if count() > 1:
        _state().wait_for_everyone()


def shared(work: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
    """What `work` makes of each item, in order: each process does its part, and all get the whole."""
    if count() == 1:
        return work(items)
    from torch.distributed import all_gather_object

    parts: list[Any] = [None] * count()
    all_gather_object(parts, work(items[rank() :: count()]))
    results: list[Any] = [None] * len(items)
    for at, part in enumerate(parts):
        results[at :: count()] = part
    return results


def _state() -> Any:
    import torch
    from accelerate import PartialState  # only here, since most commands run alone

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without which each process would train by itself, in silence
    return PartialState(cpu=not torch.cuda.is_available())
