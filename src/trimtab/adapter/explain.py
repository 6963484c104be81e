"""What an adapter does to one prompt: how far each token moves at each block, and what each block's edit changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from trimtab.adapter.edit import edit_at
from trimtab.adapter.hooks import hook
from trimtab.adapter.picture import document, heat, shown
from trimtab.adapter.tuner import ReftLayer


@dataclass(frozen=True)
class Place:
    """One edited module."""

    module: str
    moved: tuple[float | None, ...]
    """Of each token: the norm of the change over that of the hidden state; None where nothing is edited."""
    without: Tensor
    """Log-probabilities (V,) of the next token when this module's edit is switched off, and no other."""
    matters: float
    """KL divergence, in nats, of that from what the whole adapter gives."""


@dataclass(frozen=True)
class Explanation:
    """What an adapter does to one prompt."""

    places: tuple[Place, ...]
    edited: Tensor
    """Log-probabilities (V,) of the next token with the adapter."""
    base: Tensor
    """And without it."""

    def top(self, count: int) -> list[int]:
        """The likeliest next tokens, with the adapter and without it."""
        likely = [int(i) for own in (self.edited, self.base) for i in own.topk(count).indices]
        return list(dict.fromkeys(likely))


@torch.no_grad()
def explain(model: PeftModel, ids: Tensor) -> Explanation:
    """Run a prompt under the active adapters, then once for each edited module without its edit.

    Args:
        model: a causal language model with ReFT adapters, in eval mode, which is left as it is.
        ids: (T,) the prompt.
    Raises:
        ValueError: the model has no ReFT adapter.
    """
    layers = [m for m in model.modules() if isinstance(m, ReftLayer)]
    if not layers:
        raise ValueError("explain: the model has no ReFT adapter.")
    if any(any(layer.loras.values()) for layer in layers):
        raise ValueError("explain: the adapter has a LoRA too, which changes every token at once; there is no picture.")
    moved: dict[str, Any] = {}

    def look(name: str, h: Tensor, before: Tensor) -> Tensor:
        change = (h - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-12)
        moved[name] = tuple(value if value > 0 else None for value in change.tolist())
        return h

    def put_back(name: str, h: Tensor, before: Tensor) -> Tensor:
        return before

    edited = _next(model, ids, layers, look)
    without = [_next(model, ids, [layer], put_back) for layer in layers]
    places = [
        Place(layer.site.name, moved[layer.site.name], off, float(_divergence(edited, off)))
        for layer, off in zip(layers, without, strict=True)
    ]
    return Explanation(tuple(places), edited, _next(model, ids, layers, put_back))


def _next(
    model: PeftModel, ids: Tensor, layers: Sequence[ReftLayer], change: Callable[[str, Tensor, Tensor], Tensor]
) -> Tensor:
    """Log-probabilities (V,) of the next token when modules give `change` of their name and of what they give after
    the adapters' edits and before."""
    before: dict[str, Tensor] = {}
    thread = threading.get_ident()

    def keep(name: str, hidden: Tensor) -> Tensor:
        if threading.get_ident() == thread:
            before[name] = hidden
        return hidden

    def changed(name: str, h: Tensor) -> Tensor:
        return change(name, h, before[name].reshape(h.shape).to(h))

    with ExitStack() as within:
        for site in (layer.site for layer in layers):
            within.enter_context(edit_at(model, [site], partial(changed, site.name)))
            within.callback(hook(site, partial(keep, site.name), first=True).remove)
        logits = model(input_ids=ids[None].to(model.device), prompt_lengths=[len(ids)]).logits
    return logits[0, -1].float().log_softmax(-1).cpu()  # type: ignore[no-any-return]


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    return nn.functional.kl_div(found, wanted, log_target=True, reduction="sum")


# ---- the picture -----------------------------------------------------------------------------------------------------


def page(found: Explanation, title: str, tokens: Sequence[str], names: dict[int, str]) -> str:
    """One HTML file that needs nothing else.

    Args:
        tokens: of the prompt, as they are shown.
        names: of the next tokens to show, by id.
    """
    most = max((value for place in found.places for value in place.moved if value), default=1.0)
    heads = "".join(f"<th>{shown(token)}</th>" for token in tokens)
    body = "".join(
        f"<tr><th class=m>{escape(place.module)}</th>{''.join(heat(v, most) for v in place.moved)}"
        f'<td class=k><i style="width:{_share(place.matters):.1f}em"></i>{place.matters:.3f}</td></tr>'
        for place in reversed(found.places)
    )
    lines = [("base model", found.base), ("adapter", found.edited)]
    lines += [(f"without {place.module}", place.without) for place in found.places]
    bars = "".join(
        f"<tr><th class=m>{escape(line)}</th>{''.join(_bar(float(own[i].exp())) for i in names)}</tr>"
        for line, own in lines
    )
    words = "".join(f"<th>{shown(name)}</th>" for name in names.values())
    return document(
        title,
        f"""<h2>How far the adapter moves each token</h2>
<p>Each cell is the length of the change over the length of the hidden state: 1.00 is as far as the state itself is
long. Grey cells are not edited. The last block is at the top. On the right, what the model would lose: how far the
probabilities of the next token change when this block's edit alone is switched off (KL divergence in nats; 0 is not at
all). A full bar is {FULL:g} or more.</p>
<div><table><tr><th></th>{heads}<th>changes the next token by</th></tr>{body}</table></div>
<h2>What comes next</h2>
<p>The probability of the likeliest next tokens: for the base model, for the adapter, and for the adapter without the
edit of one block.</p>
<div><table><tr><th></th>{words}</tr>{bars}</table></div>""",
        _STYLE,
    )


_STYLE = """
td { min-width: 3.6em } td.k { text-align: left; background: none; padding-left: .8em; white-space: nowrap }
i { display: inline-block; height: .8em; background: #8a5a00; margin-right: .4em }
td.b { text-align: left; min-width: 7em }
td.b b { display: inline-block; height: 1.1em; background: #2b6cb0; vertical-align: middle; margin-right: .4em }
"""


FULL = 1.0
"""Nats of a full bar: the same in each picture, so that pictures can be compared."""


def _share(value: float) -> float:
    return 6 * min(1.0, value / FULL)


def _bar(share: float) -> str:
    return f'<td class=b><b style="width:{4 * share:.2f}em"></b>{share:.1%}</td>'
