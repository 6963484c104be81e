"""Which base model an adapter was made on: a digest of the weights of its blocks."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.where.sites import find_blocks

_VALUES, _STRIDE = 64, 2_654_435_761  # a prime, which spreads its multiples over any size
_LEAST = 2.0**-14
"""What float16 holds in full precision; less is read as 0."""
_OURS = {"reft", "modules_to_save"}
_WRAPPERS = {"base_layer", "original_module"}
"""Names that PEFT puts around a module of the base."""


class OtherBase(UserWarning):
    """An adapter is loaded onto weights other than those it was made on.

    `warnings.simplefilter("error", trimtab.OtherBase)` makes it an error.
    """


def base_digest(model: nn.Module) -> str | None:
    """SHA-256, in hex, of the shapes and 64 values of each parameter of the blocks; adapters on them do not count.

    Values are rounded to bfloat16, so that weights stored so read the same in float32, bfloat16 and float16, and
    float32 ones in bfloat16.

    Returns:
        None where the weights cannot be told: on no device, sharded, quantized, rounded to float16, or in no blocks.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    try:
        parameters = _parameters(model)
    except ValueError:  # no blocks, or none that is meant
        return None
    if not parameters or not all(map(_is_whole, parameters.values())):
        return None
    values = _values(list(parameters.values()))
    if values is None:
        return None
    said = repr([(name, tuple(parameter.shape)) for name, parameter in parameters.items()]).encode()
    return hashlib.sha256(said + values.view(torch.uint8).numpy().tobytes()).hexdigest()


def differ(own: str | None, other: str | None) -> bool:
    """Whether two digests are of different weights, as far as both are known."""
    return own is not None and other is not None and own != other


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Of the blocks alone, sorted, by their number and name in it: the same in a headless model."""
    found = {}
    for number, (_, block) in enumerate(find_blocks(model)):
        for name, parameter in block.named_parameters():
            path = name.split(".")
            if not _OURS & set(path) and not any(part.startswith("lora_") for part in path):
                found[f"{number}.{'.'.join(part for part in path if part not in _WRAPPERS)}"] = parameter.detach()
    return dict(sorted(found.items()))


def _is_whole(parameter: Tensor) -> bool:
    """Plain floats: sharded and quantized ones are subclasses, bytes, or empty."""
    floats = parameter.is_floating_point() and parameter.element_size() > 1
    return type(parameter) is Tensor and floats and not parameter.is_meta and parameter.numel() > 0


@torch.no_grad()
def _values(parameters: list[Tensor]) -> Tensor | None:
    """Of all parameters, one after another, in bfloat16; None if one was rounded to float16 from who knows what."""
    picked: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        index = torch.arange(1, _VALUES + 1, device=parameter.device) * _STRIDE % math.prod(parameter.shape)
        own = torch.take(parameter, index).float()
        picked.setdefault((parameter.device, parameter.dtype), []).append(own.where(own.abs() >= _LEAST, 0))
    rounded = []
    for (_, dtype), values in picked.items():  # from each device at once
        exact = torch.cat(values).cpu()
        rounded.append(exact.bfloat16())
        if dtype == torch.float16 and not torch.equal(rounded[-1].float(), exact):
            return None
    return torch.cat(rounded)
