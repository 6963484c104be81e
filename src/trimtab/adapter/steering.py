"""Adapters without training: a direction read off pairs of texts, and what is done along it.

For each pair (x⁺, x⁻) and block, h is the mean of the hidden states at the chosen tokens. The direction u, of length 1
(`edits/directions.py`), is found by

- `mean`: the difference of means;
- `pca`: the first principal component of the pairs' differences;
- `caa`: the mean over pairs at the last token alone, an answer's say, whatever tokens are edited (contrastive
  activation addition, arXiv:2312.06681).

The `action` is what the adapter does, n being the median norm of the block's hidden states at those tokens:

- `add`: h + s n u (method `vector`), s by default the distance of the means along u in units of n;
- `clamp`: h + (s n - uᵀh) u (method `consreft`): the coordinate is fixed, by default where the positives have it;
- `erase`: LEACE (method `direft`), after which no linear probe tells the states of both kinds apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.edit import edit
from trimtab.adapter.folder import adapter_from, as_edit
from trimtab.edits.directions import difference_of_means, leace, principal_component
from trimtab.errors import DataError
from trimtab.where.positions import parse_positions
from trimtab.where.sites import find_sites

FEWEST = 4
"""Pairs, of which every fourth is held out."""
Direction = Callable[[Tensor, Tensor], Tensor]
HOW: dict[str, Direction] = {
    "mean": difference_of_means,
    "pca": principal_component,
    "caa": difference_of_means,
}


class States(NamedTuple):
    """Of texts of one kind at one block, at the chosen tokens."""

    means: Tensor
    """(n, d), of each text."""
    norms: Tensor
    """(tokens,), of all texts."""
    every: Tensor
    """(tokens, d), of all texts; (0, d) where the action does not ask for it, since they take memory."""

    @classmethod
    def together(cls, texts: Sequence[States]) -> States:
        return cls(*map(torch.cat, zip(*texts, strict=True)))


class Plan(NamedTuple):
    """What an action makes of the states at one block."""

    tensors: dict[str, Tensor]
    """Of the edit."""
    reads: Tensor
    """(d,), which is multiplied with a state to tell the kinds apart."""
    strength: float | None = None
    """In norms of the hidden state; None where there is none."""


def _add(plus: States, minus: States, direction: Direction, norm: float, strength: float | None) -> Plan:
    unit = direction(plus.means, minus.means)
    amount = float((plus.means - minus.means).mean(0) @ unit) / norm if strength is None else strength
    return Plan({"vector": unit * norm, "strength": torch.tensor([amount])}, unit, amount)


def _clamp(plus: States, minus: States, direction: Direction, norm: float, strength: float | None) -> Plan:
    unit = direction(plus.means, minus.means)
    amount = float(plus.means.mean(0) @ unit) / norm if strength is None else strength
    return Plan({"rotation": unit[None], "bias": torch.tensor([amount * norm])}, unit, amount)


def _erase(plus: States, minus: States, direction: Direction, norm: float, strength: float | None) -> Plan:
    if strength is not None:
        raise ValueError(f"strength={strength}: erasing has none; `trimtab compose -w 0.5` takes half of it.")
    term = leace(plus.every, minus.every)
    tensors = {"projection": term.basis, "weight": term.rows, "bias": term.bias}
    return Plan({name: tensor.float() for name, tensor in tensors.items()}, -term.rows[0].float())


class Action(NamedTuple):
    """One thing to do with a direction."""

    fields: dict[str, Any]
    """Of the adapter's config."""
    plan: Callable[[States, States, Direction, float, float | None], Plan]
    """From positives, negatives, how the direction is found, n, and the strength if it is given."""
    both: bool = False
    """Whether it looks at every token, is for positives too, and makes what follows both kinds alike."""


ACTIONS = {
    "add": Action({"method": "vector"}, _add),
    "clamp": Action({"method": "consreft", "r": 1}, _clamp),
    "erase": Action({"method": "direft", "r": 1}, _erase, both=True),
}


