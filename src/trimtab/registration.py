"""Registering the method with PEFT: now if PEFT is loaded, else when it is.

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

_TUNER = "trimtab.adapter.tuner"
"""Whose import registers."""


class _WhenPeftIsLoaded(MetaPathFinder):
    """Stands aside, but has the method registered right after `peft` ran, which need not be when it is first found."""

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
                import_module(_TUNER)

            loader.exec_module = run_and_register
        return spec


def register() -> None:
    """Have PEFT know the method from the moment it is loaded."""
    if "peft" in sys.modules:
        import_module(_TUNER)
    else:
        sys.meta_path.insert(0, _WhenPeftIsLoaded())
