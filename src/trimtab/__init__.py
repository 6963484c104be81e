"""trimtab: representation fine-tuning (ReFT, LoReFT) as a PEFT method.

Importing it registers the method with PEFT, after which `get_peft_model` and `PeftModel.from_pretrained` know it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimtab.registration import register

if TYPE_CHECKING:
    from trimtab.adapter.config import ReftConfig
    from trimtab.adapter.edit import edit
    from trimtab.adapter.folder import adapter_from
    from trimtab.adapter.identity import OtherBase
    from trimtab.adapter.loading import expect_missing
    from trimtab.adapter.lora_at import LoraAtConfig
    from trimtab.adapter.readout import set_pool
    from trimtab.adapter.running import prompts
    from trimtab.adapter.sharding import shard_edits
    from trimtab.adapter.shared_rotation import share_rotation
    from trimtab.adapter.tuner import ReftModel, set_scale
    from trimtab.edits import METHODS
    from trimtab.runs.trainer import supervised_only, with_prompts
    from trimtab.where.positions import Positions, parse_positions

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "LoraAtConfig",
    "OtherBase",
    "Positions",
    "ReftConfig",
    "ReftModel",
    "__version__",
    "adapter_from",
    "edit",
    "expect_missing",
    "parse_positions",
    "prompts",
    "set_pool",
    "set_scale",
    "shard_edits",
    "share_rotation",
    "supervised_only",
    "with_prompts",
]

_HOMES = {
    "METHODS": "edits",
    "LoraAtConfig": "adapter.lora_at",
    "OtherBase": "adapter.identity",
    "Positions": "where.positions",
    "ReftConfig": "adapter.config",
    "ReftModel": "adapter.tuner",
    "adapter_from": "adapter.folder",
    "edit": "adapter.edit",
    "expect_missing": "adapter.loading",
    "parse_positions": "where.positions",
    "prompts": "adapter.running",
    "set_pool": "adapter.readout",
    "set_scale": "adapter.tuner",
    "shard_edits": "adapter.sharding",
    "share_rotation": "adapter.shared_rotation",
    "supervised_only": "runs.trainer",
    "with_prompts": "runs.trainer",
}
"""Where each public name lives; imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"trimtab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register()
