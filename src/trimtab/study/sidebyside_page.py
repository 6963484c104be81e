"""Two adapters side by side, as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from trimtab.adapter.compared import SHARE
from trimtab.adapter.picture import CHARTS, Line, chart, document, heat, shown
from trimtab.study.sidebyside import Block, SideBySide, Text

COLOURS = ("43,108,176", "192,86,33")
PICTURED = 3
"""Texts whose tokens are drawn."""
EXPLAINED = (
    ("moved", "the length of the change over that of the base model's hidden state, ‖h′ − h‖ / ‖h‖, at what the block "
     "gives in the whole forward: the mean over the tokens of all texts. Tokens that are not edited move too, as far "
     "as edited ones, or edited blocks below, reach them. 0.10 is a tenth of the state's own length."),
    ("directions", f"how many principal directions hold {SHARE:.0%} of the changes' squared length."),
    ("overlap", "of the spans of these directions, the mean squared cosine of the principal angles: 1 where one span "
     "holds the other, 0 at right angles; beside it what random directions of that number would have. Hidden states "
     "have strong directions of their own, so that a little more than chance says little."),
    ("CKA", "linear centred kernel alignment of the two adapters' states, at the tokens that either moves: 1 where one "
     "set is the other rotated, scaled and shifted. Behind it, that of A and of B with the base model. It leans "
     "towards 1 where there are fewer tokens than the states are wide."),
)  # fmt: skip
"""What the figures are: for the page and the terminal."""


def in_short(found: SideBySide) -> list[str]:
    """What a reader takes away, in sentences: sizes, how far each moves states, what the two have in common."""
    (a, b), sizes = found.names, found.total
    own = [f"{n:,} parameters ({size / 1000:,.1f} kB)" for n, size in zip(sizes.parameters, sizes.bytes, strict=True)]
    said = [f"A ({a}) has {own[0]}, B ({b}) {own[1]}."]
    for name, words in (("prompt", "the prompt"), ("generated", "the answer")):
        far = [[getattr(block, name)[i] or 0.0 for block in found.blocks] for i in (0, 1)]
        if any(map(any, far)):
            most = [f"{max(own):.2f} of their own length under" for own in far]
            at = [f"(block {own.index(max(own))})" for own in far]
            said.append(f"Hidden states of {words} move by up to {most[0]} A {at[0]}, {most[1]} B {at[1]}.")
    both = [(block.overlap, block.chance) for block in found.blocks if block.overlap is not None]
    if both:
        overlap, chance = (sum(value or 0.0 for value in values) / len(both) for values in zip(*both, strict=True))
        said.append(
            f"The directions that they move in overlap by {overlap:.2f} on average; random ones by {chance:.2f}."
        )
    if (last := found.blocks[-1].cka) is not None:
        said.append(f"What the last block gives is alike by {last:.2f} (CKA) under A and under B.")
    return said


def page(found: SideBySide) -> str:
    """The page."""
    a, b = map(escape, found.names)
    colours = "".join(
        f'<b style="color:rgb({rgb})">{k}</b> {n}, ' for k, n, rgb in zip("AB", (a, b), COLOURS, strict=True)
    )
    tokens = sum(len(text.tokens) for text in found.texts)
    body = f"""<p>{colours}both of {escape(found.base)}. Read: {escape(found.source)}, each with what the base model