@dataclass(frozen=True)
class Layer:
    """What was found at one block, and what the pairs that were held out say of it."""

    number: int
    edit: nn.Module
    """Φ(h) - h: (n, d) -> (n, d)."""
    plan: Plan
    accuracy: float
    """Share of held-out texts on their own side of the midpoint between the means."""
    gap_closed: float
    """1 - KL(p⁺ ‖ p of x⁻ when edited) / KL(p⁺ ‖ p of x⁻), over the next token after held-out texts: 1 if the edit
    makes the model go on after x⁻ as it does after x⁺, 0 if it changes nothing, below 0 if it leads elsewhere. For an
    action on both kinds the p⁺ above is that of x⁺ when edited."""

    @property
    def strength(self) -> float | None:
        return self.plan.strength

    def change(self, h: Tensor) -> Tensor:
        """Φ(h), for `trimtab.edit`."""
        return h + self.edit(h)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Steering:
    """Edits at the chosen blocks."""

    layers: tuple[Layer, ...]
    """All that were looked at."""
    chosen: tuple[int, ...]
    config: ReftConfig

    def save(self, model: nn.Module, output: str | Path) -> ReftConfig:
        """Write it as an adapter. Raises FileExistsError for what is there already."""
        tensors = {layer.number: layer.plan.tensors for layer in self.layers if layer.number in self.chosen}
        return adapter_from(tensors, self.config, model, output)


@torch.no_grad()
def steer(
    model: nn.Module,
    positive: Sequence[Tensor],
    negative: Sequence[Tensor],
    *,
    how: str = "mean",
    action: str = "add",
    layers: list[int] | None = None,
    positions: str = "all",
    strength: float | None = None,
) -> Steering:
    """Find the edits from pairs of texts.

    Args:
        model: a causal language model in eval mode, which is left as it is.
        positive, negative: token ids (T,) of texts that have and lack what is wanted; the i-th of both are a pair.
        how: the direction is found, of `HOW`; `erase` finds its own.
        action: what is done along it, of `ACTIONS`.
        layers: blocks to edit, counted from 0; None: the one that closes most of the gap on the held-out pairs.
        positions: tokens to edit, of texts as prompts; the same are read (for `generated` and `caa` the text's last).
        strength: in units of the hidden states' norm.
    Raises:
        ValueError: a field is wrong; DataError for too few pairs, or halves of unequal number.
    """
    _check(how, action, len(positive), len(negative))
    edited = "l1" if parse_positions(positions).scope == "generated" else positions
    numbers = _numbers(layers, len(find_sites(model, "block", "all")))
    read = partial(_read, model, numbers, "l1" if how == "caa" else edited, ACTIONS[action].both)
    held = [(positive[i], negative[i]) for i in range(len(positive)) if _held_out(i)]
    before = [(_next(model, plus), _next(model, minus)) for plus, minus in held]
    config = ReftConfig(task_type="CAUSAL_LM", positions=positions, **ACTIONS[action].fields)
    search = _Search(model, HOW[how], ACTIONS[action], config, strength, edited, held, before)
    found = [search.layer(*own) for own in zip(numbers, read(positive), read(negative), strict=True)]
    best = max(found, key=lambda layer: layer.gap_closed).number
    return Steering(tuple(found), (best,) if layers is None else tuple(numbers), config)


