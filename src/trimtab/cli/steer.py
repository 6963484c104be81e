"""`trimtab steer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trimtab.cli.common import command, console, indices, must_be_new


@command()
def steer(
    model: Annotated[str, typer.Argument(help="The base model: a local folder or a Hub name.")],
    positive: Annotated[Path, typer.Option(help="Texts that have what is wanted: lines, or rows with a field text.")],
    negative: Annotated[Path, typer.Option(help="Texts that lack it; line by line the pairs of the others.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    how: Annotated[str, typer.Option(help="mean (difference of means) or pca (of the pairs' differences).")] = "mean",
    layers: Annotated[
        str | None, typer.Option(help="Blocks to edit, as in 10,11; else the best on held-out pairs.")
    ] = None,
    positions: Annotated[str, typer.Option(help="Edited tokens: l1, f1+l2, prompt, generated, all.")] = "all",
    strength: Annotated[
        float | None, typer.Option(help="In norms of the hidden state; else as far as the means lie apart.")
    ] = None,
    chat: Annotated[bool | None, typer.Option(help="Whether texts go into the chat template; if there is one.")] = None,
) -> None:
    """Make an adapter without training, from pairs of texts: a direction that is added to hidden states."""
    import torch

    from trimtab.adapter.steering import steer as run
    from trimtab.runs.models import ModelSource, load_model, load_tokenizer
    from trimtab.tasks.files import read_texts
    from trimtab.tasks.tokens import encode

    must_be_new(output)
    tokenizer = load_tokenizer(model)
    texts = [
        [torch.tensor(encode(tokenizer, text, chat="auto" if chat is None else chat).input_ids) for text in lines]
        for lines in (read_texts(positive), read_texts(negative))
    ]
    base = load_model(ModelSource(model)).eval()
    found = run(base, *texts, how=how, layers=indices("--layers", layers), positions=positions, strength=strength)
    table = Table("block", "strength", "held-out texts told apart", "gap closed", "")
    for layer in found.layers:
        mark = "written" if layer.number in found.chosen else ""
        table.add_row(
            str(layer.number), f"{layer.strength:.2f}", f"{layer.accuracy:.0%}", f"{layer.gap_closed:+.2f}", mark
        )
    console.print(table)
    found.save(base, output)
    console.print(
        "gap closed: how much nearer, on held-out pairs, the next token after a steered negative comes to the "
        f"positive's (1: the same, 0: no nearer).\nWrote {output!s}.",
        soft_wrap=True,
    )
