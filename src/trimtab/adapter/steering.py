"""Adapters without training: a direction read off pairs of texts, added to hidden states (method `vector`).

For each pair (x⁺, x⁻) and block, h is the mean of the hidden states at the chosen tokens. The direction u, of length 1:

- `mean`: along the mean of h(x⁺) - h(x⁻), the difference of means (Marks and Tegmark 2023, arXiv:2310.06824; CAA,
  arXiv:2312.06681);
- `pca`: the first principal component of the differences and their negatives, that is the first right singular vector
  of the matrix of differences (Zou et al. 2023, arXiv:2310.01405), turned so that positives lie further along it.

The edit is h + s n u, where n is the median norm of the block's hidden states at those tokens, so that the strength s
is in units of it. Unless it is given, s is the distance of the means along u in those units.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.edit import edit
from trimtab.adapter.folder import adapter_from
from trimtab.errors import DataError
from trimtab.where.positions import parse_positions
from trimtab.where.sites import find_sites

HOW = ("mean", "pca")
FEWEST = 4
"""Pairs, of which every fourth is held out."""


@dataclass(frozen=True)
class Layer:
    """What was found at one block, and what the pairs that were held out say of it."""

    number: int
    vector: Tensor
    """n u (d,): along the direction, as long as a hidden state."""
    strength: float
    accuracy: float
    """Share of held-out texts on their own side of the midpoint between the means."""
    gap_closed: float
    """1 - KL(p⁺ ‖ p of x⁻ when steered) / KL(p⁺ ‖ p of x⁻), over the next token after held-out texts: 1 if steering
    makes the model go on after x⁻ as it does after x⁺, 0 if it changes nothing, below 0 if it leads elsewhere."""


@dataclass(frozen=True)
class Steering:
    """Directions at the chosen blocks."""

    layers: tuple[Layer, ...]
    """All that were looked at."""
    chosen: tuple[int, ...]
    positions: str

    def save(self, model: nn.Module, output: str | Path) -> ReftConfig:
        """Write it as an adapter. Raises FileExistsError for what is there already."""
        config = ReftConfig(task_type="CAUSAL_LM", method="vector", positions=self.positions)
        tensors = {
            layer.number: {"vector": layer.vector, "strength": torch.tensor([layer.strength])}
            for layer in self.layers
            if layer.number in self.chosen
        }
        return adapter_from(tensors, config, model, output)


@torch.no_grad()
def steer(
    model: nn.Module,
    positive: Sequence[Tensor],
    negative: Sequence[Tensor],
    *,
    how: str = "mean",
    layers: list[int] | None = None,
    positions: str = "all",
    strength: float | None = None,
) -> Steering:
    """Find the directions from pairs of texts.

    Args:
        model: a causal language model in eval mode, which is left as it is.
        positive, negative: token ids (T,) of texts that have and lack what is wanted; the i-th of both are a pair.
        layers: blocks to edit, counted from 0; None: the one that closes most of the gap on the held-out pairs.
        positions: tokens to edit, of texts as prompts; the same are read (for `generated`, the prompt's last).
        strength: in units of the hidden states' norm.
    Raises:
        ValueError: a field is wrong; DataError for too few pairs, or halves of unequal number.
    """
    if how not in HOW:
        raise ValueError(f"how={how!r}: must be one of {', '.join(HOW)}.")
    if len(positive) != len(negative) or len(positive) < FEWEST:
        raise DataError(
            f"{len(positive)} positive and {len(negative)} negative texts: give at least {FEWEST} pairs, the i-th of "
            "both being one."
        )
    read = "l1" if parse_positions(positions).scope == "generated" else positions
    numbers = _numbers(layers, len(find_sites(model, "block", "all")))
    states, norms = zip(*(_read(model, texts, numbers, read) for texts in (positive, negative)), strict=True)
    held = torch.arange(len(positive)) % FEWEST == FEWEST - 1
    pairs = [pair for pair, out in zip(zip(positive, negative, strict=True), held.tolist(), strict=True) if out]
    after = [(_next(model, plus), _next(model, minus)) for plus, minus in pairs]
    found = []
    for i, number in enumerate(numbers):
        plus, minus = states[0][i], states[1][i]
        unit, middle, distance = _direction(plus[~held], minus[~held], how)
        norm = float(torch.cat([norms[0][i], norms[1][i]]).median())
        amount = distance / norm if strength is None else float(strength)
        right = torch.cat([plus[held] @ unit > middle, minus[held] @ unit < middle]).float().mean()
        with edit(model, unit * norm, layers=[number], positions=read, scale=amount):
            steered = [_next(model, minus) for _, minus in pairs]
        found.append(Layer(number, unit * norm, amount, float(right), _gap_closed(after, steered)))
    best = max(found, key=lambda layer: layer.gap_closed).number
    return Steering(tuple(found), (best,) if layers is None else tuple(numbers), positions)


def _numbers(layers: list[int] | None, count: int) -> list[int]:
    """Blocks counted from 0. Raises ValueError for those that are not there."""
    if layers is None:
        return list(range(count))
    if not layers or any(not -count <= i < count for i in layers):
        raise ValueError(f"layers={layers}: the model has blocks 0 to {count - 1}.")
    return sorted({i % count for i in layers})


def _gap_closed(after: Sequence[tuple[Tensor, Tensor]], steered: Sequence[Tensor]) -> float:
    gap = sum(_divergence(plus, minus) for plus, minus in after)
    left = sum(_divergence(plus, own) for (plus, _), own in zip(after, steered, strict=True))
    return 1 - left / gap if gap else 0.0


def _read(model: nn.Module, texts: Sequence[Tensor], numbers: list[int], positions: str) -> tuple[Any, Any]:
    """For each block: the mean state of each text (n, d), and the norms of all states that were read."""
    means: list[list[Tensor]] = [[] for _ in numbers]
    norms: list[list[Tensor]] = [[] for _ in numbers]

    def look(i: int, h: Tensor) -> Tensor:
        means[i].append(h.mean(0).cpu())
        norms[i].append(h.norm(dim=1).cpu())
        return h

    with ExitStack() as within:
        for i, number in enumerate(numbers):
            within.enter_context(edit(model, partial(look, i), layers=[number], positions=positions))
        for text in texts:
            _next(model, text)
    return [torch.stack(own) for own in means], [torch.cat(own) for own in norms]


def _direction(plus: Tensor, minus: Tensor, how: str) -> tuple[Tensor, float, float]:
    """u (d,), and along it the midpoint between the means and their distance."""
    difference = (plus - minus).mean(0)
    if how == "pca":
        unit = torch.linalg.svd(plus - minus, full_matrices=False).Vh[0]
        unit = unit * torch.sign(unit @ difference)
    else:
        unit = nn.functional.normalize(difference, dim=0)
    if not float(unit.norm()) > 0.5:
        raise DataError("positive and negative texts have the same hidden states at these tokens: nothing to steer by.")
    return unit, float((plus + minus).mean(0) @ unit) / 2, float(difference @ unit)


def _next(model: Any, text: Tensor) -> Tensor:
    """Log-probabilities (V,) of the next token after a text."""
    ids = text[None].to(next(model.parameters()).device)
    said = {"prompt_lengths": [len(text)]} if hasattr(model, "_reft_forwards") else {}  # within an edit
    logits = model(input_ids=ids, **said).logits
    return logits[0, -1].float().log_softmax(-1).cpu()  # type: ignore[no-any-return]


def _divergence(wanted: Tensor, found: Tensor) -> float:
    return float(nn.functional.kl_div(found, wanted, log_target=True, reduction="sum"))
