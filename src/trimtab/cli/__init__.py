"""The `trimtab` command: a module a group of commands, each of which imports what it needs when it is called."""

from __future__ import annotations

import gc
import os
import sys

from trimtab.cli import compose, convert, explain, look, serve, steer, study, talk, train  # noqa: F401 (each registers its commands)
from trimtab.cli.common import PlainConsole, app, console

__all__ = ["app", "console", "main"]


def main() -> None:
    """Run the command; what a person can mend is said in a few lines, without a traceback unless asked for."""
    arguments = [argument for argument in sys.argv if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) or os.environ.get("TRIMTAB_DEBUG", "") not in ("", "0")
    sys.argv = arguments
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        if isinstance(error, NotADirectoryError | FileExistsError) and error.filename:
            said += "; a file is where a folder belongs: give another place, or move the file away"
        PlainConsole(stderr=True, highlight=False).print(f"error: {said}", soft_wrap=True)
        sys.exit(2)
    finally:
        gc.freeze()  # the interpreter's last collection would take seconds to go through the libraries' objects
