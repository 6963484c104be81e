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
    """Log-probabilities (V,) of the first token."""
    says: Tensor
    """Ids of its own answer, greedy."""
    answer: float
    """Log-probability of the answer that is explained, whole."""


@dataclass(frozen=True)
class Place:
    """One edited module."""

    module: str
    moved: tuple[float | None, ...]
    """Of each token, of the prompt and then of the explained answer but its last, which no module reads: the norm of
    the change over that of the hidden state; None where nothing is edited."""
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
    """(N,) ids of the answer that is explained."""
    edited: Outcome
    base: Outcome
    places: tuple[Place, ...]
    """In the order of the forward pass."""

    @property
    def rows(self) -> list[tuple[str, Outcome]]:
        """Each way of asking the model, by name."""
        ways = [("with the adapter", self.edited), ("base model", self.base)]
        return ways + [(f"without {place.label}", place.without) for place in self.places]

    def times(self, outcome: Outcome) -> str:
        """How much less, or more, likely than with the adapter the answer is: `27× less`."""
        change = outcome.answer - self.edited.answer
        if abs(change) < 0.01:
            return "the same"
        times = math.exp(min(abs(change), 20))
        count = f"{times:.2f}" if times < 10 else f"{times:,.0f}" if times < 1e6 else "over a million"
        return f"{count}× {'more' if change > 0 else 'less'}"


def percent(log_probability: float) -> str:
    """A probability for people."""
    share = math.exp(log_probability)
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"


@torch.no_grad()
def explain(model: PeftModel, ids: Tensor, answer: Tensor | None = None, max_new_tokens: int = 32) -> Explanation:
    """Answer a prompt under the active adapters, without them, and once without each edited module's edit, and see how
    likely one answer is each time.

    Args:
        model: a causal language model with ReFT adapters, in eval mode, which is left as it is.
        ids: (T,) the prompt.
        answer: (N,) ids of the answer to explain; by default the adapters' own.
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

    ask = partial(_outcome, model, ids, max_new_tokens)
    edited = ask(answer, layers, look)
    answer = edited.says if answer is None else answer
    places = [Place(layer.site.name, moved[layer.site.name], ask(answer, [layer], put_back)) for layer in layers]
    return Explanation(answer, edited, ask(answer, layers, put_back), tuple(places))


def _answered(model: PeftModel, ids: Tensor, max_new_tokens: int) -> Tensor:
    """(N,)"""
    asked = ids[None].to(model.device)
    how = {"attention_mask": torch.ones_like(asked), "max_new_tokens": max_new_tokens}
    out: Tensor = model.generate(input_ids=asked, do_sample=False, pad_token_id=0, **how)
    return out[0, len(ids) :].cpu()


def _outcome(
    model: PeftModel,
    ids: Tensor,
    max_new_tokens: int,
    answer: Tensor | None,
    layers: Sequence[ReftLayer],
    change: Callable[[str, Tensor, Tensor], Tensor],
) -> Outcome:
    """What comes when modules give `change` of their name, of what they give after the adapters' edits, and before.

    The answer is by default what is said then.
    """
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
        says = _answered(model, ids, max_new_tokens)
        answer = says if answer is None else answer
        whole = torch.cat([ids.cpu(), answer[:-1]])[None].to(model.device)
        logits = model(input_ids=whole, prompt_lengths=[len(ids)]).logits
    said = logits[0, len(ids) - 1 :].float().log_softmax(-1).cpu()
    return Outcome(said[0], says, float(said.gather(1, answer[:, None]).sum()))


# ---- the picture -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """What a page has to be told, as texts."""

    adapter: str
    prompt: str
    tokens: Sequence[str]
    """Of the prompt, and of the explained answer but its last."""
    answer: str
    """The one explained."""
    edits: str
    """Which tokens are edited."""
    text: Callable[[Tensor], str]
    """Of ids: an answer's."""
    token: Callable[[int], str]

    def first(self, outcome: Outcome, count: int = 2) -> str:
        """The likeliest first tokens, with their probabilities."""
        found = outcome.next.topk(count)
        return ", ".join(f"{self.token(int(i))!r} {float(p.exp()):.0%}" for p, i in zip(*found, strict=True))


READING = """less likely without the edit of a layer: it works towards this answer, which may be right or wrong; more
likely: against it. Layers are switched off one at a time, and their shares do not add up. One prompt proves little."""
MOVING = """the length of the change over that of the hidden state, which is what the model holds for the token after
that layer. A token that is moved far need not matter much."""


def page(found: Explanation, words: Words) -> str:
    """One HTML file that needs nothing else."""
    prompt = len(words.tokens) - len(found.answer) + 1
    answer_edited = any(value is not None for place in found.places for value in place.moved[prompt:])
    seen = len(words.tokens) if answer_edited else prompt
    heads = "".join(f"<th{_edge(i, prompt)}>{shown(token)}</th>" for i, token in enumerate(words.tokens[:seen]))
    body = "".join(
        f"<tr><th class=m>{escape(place.label)}</th>"
        + "".join(_cell(value, _edge(i, prompt)) for i, value in enumerate(place.moved[:seen]))
        + "</tr>"
        for place in found.places
    )
    rows = "".join(
        f"<tr{' class=e' if i == 2 else ''}><th class=m>{escape(line)}</th><td>{escape(words.text(own.says))}</td>"
        f"<td>{percent(own.answer)}</td><td>{found.times(own) if i else ''}</td><td>{escape(words.first(own))}</td>"
        "</tr>"
        for i, (line, own) in enumerate(found.rows)
    )
    beyond = "" if answer_edited else " Tokens of the answer are not edited, and not shown."
    return document(
        f"What the adapter “{words.adapter}” does to the prompt “{words.prompt}”",
        f"""<h2>What each layer's edit does to the answer</h2>
<p>Each row asks the model once more: with the adapter, without it, and without the edit of one layer. It says what is
answered (greedily) and how likely the answer “{escape(words.answer)}” is. {READING[0].upper()}{READING[1:]}</p>
<div><table class=a><tr><th></th><th>answers</th><th>chance of “{escape(words.answer)}”</th>
<th>than with the adapter</th><th>likeliest first tokens</th></tr>{rows}</table></div>
<h2>How far each token is moved</h2>
<p>The adapter edits {escape(words.edits)}; empty cells are not edited.{beyond} A token is a word or a piece of one, or
a mark that the chat template puts in. A number is {MOVING} 1.00 has the darkest blue. The first layer is at the
top.</p>
<div><table class=h><tr><th></th>{heads}</tr>{body}</table></div>""",
        _STYLE,
    )


_STYLE = """
.a th { text-align: left } .a th.m { text-align: right }
.a td { border-radius: 0; background: none; text-align: left; padding: 0 .5em }
.a tr.e > * { border-top: 1px solid #1b1f24 } .a td:nth-child(3) { text-align: right }
.h td { min-width: 2.8em } .h td:empty { background: none }
th.m { position: sticky; left: 0; background: #fff } th.e, td.e { border-left: 2px solid #1b1f24 }
@media (max-width: 500px) { table { font-size: .75em } th, .a td { padding: .2em } }
"""


def _edge(i: int, prompt: int) -> str:
    """Marks where the answer begins."""
    return " class=e" if i == prompt else ""


def _cell(value: float | None, edge: str) -> str:
    return heat(value, MOVES_FULL).replace("<td", f"<td{edge}", 1)
