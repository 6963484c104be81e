"""Draws a result of train.py: step time and peak memory of each method, as ratios to the floor; or one of serve.py.

python benchmarks/plot.py benchmarks/results/train-60m-commonsense.json benchmarks/results/serve.json ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, THEIRS, FLOOR = "#1b6ca8", "#8a8f98", "#c4473a"


def draw(result: dict[str, Any], path: Path) -> None:
    """One row a method, fastest at the top; the bar spans all rounds, the dot is the median."""
    rows = [r for r in result["methods"] if r["method"] != "floor"]
    rows.sort(key=lambda r: r["ratio_to_floor"]["median"], reverse=True)
    with_memory = all("peak_ratio_to_floor" in r for r in rows)
    figure, axes = plt.subplots(
        1, 2 if with_memory else 1, figsize=(11 if with_memory else 7, 0.45 * len(rows) + 1.8), sharey=True
    )
    panels = list(axes) if with_memory else [axes]
    _times(panels[0], rows)
    if with_memory:
        _memory(panels[1], rows)
    panels[0].set_yticks(range(len(rows)), [r["method"] for r in rows])
    for panel in panels:
        panel.axvline(1, color=FLOOR, linewidth=1, zorder=1)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.grid(axis="x", alpha=0.25)
        panel.tick_params(axis="y", length=0)
    figure.suptitle(_title(result), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _times(panel: Any, rows: list[dict[str, Any]]) -> None:
    for y, row in enumerate(rows):
        ratio, colour = row["ratio_to_floor"], _colour(row)
        panel.plot([ratio["min"], ratio["max"]], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="round")
        panel.plot(ratio["median"], y, "o", color=colour)
        panel.annotate(
            f"{ratio['median']:.2f}", (ratio["median"], y), (0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    panel.set_ylim(-0.6, len(rows) - 0.3)
    panel.set_xlabel("step time, 1 = floor (median and range)")


def _memory(panel: Any, rows: list[dict[str, Any]]) -> None:
    for y, row in enumerate(rows):
        ratio = row["peak_ratio_to_floor"]
        panel.plot(ratio, y, "o", color=_colour(row))
        panel.annotate(f"{ratio:.2f}", (ratio, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    panel.set_xlabel("peak memory above the frozen model, 1 = floor")


def _colour(row: dict[str, Any]) -> str:
    return OURS if row["method"].startswith("trimtab") else THEIRS


def _title(result: dict[str, Any]) -> str:
    model, batches = result["model"], result["batches"]
    where = result["machine"]["gpu"] if model["device"] != "cpu" else f"{result['threads']} CPU threads"
    return (
        f"Llama {model['shape']}, random weights, {model['dtype']}; {batches['lengths']} lengths, "
        f"batch {batches['size']}; {result['adapter']['positions']}, rank {result['adapter']['r']}; {where}"
    )


def draw_serving(result: dict[str, Any], path: Path) -> None:
    """A panel a load: tokens a second of each contender, over all rounds, the dot the median."""
    rows = result["throughput"]["found"]
    loads = list(dict.fromkeys((r["requests"], r["shortest"], r["longest"], r["running"]) for r in rows))
    names = list(dict.fromkeys(r["name"] for r in rows))[::-1]
    figure, axes = plt.subplots(1, len(loads), figsize=(4 * len(loads) + 1, 0.4 * len(names) + 1.8), sharey=True)
    for panel, load in zip(axes if len(loads) > 1 else [axes], loads, strict=True):
        for row in rows:
            if (row["requests"], row["shortest"], row["longest"], row["running"]) == load:
                speed, y = row["tokens_per_second"], names.index(row["name"])
                colour = OURS if row["name"].startswith("slots") else THEIRS
                panel.plot([speed["min"], speed["max"]], [y, y], color=colour, linewidth=5, alpha=0.35)
                panel.plot(speed["median"], y, "o", color=colour)
        panel.set_title(f"{load[0]} prompts of {load[1]} to {load[2]}, {load[3]} at a time", fontsize=9)
        panel.set_xlim(left=0)
        panel.set_xlabel("tokens a second")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.grid(axis="x", alpha=0.25)
        panel.tick_params(axis="y", length=0)
        panel.set_yticks(range(len(names)), names)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Draw each result beside its file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    for path in parser.parse_args().results:
        result = json.loads(path.read_text())
        (draw_serving if "throughput" in result else draw)(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
