"""`trimtab explain`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from trimtab.cli.common import ModelName, command, console, must_be_new

if TYPE_CHECKING:
    from trimtab.adapter.explain import Explanation


@command()
def explain(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder.")],
    prompt: Annotated[str, typer.Argument(help="The input; the adapter's own prompt template goes around it.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="An HTML file to write the picture to.")] = None,
    model: ModelName = None,
    top: Annotated[int, typer.Option(min=1, max=20, help="Likeliest next tokens to show.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the answers.")] = 32,
) -> None:
    """Show what an adapter does to one prompt: its answer and the base model's, what each layer's edit is worth to it,
    and which tokens are moved how far."""
    import torch

    from trimtab.adapter.explain import explain as run
    from trimtab.adapter.explain import page
    from trimtab.runs.folder import write_text
    from trimtab.runs.generate import Answerer, find_adapters
    from trimtab.runs.predict import check_context

    if output is not None:
        must_be_new(output)
    found = find_adapters([str(adapter)])
    if len(found) > 1:
        raise ValueError(f"{adapter}: holds {len(found)} adapters, {', '.join(found)}; name one of them.")
    answerer, name = Answerer(found, model), next(iter(found))
    encoded = answerer.encode(prompt, name)
    check_context(answerer.model, [encoded], max_new_tokens, lambda _: "PROMPT", "lower --max-new-tokens")
    ids = encoded.input_ids
    seen = run(answerer.model, torch.tensor(ids), max_new_tokens)
    decode = answerer.tokenizer.decode
    tokens = [str(decode([int(i)])) for i in [*ids, *seen.answer[:-1]]]
    answers = [
        str(decode(own, skip_special_tokens=True)).strip() or "(nothing)" for own in (seen.answer, seen.base_answer)
    ]
    names = {i: str(decode([i])) for i in seen.top(top)}
    edited = [any(place.moved[i] is not None for place in seen.places) for i in range(len(tokens))]
    why = answerer.model.peft_config[name].parsed_positions.words
    console.print(f"With the adapter: {answers[0]}\nBase model:       {answers[1]}\n", soft_wrap=True)
    console.print(_outcomes(seen, names))
    console.print(
        f"answer: the probability of {answers[0]!r}, whole. Less likely without a layer's edit: this edit helped.\n"
    )
    marked = (f"[{t}]" if e else t for t, e in zip(tokens[: len(ids)], edited, strict=False))
    console.print(f"The adapter edits {why}, here in brackets: {' '.join(marked)}", soft_wrap=True)
    if not any(edited):
        console.print("No token is moved: the adapter is as it was before training.")
    console.print(_moves(seen, tokens))
    console.print("moved: the length of the change over that of the hidden state; the mean over edited tokens.")
    if output is not None:
        title = f"Adapter {name} on the prompt “{prompt}”"
        write_text(output, page(seen, title, tokens, names, answers, why))
        console.print(f"Wrote {output!s}.", soft_wrap=True)


def _outcomes(seen: Explanation, names: dict[int, str]) -> Table:
    from trimtab.adapter.explain import percent

    table = Table(
        Column("", no_wrap=True), "answer", Column("", no_wrap=True), *(f"{name!r} next" for name in names.values())
    )
    for i, (line, own) in enumerate(seen.rows):
        each = (f"{float(own.next[token].exp()):.1%}" for token in names)
        table.add_row(line, percent(own.answer), seen.times(own) if i else "", *each)
    return table


def _moves(seen: Explanation, tokens: Sequence[str]) -> Table:
    table = Table("edit at", "moved", "most, at")
    for place in seen.places:
        moved = {i: value for i, value in enumerate(place.moved) if value is not None}
        most = max(moved, key=lambda i: moved[i], default=None)
        table.add_row(
            place.label,
            f"{sum(moved.values()) / len(moved):.2f}" if moved else "-",
            f"{moved[most]:.2f} {tokens[most]!r}" if most is not None else "-",
        )
    return table
