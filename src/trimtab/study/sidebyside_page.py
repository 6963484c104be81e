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
    ("moved", "the length of the change over that of the base model's hidden state, ‖h′ − h‖ / ‖h‖: the mean over the "
     "tokens of all texts, so that an edit of few tokens counts for less in long ones. It is measured at each block's "
     "output with the whole adapter on, and holds what all blocks before changed: a rise is not that block's own "
     "share. Tokens that are not edited move too, as far as attention reaches edited ones."),
    ("directions", f"how many principal directions hold {SHARE:.0%} of the changes' squared length; they may be more "
     "than the rank, since what blocks before changed arrives too."),
    ("overlap", "of the spans of these directions, the mean squared cosine of the principal angles: 1 where one span "
     "holds the other, 0 at right angles; beside it what random directions of that number would have. Hidden states "
     "have strong directions of their own, so that a little more than chance says little."),
    ("CKA", "linear centred kernel alignment of the two adapters' states, at the tokens that either moves: 1 where one "
     "set is the other rotated, scaled and shifted. In the next columns, that of A and of B with the base model. It "
     "reads high unless there are many more tokens than the states are wide."),
)  # fmt: skip
"""What the figures are: for the page and the terminal."""


def in_short(found: SideBySide) -> list[str]:
    """What a reader takes away, in sentences: sizes, how far each moves states, what the two have in common."""
    (a, b), sizes = found.names, found.total
    own = [f"{n:,} parameters ({size / 1000:,.1f} kB)" for n, size in zip(sizes.parameters, sizes.bytes, strict=True)]
    said = [f"A ({a}) has {own[0]}, B ({b}) {own[1]}."]
    for name, words in (("prompt", "prompts"), ("generated", "answers")):
        far = [[getattr(block, name)[i] or 0.0 for block in found.blocks] for i in (0, 1)]
        if any(map(any, far)):
            mean = [f"{max(own):.2f} of a state's length under {k}" for k, own in zip("AB", far, strict=True)]
            at = [own.index(max(own)) for own in far]
            most = [f"{_most(found, i, name == 'prompt'):.2f}" for i in (0, 1)]
            said.append(
                f"Over all tokens of the {words}, the mean change is at most {mean[0]} (block {at[0]}) and {mean[1]} "
                f"(block {at[1]}); of one token, {most[0]} and {most[1]}."
            )
    both = [(i, block) for i, block in enumerate(found.blocks) if block.overlap is not None]
    if both:
        ends = [f"{block.overlap:.2f} at block {i} (by chance {block.chance:.2f})" for i, block in (both[0], both[-1])]
        said.append(f"The directions of their changes overlap by {' and '.join(dict.fromkeys(ends))}.")
    last = found.blocks[-1]
    if last.cka is not None and None not in last.cka_base:
        base = [f"{value:.2f}" for value in last.cka_base]
        like = f"{last.cka:.2f} of A's states with B's, {base[0]} of A's with the base model's, {base[1]} of B's"
        near = last.cka <= min(value or 0.0 for value in last.cka_base)
        no_sign = ": as near to the untouched model as to each other, so no sign that they do the same" if near else ""
        said.append(f"CKA at the last block is {like}{no_sign}.")
    return [*said, "This is how the two differ, not which is better: trimtab compare finds that out."]


def _most(found: SideBySide, which: int, of_prompt: bool) -> float:
    """The furthest that one token moves at any block."""
    parts = [
        own[: text.prompt] if of_prompt else own[text.prompt :] for text in found.texts for own in text.moved[which]
    ]
    return max((value for part in parts for value in part), default=0.0)


def page(found: SideBySide) -> str:
    """The page."""
    a, b = map(escape, found.names)
    colours = "".join(
        f'<b style="color:rgb({rgb})">{k}</b> {n}, ' for k, n, rgb in zip("AB", (a, b), COLOURS, strict=True)
    )
    tokens = sum(len(text.tokens) for text in found.texts)
    pictured = found.texts[:PICTURED]
    most = max((value for text in pictured for own in text.moved for row in own for value in row), default=1.0)
    body = f"""<p>{colours}both of {escape(found.base)}. Read: {escape(found.source)}, each with the base model's
answer (nothing is generated with A or B); {tokens} tokens, states {found.width} wide.</p>
<ul>{"".join(f"<li>{escape(line)}</li>" for line in in_short(found))}</ul>
<h2>What each is</h2>
<p>Line by line, what one has in place of what the other has; in pale letters where they say the same.</p>
<div><table class=s><tr><th></th><th>A: {a}</th><th>B: {b}</th></tr>{"".join(_settings(found))}</table></div>
<h2>How far each moves the same hidden states</h2>
<div class=charts>{_charts(found)}</div>
<h2>By block</h2>
{_blocks(found)}
<dl>{"".join(f"<dt>{term}</dt><dd>{said}</dd>" for term, said in EXPLAINED)}</dl>
<h2>By token</h2>
<p>How far each token moves at each block, the last block at the top; an empty cell has not moved at all. The answer,
behind the bar, is the base model's. The darkest of all tables is {most:.2f} of a state's own length.</p>
{"".join(f"<h3>Text {n} of {len(found.texts)}</h3>{_tokens(text, most)}" for n, text in enumerate(pictured, 1))}"""
    return document(f"{found.names[0]} and {found.names[1]}", body, CHARTS + _STYLE)


_STYLE = """
table.n td, table.s td { padding: .1em .6em } table.s td { text-align: left; max-width: 26em }
table.s tr.same td { color: #57606a } dt { font-weight: 500 } dd { margin: 0 0 .5em 1.2em; max-width: 46em }
table.t th.m { position: sticky; left: 0; background: #fff } table.t { margin-bottom: .6em }
td.g, th.g { border-left: 3px solid #1b1f24; border-radius: 0 }
table.n + table.n { margin-top: 1em }
@media (max-width: 500px) {
  table.n, table.t { font-size: .7em } table.n td, table.n th, table.t th { padding: .1em .2em; min-width: 2.5em }
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
        Line("overlap by chance", [block.chance for block in found.blocks], "40,120,80", True),
        Line("CKA of A and B", [block.cka for block in found.blocks], "110,70,160"),
        *(
            Line(f"CKA of {k} and the base", [block.cka_base[i] for block in found.blocks], COLOURS[i], True)
            for i, k in enumerate("AB")
        ),
    ]
    moved = chart("Mean change over the state's length, by block", far)
    return moved + chart("How alike the two are, by block", alike, 1.0)


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


def _tokens(text: Text, most: float) -> str:
    heads = "".join(f"<th{_edge(i, text)}>{shown(token)}</th>" for i, token in enumerate(text.tokens))
    tables = []
    for name, rgb, moved in zip("AB", COLOURS, text.moved, strict=True):
        rows = "".join(_row(i, row, text, most, rgb) for i, row in reversed(list(enumerate(moved))))
        tables.append(f"<table class=t><tr><th class=m>{name}</th>{heads}</tr>{rows}</table>")
    return f"<div>{''.join(tables)}</div>"  # one to scroll, so that their columns stay in line


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
