"""The file of an adapter's tensors: safetensors, or a pickle where PEFT was told `safe_serialization=False`.

A pickle is read as tensors alone, so that no code in it runs, and then checked as any other file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trimtab.errors import AdapterError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def weights_in(folder: Path) -> Path:
    """The file that is read: safetensors where there are both, as in PEFT."""
    pickle = folder / PICKLE
    return pickle if pickle.exists() and not (folder / WEIGHTS).exists() else folder / WEIGHTS


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file.

    Raises:
        AdapterError: it is missing, damaged, or something else, such as a pickle under another name.
    """
    if path.name == PICKLE:
        return read_pickle(path)
    check_kind(path)
    if not path.exists():
        raise AdapterError(f"{path}: missing; the folder holds a config without weights. Copy the file there too.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: {_what_it_is(path)} ({error}).") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle. No other function opens one.

    Raises:
        AdapterError: it is damaged, or holds anything else.
    """
    check_kind(path)
    try:
        # Mapped, a compressed file is refused, which could fill the memory.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        what = _what_it_is(path) if _start(path).startswith(_POINTER) else "not a pickle of tensors alone, or not whole"
        remedy = "No code in it was run. Copy it again, or ask for safetensors."
        raise AdapterError(f"{path}: {what} ({type(error).__name__}). {remedy}") from None
    if not isinstance(loaded, dict):
        raise AdapterError(f"{path}: not a pickle of tensors alone: it holds a {type(loaded).__name__}.")
    for key, value in loaded.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise AdapterError(
                f"{path}: not a pickle of tensors alone: {key} is a {type(value).__name__} that safetensors could not "
                "hold, such as a sharded, sparse or expanded one. Save whole tensors."
            )
    return {key: tensor.detach() for key, tensor in loaded.items()}


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with all its numbers in the file."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_nested)
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def check_kind(path: Path) -> None:
    """Raise AdapterError for what is there but is no file to read: a pipe waits for ever."""
    if path.exists() and not path.is_file():
        raise AdapterError(f"{path}: a pipe, folder or device, not a file. Copy the adapter again.")


_POINTER = b"version https://git-lfs"


def _start(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(64)


def _what_it_is(path: Path) -> str:
    """What a file that cannot be read looks like, and what to do."""
    start = _start(path)
    if start.startswith((b"\x80", b"PK")):
        return "a pickle under another name, which can run code when opened; it was not opened. Ask for safetensors"
    if start.startswith(_POINTER):
        return "a Git LFS pointer, not the weights; run `git lfs pull`"
    return "not a whole safetensors file; copy or save the adapter again"
