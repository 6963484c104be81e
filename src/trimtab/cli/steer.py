"""`trimtab steer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.cli.common import command, console, indices, must_be_new

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.adapter.steering import Steering


@command()
def steer(
    model: Annotated[str, typer.Argument(help="The base model: a local folder or a Hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    positive: Annotated[
        Path | None, typer.Option(help="Texts that have what is wanted: lines, or rows with a field text.")
    ] = None,
    negative: Annotated[
        Path | None, typer.Option(help="Texts that lack it; line by line the pairs of the others.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="In place of both: rows with positive and negative, and prompt if they are answers to one."),
    ] = None,
    how: Annotated[
        str, typer.Option(help="The direction: mean (difference of means), pca, or caa (read at the last token).")
    ] = "mean",
    action: Annotated[
        str, typer.Option(help="add it, clamp the coordinate along it, or erase all that tells both apart (LEACE).")
    ] = "add",
    layers: Annotated[
        str | None, typer.Option(help="Blocks to edit, as in 10,11; else the best on held-out pairs.")
    ] = None,
    positions: Annotated[str, typer.Option(help="Edited tokens: l1, f1+l2, prompt, generated, all.")] = "all",
    strength: Annotated[
        float | None, typer.Option(help="In norms of the hidden state; else as far as, or where, the positives lie.")
    ] = None,
    chat: Annotated[bool | None, typer.Option(help="Whether texts go into the chat template; if there is one.")] = None,
) -> None:
    """Make an adapter without training, from pairs of texts: a direction is added, clamped or erased."""
    from trimtab.adapter.steering import steer as run
    from trimtab.runs.models import ModelSource, load_model, load_tokenizer

    must_be_new(output)
    texts = _texts(load_tokenizer(model), positive, negative, pairs, "auto" if chat is None else chat)
    base = load_model(ModelSource(model)).eval()
    found = run(
        base,
        *texts,
        how=how,
        action=action,
        layers=indices("--layers", layers),
        positions=positions,
        strength=strength,
    )
    console.print(_table(found))
    found.save(base, output)
    console.print(
        "gap closed: how much nearer, on held-out pairs, the next token after an edited negative comes to the "
        f"positive's{', edited too' if action == 'erase' else ''} (1: the same, 0: no nearer).\nWrote {output!s}.",
        soft_wrap=True,
    )


def _texts(
    tokenizer: Any, positive: Path | None, negative: Path | None, pairs: Path | None, chat: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids of positives and negatives. Raises DataError for files that hold none."""
    import torch

    from trimtab.errors import DataError
    from trimtab.tasks.files import read_rows, read_texts
    from trimtab.tasks.tokens import encode

    if pairs is None and positive is not None and negative is not None:
        rows = [[{"prompt": text} for text in read_texts(file)] for file in (positive, negative)]
    elif pairs is not None and positive is None and negative is None:
        rows = [[_row(row, kind, pairs) for row in read_rows(pairs)] for kind in ("positive", "negative")]
    else:
        raise DataError("give --positive and --negative, or --pairs alone.")

    def ids(prompt: str, answer: str = "") -> Tensor:
        said = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
        return torch.tensor([*encode(tokenizer, prompt, chat=chat).input_ids, *said])

    return [ids(**row) for row in rows[0]], [ids(**row) for row in rows[1]]


def _row(row: dict[str, Any], kind: str, file: Path) -> dict[str, str]:
    from trimtab.errors import DataError

    wanted = [name for name in ("prompt", kind) if name in row]
    if kind not in row or not all(isinstance(row[name], str) for name in wanted):
        raise DataError(f"{file}: every row needs texts 'positive' and 'negative', and may have a text 'prompt'.")
    return {"prompt": row["prompt"], "answer": row[kind]} if "prompt" in row else {"prompt": row[kind]}


def _table(found: Steering) -> Table:
    table = Table("block", "strength", "held-out texts told apart", "gap closed", "")
    for layer in found.layers:
        mark = "written" if layer.number in found.chosen else ""
        strength = "-" if layer.strength is None else f"{layer.strength:.2f}"
        table.add_row(str(layer.number), strength, f"{layer.accuracy:.0%}", f"{layer.gap_closed:+.2f}", mark)
    return table
