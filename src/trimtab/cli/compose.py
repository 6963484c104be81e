"""`trimtab compose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.common import command, console, numbers


@command()
def compose(
    adapters: Annotated[list[Path], typer.Argument(help="Adapters' folders, in the order in which they edit.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    weights: Annotated[
        str | None,
        typer.Option("--weights", "-w", help="Of each, as in 0.7,-0.3; -1 reverses; else all 1."),
    ] = None,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Each reads the hidden state without the others' edits: a plain sum.")
    ] = False,
) -> None:
    """Write the one adapter that edits as several do together, or one reversed, weaker or stronger, where exact."""
    from trimtab.adapter.compose import compose as run

    given = numbers("--weights", weights) if weights is not None else [1.0] * len(adapters)
    config = run(adapters, given, output, parallel=parallel)
    console.print(f"Wrote {output!s}: {config.method_text}, {config.positions}.", soft_wrap=True)
