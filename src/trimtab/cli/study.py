"""Commands of many experiments: compare, tune."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from trimtab.cli.common import (
    DataFolder,
    OutputFolder,
    RecipeFile,
    RecipeModel,
    Settings,
    TaskNames,
    as_settings,
    command,
    console,
    extra,
    must_be_new,
    read_recipe,
    resumable,
)

if TYPE_CHECKING:
    from trimtab.runs.trial import Experiment


KEPT = "What is done is kept; the same command goes on from there."


@command()
def compare(
    file: RecipeFile,
    model: RecipeModel = None,
    data: DataFolder = None,
    output: OutputFolder = None,
    settings: Settings = None,
    task: TaskNames = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    few_shot: Annotated[str | None, typer.Option(help="Numbers of training examples, as in 4,8,16,32,64.")] = None,
    ablate: Annotated[
        str | None, typer.Option(help="Vary the recipe's adapter instead: positions,layers,r,tied,init.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trials at a time; by default as many as fit.")] = None,
) -> None:
    """Compare methods on a recipe's tasks: same data, steps, seeds and learning rates, with statistics."""
    with extra("bench"):
        from trimtab.study.pages import write_report
    from trimtab.recipe.init import look_at
    from trimtab.runs.ways import as_way
    from trimtab.study.ablations import adapter_variants
    from trimtab.study.compare import Group, Study, choose_ways
    from trimtab.study.tables import overview
    from trimtab.study.workers import room_for

    recipe = read_recipe(file, model, data, output, settings, task)
    experiments, chosen = recipe.experiments(task), recipe.compare
    if seeds is not None:
        chosen = chosen.model_copy(update={"seeds": seeds})
    ways = choose_ways(experiments, chosen, method)
    if ablate is not None:
        blocks = look_at(recipe.model).blocks
        ways = {
            name: [as_way(v, experiment.adapter) for v in adapter_variants(experiment, ablate, blocks)]
            for name, experiment in experiments.items()
        }
    folder = Path(recipe.output) / "compare"
    study = Study(experiments, ways, chosen, folder / "trials", _numbers(few_shot) if few_shot else (None,))
    left = list(study.groups)

    def watch(group: Group) -> None:
        scores = [run.test[group.experiment.task.score.name] for run in group.seeds]
        found = ", ".join(f"{100 * s:.1f}" for s in scores) or group.impossible
        size = f" {group.examples} examples" if group.examples else ""
        left.remove(group)
        text = f"{group.task}{size}, {group.way.name}: {found}"
        console.print(f"{text} ({len(left)} left)")

    _say(experiments)
    jobs = jobs or room_for(recipe.model)
    console.print(f"{len(study.groups)} comparisons, {jobs} trials at a time; what is done already is read.")
    with resumable(KEPT):
        study.run(jobs, watch)
    name = "-".join(["ablation"] * bool(ablate) + ["few-shot"] * bool(few_shot)) or "report"
    command = " ".join(["trimtab", *sys.argv[1:]])
    report = write_report(study.groups, chosen, folder, name, command)
    head, lines = overview(report)
    table = Table(*head[:5], title=recipe.model)  # what fits a terminal
    for line in lines:
        table.add_row(*line[:5])
    console.print(table)
    console.print(f"Wrote {folder / name}.html, .md, .json and plots.")


@command()
def tune(
    file: RecipeFile,
    model: RecipeModel = None,
    data: DataFolder = None,
    settings: Settings = None,
    task: TaskNames = None,
    trials: Annotated[int, typer.Option(min=1, help="In all, those of earlier searches included.")] = 20,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe to write; FILE with -tuned in its name.")
    ] = None,
) -> None:
    """Search rank, positions, layers and learning rate on validation, and write a recipe with the best."""
    with extra("bench"):
        import optuna  # noqa: F401 (before anything is done)
    from trimtab.recipe.init import look_at
    from trimtab.recipe.write import write_tuned
    from trimtab.study.search import Found
    from trimtab.study.search import tune as search

    recipe = read_recipe(file, model, data, None, settings, task)
    output = output or file.with_name(f"{file.stem}-tuned{file.suffix or '.yaml'}")
    must_be_new(output)
    blocks, folder = look_at(recipe.model).blocks, Path(recipe.output) / "tune"
    best: dict[str, Found] = {}
    _say(recipe.experiments(task))
    for name, experiment in recipe.experiments(task).items():

        def watch(number: int, found: Found, name: str = name) -> None:
            tried = {**found.settings, "learning_rate": found.learning_rate}
            said = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in tried.items())
            console.print(f"{name} {number}: validation {found.validation:.3f} with {said}")

        with resumable(KEPT):
            best[name] = search(experiment, recipe.tune, folder, blocks, trials, watch)
    table = Table("task", "validation", "r", "positions", "layers", "learning rate")
    for name, found in best.items():
        shown = (str(found.settings[k]) for k in ("r", "positions", "layers"))
        table.add_row(name, f"{found.validation:.3f}", *shown, f"{found.learning_rate:.2g}")
    console.print(table)
    runs = write_tuned(output, recipe, best, file, as_settings(model, None, settings), data)
    kept = [name for name, found in best.items() if found.own]
    if kept:
        console.print(f"{', '.join(kept)}: nothing better than the recipe's own settings was found.")
    console.print(f"Wrote {output}, whose runs go to {runs}. Train it: trimtab train {output}")


def _say(experiments: Mapping[str, Experiment]) -> None:
    """What each task is tried on, before the first trial."""
    from trimtab.runs.models import load_tokenizer
    from trimtab.runs.summary import checked_summary

    for experiment in experiments.values():
        console.print(checked_summary(experiment, load_tokenizer(experiment.source.name), placed=False))


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"--few-shot {text!r}: give positive numbers of examples, as in 4,8,16")
    return sorted(set(found))
