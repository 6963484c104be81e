"""Tiny models are read from disk once."""

import copy
from typing import Any

import pytest

from trimtab.interop.base import Base


@pytest.fixture(scope="session")
def read_models() -> dict[Any, Any]:
    return {}


@pytest.fixture(autouse=True)
def loaded_once(read_models: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`Base.load` by a copy of what it gave before for the same base."""
    load = Base.load

    def remembered(self: Base, dtype: Any = None) -> Any:
        key = self.name, self.task, self.labels, dtype
        if key not in read_models:
            read_models[key] = load(self) if dtype is None else load(self, dtype)
        return copy.deepcopy(read_models[key])

    monkeypatch.setattr(Base, "load", remembered)
