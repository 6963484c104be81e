"""Registering the methods with PEFT: now if PEFT is loaded, else when it is.

`import trimtab` alone must not cost the seconds that PEFT and transformers take to load: `trimtab --help` does it too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_METHODS = ("trimtab.adapter.tuner", "trimtab.adapter.lora_at")
"""Whose import registers: edits, and LoRAs at chosen tokens."""


class _WhenPeftIsLoaded(MetaPathFinder):
    """Stands aside, but has the methods registered right after `peft` ran, which need not be when it is first found."""

    def __init__(self) -> None:
        self._looking = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft" or self._looking:
            return None
        self._looking = True
        try:
            spec = find_spec("peft")
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                run(module)
                _register()

            loader.exec_module = run_and_register
        return spec


def register() -> None:
    """Have PEFT know the methods from the moment it is loaded."""
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenPeftIsLoaded())


def _register() -> None:
    for name in _METHODS:
        import_module(name)
