"""Scores as plain functions of Python lists. Averages over no items raise ZeroDivisionError; tasks check before."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"  # 1,234 or 1234
NUMBER = re.compile(rf"(?:(?<![\w).])-)?\$?(?:{WHOLE}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def last_number(text: str) -> float | None:
    """The last number in a text, `1,234.5` and `-$3` included; None without one."""
    found: list[str] = NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("$", "")) if found else None


def same_number(predicted: str, wanted: str, tolerance: float = 1e-3) -> bool:
    """Whether the last numbers of two texts agree; False where either has none."""
    a, b = last_number(predicted), last_number(wanted)
    return a is not None and b is not None and abs(a - b) <= tolerance


def overlap(predicted: str, wanted: str) -> float:
    """F1 of the words two texts share, in any case and order, as in SQuAD; 0 where either has none."""
    a, b = (Counter(re.findall(r"\w+", text.casefold())) for text in (predicted, wanted))
    return 2 * (a & b).total() / (a.total() + b.total()) if a and b else 0.0


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


def accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """The share of equal items."""
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


def f1(predicted: Sequence[int], wanted: Sequence[int], classes: int) -> float:
    """F1 of class 1 when there are two classes, else the mean F1 of the classes seen; 0 where it has no denominator."""
    right = Counter(p for p, w in zip(predicted, wanted, strict=True) if p == w)
    seen = Counter(predicted) + Counter(wanted)
    of = [1] if classes == 2 else sorted(seen)
    return sum(2 * right[c] / seen[c] if seen[c] else 0.0 for c in of) / len(of)


def mcc(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Matthews correlation for any number of classes; 0 when the predictions or the answers are constant."""
    n, right = len(wanted), sum(p == w for p, w in zip(predicted, wanted, strict=True))
    p_counts, w_counts = Counter(predicted), Counter(wanted)
    p_spread = n * n - sum(v * v for v in p_counts.values())
    w_spread = n * n - sum(v * v for v in w_counts.values())
    if p_spread == 0 or w_spread == 0:
        return 0.0
    return (right * n - sum(v * w_counts[c] for c, v in p_counts.items())) / math.sqrt(p_spread * w_spread)


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Linear correlation; 0 when either side is constant or not finite."""
    if not all(map(math.isfinite, (*a, *b))) or min(a) == max(a) or min(b) == max(b):
        return 0.0
    xs, ys = _centred(a), _centred(b)
    return max(-1.0, min(1.0, math.fsum(x * y for x, y in zip(xs, ys, strict=True))))


def _centred(values: Sequence[float]) -> list[float]:
    """Mean 0 and norm 1; divided by the largest first, so that squares neither overflow nor vanish."""
    mean = math.fsum(v / len(values) for v in values)
    off = [v - mean for v in values]
    top = max(map(abs, off))
    norm = math.sqrt(math.fsum((v / top) ** 2 for v in off))
    return [v / top / norm for v in off]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks, ties at their mean rank; 0 when either side is constant or not finite."""
    finite = all(map(math.isfinite, (*a, *b)))
    return pearson(ranks(a), ranks(b)) if finite else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of their places."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values), 1):
        places.setdefault(value, []).append(place)
    mean = {value: sum(p) / len(p) for value, p in places.items()}
    return [mean[value] for value in values]
