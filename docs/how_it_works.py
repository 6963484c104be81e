# ruff: noqa: E501  (the lines of the page)
"""Writes docs/how-it-works.md: an adapter is trained, and one hidden state is taken through its edit, in numbers.

python docs/how_it_works.py      # a minute; needs the extras train and bench
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import ReftConfig
from trimtab.adapter.explain import explain
from trimtab.tasks.tokens import Collator, encode

DOCS = Path(__file__).parent
MODEL, DATA = DOCS.parent / "models/tiny-llama", DOCS.parent / "recipes/data/plural"
BLOCK, RANK, STEPS, BATCH = 4, 2, 150, 16


@dataclass(frozen=True)
class Edited:
    """The hidden states of last prompt tokens (n, d) at one block, and what the edit there makes of them."""

    h: Tensor
    after: Tensor
    rotation: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def read(self) -> Tensor:
        """R h (n, r)."""
        return self.h @ self.rotation.T

    @property
    def wanted(self) -> Tensor:
        """W h + b (n, r)."""
        return self.h @ self.weight.T + self.bias


def trained(tokenizer: Any) -> Any:
    """The bundled model with an adapter that makes it write plurals."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    config = ReftConfig(task_type="CAUSAL_LM", method="loreft", r=RANK, positions="f1+l2", layers="all")
    model = get_peft_model(base, config)
    rows = list(map(json.loads, (DATA / "train_wide.jsonl").read_text().splitlines()))
    examples = [encode(tokenizer, row["input"], row["output"]) for row in rows]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    collate = Collator(tokenizer)
    for _ in range(STEPS):
        chosen = torch.randperm(len(examples))[:BATCH].tolist()
        model(**collate([examples[i] for i in chosen])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def looked_at(model: Any, tokenizer: Any, words: list[str]) -> Edited:
    """The block's output before its edit and after, at the last token of each word's prompt."""
    block = model.get_base_model().model.layers[BLOCK]
    seen: list[Tensor] = []
    # The first hook comes before the edit, the second behind it.
    hooks = [block.register_forward_hook(lambda m, i, out: seen.append(out[0, -1]), prepend=first) for first in (1, 0)]
    for word in words:
        model.generate(torch.tensor([encode(tokenizer, word).input_ids]), max_new_tokens=1)
    for one in hooks:
        one.remove()
    edit = block.reft.edits("default")["edit"]
    return Edited(torch.stack(seen[::2]), torch.stack(seen[1::2]), edit.rotation(), edit.weight, edit.bias)


def drawn_plane(edited: Edited, words: list[str], path: Path) -> None:
    """Every word's way in the plane that R spans: from R h to W h + b."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    start, end = edited.read.tolist(), edited.wanted.tolist()
    for i, (here, there) in enumerate(zip(start, end, strict=True)):
        look = {"color": "#24292f", "lw": 2.0} if i == 0 else {"color": "#ffa94d", "lw": 0.7}
        axes.annotate("", there, here, arrowprops={"arrowstyle": "->", **look}, zorder=3 - (i > 0))
    axes.plot(*zip(*start, strict=True), "o", ms=4, color="#57606a", label="R h: what the base model says")
    axes.plot(*zip(*end, strict=True), "o", ms=4, color="#d9480f", label="W h + b: what the edit puts there")
    axes.annotate(words[0], start[0], (-40, 2), textcoords="offset points", weight="bold")
    axes.set(xlabel="along the first row of R", ylabel="along the second row of R")
    axes.legend(loc="best", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def drawn_next(names: list[str], before: list[float], after: list[float], path: Path) -> None:
    """The likeliest next tokens, without the adapter and with it."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    places = range(len(names))
    axes.barh([p - 0.19 for p in places], before, 0.36, color="#afb8c1", label="base model")
    axes.barh([p + 0.19 for p in places], after, 0.36, color="#d9480f", label="with the adapter")
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.set(xlabel="probability of the next token", xlim=(0, 1))
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def numbers(values: Tensor, digits: int = 3) -> str:
    """As people write a vector."""
    return "(" + ", ".join(f"{v:.{digits}f}" for v in values.tolist()) + ")"


def page(images: Path) -> str:
    """The page's text; its pictures go to `images`."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = trained(tokenizer)
    rows = list(map(json.loads, (DATA / "test.jsonl").read_text().splitlines()))
    words = [row["input"] for row in rows]
    edited = looked_at(model, tokenizer, words)
    h, after, rotation = edited.h[0], edited.after[0], edited.rotation
    rest = torch.eye(h.shape[0]) - rotation.T @ rotation
    ids = torch.tensor(encode(tokenizer, words[0]).input_ids)
    found = explain(model, ids)
    top = found.top(4)
    names = [tokenizer.decode([i]) or "?" for i in top]
    before, then = (own.next[top].exp().tolist() for own in (found.base, found.edited))
    drawn_plane(edited, words, images / "plane.png")
    drawn_next(names, before, then, images / "next.png")
    tokens = [tokenizer.decode([int(i)]).replace("<|", "‹").replace("|>", "›") for i in ids]
    moved = "\n".join(
        f"| {place.module.removeprefix('model.layers.')} | "
        + " | ".join("" if share is None else f"{share:.2f}" for share in place.moved[: len(ids)])
        + " |"
        for place in found.places
    )
    table = "\n".join(f"| `{name}` | {b:.3f} | {a:.3f} |" for name, b, a in zip(names, before, then, strict=True))
    error = float((edited.after @ rotation.T - edited.wanted).abs().max())
    kept = float((after @ rest - h @ rest).abs().max())
    unit = float((rotation @ rotation.T - torch.eye(RANK)).abs().max())
    return f"""\
# How it works

*This page is written by `docs/how_it_works.py`, which trains an adapter and looks into it; every number was computed.*

The bundled model, asked for a word, cannot know whether its plural, its French or its kind is wanted. A LoReFT adapter of
rank {RANK} was trained for {STEPS} steps of {BATCH} words to make it write plurals. No weight of the model changed. What follows is
the word **{words[0]}**, which was not among them.

## One hidden state

After block {BLOCK} the last token of the prompt has a hidden state h: {h.shape[0]} numbers, of norm {float(h.norm()):.2f}. The edit of that block is

> h′ = h + Rᵀ(W h + b − R h)

1. **R reads.** R has {RANK} rows of length 1 at right angles (R Rᵀ = I to {unit:.0e}). R h = {numbers(edited.read[0])}: where h stands
   in the plane that they span.
2. **W and b say where it should stand.** W h + b = {numbers(edited.wanted[0])}, computed from all of h.
3. **The difference is put back.** Rᵀ turns the {RANK} numbers {numbers(edited.wanted[0] - edited.read[0])} into a change of {h.shape[0]}, of norm {float((after - h).norm()):.2f}:
   {float((after - h).norm() / h.norm()):.0%} of h.

Afterwards R h′ *is* W h + b (to {error:.0e}), and everything at right angles to the plane is what it was (to {kept:.0e}): the
edit replaces one small part of h and leaves the rest alone. LoRA would have changed the matrix that every token is multiplied
by.

With rank {RANK} the plane can be drawn. Each arrow is one of {len(words)} words that were not trained on; the dark one is
{words[0]}:

![Arrows from R h to W h + b for {len(words)} words](images/plane.png)

## Which tokens, which blocks

`positions="f1+l2"` edits the first token of the prompt and its last two, after each block. How far each is moved, as a share
of its norm:

| block | {" | ".join(tokens)} |
|---|{"---|" * len(tokens)}
{moved}

The answer's tokens are not edited at all: they read what the edited ones left in the cache. So a step of decoding costs what
it costs without an adapter.

## What comes of it

| next token | base model | with the adapter |
|---|---|---|
{table}

`ap` begins *apples*; the base model would rather have said *pomme*.

![The next token's probabilities before and after](images/next.png)

The same for a prompt and an adapter of your own: `trimtab explain ADAPTER PROMPT -o page.html`.
"""


if __name__ == "__main__":
    (DOCS / "how-it-works.md").write_text(page(DOCS / "images"), encoding="utf-8")
