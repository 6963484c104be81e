"""The `trimtab` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table

from trimtab.cli.convert import commands as conversion

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, score and switch LoReFT adapters on one frozen model.",
)
app.add_typer(conversion)
console = Console()

RecipeFile = Annotated[
    Path, typer.Argument(help="The recipe: a YAML file, or the name of one that comes with trimtab.", metavar="RECIPE")
]
TaskNames = Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")]
Folders = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="An adapter's folder, or one that holds several; may be repeated."),
]
RecipeModel = Annotated[str | None, typer.Option("--model", help="The base model, instead of the recipe's.")]
DataFolder = Annotated[
    Path | None, typer.Option("--data", help="The folder that relative data files are in, instead of the recipe's.")
]
OutputFolder = Annotated[str | None, typer.Option("--output", help="Where runs go, instead of where the recipe says.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="key.path=value, instead of what the recipe says (training.epochs=3); may be repeated."),
]
ModelName = Annotated[str | None, typer.Option(help="The base model, where it is not the one the adapter names.")]


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="A local model folder or a Hub name.")],
    task: Annotated[list[str] | None, typer.Option(help="name=training_file; may be repeated.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Look at a model and write a commented recipe for it."""
    from trimtab.recipe.init import adapter_parameters, look_at, parse_tasks, recipe_text, suggest

    _must_be_new(output)
    facts = look_at(model)
    text = recipe_text(facts, parse_tasks(task or []))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    weight = adapter_parameters(facts, suggest(facts).r)
    table = Table(
        "", "parameters", "share", "file (float32)", title=f"{model}: {facts.blocks} blocks of width {facts.width}"
    )
    for name, count in (("this LoReFT", weight), ("LoRA r8, all linear layers", facts.lora_parameters)):
        table.add_row(name, f"{count:,}", f"{100 * count / facts.parameters:.3f}%", _size(4 * count))
    console.print(table)
    console.print(f"Wrote {output}. Fill in the data, then: trimtab train {output}")


@app.command()
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
) -> None:
    """Train an adapter for every task of a recipe."""
    from trimtab.runs.trial import Progress, train_recipe

    recipe = _recipe(file, model, data, output, settings, task)
    names = recipe.chosen(task)
    rows = {name: Progress(name) for name in names}
    live = Live(console=console, refresh_per_second=4)

    def watch(progress: Progress) -> None:
        rows[progress.task] = progress
        live.start()  # not before, so that a mistake in the recipe or its data is told without a table
        live.update(_progress_table(rows))

    try:
        metrics = train_recipe(recipe, names, resume=resume, watch=watch)
    finally:
        if live.is_started:
            live.stop()
            if not console.is_terminal:
                console.print()  # Live ends without a line break there
    console.print(_results_table(metrics))
    for name, m in metrics.items():
        if m["reuse"]["reused"]:
            share = m["reuse"]["tokens_saved"] / max(1, m["reuse"]["tokens"])
            console.print(f"{name}: kept {m['reuse']['reused']}, {share:.0%} of all tokens' work.")
    talks = next((name for name in metrics if recipe.tasks[name].type == "generation"), None)
    hint = f" Try: trimtab generate PROMPT --adapter {recipe.output}/{talks}" if talks else ""
    console.print(f"Adapters in {recipe.output}/<task>.{hint}")


@app.command(name="eval")
def evaluate_recipe(
    file: RecipeFile,
    model: RecipeModel = None,
    data: DataFolder = None,
    output: OutputFolder = None,
    settings: Settings = None,
    task: TaskNames = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
) -> None:
    """Score the trained adapters of a recipe, and the base model beside them."""
    from trimtab.runs.trial import evaluate_run

    recipe = _recipe(file, model, data, output, settings, task)
    table = Table("task", "score", "examples", "untuned", "tuned", title=f"{split} split")
    for name, result in evaluate_run(recipe, task, split).items():
        for label, row in {name: result, **_indented(result["sets"])}.items():
            scores = (f"{row[which]:.3f}" for which in ("untuned", "tuned"))
            table.add_row(label, _score(row), str(row["examples"]), *scores)
    console.print(table)


@app.command()
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
    from trimtab.runs.trial import write_json

    _must_be_new(output)
    rows = alpaca_eval(run, generator, untuned=untuned)
    write_json(output, rows)
    console.print(f"Wrote {len(rows)} answers by {rows[0]['generator']!r} to {output}.")


