"""Commands that look at what is there: show, outputs, lm-eval, mmlu."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trimtab.cli.common import command, console, extra, must_be_new, size_of


@command()
def show(adapter: Annotated[Path, typer.Argument(help="An adapter's folder.")]) -> None:
    """Describe an adapter: method, layers, positions, parameters, and the size of its edit by layer."""
    from trimtab.adapter.folder import inspect_adapter

    info = inspect_adapter(adapter)
    config = info.config
    facts = Table(show_header=False, title=str(adapter))
    for name, value in (
        ("base model", info.base_model),
        ("method", f"{config.method_text}{'' if config.tied else ', prefix and suffix edited apart'}"),
        ("positions", config.positions),
        ("site, layers", f"{config.site}, {config.layers}"),
        ("parameters", f"{info.parameters:,}"),
        ("beside the edits", ", ".join(info.extras) or "nothing"),
        ("file", size_of(info.bytes_on_disk)),
    ):
        facts.add_row(name, str(value))
    console.print(facts)
    largest = max(info.edit_norms.values(), default=0.0) or 1.0
    norms = Table("edited module", "size of the edit", "")
    for module, norm in info.edit_norms.items():
        norms.add_row(module, f"{norm:.4f}", "█" * round(24 * norm / largest))
    console.print(norms)


@command()
def outputs(
    run: Annotated[Path, typer.Argument(help="The folder that a task's run left.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("outputs.json"),
    generator: Annotated[
        str | None, typer.Option(help="What the answers go under; the model and task by default.")
    ] = None,
    untuned: Annotated[bool, typer.Option("--untuned", help="The base model's answers instead.")] = False,
) -> None:
    """Write a run's answers to its test prompts as AlpacaEval reads them."""
    from trimtab.interop.alpaca_eval import alpaca_eval
    from trimtab.runs.folder import write_json

    must_be_new(output)
    rows = alpaca_eval(run, generator, untuned=untuned)
    write_json(output, rows)
    console.print(f"Wrote {len(rows)} answers by {rows[0]['generator']!r} to {output}.")


@command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context) -> None:
    """Score an adapter with lm-evaluation-harness, whose options these are (docs/lm-eval.md)."""
    with extra("lm-eval"):
        from trimtab.interop.lm_eval import main
    main(context.args)


@command()
def mmlu(
    data: Annotated[Path, typer.Argument(help="The folder that holds MMLU's dev/ and test/ with CSV files.")],
    output: Annotated[Path, typer.Argument(help="The folder to write to.")],
) -> None:
    """Make MMLU's files into tasks for `trimtab lm-eval`, to run without the Hub."""
    from trimtab.interop.mmlu import write_mmlu

    must_be_new(output)
    write_mmlu(data, output)
    console.print(f"Run it: trimtab lm-eval --include_path {output} --tasks mmlu_local ...", soft_wrap=True)
