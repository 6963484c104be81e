"""Each method's score on short and on long texts: `python benchmarks/verdict/by_length.py CONFIG --model M --data D`.

Of a classification that `trimtab compare CONFIG` has run: the test items in four parts by their number of tokens, the
seeds' mean accuracy on each, and how much further a method falls from the shortest to the longest part than the first
method does, with an interval over items and seeds drawn anew. Writes report-length.json and .png beside the report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from trials import asked_for

from trimtab.runs.folder import write_json
from trimtab.runs.models import load_tokenizer
from trimtab.study.compare import Group

PARTS = 4
DRAWS = 2000
Array = NDArray[Any]


def right(group: Group) -> Array:
    """Which test items each seed gets right, (seeds, items)."""
    labels = [example.label for example in group.experiment.task.examples("test")]
    return np.array([[p == label for p, label in zip(run.predictions, labels, strict=True)] for run in group.seeds])


def lengths(group: Group) -> Array:
    """Tokens of each test item."""
    experiment = group.experiment
    tokenizer = load_tokenizer(experiment.source.name)
    encoded, _ = experiment.encode(tokenizer, experiment.task.examples("test"), training=False)
    return np.array([len(one.input_ids) for one in encoded])


def parts_of(tokens: Array) -> list[Array]:
    """The items of each part, as equal in number as ties allow."""
    edges = np.quantile(tokens, np.linspace(0, 1, PARTS + 1)[1:-1])
    part = np.searchsorted(edges, tokens)
    return [np.flatnonzero(part == i) for i in range(PARTS)]


def further(one: Array, other: Array, short: Array, long: Array) -> tuple[float, float, float]:
    """How much more of `one` than of `other` is lost from the short to the long items, with its 95% interval."""
    rng = np.random.default_rng(0)

    def lost(of: Array, seeds: Array, first: Array, last: Array) -> float:
        return float(of[np.ix_(seeds, first)].mean() - of[np.ix_(seeds, last)].mean())

    def drawn(indices: Array) -> Array:
        return rng.choice(indices, len(indices))

    found = []
    for _ in range(DRAWS):
        items = drawn(short), drawn(long)
        mine, its = drawn(np.arange(len(one))), drawn(np.arange(len(other)))
        found.append(lost(one, mine, *items) - lost(other, its, *items))
    told = lost(one, np.arange(len(one)), short, long) - lost(other, np.arange(len(other)), short, long)
    low, high = np.quantile(found, [0.025, 0.975])
    return told, float(low), float(high)


def draw(labels: list[str], scores: dict[str, list[float]], path: Path) -> None:
    """A line a method."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    panel = figure.subplots()
    for name, values in scores.items():
        panel.plot(labels, [100 * v for v in values], "o-", label=name, lw=2.4 if name == next(iter(scores)) else 1.2)
    panel.set(xlabel="tokens of the text", ylabel="right of 100, mean of the seeds")
    figure.legend(loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command."""
    folder, _, groups = asked_for(__doc__)
    tokens, first = lengths(groups[0]), groups[0]
    parts = parts_of(tokens)
    labels = [f"{tokens[part].min()} to {tokens[part].max()}" for part in parts]
    table, lines = [["method", *labels, "further than the first, long against short"]], []
    for group in groups:
        mine = right(group)
        by_part = [mine[:, part].mean(1) for part in parts]
        told, low, high = further(mine, right(first), parts[0], parts[-1])
        lines.append(
            {
                "method": group.way.name,
                "seeds": [[round(float(s), 4) for s in part] for part in by_part],
                "further": [round(x, 4) for x in (told, low, high)],
            }
        )
        cells = [
            f"{100 * part.mean():.1f}" + (f" ± {100 * part.std(ddof=1):.1f}" if len(part) > 1 else "")
            for part in by_part
        ]
        apart = "" if group is first else f"{100 * told:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        table.append([group.way.name, *cells, apart])
    table.insert(1, ["---"] * len(table[0]))
    print("\n".join("| " + " | ".join(row) + " |" for row in table))
    found = {"items": [len(part) for part in parts], "tokens": labels, "methods": lines}
    write_json(folder / "report-length.json", found)
    means = {line["method"]: [float(np.mean(part)) for part in line["seeds"]] for line in lines}
    draw(labels, means, folder / "report-length.png")


if __name__ == "__main__":
    main()
