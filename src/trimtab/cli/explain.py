"""`trimtab explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.cli.common import ModelName, command, console, must_be_new

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.adapter.explain import Explanation


@command()
def explain(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder.")],
    prompt: Annotated[str, typer.Argument(help="The input; the adapter's own prompt template goes around it.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="An HTML file to write the picture to.")] = None,
    model: ModelName = None,
    answer: Annotated[str | None, typer.Option(help="Explain this answer instead of the adapter's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the answers.")] = 32,
) -> None:
    """Show what an adapter does to one prompt: what is answered with it, without it and without each layer's edit, and
    which tokens are moved how far."""
    import torch

    from trimtab.adapter.explain import MOVING, READING, Words, page, percent
    from trimtab.adapter.explain import explain as run
    from trimtab.runs.folder import write_text
    from trimtab.runs.generate import Answerer, find_adapters
    from trimtab.runs.predict import check_context

    if output is not None:
        must_be_new(output, suffix=".html")
    found = find_adapters([str(adapter)])
    if len(found) > 1:
        raise ValueError(f"{adapter}: holds {len(found)} adapters, {', '.join(found)}; name one of them.")
    answerer, name = Answerer(found, model), next(iter(found))
    encoded = answerer.encode(prompt, name, answer)
    check_context(answerer.model, [encoded], max_new_tokens, lambda _: "PROMPT", "lower --max-new-tokens")
    ids = torch.tensor(encoded.input_ids)
    ids, wanted = ids[: encoded.prompt_length], ids[encoded.prompt_length :]
    seen = run(answerer.model, ids, wanted if answer is not None else None, max_new_tokens)
    decode = answerer.tokenizer.decode
    words = Words(
        adapter=name,
        prompt=prompt,
        tokens=[str(decode([int(i)])) for i in [*ids, *seen.answer[:-1]]],
        answer=_text(decode, seen.answer),
        edits=answerer.model.peft_config[name].parsed_positions.words,
        text=partial(_text, decode),
        token=lambda i: str(decode([i])),
    )
    console.print(f"What the adapter {name!r} does to the prompt {prompt!r}\n")
    table = Table("", "answers", f"chance of\n{words.answer!r}", "than with\nthe adapter", "likeliest first tokens")
    for i, (line, own) in enumerate(seen.rows):
        again = seen.times(own) if i else ""
        table.add_row(line, words.text(own.says), percent(own.answer), again, words.first(own), end_section=i == 1)
    console.print(table)
    console.print(f"chance of {words.answer!r}: {' '.join(READING.split())}\n")
    edited = [any(place.moved[i] is not None for place in seen.places) for i in range(len(words.tokens))]
    marked = (f"[{t}]" if e else t for t, e in zip(words.tokens[: len(ids)], edited, strict=False))
    console.print(f"The adapter edits {words.edits}, here in brackets: {' '.join(marked)}")
    if not any(edited):
        console.print("No token is moved: the adapter is as it was before training.")
    console.print(_moves(seen, words.tokens))
    console.print(f"moved: the mean over edited tokens of {' '.join(MOVING.split())}")
    if output is not None:
        write_text(output, page(seen, words))
        console.print(f"Wrote {output!s}.", soft_wrap=True)


def _text(decode: Callable[..., Any], ids: Tensor) -> str:
    return str(decode(ids, skip_special_tokens=True)).strip() or "(nothing)"


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
