"""Choosing the next token of each row: every row by its own settings and its own random numbers.

Shapes: rows B · vocabulary V.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.serve.engine import Logprob, Sampling
from trimtab.serve.grammar import Form

COLDEST = 1e-6
"""Temperatures below it are none: logits divided by them leave what floats can hold."""


class Sampler:
    """What one request's choices depend on besides its logits: settings, tokens so far, a random sequence."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], form: Form | None = None) -> None:
        self.sampling, self.form = sampling, form
        self._random = random.Random(sampling.seed)
        self._prompt = frozenset(prompt) if sampling.repetition_penalty != 1 else frozenset()
        self._generated: Counter[int] = Counter()
        self.adjusts = bool(
            sampling.logit_bias
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.repetition_penalty != 1
            or form is not None
        )

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < COLDEST

    @property
    def filters(self) -> bool:
        return self.sampling.top_p < 1 or self.sampling.top_k > 0 or self.sampling.min_p > 0

    def draw(self) -> float:
        return self._random.random()

    def saw(self, token: int) -> None:
        if self.adjusts:
            self._generated[token] += 1
        if self.form is not None:
            self.form.saw(token)

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits (V,) after penalties and bias, of the tokens that the answer's form allows."""
        own = self.sampling
        logits = logits.clone()
        if own.repetition_penalty != 1 and (seen := list(self._prompt | self._generated.keys())):
            index = torch.tensor(seen, device=logits.device)
            old = logits[index]
            logits[index] = torch.where(old > 0, old / own.repetition_penalty, old * own.repetition_penalty)
        changes = {t: -own.presence_penalty - own.frequency_penalty * n for t, n in self._generated.items()}
        for token, bias in own.logit_bias.items():
            changes[token] = changes.get(token, 0.0) + bias
        if changes:
            index = torch.tensor(list(changes), device=logits.device)
            logits[index] += torch.tensor(list(changes.values()), device=logits.device)
        if self.form is not None:
            logits.masked_fill_(~self.form.allowed().to(logits.device), -torch.inf)
        return logits


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row, for logits (B, V) in float32.

    A row's choice is a function of its own logits and sampler. Rows that filter are drawn apart from those that do not,
    so that which of the two ways a row goes does not depend on its neighbours.
    """
    if any(sampler.adjusts for sampler in samplers):
        rows = zip(logits, samplers, strict=True)
        logits = torch.stack([sampler.adjusted(row) if sampler.adjusts else row for row, sampler in rows])
    chosen = logits.argmax(-1)
    for filters in (False, True):
        own = [i for i, sampler in enumerate(samplers) if not sampler.greedy and sampler.filters == filters]
        if own:
            index = torch.tensor(own, device=logits.device)
            chosen[index] = _drawn(logits[index], [samplers[i] for i in own], filters)
    tokens: list[int] = chosen.tolist()
    for token, sampler in zip(tokens, samplers, strict=True):
        sampler.saw(token)
    return tokens


def _drawn(logits: Tensor, samplers: Sequence[Sampler], filters: bool) -> Tensor:
    """Tokens (B,) drawn by inverting the cumulative distribution at one uniform number a row."""
    settings = [sampler.sampling for sampler in samplers]
    probabilities = (logits / _column([s.temperature for s in settings], logits)).softmax(-1)
    order = None
    if filters:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        probabilities = _filtered(probabilities, settings)
    total = probabilities.double().cumsum(-1)
    place = torch.searchsorted(total, _column([s.draw() for s in samplers], total) * total[:, -1:], right=True)
    last = total.argmax(-1, keepdim=True)  # the first place where all of the mass is reached
    place = torch.minimum(place, last)
    return (place if order is None else order.gather(-1, place)).squeeze(-1)


def _filtered(probabilities: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Sorted probabilities (B, V) with 0 for what top_k, top_p and min_p leave out; top_p counts what top_k left."""
    rank = torch.arange(probabilities.shape[-1], device=probabilities.device)
    k = _column([min(s.top_k or len(rank), len(rank)) for s in settings], rank)
    kept = torch.where(rank < k, probabilities, 0)
    before = kept.cumsum(-1) - kept
    keep = before < _column([s.top_p for s in settings], kept) * kept.sum(-1, keepdim=True)
    keep &= kept >= _column([s.min_p for s in settings], kept) * kept[:, :1]
    return torch.where(keep, kept, 0)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[Logprob, ...]:
    """The log-probabilities of tokens under logits (n, V), each with the `top` likeliest."""
    everything = logits.float().log_softmax(-1)
    own = everything.gather(-1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    best = everything.topk(min(top, everything.shape[-1]), -1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(
        Logprob(token, value, tuple(zip(ids, values, strict=True)))
        for token, value, (ids, values) in zip(tokens, own, pairs, strict=True)
    )
