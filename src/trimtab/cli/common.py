"""What the commands share: the app, the console, options, the recipe, small checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

if TYPE_CHECKING:
    from trimtab.recipe.schema import Recipe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, score and switch LoReFT adapters on one frozen model.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def say_version(asked: bool) -> None:
    """And do nothing else."""
    if asked:
        typer.echo(f"trimtab {installed('trimtab')}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=say_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Train, score and switch LoReFT adapters on one frozen model."""


class PlainConsole(Console):
    """Prints names as they are: no markup, no escape sequence in them is obeyed."""

    def render_str(self, text: str, **how: Any) -> Any:
        """The text, with what is not printable made visible."""
        seen = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
        return super().render_str(seen, **{**how, "markup": False, "emoji": False})


console = PlainConsole(highlight=False)


class QuietCommand(TyperCommand):
    """Silences the libraries underneath when it runs, which loads them, and not when its help is read."""

    together = False
    """Whether several processes may run it, as torchrun starts them."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        from trimtab.runs import processes
        from trimtab.runs.models import quiet

        if processes.count() > 1 and not self.together:
            raise ValueError(f"{self.name} runs in one process; start it without torchrun or accelerate launch.")
        console.quiet = processes.rank() > 0
        quiet()
        return super().invoke(ctx)


class JointCommand(QuietCommand):
    """One that several processes may run."""

    together = True


command = partial(app.command, cls=QuietCommand)
joint_command = partial(app.command, cls=JointCommand)

RecipeFile = Annotated[
    Path, typer.Argument(help="The recipe: a YAML file, or the name of one that comes with trimtab.", metavar="RECIPE")
]
TaskNames = Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")]
Folders = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="An adapter's folder, NAME=FOLDER, or a folder of several; may be repeated."),
]
RecipeModel = Annotated[str | None, typer.Option("--model", help="The base model, instead of the recipe's.")]
DataFolder = Annotated[
    Path | None, typer.Option("--data", help="The folder that relative data files are in, instead of the recipe's.")
]
OutputFolder = Annotated[
    str | None, typer.Option("--output", "-o", help="Where runs go, instead of where the recipe says.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="key.path=value, instead of what the recipe says (training.epochs=3); may be repeated."),
]
ModelName = Annotated[str | None, typer.Option(help="The base model, where it is not the one the adapter names.")]


def must_be_new(output: Path, option: str = "-o", suffix: str | None = None) -> None:
    """Raises FileExistsError for what is there already, and ValueError for a name that says another kind of file than
    `suffix`; `option` gives another."""
    if suffix is not None and output.suffix.lower() != suffix:
        raise ValueError(f"{option} {output}: {suffix[1:].upper()} is written; call it {output.with_suffix(suffix)}.")
    if output.exists():
        raise FileExistsError(f"{output} is there already; name another output ({option}), or remove it.")


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports that an optional extra brings; without it, say how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"this command needs {error.name}: pip install 'trimtab[{name}]'") from None


@contextmanager
def resumable(said: str) -> Iterator[None]:
    """Around work that may be gone on with: at Ctrl-C, one line that says so, and how."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"\nStopped. {said}")
        raise typer.Exit(130) from None


def read_recipe(
    file: Path,
    model: str | None,
    data: Path | None,
    output: str | None,
    settings: list[str] | None,
    tasks: list[str] | None,
) -> Recipe:
    """The recipe as the options change it; only the files of `tasks` have to be there."""
    from trimtab.recipe.load import load_recipe

    return load_recipe(file, as_settings(model, output, settings), data=data, only=tasks)


def as_settings(model: str | None, output: str | None, settings: list[str] | None) -> list[str]:
    """What options change in a recipe, as `key.path=value`."""
    own = {"model": model, "output": output}
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items() if value is not None]
    return [*given, *(settings or [])]


def size_of(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"


def numbers(option: str, text: str) -> list[float]:
    """Raises ValueError for what is no list of numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: give numbers, as in 0.7,-0.3") from None


def indices(option: str, text: str | None) -> list[int] | None:
    """Raises ValueError for what is no list of blocks."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: give blocks, counted from 0, as in 10,11") from None