@app.command()
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
    with _extra("bench"):
        from trimtab.study.compare import Group, Study, room_for
        from trimtab.study.report import overview, write_report
    from trimtab.recipe.init import look_at
    from trimtab.runs.ways import as_contender, choose_contenders
    from trimtab.study.ablations import adapter_variants

    recipe = _recipe(file, model, data, output, settings, task)
    if seeds is not None:
        recipe = recipe.model_copy(update={"compare": recipe.compare.model_copy(update={"seeds": seeds})})
    contenders = choose_contenders(recipe, task, method)
    if ablate is not None:
        blocks = look_at(recipe.model).blocks
        contenders = {
            name: [as_contender(v, spec.adapter) for v in adapter_variants(spec, ablate, blocks)]
            for name, spec in recipe.tasks.items()
            if name in contenders
        }
    folder = Path(recipe.output) / "compare"
    study = Study(recipe, contenders, folder / "trials", _numbers(few_shot) if few_shot else (None,))

    left = list(study.groups)

    def watch(group: Group) -> None:
        scores = [run["test"][recipe.tasks[group.task].score] for run in group.seeds]
        found = ", ".join(f"{100 * s:.1f}" for s in scores) or group.impossible
        size = f" {group.examples} examples" if group.examples else ""
        left.remove(group)
        text = escape(f"{group.task}{size}, {group.contender.name}: {found}")
        console.print(f"{text} [dim]({len(left)} left)[/]", highlight=False)

    jobs = jobs or room_for(recipe)
    console.print(f"{len(study.groups)} comparisons, {jobs} trials at a time; what is done already is read.")
    study.run(jobs, watch)
    name = "-".join(["ablation"] * bool(ablate) + ["few-shot"] * bool(few_shot)) or "report"
    command = " ".join(["trimtab", *sys.argv[1:]])
    report = write_report(recipe, study.groups, folder, name, command)
    head, lines = overview(report)
    table = Table(*head[:5], title=recipe.model)  # what fits a terminal
    for line in lines:
        table.add_row(*line[:5])
    console.print(table)
    console.print(f"Wrote {folder / name}.html, .md, .json and plots.")


@app.command()
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
    with _extra("bench"):
        from trimtab.study import search as tuning
    from trimtab.recipe.init import look_at
    from trimtab.runs.ways import choose_contenders

    recipe = _recipe(file, model, data, None, settings, task)
    output = output or file.with_name(f"{file.stem}-tuned{file.suffix}")
    _must_be_new(output)
    blocks, found = look_at(recipe.model).blocks, {}
    for name in choose_contenders(recipe, task):

        def watch(number: int, settings: dict[str, Any], score: float, name: str = name) -> None:
            said = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())
            console.print(f"{name} {number}: validation {score:.3f} with {said}", highlight=False)

        found[name] = tuning.tune(recipe, name, blocks, trials, watch)
    table = Table("task", "validation", "r", "positions", "layers", "learning rate")
    for name, best in found.items():
        table.add_row(
            name,
            f"{best['validation']:.3f}",
            *(str(best[k]) for k in ("r", "positions", "layers")),
            f"{best['learning_rate']:.2g}",
        )
    console.print(table)
    output.write_text(tuning.tuned_recipe(recipe, found), encoding="utf-8")
    console.print(f"Wrote {output}. Train it: trimtab train {output}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The input; each adapter's own prompt template goes around it.")],
    adapter: Folders = None,
    model: ModelName = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="At most so many new tokens.")] = None,
    base: Annotated[bool, typer.Option(help="Answer with the base model too.")] = True,
) -> None:
    """Answer one prompt with each adapter, and the base model, in a single batch."""
    from trimtab.runs.generate import BASE, Answerer, find_adapters

    adapters = find_adapters(adapter or [])
    answerer = Answerer(adapters, model)
    names = [*adapters, *([BASE] if base or not adapters else [])]
    table = Table("adapter", "answer", title=escape(prompt))
    for name, text in zip(names, answerer.answer(prompt, names, max_new_tokens), strict=True):
        table.add_row("(base model)" if name == BASE else name, escape(text))
    console.print(table)


@app.command()
def chat(adapter: Folders = None, model: ModelName = None) -> None:
    """Talk to a model; /use NAME switches the adapter, also in the middle of a conversation."""
    from trimtab.runs.generate import BASE, Answerer, find_adapters

    adapters = find_adapters(adapter or [])
    answerer = Answerer(adapters, model)
    current = next(iter(adapters), BASE)
    messages: list[dict[str, str]] = []
    console.print(f"Adapters: {', '.join([*adapters, 'base'])}. Commands: /use NAME, /new, /quit.")
    while True:
        try:
            text = console.input(f"[bold]{'base' if current == BASE else escape(current)}>[/] ").strip()
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
        elif command.startswith("/"):
            console.print("Commands: /use NAME, /new, /quit.")
        elif text:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answerer.reply(messages, current)})
            console.print(escape(messages[-1]["content"]))


