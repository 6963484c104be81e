"""Scores: each is one object that knows its plain value, its value in resamples, and what its items are.

    accuracy.value(predictions, truth)              # plain
    accuracy.weighted(predictions, truth, weights)  # (B, n) weights of the items -> (B,), for a bootstrap
    accuracy.binary                                 # items are right or wrong, so that exact tests apply

A new score is one object in its task's table; training, evaluation and the report take it from there.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """What predictions are held against."""

    wanted: Sequence[Any]
    """Answers as text, class numbers, lists of these, or numbers."""
    classes: int = 0
    choices: Sequence[str] = ()
    """What an answer may be, or the names of the classes."""


@dataclass(frozen=True)
class Score:
    """One score, higher is better.

    Either `item` scores each prediction, (prediction, wanted, truth) -> float, and the score is their mean; or `whole`
    scores all at once, (predictions (n,), truth, weights (B, n)) -> (B,), where no mean over items does.
    """

    name: str
    item: Callable[[Any, Any, Truth], float] | None = None
    whole: Callable[[Any, Truth, Array], Array] | None = None
    binary: bool = False
    """Every item is 0 or 1."""
    beside: tuple[Score, ...] = ()
    """What is shown beside it."""
    takes_choices: bool = False
    takes_empty: bool = False
    """An empty answer is one."""
    flaw: Callable[[str, Truth], str | None] = lambda answer, truth: None
    """What is wrong with an answer that this score could never find right; None for nothing."""

    def per_item(self, predictions: Sequence[Any], truth: Truth) -> list[float]:
        """The value of each prediction, for a score that is a mean of them."""
        assert self.item is not None
        return [self.item(p, w, truth) for p, w in zip(predictions, truth.wanted, strict=True)]

    def weighted(self, predictions: Sequence[Any], truth: Truth, weights: Array) -> Array:
        """The score of each resample of the items.

        Args:
            weights: (B, n), how often each item is drawn.
        """
        if self.whole is not None:
            return self.whole(predictions, truth, weights)
        return mean_of(self.per_item(predictions, truth), weights)

    def value(self, predictions: Sequence[Any], truth: Truth) -> float:
        """The plain score."""
        return float(self.weighted(predictions, truth, np.ones((1, len(truth.wanted))))[0])


def mean_of(values: Sequence[float] | Array, weights: Array) -> Array:
    """The mean over items of each resample."""
    return ratio(weights @ np.asarray(values, dtype=np.float64), weights.sum(1))


def ratio(above: Array, below: Array) -> Array:
    """Quotients, 0 where there is nothing to divide by."""
    found: Array = np.divide(above, below, out=np.zeros_like(below), where=below > 0)
    return found


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `count` items."""
    wide = 1.96**2 / count
    middle, half = share + wide / 2, (share * (1 - share) * wide + wide**2 / 4) ** 0.5
    return (middle - half) / (1 + wide), (middle + half) / (1 + wide)


# ---- text --------------------------------------------------------------------------------------------------------

WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"  # 1,234 or 1234
NUMBER = re.compile(rf"(?:(?<![\w).])-)?\$?(?:{WHOLE}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def last_number(text: str) -> float | None:
    """The last number in a text, `1,234.5` and `-$3` included; None without one."""
    found: list[str] = NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("$", "")) if found else None


def same_number(predicted: str, wanted: str, tolerance: float = 1e-3) -> bool:
    """Whether the last numbers of two texts agree; False where either has none.

    Args:
        tolerance: by how much they may differ; of numbers below 1, by how much of themselves.
    """
    a, b = last_number(predicted), last_number(wanted)
    return a is not None and b is not None and abs(a - b) <= tolerance * min(1, max(abs(a), abs(b)))


def overlap(predicted: str, wanted: str) -> float:
    """F1 of the words two texts share, in any case and order; where either has none, whether they are the same."""
    a, b = (Counter(_words(text)) for text in (predicted, wanted))
    if not a or not b:
        return float(predicted.strip() == wanted.strip())
    return 2 * (a & b).total() / (a.total() + b.total())


def _words(text: str) -> list[str]:
    """Letters, digits and the marks that belong to them, as Hindi's vowel signs, which a pattern's `w` leaves out."""
    return "".join(c if c.isalnum() or c == "_" or category(c)[0] == "M" else " " for c in text.casefold()).split()


