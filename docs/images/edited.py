"""Draws README's picture: which tokens are edited in which blocks, and how.

    python docs/images/edited.py      # writes docs/images/edited.svg

Tokens are the bundled tokenizer's, the edited ones are found as in training and use.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from trimtab.where.positions import parse_positions

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "models/tiny-llama"
PROMPT, ANSWER, POSITIONS = "<|bos|><|user|>a cat and a dog<|assistant|>", "two of them", "f1+l2"
LEFT, TOP, CELL, ROW = 92, 58, 66, 26
STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #24292f }
.note { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; fill: #57606a }
.cell { fill: #eaeef2 } .answer { fill: none; stroke: #afb8c1; stroke-dasharray: 3 3 } .edited { fill: #d9480f }
.formula { font: italic 17px Georgia, "Times New Roman", serif }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } .cell { fill: #262c36 }
  .answer { stroke: #59616b } .edited { fill: #ff922b }
}
"""


def drawn() -> str:
    """The picture as SVG."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    blocks = AutoConfig.from_pretrained(MODEL).num_hidden_layers
    prompt, answer = (tokenizer.tokenize(text) for text in (PROMPT, f" {ANSWER}"))
    index, valid = parse_positions(POSITIONS).slots(torch.tensor([len(prompt)]))
    edited = set(index[valid].tolist())
    texts = [tokenizer.convert_tokens_to_string([token]).strip() or token for token in (*prompt, *answer)]
    width, bottom = LEFT + CELL * len(texts) + 20, TOP + ROW * blocks
    parts = [
        f'<text class="note" x="{LEFT}" y="20">prompt: read once, {POSITIONS} edited in every block</text>',
        f'<text class="note" x="{LEFT + CELL * len(prompt) + 4}" y="20">answer: nothing edited</text>',
    ]
    for column, text in enumerate(texts):
        x = LEFT + CELL * column
        parts.append(f'<text x="{x + CELL / 2 - 2}" y="{TOP - 12}" text-anchor="middle">{escape(short(text))}</text>')
        for row in range(blocks):
            kind = "answer" if column >= len(prompt) else "edited" if column in edited else "cell"
            y = bottom - ROW * (row + 1)
            parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL - 4}" height="{ROW - 4}" rx="4"/>')
    for row in range(blocks):
        y = bottom - ROW * row - ROW / 2 + 2
        parts.append(f'<text class="note" x="{LEFT - 10}" y="{y}" text-anchor="end">block {row}</text>')
    parts += [
        f'<rect class="edited" x="{LEFT}" y="{bottom + 18}" width="20" height="16" rx="4"/>',
        f'<text class="formula" x="{LEFT + 30}" y="{bottom + 32}">h ← h + Rᵀ(W h + b − R h)</text>',
        f'<text class="note" x="{LEFT + 240}" y="{bottom + 31}">R: a few directions. The rest of h stays, '
        "and every weight</text>",
    ]
    size = f'viewBox="0 0 {width} {bottom + 48}" width="{width}" height="{bottom + 48}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>", *parts, "</svg>", ""]
    return "\n".join(lines)


def short(token: str) -> str:
    """As it fits above its column."""
    return {"<|assistant|>": "‹asst›", "<|user|>": "‹user›", "<|bos|>": "‹bos›"}.get(token, token)


if __name__ == "__main__":
    (HERE / "edited.svg").write_text(drawn(), encoding="utf-8")
