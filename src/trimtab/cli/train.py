"""Commands from a model to trained adapters: init, train, eval."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trimtab.cli.common import (
    DataFolder,
    OutputFolder,
    RecipeFile,
    RecipeModel,
    Settings,
    TaskNames,
    command,
    console,
    joint_command,
    must_be_new,
    read_recipe,
    resumable,
    size_of,
)
from trimtab.cli.tables import failure_tables, progress_table, result_remarks, results_table, scores_table

SHOWN, SHOWN_BY_TRAIN = 5, 3
"""Wrong predictions of a task that `eval` shows, and `train`; also the most tasks of which `train` shows any."""


@command()
def init(
    model: Annotated[str | None, typer.Argument(help="A local model folder or a Hub name.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="name=training_file; may be repeated.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe to write; recipe.yaml by default.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="The fields of a CSV or TSV file that has no header line: id,label,text.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="What stands between the cells of a CSV or TSV file, where it is not found.")
    ] = None,
    example: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Only print a recipe of this type of task, with every key.")
    ] = None,
) -> None:
    """Look at a model and write a commented recipe for it."""
    if example is not None:
        from trimtab.recipe.reference import example_recipe

        if task or output:
            raise ValueError("--example prints a recipe and reads no file; leave out --task and --output.")
        typer.echo(example_recipe(example, model), nl=False)
        return
    if model is None:
        raise ValueError("init needs a model: trimtab init MODEL --task FILE, or --example TYPE alone.")
    from trimtab.recipe.init import adapter_parameters, look_at, look_at_tasks, recipe_text, suggest, with_new_head
    from trimtab.recipe.load import load_recipe
    from trimtab.runs.summary import first_row

    output = output or Path("recipe.yaml")
    must_be_new(output)
    facts = look_at(model)
    named = [name.strip() for name in columns.split(",")] if columns else None
    tasks = look_at_tasks(task or [], facts.generates, named, separator)
    text = recipe_text(facts, tasks)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    weight = adapter_parameters(facts, suggest(facts).r)
    table = Table(
        "", "parameters", "share", "file (float32)", title=f"{model}: {facts.blocks} blocks of width {facts.width}"
    )
    for name, count in (("this LoReFT", weight), ("LoRA r8, all linear layers", facts.lora_parameters)):
        table.add_row(name, f"{count:,}", f"{100 * count / facts.parameters:.3f}%", size_of(4 * count))
    if with_new_head(tasks):
        table.caption = "a new head comes on top"
    console.print(table)
    fill = "Check it" if task else "Fill in the data"
    console.print(f"Wrote {output}. {fill}, then: trimtab train {output}")
    for experiment in load_recipe(output).experiments().values() if task else ():
        console.print(first_row(experiment))
        if said := tasks[experiment.name][1].said:
            console.print(f"  ! {said}")


@joint_command()
def train(
    file: RecipeFile,
    model: RecipeModel = None,
    data: DataFolder = None,
    output: OutputFolder = None,
    settings: Settings = None,
    task: TaskNames = None,
    resume: Annotated[
        bool, typer.Option(help="Skip what is done and go on where a run stopped; --no-resume starts over.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be trained on what.")] = False,
) -> None:
    """Train an adapter for every task of a recipe."""
    from rich.live import Live

    from trimtab.runs.curve import CURVE, NO_PLOT
    from trimtab.runs.train import rehearse
    from trimtab.runs.train import train as train_all
    from trimtab.runs.trainer import Progress

    recipe = read_recipe(file, model, data, output, settings, task)
    experiments = recipe.experiments(task)
    if dry_run:
        rehearse(experiments, recipe.output, console.print, resume=resume)
        return
    rows = {name: Progress(name) for name in experiments}
    live = Live(console=console, refresh_per_second=4)

    def watch(progress: Progress) -> None:
        rows[progress.task] = progress
        live.start()  # not before, so that a mistake in the recipe or its data is told without a table
        live.update(progress_table(rows))

    with resumable("The same command goes on from the last checkpoint, and skips the tasks that are done."):
        try:
            metrics = train_all(experiments, recipe.output, resume=resume, watch=watch, say=console.print)
        finally:
            if live.is_started:
                live.stop()
                if not console.is_terminal:
                    console.print()  # Live ends without a line break there
    console.print(results_table(metrics))
    for name, m in metrics.items() if len(metrics) <= SHOWN_BY_TRAIN else ():
        for table in failure_tables(name, m, most=SHOWN_BY_TRAIN):
            console.print(table)
    for name, m in metrics.items():
        for said in result_remarks(m):
            console.print(f"{name}: {said}")
        if m["reuse"]["reused"]:
            share = m["reuse"]["tokens_saved"] / max(1, m["reuse"]["tokens"])
            console.print(f"{name}: kept {m['reuse']['reused']}, {share:.0%} of all tokens' work.")
    drawn = [Path(recipe.output) / name / CURVE for name in metrics]
    there = [str(path) for path in drawn if path.exists()]
    if there:
        console.print(f"Loss and validation by step: {', '.join(there)}")
    elif find_spec("matplotlib") is None:
        console.print(NO_PLOT)
    hint = f"Use one on a file: trimtab predict FILE -a {recipe.output}/{next(iter(metrics))}"
    console.print(f"Adapters in {recipe.output}/<task>. {hint}")


@command(name="eval")
def evaluate_recipe(
    file: RecipeFile,
    model: RecipeModel = None,
    data: DataFolder = None,
    output: OutputFolder = None,
    settings: Settings = None,
    task: TaskNames = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    predictions: Annotated[
        Path | None, typer.Option(help="A .json file to write: what was asked, expected and answered, row by row.")
    ] = None,
) -> None:
    """Score the trained adapters of a recipe, the base model beside them, and show where they fail."""
    from trimtab.runs.folder import write_json
    from trimtab.runs.train import evaluate_runs

    if predictions is not None:
        must_be_new(predictions, "--predictions", ".json")
    recipe = read_recipe(file, model, data, output, settings, task)
    results = evaluate_runs(recipe.experiments(task), recipe.output, split)
    console.print(scores_table(results))
    for name, result in results.items():
        for table in failure_tables(name, result, most=SHOWN):
            console.print(table)
    if predictions is not None:
        write_json(predictions, {name: result["answers"] for name, result in results.items()})
        console.print(f"Wrote {predictions}.")
