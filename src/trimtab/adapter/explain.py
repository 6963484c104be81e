"""What an adapter does to one prompt: the answer, what of it is each layer's doing, and how far each token is moved."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from trimtab.adapter.edit import edit_at
from trimtab.adapter.hooks import hook
from trimtab.adapter.picture import document, heat, shown
from trimtab.adapter.tuner import ReftLayer

MOVES_FULL = 1.0
"""Of the darkest cell: the change is as long as the hidden state. The same in each picture, so that they compare."""


@dataclass(frozen=True)
class Outcome:
    """What a model says after the prompt."""

    next: Tensor
    """Log-probabilities (V,) of the next token."""
    answer: float
    """Log-probability of the adapter's answer, whole."""


@dataclass(frozen=True)
class Place:
    """One edited module."""

    module: str
    moved: tuple[float | None, ...]
    """Of each token, of the prompt and then of the answer but its last, which no module reads: the norm of the change
    over that of the hidden state; None where nothing is edited."""
    without: Outcome
    """When this module's edit is switched off, and no other."""

    @property
    def label(self) -> str:
        """`layer 3`, and what in it where that is not the whole block."""
        match = re.fullmatch(r".*?\.(\d+)(?:\.(.+))?", self.module)
        return self.module if match is None else f"layer {match[1]}" + (f" {match[2]}" if match[2] else "")


@dataclass(frozen=True)
class Explanation:
    """What an adapter does to one prompt."""

    answer: Tensor
    """(N,) ids of the greedy answer with the adapter."""
    base_answer: Tensor
    """(M,) and without it."""
    edited: Outcome
    base: Outcome
    places: tuple[Place, ...]
    """In the order of the forward pass."""

    @property
    def rows(self) -> list[tuple[str, Outcome]]:
        """Each way of asking the model, by name."""
        ways = [("with the adapter", self.edited), ("base model", self.base)]
        return ways + [(f"without {place.label}", place.without) for place in self.places]

    def top(self, count: int) -> list[int]:
        """The likeliest next tokens, with the adapter and without it."""
        likely = [int(i) for own in (self.edited, self.base) for i in own.next.topk(count).indices]
        return list(dict.fromkeys(likely))

    def times(self, outcome: Outcome) -> str:
        """How much less, or more, likely than with the adapter its answer is: `27× less likely`."""
        change = outcome.answer - self.edited.answer
        if abs(change) < 0.005:
            return "as likely"
        times = math.exp(min(abs(change), 20))
        count = f"{times:.2f}" if times < 10 else f"{times:,.0f}" if times < 1e6 else "over a million"
        return f"{count}× {'more' if change > 0 else 'less'} likely"


def percent(log_probability: float) -> str:
    """A probability for people."""
    share = math.exp(log_probability)
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"


@torch.no_grad()
def explain(model: PeftModel, ids: Tensor, max_new_tokens: int = 32) -> Explanation:
    """Answer a prompt under the active adapters and without, then see how likely that answer is without each edit.

    Args:
        model: a causal language model with ReFT adapters, in eval mode, which is left as it is.
        ids: (T,) the prompt.
        max_new_tokens: of the answers, which are greedy.
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

    def answered() -> Tensor:
        asked = ids[None].to(model.device)
        how = {"attention_mask": torch.ones_like(asked), "max_new_tokens": max_new_tokens}
        return model.generate(input_ids=asked, do_sample=False, pad_token_id=0, **how)[0, len(ids) :].cpu()  # type: ignore[no-any-return]

    answer = answered()
    with model.disable_adapter():
        base_answer = answered()
    outcome = partial(_outcome, model, ids, answer)
    edited = outcome(layers, look)
    places = [Place(layer.site.name, moved[layer.site.name], outcome([layer], put_back)) for layer in layers]
    return Explanation(answer, base_answer, edited, outcome(layers, put_back), tuple(places))


def _outcome(
    model: PeftModel,
    ids: Tensor,
    answer: Tensor,
    layers: Sequence[ReftLayer],
    change: Callable[[str, Tensor, Tensor], Tensor],
) -> Outcome:
    """What comes when modules give `change` of their name, of what they give after the adapters' edits, and before."""
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
        whole = torch.cat([ids.cpu(), answer[:-1]])[None].to(model.device)
        logits = model(input_ids=whole, prompt_lengths=[len(ids)]).logits
    said = logits[0, len(ids) - 1 :].float().log_softmax(-1).cpu()
    return Outcome(said[0], float(said.gather(1, answer[:, None]).sum()))


