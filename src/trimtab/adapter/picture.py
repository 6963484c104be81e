"""Parts of HTML pages that need nothing else: the page itself, cells shaded by a number, a chart of lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24;
  background: #fff }
h1 { font-size: 1.3em } h2 { font-size: 1.1em; margin-top: 2em } h3 { font-size: 1em; font-weight: 600 }
p { max-width: 46em }
div { overflow-x: auto } table { border-collapse: separate; border-spacing: 2px; font-size: .9em;
  font-variant-numeric: tabular-nums }
th { font-weight: 500; padding: .2em .5em } th.m { text-align: right; font-weight: 400; white-space: nowrap }
td { min-width: 3.2em; height: 1.7em; text-align: center; border-radius: 3px; background: #f3f4f6 }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def document(title: str, body: str, style: str = "") -> str:
    """One HTML file.

    Args:
        title: a text; the others are HTML and CSS already.
    """
    return PAGE.format(title=escape(title), body=body, style=STYLE + style)


def shown(token: str) -> str:
    """A token as HTML, its blanks visible."""
    return escape(token.replace(" ", "␣").replace("\n", "↵") or "∅")


def heat(value: float | None, most: float, rgb: str = "43,108,176") -> str:
    """A cell of a table, the darker the nearer its value is to `most`; empty for None."""
    if value is None:
        return "<td></td>"
    share = min(1.0, value / (most or 1.0))
    ink = "#fff" if share > 0.6 else "#1b1f24"
    return f'<td style="background:rgba({rgb},{0.12 + 0.88 * share:.2f});color:{ink}">{value:.2f}</td>'


@dataclass(frozen=True)
class Line:
    """One line of a chart, by number from 0; it has gaps where there is no value."""

    label: str
    values: Sequence[float | None]
    rgb: str = "43,108,176"
    dashed: bool = False


def chart(title: str, lines: Sequence[Line], most: float | None = None) -> str:
    """Lines over whole numbers, 0 at the bottom, as SVG with their names under it.

    Args:
        most: the value at the top; the greatest by default.
    """
    count = max(len(line.values) for line in lines)
    top = most or max((value for line in lines for value in line.values if value is not None), default=0.0) or 1.0

    def at(i: int, value: float) -> str:
        return f"{40 + 430 * i / max(1, count - 1):.1f},{150 - 130 * min(value / top, 1):.1f}"

    drawn = []
    for line in lines:
        points = [at(i, value) for i, value in enumerate(line.values) if value is not None]
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        look = f'fill="none" stroke="rgb({line.rgb})" stroke-width="2"{dash}'
        dots = "".join('<circle cx="{}" cy="{}" r="2.5"/>'.format(*point.split(",")) for point in points)
        drawn.append(f'<polyline points="{" ".join(points)}" {look}/><g fill="rgb({line.rgb})">{dots}</g>')
    grid = "".join(
        f'<path d="M40 {150 - 130 * share:g}H470" stroke="#ddd"/>'
        f'<text x="34" y="{154 - 130 * share:g}" text-anchor="end">{top * share:.2g}</text>'
        for share in (0, 0.5, 1)
    )
    every = -(-count // 16)
    ticks = "".join(
        f'<text x="{at(i, 0).partition(",")[0]}" y="168" text-anchor="middle">{i}</text>'
        for i in range(0, count, every)
    )
    key = "".join(
        f'<span><i style="border-top:2px {"dashed" if line.dashed else "solid"} rgb({line.rgb})"></i>'
        f"{escape(line.label)}</span> "
        for line in lines
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 480 174" role="img">{grid}{ticks}'
        f"{''.join(drawn)}</svg><p class=key>{key}</p></figure>"
    )


CHARTS = """
figure { margin: 0; flex: 1 1 20rem; max-width: 34rem } figcaption { font-weight: 500 }
svg { width: 100%; font: 11px system-ui, sans-serif; fill: #57606a }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; overflow: visible }
.key { margin: 0; font-size: .85em } .key span { white-space: nowrap; margin-right: 1em }
.key i { display: inline-block; width: 1.6em; margin-right: .4em; vertical-align: middle }
"""
"""The style that `chart` needs."""
