"""Processes that trials run in, and how many fit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import RunError
from trimtab.runs.models import quiet


@contextmanager
def workers(jobs: int) -> Iterator[Executor]:
    """Processes that share the cores; each has its own GPU where there are several."""
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    cards = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    for i in range(jobs):
        devices.put(cards.split(",")[i % (cards.count(",") + 1)])
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # processes whose threads spin for one another's cores
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(devices, threads))
    try:
        with _deaf():
            for _ in range(jobs):
                pool.submit(_started)
        yield pool
    except BrokenProcessPool:
        raise RunError(
            "a process was killed in a trial, most likely since memory ran out: try fewer --jobs. What was done is "
            "kept; the same command goes on from there."
        ) from None
    except BaseException:  # Ctrl-C too: now, not after the trials that run
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started here pay no heed to Ctrl-C, which a terminal sends them too; who started them ends them.

    They inherit that it is blocked. Whoever starts them hears it, once they are all started and can be ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
        for number in heard:
            signal.raise_signal(number)


def _started() -> None:
    """For a process to do first."""


def _start_worker(devices: Any, threads: int) -> None:
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()  # seeing several, transformers' Trainer would use them all
    torch.set_num_threads(threads)
    quiet()


def _leave_with(parent: int) -> None:
    """End this process when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def room_for(model: str) -> int:
    """How many trials fit at a time: one a GPU, else one for each core whose copy of the model fits into memory."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    size = sum(f.stat().st_size for f in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fit = memory // (8 * size) if size else 1  # a full fine-tuning holds weights, gradients and two moments
    return max(1, min(len(os.sched_getaffinity(0)), fit))