# ---- the picture -----------------------------------------------------------------------------------------------------


def page(
    found: Explanation, title: str, tokens: Sequence[str], names: dict[int, str], answers: Sequence[str], why: str
) -> str:
    """One HTML file that needs nothing else.

    Args:
        tokens: of the prompt and of the answer but its last, as they are shown.
        names: of the next tokens to show, by id.
        answers: with the adapter and without it, as texts.
        why: which tokens are edited, in words.
    """
    prompt = len(tokens) - len(found.answer) + 1
    answer_edited = any(value is not None for place in found.places for value in place.moved[prompt:])
    seen = len(tokens) if answer_edited else prompt
    heads = "".join(f"<th{_edge(i, prompt)}>{shown(token)}</th>" for i, token in enumerate(tokens[:seen]))
    body = "".join(
        f"<tr><th class=m>{escape(place.label)}</th>"
        + "".join(_cell(value, _edge(i, prompt)) for i, value in enumerate(place.moved[:seen]))
        + "</tr>"
        for place in found.places
    )
    full = max([math.log(2)] + [abs(own.answer - found.edited.answer) for _, own in found.rows])
    rows = "".join(
        f"<tr><th class=m>{escape(line)}</th><td>{percent(own.answer)}</td><td class=k>"
        + (f"{_bar((own.answer - found.edited.answer) / full)}{found.times(own)}" if i else "")
        + "</td>"
        + "".join(f"<td>{float(own.next[token].exp()):.1%}</td>" for token in names)
        + "</tr>"
        for i, (line, own) in enumerate(found.rows)
    )
    words = "".join(f"<th>next {shown(name)}</th>" for name in names.values())
    beyond = "" if answer_edited else " Tokens of the answer are not edited, and not shown."
    return document(
        title,
        f"""<table class=a><tr><th class=m>with the adapter</th><td>{shown(answers[0])}</td></tr>
<tr><th class=m>base model</th><td>{shown(answers[1])}</td></tr></table>
<h2>What each layer's edit is worth</h2>
<p>The probability of the adapter's whole answer, {shown(answers[0])}: with the adapter, without it (base model), and
with the edit of one layer switched off while the others stay. Less likely without a layer's edit means that this edit
helped; more likely, that it got in the way. On the right, tokens that could come first, with their probabilities.</p>
<div><table><tr><th></th><th>the answer</th><th></th>{words}</tr>{rows}</table></div>
<h2>How far each token is moved</h2>
<p>The adapter edits {escape(why)}.{beyond} Each cell is the length of the change over the length of the hidden
state: 1.00, the darkest, is as far as the state itself is long. Grey cells are not edited. Layers run from the first,
at the top, to the last. A token that is moved far need not matter much: what matters, the table above says.</p>
<div><table><tr><th></th>{heads}</tr>{body}</table></div>""",
        _STYLE,
    )


_STYLE = """
table.a td { text-align: left; padding: .2em .8em; height: auto }
td { min-width: 3.6em } td.k { text-align: left; background: none; padding: 0 .8em; white-space: nowrap }
i { display: inline-block; height: .8em; background: #8a5a00; margin-right: .4em } i.up { background: #2b6cb0 }
th.m { position: sticky; left: 0; background: #fff }
th.e, td.e { border-left: 2px solid #1b1f24 }
"""


def _edge(i: int, prompt: int) -> str:
    """Marks where the answer begins."""
    return " class=e" if i == prompt else ""


def _cell(value: float | None, edge: str) -> str:
    return heat(value, MOVES_FULL).replace("<td", f"<td{edge}", 1)


def _bar(share: float) -> str:
    return f'<i{" class=up" if share > 0 else ""} style="width:{4 * abs(share):.1f}em"></i>'