answers; {tokens} tokens, states {found.width} wide.</p>
<ul>{"".join(f"<li>{escape(line)}</li>" for line in in_short(found))}</ul>
<h2>What each is</h2>
<p>Line by line, what one has in place of what the other has; grey where they say the same.</p>
<div><table class=s><tr><th></th><th>A: {a}</th><th>B: {b}</th></tr>{"".join(_settings(found))}</table></div>
<h2>How far each moves the same hidden states</h2>
<div class=charts>{_charts(found)}</div>
<h2>By block</h2>
{_blocks(found)}
<dl>{"".join(f"<dt>{term}</dt><dd>{said}</dd>" for term, said in EXPLAINED)}</dl>
<h2>By token</h2>
<p>How far each token moves at each block, the last block at the top. The answer, behind the bar, is the base model's.
Both tables of a text share one scale.</p>
{"".join(f"<h3>Text {n}</h3>{_tokens(found, text)}" for n, text in enumerate(found.texts[:PICTURED], 1))}"""
    return document(f"{found.names[0]} and {found.names[1]}", body, CHARTS + _STYLE)


_STYLE = """
table.n td, table.s td { padding: .1em .6em } table.s td { text-align: left; max-width: 26em }
table.s tr.same td { color: #57606a } dt { font-weight: 500 } dd { margin: 0 0 .5em 1.2em; max-width: 46em }
td.g, th.g { border-left: 3px solid #1b1f24; border-radius: 0 }
table.n + table.n { margin-top: 1em }
@media (max-width: 500px) {
  table.n { font-size: .7em } table.n td, table.n th { padding: .1em .2em; min-width: 2.5em }
  table.s, table.s tbody { display: block } table.s tr { display: grid; grid-template-columns: 1fr 1fr; gap: 2px }
  table.s td { height: auto } table.s th.m { grid-column: 1 / -1; text-align: left }
  table.s th:empty { display: none }
}
"""


def _charts(found: SideBySide) -> Iterator[str] | str:
    far = [
        Line(f"{name}, {words}", [getattr(block, which)[i] for block in found.blocks], COLOURS[i], which == "generated")
        for i, name in enumerate("AB")
        for which, words in (("prompt", "prompt"), ("generated", "answer"))
    ]
    alike = [
        Line("overlap of the directions", [block.overlap for block in found.blocks], "40,120,80"),
        Line("of random ones", [block.chance for block in found.blocks], "150,150,150", True),
        Line("CKA of the states", [block.cka for block in found.blocks], "110,70,160"),
    ]
    return chart("Change over the state's length, by block", far) + chart("How alike the two are, by block", alike, 1.0)


def _blocks(found: SideBySide) -> str:
    """Two tables, each narrow enough for a phone: what each adapter is and does, and what the two have in common."""
    blocks = [(f"block {i}", block) for i, block in enumerate(found.blocks)]
    beside = [found.beside] if any(found.beside.parameters) else []
    rows = [*blocks, *((block.name, block) for block in (*beside, found.total))]
    most = max((v for block in found.blocks for v in (*block.prompt, *block.generated) if v is not None), default=1.0)
    pairs = "".join(f"<th colspan=2>{name}</th>" for name in ("parameters", "bytes", "moved, prompt", "moved, answer"))
    each = f"<tr><th></th>{pairs}</tr><tr><th></th>{'<th>A</th><th>B</th>' * 4}</tr>"
    both = (
        "<tr><th></th><th colspan=2>directions</th><th>overlap</th><th>by chance</th><th>CKA</th>"
        "<th colspan=2>CKA, base</th></tr>"
        "<tr><th></th><th>A</th><th>B</th><th></th><th></th><th></th><th>A</th><th>B</th></tr>"
    )
    tables = each + "".join(_each(*row, most) for row in rows), both + "".join(_both(*row) for row in blocks)
    return f"<div>{''.join(f'<table class=n>{table}</table>' for table in tables)}</div>"


def _each(name: str, block: Block, most: float) -> str:
    sizes = "".join(f"<td>{value:,}</td>" for value in (*block.parameters, *block.bytes))
    far = "".join(heat(v, most, COLOURS[i]) for pair in (block.prompt, block.generated) for i, v in enumerate(pair))
    return f"<tr><th class=m>{escape(name)}</th>{sizes}{far}</tr>"


def _both(name: str, block: Block) -> str:
    directions = block.directions if any(block.directions) else (None, None)
    alike = (*directions, block.overlap, block.chance, block.cka, *block.cka_base)
    return f"<tr><th class=m>{escape(name)}</th>{''.join(f'<td>{number(value)}</td>' for value in alike)}</tr>"


def number(value: float | None) -> str:
    """A figure of the tables; nothing where there is none."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


def _tokens(found: SideBySide, text: Text) -> str:
    most = max((value for own in text.moved for row in own for value in row), default=1.0)
    heads = "".join(f"<th{_edge(i, text)}>{shown(token)}</th>" for i, token in enumerate(text.tokens))
    tables = []
    for name, rgb, moved in zip("AB", COLOURS, text.moved, strict=True):
        rows = "".join(_row(i, row, text, most, rgb) for i, row in reversed(list(enumerate(moved))))
        tables.append(f"<div><table><tr><th class=m>{name}</th>{heads}</tr>{rows}</table></div>")
    return "".join(tables)


def _row(i: int, values: Sequence[float], text: Text, most: float, rgb: str) -> str:
    cells = (
        heat(value or None, most, rgb).replace("<td", f"<td{_edge(at, text)}", 1) for at, value in enumerate(values)
    )
    return f"<tr><th class=m>block {i}</th>{''.join(cells)}</tr>"


def _edge(i: int, text: Text) -> str:
    return " class=g" if i == text.prompt else ""


def _settings(found: SideBySide) -> Iterator[str]:
    for line in found.settings:
        same = " class=same" if line.values[0] == line.values[1] else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in line.values)
        yield f"<tr{same}><th class=m>{escape(line.name)}</th>{cells}</tr>"
