"""trimtab: representation fine-tuning (ReFT, LoReFT) as a PEFT method.

Importing it registers the method with PEFT, after which `get_peft_model` and `PeftModel.from_pretrained` know it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimtab.registration import register

if TYPE_CHECKING:
    from trimtab.adapter.config import ReftConfig
    from trimtab.adapter.tuner import ReftModel, set_scale
    from trimtab.edits import METHODS
    from trimtab.where.positions import Positions, parse_positions

__version__ = "0.1.0"
__all__ = ["METHODS", "Positions", "ReftConfig", "ReftModel", "__version__", "parse_positions", "set_scale"]

_HOMES = {
    "METHODS": "edits",
    "Positions": "where.positions",
    "ReftConfig": "adapter.config",
    "ReftModel": "adapter.tuner",
    "parse_positions": "where.positions",
    "set_scale": "adapter.tuner",
}
"""Where each public name lives; imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"trimtab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register()
