"""Commands that look at what is there: show, outputs, lm-eval, mmlu."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trimtab.cli.common import ModelName, command, console, extra, must_be_new, size_of


@command()
def show(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder.")],
    other: Annotated[str | None, typer.Argument(help="Another one, ReFT or LoRA, to set beside it.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="With two: a text to compare them on; may be repeated.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="With two: a file of such texts, one a line.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With two: an HTML file for the pictures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With two: print all figures as JSON instead.")] = False,
    model: ModelName = None,
) -> None:
    """Describe an adapter, or set two of one base model side by side: settings, sizes, what each does to h."""
    if other is None:
        if prompt or prompts or output or as_json or model:
            raise ValueError("--prompt, --prompts, --output, --json and --model go with two adapters.")
        _show_one(Path(adapter))
    else:
        texts = [*(prompt or []), *(_lines(prompts) if prompts else [])]
        _show_two(adapter, other, texts, output, as_json, model)


def _lines(file: Path) -> list[str]:
    """Those that are not blank. Raises ValueError where there are none."""
    found = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"--prompts {file}: holds no text; write one a line.")
    return found


def _show_one(adapter: Path) -> None:
    from trimtab.adapter.folder import inspect_adapter

    info = inspect_adapter(adapter)
    config = info.config
    beside = f" ({info.extra_parameters:,} beside the edits)" if info.extras else ""
    facts = Table(show_header=False, title=str(adapter))
    for name, value in (
        ("base model", info.base_model),
        ("method", f"{config.method_text}{'' if config.tied else ', prefix and suffix edited apart'}"),
        ("positions", config.positions),
        ("site, layers", f"{config.site}, {config.layers}"),
        ("parameters", f"{info.parameters:,}{beside}"),
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


def _show_two(
    first: str, second: str, prompts: list[str], output: Path | None, as_json: bool, model: str | None
) -> None:
    from trimtab.runs.folder import write_text
    from trimtab.study.sidebyside import compare_adapters
    from trimtab.study.sidebyside_page import EXPLAINED, in_short, number, page

    if output is not None:
        must_be_new(output, suffix=".html")
    found = compare_adapters(first, second, prompts, model=model)
    if output is not None:
        write_text(output, page(found))
    if as_json:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False))
        return
    names = (f"{k}: {name}" for k, name in zip("AB", found.names, strict=True))
    settings = Table("", *names, title=f"two adapters of {found.base}")
    for line in found.settings:
        settings.add_row(line.name, *line.values)
    console.print(settings)
    heads = ("para-\nmeters", "bytes", "moved,\nprompt", "moved,\nanswer", "direc-\ntions", "overlap\n(chance)")
    table = Table("", *heads, "CKA", "CKA,\nbase", title="A above, B below, by block")
    for block in (*found.blocks, found.total):
        overlap = "" if block.overlap is None else f"{block.overlap:.2f}\n({number(block.chance)})"
        sizes = ("\n".join(f"{n:,}" for n in block.parameters), "\n".join(map(size_of, block.bytes)))
        directions = _pair(block.directions) if any(block.directions) else ""
        alike = (directions, overlap, number(block.cka), _pair(block.cka_base))
        table.add_row(block.name.rpartition("layers.")[2], *sizes, *map(_pair, (block.prompt, block.generated)), *alike)
    console.print(table)
    console.print(f"Read: {found.source}.")
    for term, said in EXPLAINED:
        console.print(f"{term}: {said}")
    console.print("\n".join(["", "In short:", *in_short(found)]))
    if output is not None:
        console.print(f"Wrote {output}.")


def _pair(values: Sequence[float | None]) -> str:
    from trimtab.study.sidebyside_page import number

    return "\n".join(filter(None, map(number, values)))


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

    must_be_new(output, suffix=".json")
    rows = alpaca_eval(run, generator, untuned=untuned)
    write_json(output, rows)
    console.print(f"Wrote {len(rows)} answers by {rows[0]['generator']!r} to {output}.")


@command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context) -> None:
    """Score an adapter with lm-evaluation-harness: its command, its options, and edits where they belong.

    The model type is trimtab unless --model says otherwise: what a question asks is the prompt that positions are
    counted in, and never what is scored. Without peft= the base model is scored. BASE and ADAPTER are folders or names
    on the Hub. Needs the extra lm-eval.

    trimtab lm-eval --model_args pretrained=BASE,peft=ADAPTER --tasks boolq --batch_size 16

    trimtab lm-eval ls tasks: which tasks there are.

    trimtab lm-eval run --help: every option of the harness.
    """
    if context.args in ([], ["-h"], ["--help"]):
        typer.echo(context.get_help())
        return
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
