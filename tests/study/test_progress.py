"""How many runs there are, were made and are left."""

from __future__ import annotations

import pytest

from trimtab.study import progress
from trimtab.study.progress import Standing


def test_time_left_is_that_of_runs_that_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    standing = Standing(6, done=2, start=100.0)
    assert (standing.done, standing.left) == (2, None)
    now[0] = 110.0
    standing.ended()
    assert standing.left == pytest.approx(30)  # three at ten seconds
    for _ in range(4):
        standing.ended()
    assert (standing.done, standing.of, standing.left) == (7, 7, 0)  # more than were expected
