"""How far many runs are, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.runs.trial import Outcome, Trial, outcome_of

Run = Callable[[Sequence[Trial], Path, dict[str, str]], list[Outcome]]


@dataclass
class Standing:
    """Runs that are there, of those there will be."""

    of: int
    done: int = 0
    made: int = 0
    """Those of them that were not there before."""
    start: float = field(default_factory=time.perf_counter)

    def ended(self, read: bool = False) -> None:
        """One more is there."""
        self.done += 1
        self.made += not read
        self.of = max(self.of, self.done)

    @property
    def left(self) -> float | None:
        """About how many seconds the rest takes; None before the first was made."""
        return (time.perf_counter() - self.start) / self.made * (self.of - self.done) if self.made else None


@dataclass(frozen=True)
class Counted:
    """Processes whose trials are counted as they end."""

    pool: Executor
    standing: Standing

    def submit(self, run: Run, trials: Sequence[Trial], folder: Path, content: dict[str, str]) -> Future[list[Outcome]]:
        """Have trials run in one process, or their outcomes read."""
        read = [outcome_of(trial, folder, content) is not None for trial in trials]
        future = self.pool.submit(run, trials, folder, content)

        def ended(one: Future[list[Outcome]]) -> None:
            if not one.cancelled() and one.exception() is None:
                for there in read:
                    self.standing.ended(there)

        future.add_done_callback(ended)
        return future