def named_choice(text: str, choices: Sequence[str]) -> int | None:
    """The index of the first of `choices` that `text` names; None if it names none.

    A text that is just one choice counts in any case. Otherwise choices are whole words in any case, except one-letter
    ones, which must match in case (so "a" is no answer A), and of two that start together the longer is meant. Where no
    choice is named, a closed-off capital, as in "(B)", "B." or "B" at the end, means the choice at that letter.
    """
    bare = text.strip().strip(".,:;!()[]\"'*").casefold()
    for index, choice in enumerate(choices):
        if bare == choice.casefold():
            return index
    hits = [(hit.start(), -len(c), i) for i, c in enumerate(choices) if (hit := _whole_word(c).search(text))]
    if hits:
        return min(hits)[2]
    letter = re.search(r"(?<!\w)([A-Z])(?=[.):]|\s*$)", text)
    index = ord(letter[1]) - ord("A") if letter else len(choices)
    return index if index < len(choices) else None


def _whole_word(choice: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(choice)}(?!\w)", 0 if len(choice) == 1 else re.IGNORECASE)


def _same_choice(predicted: str, wanted: str, truth: Truth) -> float:
    right = named_choice(wanted, truth.choices)
    return float(right is not None and named_choice(predicted, truth.choices) == right)


EXACT_MATCH = Score("exact_match", lambda p, w, truth: float(p.strip() == w.strip()), binary=True)
NUMBER_MATCH = Score(
    "number",
    lambda p, w, truth: float(same_number(p, w)),
    binary=True,
    beside=(Score("answered", lambda p, w, truth: float(last_number(p) is not None), binary=True),),
    flaw=lambda answer, truth: (
        f"score: number needs a number in the answer, which is {answer[:60]!r}" if last_number(answer) is None else None
    ),
)
CHOICE = Score(
    "choice",
    _same_choice,
    binary=True,
    beside=(Score("answered", lambda p, w, t: float(named_choice(p, t.choices) is not None), binary=True),),
    takes_choices=True,
    flaw=lambda answer, truth: (
        f"the answer {answer[:60]!r} names none of choices: {truth.choices}"
        if named_choice(answer, truth.choices) is None
        else None
    ),
)
OVERLAP = Score("overlap", lambda p, w, truth: overlap(p, w), takes_empty=True)
GENERATION_SCORES = {score.name: score for score in (EXACT_MATCH, NUMBER_MATCH, CHOICE, OVERLAP)}


# ---- classes -----------------------------------------------------------------------------------------------------


def _f1(predicted: Any, truth: Truth, weights: Array) -> Array:
    """F1 of class 1 when there are two classes, else the mean F1 of those seen; 0 where it has no denominator."""
    guess, wanted = np.asarray(predicted), np.asarray(truth.wanted)
    of = np.array([1]) if truth.classes == 2 else np.unique(np.concatenate([wanted, guess]))
    right = weights @ ((wanted == guess)[:, None] & (wanted[:, None] == of))
    seen = weights @ ((guess[:, None] == of).astype(float) + (wanted[:, None] == of))
    total: Array = ratio(2 * right, seen).sum(1) / np.maximum(1, (seen > 0).sum(1))
    return total


def _mcc(predicted: Any, truth: Truth, weights: Array) -> Array:
    """Matthews correlation for any number of classes; 0 when the predictions or the answers are constant."""
    guess, wanted = np.asarray(predicted), np.asarray(truth.wanted)
    classes = np.unique(np.concatenate([wanted, guess]))
    right = weights @ (wanted == guess)
    p, w = (weights @ (x[:, None] == classes) for x in (guess, wanted))
    n = weights.sum(1)
    below = np.sqrt((n**2 - (p**2).sum(1)) * (n**2 - (w**2).sum(1)))
    return ratio(right * n - (p * w).sum(1), below)


ACCURACY = Score("accuracy", lambda p, w, truth: float(p == w), binary=True)
F1 = Score("f1", whole=_f1)
MCC = Score("mcc", whole=_mcc)
CLASS_SCORES = {score.name: score for score in (ACCURACY, F1, MCC)}


# ---- several classes ---------------------------------------------------------------------------------------------


def _found_f1(found: Sequence[set[Any]], wanted: Sequence[set[Any]], weights: Array) -> Array:
    """F1 of what was found among what was to be found in all items together; 0 where there is neither."""
    right = np.array([len(f & w) for f, w in zip(found, wanted, strict=True)], dtype=np.float64)
    seen = np.array([len(f) + len(w) for f, w in zip(found, wanted, strict=True)], dtype=np.float64)
    return ratio(2 * weights @ right, weights @ seen)


