"""Processes of a study, and Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from trimtab.study.workers import workers


def test_an_interrupt_while_processes_start_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """By who starts them alone: at once, and no process is left."""
    submit = ProcessPoolExecutor.submit

    def interrupted(self: Any, *args: Any) -> Any:
        future = submit(self, *args)
        for process in (os.getpid(), *self._processes):
            os.kill(process, signal.SIGINT)  # as a terminal does
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has jobs in the background ignore it
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt), workers(2):
            time.sleep(1)  # another thread may be the one to hear it
            pytest.fail("it was not heard")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - start < 2 and not multiprocessing.active_children()
