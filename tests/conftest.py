"""Every test runs offline, on one core, from the same seed."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("project", deadline=None, derandomize=True)  # no failure by chance or by a busy machine
settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mixes", type=int, default=500, help="requests of each slow test that serves mixes of adapters")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def trimtab(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command; its exit code and all it printed."""

    def run(*arguments: object, stdin: str = "") -> tuple[int, str]:
        from trimtab import cli

        monkeypatch.setattr("sys.argv", ["trimtab", *map(str, arguments)])
        answers = iter(stdin.splitlines())

        def read(*_: object, **__: object) -> str:
            try:
                return next(answers)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(cli.console, "input", read)
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out + err

    return run


class Inline(Executor):
    """Runs a call when it is submitted."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` without processes of its own."""
    from trimtab.study import compare

    @contextmanager
    def workers(jobs: int) -> Iterator[Executor]:
        yield Inline()

    monkeypatch.setattr(compare, "workers", workers)


@contextmanager
def importable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Has scripts of a folder find each other as they do when run; they are forgotten afterwards.

    What was imported from elsewhere under the name of one, as the tests' folder `serve` is, is put aside.
    """
    own = {path.stem for path in folder.glob("*.py")}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
                del sys.modules[name]