def _micro_f1(predicted: Any, truth: Truth, weights: Array) -> Array:
    return _found_f1([set(p) for p in predicted], [set(w) for w in truth.wanted], weights)


MICRO_F1 = Score("f1", whole=_micro_f1)
SUBSET = Score("accuracy", lambda p, w, truth: float(set(p) == set(w)), binary=True)
"""All of an item's classes right."""
SET_SCORES = {score.name: score for score in (MICRO_F1, SUBSET)}


# ---- tags --------------------------------------------------------------------------------------------------------

BIO = re.compile(r"O|[BI](-.*)?")


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Kind, first word and the word behind the last of each entity in BIO tags.

    As conlleval and seqeval count: an `I-` that continues no entity of its kind begins one.
    """
    found: set[tuple[str, int, int]] = set()
    kind, begin = None, 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if mark == "I" and name == kind:
            continue
        if kind is not None:
            found.add((kind, begin, place))
        kind, begin = (name if mark in ("B", "I") else None), place
    return found


def _tag_accuracy(predicted: Any, truth: Truth, weights: Array) -> Array:
    """Right tags of all words together; a word without one is missed."""
    right = np.array(
        [sum(a == b for a, b in zip(p, w, strict=False)) for p, w in zip(predicted, truth.wanted, strict=True)]
    )
    return ratio(weights @ right.astype(np.float64), weights @ np.array([float(len(w)) for w in truth.wanted]))


def _entity_f1(predicted: Any, truth: Truth, weights: Array) -> Array:
    found, wanted = (
        [entities([truth.choices[i] for i in tags]) for tags in side] for side in (predicted, truth.wanted)
    )
    return _found_f1(found, wanted, weights)


def _not_bio(_: str, truth: Truth) -> str | None:
    odd = [tag for tag in truth.choices if not BIO.fullmatch(tag)]
    return f"score: f1 is of entities in BIO tags (B-PER, I-PER, O), not {odd[0]!r}; take accuracy" if odd else None


TAG_ACCURACY = Score("accuracy", whole=_tag_accuracy)
ENTITY_F1 = Score("f1", whole=_entity_f1, flaw=_not_bio)
TAG_SCORES = {score.name: score for score in (TAG_ACCURACY, ENTITY_F1)}


# ---- numbers -----------------------------------------------------------------------------------------------------


def ranks(values: Sequence[float] | Array) -> Array:
    """Ranks from 1; equal values share the mean of their places."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    found: Array = (last - (counts - 1) / 2)[place]
    return found


def _pearson(predicted: Any, truth: Truth, weights: Array) -> Array:
    """Linear correlation; 0 when either side is constant or not finite."""
    sides = [np.asarray(side, dtype=np.float64) for side in (predicted, truth.wanted)]
    if not all(np.isfinite(side).all() and len(side) and side.min() < side.max() for side in sides):
        return np.zeros(len(weights))
    n = weights.sum(1, keepdims=True)
    x, y = (_scaled(side) for side in sides)
    x_off, y_off = (v - (weights @ v)[:, None] / n for v in (x, y))
    below = np.sqrt((weights * x_off**2).sum(1) * (weights * y_off**2).sum(1))
    return ratio((weights * x_off * y_off).sum(1), below).clip(-1, 1)


def _scaled(values: Array) -> Array:
    """Around 0 and at most 1 in size, so that squares neither overflow nor vanish."""
    off = values - math.fsum(values / len(values))
    scaled: Array = off / np.abs(off).max()
    return scaled


def _spearman(predicted: Any, truth: Truth, weights: Array) -> Array:
    """Correlation of ranks, those of the whole sample in every resample; ties at their mean rank."""
    if not all(np.isfinite(np.asarray(side, dtype=np.float64)).all() for side in (predicted, truth.wanted)):
        return np.zeros(len(weights))
    return _pearson(ranks(predicted), Truth(ranks(truth.wanted).tolist()), weights)


PEARSON = Score("pearson", whole=_pearson)
SPEARMAN = Score("spearman", whole=_spearman)
CORRELATION = Score("correlation", whole=lambda p, t, w: (_pearson(p, t, w) + _spearman(p, t, w)) / 2)
NUMBER_SCORES = {score.name: score for score in (CORRELATION, PEARSON, SPEARMAN)}
