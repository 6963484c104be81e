"""Hooks that put hidden states through a function, at whichever side of a module a `Site` means.

They are plain objects, so that a deep copy of a model copies what its hooks hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.where.sites import Site

Change = Callable[[Tensor], Tensor]
"""Of hidden states; gives them themselves to leave them alone."""


@dataclass(frozen=True)
class OnOutput:
    """A forward hook: the output, or the first of several, changed."""

    change: Change

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        changed = self.change(hidden)
        if changed is hidden:
            return None
        return changed if isinstance(output, Tensor) else type(output)((changed, *output[1:]))


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
