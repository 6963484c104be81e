"""Commands that ask adapters: generate, chat, predict."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trimtab.cli.common import Folders, ModelName, command, console, must_be_new, resumable
from trimtab.errors import DataError


@command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The input; each adapter's own prompt template goes around it.")],
    adapter: Folders = None,
    model: ModelName = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="At most so many new tokens.")] = None,
    base: Annotated[bool, typer.Option(help="Answer with the base model too.")] = True,
) -> None:
    """Answer one prompt with each adapter, and the base model, in a single batch."""
    from trimtab.runs.generate import BASE, Answerer, find_adapters

    if not prompt.strip():
        raise DataError("the prompt is empty; give one")
    adapters = find_adapters(adapter or [], console.print)
    answerer = Answerer(adapters, model)
    names = [*adapters, *([BASE] if base or not adapters else [])]
    table = Table("adapter", "answer", title=prompt)
    for name, text in zip(names, answerer.answer(prompt, names, max_new_tokens), strict=True):
        table.add_row("(base model)" if name == BASE else name, text)
    console.print(table)


@command()
def chat(adapter: Folders = None, model: ModelName = None) -> None:
    """Talk to a model; /use NAME switches the adapter, also in the middle of a conversation."""
    from trimtab.runs.generate import BASE, Answerer, find_adapters

    with suppress(ImportError):  # no Windows
        import readline  # noqa: F401  (by which input() edits its line)
    adapters = find_adapters(adapter or [], console.print)
    answerer = Answerer(adapters, model)
    current = next(iter(adapters), BASE)
    messages: list[dict[str, str]] = []
    console.print(f"Adapters: {', '.join([*adapters, 'base'])}. Commands: /use NAME, /new, /quit.")
    while True:
        try:
            text = console.input(f"{'base' if current == BASE else current}> ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        command, _, argument = text.partition(" ")
        if command == "/quit":
            break
        if command == "/new":
            messages = []
        elif command == "/use":
            if argument not in (*adapters, "base"):
                console.print(f"No adapter {argument!r}; there are {', '.join([*adapters, 'base'])}.")
            else:
                current = BASE if argument == "base" else argument
                goes_on = "; it answers within what was said before, and /new starts over" if messages else ""
                console.print(f"{argument} from here on{goes_on}.")
        elif command.startswith("/"):
            console.print(f"No command {command}; there are /use NAME, /new, /quit.")
        elif text:
            asked = [*messages, {"role": "user", "content": text}]
            try:
                answer = answerer.reply(asked, current)
            except KeyboardInterrupt:
                console.print("\nStopped; that was not asked.")
                continue
            except ValueError as error:
                console.print(f"Not asked: {str(error).removesuffix('.')}. /new starts over.")
                continue
            messages = [*asked, {"role": "assistant", "content": answer}]
            console.print(answer or "(nothing)")


@command()
def predict(
    file: Annotated[
        Path, typer.Argument(help="The rows: a file of any kind that recipes read; answers need not be in it.")
    ],
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="The folder of one trained task.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .csv or .jsonl file to write, instead of printing CSV.")
    ] = None,
    model: ModelName = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows at a time; the training's eval_batch_size by default.")
    ] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and say how many.")
    ] = False,
) -> None:
    """Answer, classify or rate every row of a file; called again after an interruption, it goes on."""
    from rich.progress import Progress

    from trimtab.runs.apply import Applied, as_csv

    if output is not None:
        must_be_new(output)
    applied = Applied(adapter, model, batch_size, skip_bad_rows)
    if output is None:
        for number, lines in enumerate(applied.lines(applied.examples(file))):
            typer.echo(as_csv(iter(lines), header=not number), nl=False)
        for remark in applied.remarks():
            typer.echo(remark, err=True)
        return
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with resumable("What is done is kept; the same command goes on from there."), bar:
        rows = bar.add_task("rows", total=None)
        before = applied.write(file, output, lambda done, of: bar.update(rows, completed=done, total=of))
    if before:
        console.print(f"{before} rows were done already.")
    for remark in applied.remarks():
        console.print(remark)
    console.print(f"Wrote {output}.")
