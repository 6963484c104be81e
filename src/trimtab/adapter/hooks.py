"""Hooks that put hidden states through a function, at whichever side of a module a `Site` means.

They are plain objects, so that a deep copy of a model copies what its hooks hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from trimtab.where.sites import Site

Change = Callable[[Tensor], Tensor]
"""Of hidden states; gives them themselves to leave them alone."""


def first_of(output: Any) -> Tensor:
    """A module's output, or the first of several. Raises TypeError for what has no first."""
    if isinstance(output, Tensor):
        return output
    if not isinstance(output, tuple | list | ModelOutput):
        raise TypeError(
            f"a module gives a {type(output).__name__}, of which no value is the first; choose another site"
        )
    first: Tensor = output[0]
    return first


def with_first(output: Any, changed: Tensor) -> Any:
    """A module's output of several values with another first one."""
    if isinstance(output, ModelOutput):
        return type(output)(**{**output, next(iter(output)): changed})
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: changed})
    return type(output)((changed, *output[1:]))


@dataclass(frozen=True)
class OnOutput:
    """A forward hook: the output, or the first of several, changed."""

    change: Change

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = first_of(output)
        changed = self.change(hidden)
        if changed is hidden:
            return None
        return changed if isinstance(output, Tensor) else with_first(output, changed)


@dataclass(frozen=True)
class OnInput:
    """A forward pre-hook: the first argument changed."""

    change: Change

    def __call__(self, module: nn.Module, args: Any) -> Any:
        changed = self.change(args[0])
        return None if changed is args[0] else (changed, *args[1:])


def hook(site: Site, change: Change, first: bool = False) -> RemovableHandle:
    """Have a site's hidden states go through `change`, before all other hooks there if `first`."""
    if site.of_input:
        return site.module.register_forward_pre_hook(OnInput(change), prepend=first)
    return site.module.register_forward_hook(OnOutput(change), prepend=first)


def hooks_of(site: Site) -> Any:
    """All hooks at that side of the module, by their number, in the order in which they run."""
    return site.module._forward_pre_hooks if site.of_input else site.module._forward_hooks
