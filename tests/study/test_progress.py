"""How many runs there are, were made and are left."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from trimtab.runs.together import run_trials
from trimtab.study import progress
from trimtab.study.progress import Counted, Standing


def test_time_left_is_that_of_runs_that_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    standing = Standing(6, start=100.0)
    standing.ended(read=True)
    standing.ended(read=True)
    assert (standing.done, standing.left) == (2, None)
    now[0] = 110.0
    standing.ended()
    assert standing.left == pytest.approx(30)  # three at ten seconds
    for _ in range(4):
        standing.ended()
    assert (standing.done, standing.of, standing.left) == (7, 7, 0)  # more than were expected


class Later(Executor):
    """Runs nothing by itself."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]


def test_only_trials_that_came_to_an_end_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(progress, "outcome_of", lambda trial, *_: trial if trial == "read" else None)
    pool, standing = Later(), Standing(4)
    trials: list[Any] = ["read", "made", "cancelled", "broken"]
    for trial in trials:
        Counted(pool, standing).submit(run_trials, [trial], tmp_path, {})
    read, made, cancelled, broken = pool.futures
    read.set_result(None)
    made.set_result(None)
    cancelled.cancel()
    broken.set_exception(OSError())
    assert (standing.done, standing.made) == (2, 1)
    Counted(pool, standing).submit(run_trials, ["read", "made"], tmp_path, {})  # type: ignore[list-item]
    pool.futures[-1].set_result([])
    assert (standing.done, standing.made) == (4, 2)
