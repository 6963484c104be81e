"""Commands of many experiments: compare, tune."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
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
from trimtab.cli.tables import elsewhere, progress_said, shown

if TYPE_CHECKING:
    from trimtab.runs.experiment import Experiment
    from trimtab.runs.ways import Way
    from trimtab.study.search import Found, Watch


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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many trials there are to run.")] = False,
) -> None:
    """Compare methods on a recipe's tasks: same data, steps, seeds and learning rates, with statistics."""
    with extra("bench"):
        from trimtab.study.pages import holds_more, write_report
    from trimtab.recipe.init import look_at
    from trimtab.runs.ways import as_way
    from trimtab.study.ablations import adapter_variants
    from trimtab.study.compare import Group, Study, choose_ways
    from trimtab.study.progress import Standing
    from trimtab.study.tables import overview, planned, remarks
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
    if chosen.budget is not None:
        ways = {name: _fitted(experiments[name], found, chosen.budget) for name, found in ways.items()}
    folder = Path(recipe.output) / "compare"
    study = Study(experiments, ways, chosen, folder / "trials", _numbers(few_shot) if few_shot else (None,))
    plan, left = study.plan(), list(study.groups)
    standing = Standing(plan.runs, plan.done)

    def watch(group: Group) -> None:
        found = ", ".join(f"{100 * s:.1f}" for s in group.scores) or group.impossible
        size = f" {group.examples} examples" if group.examples else ""
        left.remove(group)
        console.print(f"{group.task}{size}, {group.way.name}: {found} ({len(left)} left{elsewhere(standing)})")

    def board() -> Table:
        table = Table("task", "comparisons left", title=progress_said(standing), title_justify="left")
        for name in experiments:
            ways = [group.way.name for group in left if group.task == name]
            table.add_row(name, f"{len(ways)}: {', '.join(ways)}" if ways else "none")
        return table

    jobs = jobs or room_for(recipe.model)
    _say(experiments, plan.runs - plan.done, jobs)
    console.print(
        f"{len(study.groups)} comparisons, {jobs} trial{'s' * (jobs > 1)} at a time; what is done already is read."
    )
    if dry_run:
        console.print(planned(plan))
        return
    with resumable(KEPT), shown(board):
        study.run(jobs, watch, standing)
    name = "-".join(["ablation"] * bool(ablate) + ["few-shot"] * bool(few_shot)) or "report"
    if (method or task) and holds_more(folder / f"{name}.json", study.groups):
        console.print(f"{name}.md has more methods or tasks and is left as it is.")
        name += "-part"
    command = " ".join(["trimtab", *sys.argv[1:]])
    report = write_report(study.groups, chosen, folder, name, command)
    if (folder / "earlier" / f"{name}.md").exists():
        console.print(f"A report by an earlier procedure, whose verdicts hold less, is kept in {folder / 'earlier'}.")
    head, lines = overview(report)
    table = Table(*head[:5], title=recipe.model)  # what fits a terminal
    for line in lines:
        table.add_row(*line[:5])
    console.print(table)
    for title, found in report.tasks.items():
        for remark in remarks(found):
            console.print(f"! {title}: {remark}")
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
    from trimtab.study.search import tune as search_one

    recipe = read_recipe(file, model, data, None, settings, task)
    output = output or file.with_name(f"{file.stem}-tuned{file.suffix or '.yaml'}")
    must_be_new(output)
    blocks, folder = look_at(recipe.model).blocks, Path(recipe.output) / "tune"
    experiments = recipe.experiments(task)
    best: dict[str, Found] = {}
    _say(experiments, trials * len(experiments))
    for name, experiment in experiments.items():
        search = partial(search_one, experiment, recipe.tune, folder, blocks, trials)
        best[name] = _searched(experiment, search, trials)
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


def _fitted(experiment: Experiment, ways: list[Way], budget: int) -> list[Way]:
    """The ways at their budget, each of which is told."""
    from trimtab.runs.models import new_modules
    from trimtab.study.budget import fitted

    new = new_modules(experiment.source.name, experiment.task.head)
    found = [fitted(experiment, way, budget, new) if way.trains else None for way in ways]
    for one in filter(None, found):
        console.print(f"{experiment.name}, {one.way.name}: {one.said}")
    return [one.way if one else way for one, way in zip(found, ways, strict=True)]


def _searched(experiment: Experiment, search: Callable[[Watch], Found], trials: int) -> Found:
    """What a search of one task finds, its trials shown as they come."""
    from trimtab.study.progress import Standing

    standing = Standing(trials)
    tried: list[Found] = []

    def watch(number: int, found: Found) -> None:
        standing.of = max(trials - number + len(tried), 1)  # those of an earlier search are not made again
        standing.ended()
        tried.append(found)
        scored = f"{experiment.name} {number}: validation {found.validation:.3f}"
        console.print(f"{scored} with {_settings_said(found)}{elsewhere(standing)}")

    def board() -> Table:
        table = Table("best so far", "validation", title=progress_said(standing), title_justify="left")
        best = max(tried, key=lambda one: one.validation, default=None)
        table.add_row(*([_settings_said(best), f"{best.validation:.3f}"] if best else ["", ""]))
        return table

    with resumable(KEPT), shown(board):
        return search(watch)


def _settings_said(found: Found) -> str:
    tried = {**found.settings, "learning_rate": found.learning_rate}
    said = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in tried.items())
    return f"{said} (the recipe's own)" if found.own else said


def _say(experiments: Mapping[str, Experiment], runs: int, jobs: int = 1) -> None:
    """What each task is tried on, how many runs there are and about how long they take, before the first."""
    from trimtab.errors import RunError
    from trimtab.runs.forecast import duration, forecast
    from trimtab.runs.kept import close_stores
    from trimtab.runs.models import Base
    from trimtab.runs.summary import checked_summary

    seconds = []
    base = Base(next(iter(experiments.values())).source)  # a recipe has one model
    for experiment in experiments.values():
        console.print(checked_summary(experiment, base.tokenizer, placed=False))
        with suppress(RunError):  # said of the trial that it is
            found = forecast(experiment, base) if runs else None
            seconds += [found.seconds] if found else []
    close_stores()
    each = sum(seconds) / len(seconds) if seconds else None
    about = f", about {duration(each * runs / jobs)} at {duration(each)} each" if each else ""
    console.print(f"About {runs} runs to make{about}.")


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"--few-shot {text!r}: give positive numbers of examples, as in 4,8,16")
    return sorted(set(found))
