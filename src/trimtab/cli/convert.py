"""Commands that take adapters elsewhere: convert, merge, push."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from trimtab.cli.common import command, console, indices

if TYPE_CHECKING:
    from trimtab.interop.convert import Report

Source = Annotated[Path, typer.Argument(help="The adapter: a folder or a file.")]
BaseModel = Annotated[
    str | None, typer.Option("--base", help="The base model, where the source names none or another.")
]
Checked = Annotated[bool, typer.Option(help="Run both sides on a few prompts if the base model is at hand.")]


@command()
def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(help="The folder or file to write.")],
    to: Annotated[str, typer.Option(help="trimtab, pyreft, easysteer, lora or gguf.")] = "trimtab",
    base: BaseModel = None,
    positions: Annotated[str | None, typer.Option(help="Edited tokens, where the source does not say: f7+l7.")] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks, where vectors are not named by theirs: 10,11.")] = None,
    method: Annotated[str | None, typer.Option(help="The edit, where the source does not say: noreft.")] = None,
    activation: Annotated[str | None, typer.Option(help="Its activation, where the source keeps none.")] = None,
    task: Annotated[str | None, typer.Option(help="PEFT's task type, if not the base's own: SEQ_CLS.")] = None,
    lora_bias: Annotated[bool, typer.Option(help="Whether what runs the LoRA takes lora_bias, as PEFT does.")] = True,
    check: Checked = True,
) -> None:
    """Convert an adapter from or to another library's format, which is found by looking (docs/convert.md)."""
    from trimtab.interop.convert import Given
    from trimtab.interop.convert import convert as run

    given = Given(base, positions, indices("--layers", layers), method, activation, task, lora_bias)
    _show(run(source, output, to, given, check=check), output)


@command()
def merge(
    adapter: Source,
    output: Annotated[Path, typer.Argument(help="The folder to write the model to.")],
    base: BaseModel = None,
    check: Checked = True,
) -> None:
    """Merge an adapter into its base model's weights: edits of every token at mlp or attention (docs/convert.md)."""
    from trimtab.interop.convert import Given
    from trimtab.interop.merge import merge as run

    _show(run(adapter, output, Given(base), check=check), output)


def _show(report: Report, output: Path) -> None:
    config, check = report.config, report.check
    facts = Table(show_header=False, title=f"{report.source} to {report.target}")
    edits = f"{config.method_text}{'' if config.tied else ', prefix and suffix edited apart'}"
    for name, value in (
        ("base model", report.base),
        ("method", edits + (f", activation {config.activation}" if config.activation else "")),
        ("positions", config.positions),
        ("site, layers", f"{config.site}, {config.layers}"),
        ("edited modules", f"{len(report.modules)}, from {report.modules[0]} to {report.modules[-1]}"),
        *([("saved whole", ", ".join(report.heads))] if report.heads else []),
        *(("not in the source", text) for text in report.unsaid),
        *(("to know", text) for text in report.notes),
        (
            "checked",
            check
            if isinstance(check, str)
            else f"{check.prompts} prompts on both sides: logits differ by at most "
            f"{check.difference:.2g}, at a scale of {check.scale:.3g}",
        ),
    ):
        facts.add_row(name, value)

    console.print(facts)
    console.print(f"Wrote {output!s}.", soft_wrap=True)


@command()
def push(
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter or of one trained task.")],
    repository: Annotated[str, typer.Argument(help="Where on the Hub: user/name.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
) -> None:
    """Upload an adapter to the Hub, from where `--adapter user/name` has it."""
    from trimtab.adapter.hub import push as upload

    console.print(f"{upload(adapter, repository, private=private)}: use it with --adapter {repository}")
