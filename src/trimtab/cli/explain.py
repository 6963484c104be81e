"""`trimtab explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.cli.common import ModelName, command, console, must_be_new

if TYPE_CHECKING:
    from trimtab.adapter.explain import Explanation


@command()
def explain(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder.")],
    prompt: Annotated[str, typer.Argument(help="The input; the adapter's own prompt template goes around it.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="An HTML file to write the picture to.")] = None,
    model: ModelName = None,
    top: Annotated[int, typer.Option(min=1, max=20, help="Likeliest next tokens to show.")] = 4,
) -> None:
    """Show which tokens an adapter moves, how far at each block, and what each block's edit changes."""
    import torch

    from trimtab.adapter.explain import explain as run
    from trimtab.adapter.explain import page
    from trimtab.runs.folder import write_text
    from trimtab.runs.generate import Answerer, find_adapters

    if output is not None:
        must_be_new(output)
    found = find_adapters([str(adapter)])
    if len(found) > 1:
        raise ValueError(f"{adapter}: holds {len(found)} adapters, {', '.join(found)}; name one of them.")
    answerer, name = Answerer(found, model), next(iter(found))
    ids = answerer.encode(prompt, name).input_ids
    seen = run(answerer.model, torch.tensor(ids))
    text = answerer.tokenizer.decode
    tokens = [str(text([i])) for i in ids]
    edited = [any(place.moved[i] is not None for place in seen.places) for i in range(len(ids))]
    console.print(
        "Edited tokens, in brackets: " + " ".join(f"[{t}]" if e else t for t, e in zip(tokens, edited, strict=True))
    )
    if not any(edited):
        console.print("None: the adapter edits only what follows a prompt, or is as it was before training.")
    console.print(_by_module(seen, tokens, text))
    names = {i: str(text([i])) for i in seen.top(top)}
    nexts = Table("next token", "base model", "adapter")
    for i, shown in names.items():
        nexts.add_row(repr(shown), f"{float(seen.base[i].exp()):.1%}", f"{float(seen.edited[i].exp()):.1%}")
    console.print(nexts)
    console.print("moved: the length of the change over that of the hidden state, the mean over edited tokens.")
    console.print(
        "matters: how far the probabilities of the next token change when this module's edit alone is switched off "
        "(KL divergence in nats; 0 is not at all)."
    )
    if output is not None:
        write_text(output, page(seen, f"{name}: {prompt}", tokens, names))
        console.print(f"Wrote {output!s}.", soft_wrap=True)


def _by_module(seen: Explanation, tokens: Sequence[str], text: Callable[[list[int]], Any]) -> Table:
    table = Table("edited module", "moved", "most, at", "matters", "next token without it")
    for place in seen.places:
        moved = {i: value for i, value in enumerate(place.moved) if value is not None}
        most = max(moved, key=lambda i: moved[i], default=None)
        table.add_row(
            place.module,
            f"{sum(moved.values()) / len(moved):.2f}" if moved else "-",
            f"{moved[most]:.2f} {tokens[most]!r}" if most is not None else "-",
            f"{place.matters:.3f}",
            f"{text([int(place.without.argmax())])!r} {float(place.without.max().exp()):.0%}",
        )
    return table