@dataclass(frozen=True)
class _Search:
    """What is the same for all blocks."""

    model: nn.Module
    direction: Direction
    action: Action
    config: ReftConfig
    strength: float | None
    edited: str
    held: Sequence[tuple[Tensor, Tensor]]
    before: Sequence[tuple[Tensor, Tensor]]
    """What follows the pairs that were held out: log-probabilities (V,)."""

    def layer(self, number: int, positive: Sequence[States], negative: Sequence[States]) -> Layer:
        """From each text's states at a block."""
        plus, minus, *kept = (
            States.together([text for i, text in enumerate(texts) if _held_out(i) == out])
            for out in (False, True)
            for texts in (positive, negative)
        )
        if torch.equal(plus.means.mean(0), minus.means.mean(0)):
            raise DataError("positive and negative texts have the same hidden states at these tokens: no direction.")
        norm = float(States.together([*positive, *negative]).norms.median())
        plan = self.action.plan(plus, minus, self.direction, norm, self.strength)
        made, reads = as_edit(self.config, plan.tensors), plan.reads
        middle = (plus.means + minus.means).mean(0) @ reads / 2
        right = torch.cat([kept[0].means @ reads > middle, kept[1].means @ reads < middle])
        return Layer(number, made, plan, float(right.float().mean()), self.gap_closed(number, made))

    def gap_closed(self, number: int, made: nn.Module) -> float:
        """As `Layer.gap_closed`."""
        with edit(self.model, lambda h: h + made(h), layers=[number], positions=self.edited):
            minus = [_next(self.model, ids) for _, ids in self.held]
            plus = [_next(self.model, ids) if self.action.both else None for ids, _ in self.held]
        gap = sum(_divergence(*pair) for pair in self.before)
        left = sum(
            _divergence(wanted if edited is None else edited, found)
            for (wanted, _), edited, found in zip(self.before, plus, minus, strict=True)
        )
        return 1 - left / gap if gap else 0.0


def _held_out(i: int) -> bool:
    return i % FEWEST == FEWEST - 1


def _check(how: str, action: str, positives: int, negatives: int) -> None:
    known: tuple[tuple[str, str, Any], ...] = (("how", how, HOW), ("action", action, ACTIONS))
    for name, value, choices in known:
        if value not in choices:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}.")
    if action == "erase" and how != "mean":
        raise ValueError(f"how={how!r}: action='erase' finds a direction of its own.")
    if positives != negatives or positives < FEWEST:
        raise DataError(
            f"{positives} positive and {negatives} negative texts: give at least {FEWEST} pairs, the i-th of both "
            "being one."
        )


def _numbers(layers: list[int] | None, count: int) -> list[int]:
    """Blocks counted from 0. Raises ValueError for those that are not there."""
    if layers is None:
        return list(range(count))
    if not layers or any(not -count <= i < count for i in layers):
        raise ValueError(f"layers={layers}: the model has blocks 0 to {count - 1}.")
    return sorted({i % count for i in layers})


def _read(
    model: nn.Module, numbers: list[int], positions: str, every: bool, texts: Sequence[Tensor]
) -> list[list[States]]:
    """For each block the states of each text. Raises DataError for one in which no token is edited."""
    states: list[list[States]] = [[] for _ in numbers]

    def look(own: list[States], h: Tensor) -> Tensor:
        kept = States(h.mean(0, keepdim=True), h.norm(dim=1), h if every else h[:0])
        own.append(States(*(tensor.cpu() for tensor in kept)))
        return h

    with ExitStack() as within:
        for own, number in zip(states, numbers, strict=True):
            within.enter_context(edit(model, partial(look, own), layers=[number], positions=positions))
        for number, text in enumerate(texts, 1):
            _next(model, text)
            if any(len(own) != number for own in states):
                raise DataError(f"text {number}: none of its {len(text)} tokens is at positions {positions!r}")
    return states


def _next(model: Any, text: Tensor) -> Tensor:
    """Log-probabilities (V,) of the next token after a text."""
    ids = text[None].to(next(model.parameters()).device)
    said = {"prompt_lengths": [len(text)]} if hasattr(model, "_reft_forwards") else {}  # within an edit
    logits = model(input_ids=ids, **said).logits
    return logits[0, -1].float().log_softmax(-1).cpu()  # type: ignore[no-any-return]


def _divergence(wanted: Tensor, found: Tensor) -> float:
    return float(nn.functional.kl_div(found, wanted, log_target=True, reduction="sum"))
