"""How far many runs are, and how long the rest takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Standing:
    """Runs that are there, of those there will be."""

    of: int
    done: int = 0
    made: int = 0
    """Those of them that were not there before, made since the start."""
    start: float = field(default_factory=time.perf_counter)

    def ended(self) -> None:
        """One more is made."""
        self.done += 1
        self.made += 1
        self.of = max(self.of, self.done)

    @property
    def left(self) -> float | None:
        """About how many seconds the rest takes; None before the first was made."""
        return (time.perf_counter() - self.start) / self.made * (self.of - self.done) if self.made else None