@app.command()
def show(adapter: Annotated[Path, typer.Argument(help="An adapter's folder.")]) -> None:
    """Describe an adapter: method, layers, positions, parameters, and the size of its edit by layer."""
    from trimtab.adapter.folder import inspect_adapter

    info = inspect_adapter(adapter)
    config = info.config
    facts = Table(show_header=False, title=str(adapter))
    for name, value in (
        ("base model", info.base_model),
        ("method", f"{config.method}, rank {config.r}{'' if config.tied else ', prefix and suffix edited apart'}"),
        ("positions", config.positions),
        ("site, layers", f"{config.site}, {config.layers}"),
        ("parameters", f"{info.parameters:,}"),
        ("file", _size(info.bytes_on_disk)),
    ):
        facts.add_row(name, str(value))
    console.print(facts)
    largest = max(info.edit_norms.values(), default=0.0) or 1.0
    norms = Table("edited module", "size of the edit", "")
    for module, norm in info.edit_norms.items():
        norms.add_row(module, f"{norm:.4f}", "█" * round(24 * norm / largest))
    console.print(norms)


@app.command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context) -> None:
    """Score an adapter with lm-evaluation-harness, whose options these are (docs/lm-eval.md)."""
    with _extra("lm-eval"):
        from trimtab.interop.lm_eval import main
    main(context.args)


@app.command()
def mmlu(
    data: Annotated[Path, typer.Argument(help="The folder that holds MMLU's dev/ and test/ with CSV files.")],
    output: Annotated[Path, typer.Argument(help="The folder to write to.")],
) -> None:
    """Make MMLU's files into tasks for `trimtab lm-eval`, to run without the Hub."""
    from trimtab.interop.mmlu import write_mmlu

    _must_be_new(output)
    write_mmlu(data, output)
    console.print(f"Run it: trimtab lm-eval --include_path {output} --tasks mmlu_local ...", soft_wrap=True)


def _must_be_new(output: Path) -> None:
    if output.exists():
        raise FileExistsError(f"{output} is there already; name another output, or remove it.")


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Around imports that an optional extra brings; without it, say how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"this command needs {error.name}: pip install 'trimtab[{name}]'") from None


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"--few-shot {text!r}: give positive numbers of examples, as in 4,8,16")
    return sorted(set(found))


def _progress_table(rows: dict[str, Any]) -> Table:
    table = Table("task", "state", "step", "loss", "validation", "tokens/s", "time left")
    for name, p in rows.items():
        rate = p.tokens / p.seconds if p.seconds else 0.0
        left = (p.steps - p.step) * p.seconds / p.step if p.step else 0.0
        table.add_row(
            name,
            p.state,
            f"{p.step}/{p.steps}" if p.steps else "",
            "" if p.loss is None else f"{p.loss:.4f}",
            "" if p.score is None or p.state == "done" else f"{p.score:.3f}",
            f"{rate:,.0f}" if rate else "",
            f"{left // 60:.0f}:{left % 60:02.0f}" if p.state == "training" else "",
        )
    return table


def _results_table(metrics: dict[str, dict[str, Any]]) -> Table:
    name_column = Column("task", overflow="fold")  # never cut
    table = Table(name_column, "score", "untuned", "tuned", "parameters", "on disk", "seconds")
    for name, m in metrics.items():
        scores = (f"{m[which][m['score']]:.3f}" for which in ("untuned", "tuned"))
        table.add_row(name, _score(m), *scores, f"{m['parameters']:,}", _size(m["bytes"]), f"{m['seconds']:.1f}")
        for label, row in _indented(m.get("sets", {})).items():
            table.add_row(label, row["score"], f"{row['untuned']:.3f}", f"{row['tuned']:.3f}")
    return table


def _score(result: dict[str, Any]) -> str:
    """What the main score is: over several test sets their mean."""
    return f"mean of {len(result['sets'])}" if result.get("sets") else str(result["score"])


def _indented(sets: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f" {name}": row for name, row in sets.items()}


def _recipe(
    file: Path,
    model: str | None,
    data: Path | None,
    output: str | None,
    settings: list[str] | None,
    tasks: list[str] | None,
) -> Any:
    """The recipe as the options change it; only the files of `tasks` have to be there."""
    from trimtab.recipe.load import load_recipe

    own = {"model": model, "output": output}
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items() if value is not None]
    return load_recipe(file, [*given, *(settings or [])], data=data, only=tasks)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"


def main() -> None:
    """Run the command; what a person can mend is said in a few lines, without a traceback."""
    from trimtab.runs.models import quiet

    quiet()
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        Console(stderr=True).print(f"[bold red]error:[/] {escape(said)}", soft_wrap=True, highlight=False)
        sys.exit(2)
