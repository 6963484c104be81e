"""The folder that a run leaves: what was run, its scores, its answers, and the adapter beside them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trimtab.adapter.weights import WEIGHTS
from trimtab.errors import RunError
from trimtab.runs.earlier import SECTIONS, completed
from trimtab.tasks import TASKS, Task, build_task

LOCK = ".lock"


class RunFolder:
    """One task's folder: `run.json`, `metrics.json`, `predictions.json`, and while training `checkpoints`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    @property
    def run(self) -> dict[str, Any]:
        """What was run, in this version's keys.

        Raises:
            RunError: trimtab left no run there.
        """
        found = self._read("run.json")
        if not isinstance(found, dict) or not isinstance(found.get("run"), dict):
            tasks = ", ".join(sorted(str(one.parent) for one in self.path.glob("*/run.json")))
            which = f", one of {tasks}" if tasks else ""
            raise RunError(f"{self.path}: no run of trimtab there (run.json); give the folder of one task{which}")
        return completed(found["run"])

    @property
    def content(self) -> dict[str, str] | None:
        """The digests of data and model that the run saw; None of a run from before they were kept."""
        found = self._read("run.json")
        return found.get("content") if isinstance(found, dict) else None

    @property
    def is_done(self) -> bool:
        """Whether there are metrics, and the adapter that they are of is whole."""
        metrics, adapter = self._read("metrics.json"), self.path / WEIGHTS
        if not isinstance(metrics, dict) or not adapter.is_file():
            return False
        if "digest" in metrics:
            return bool(digest_of(adapter) == metrics["digest"])
        return bool(adapter.stat().st_size == metrics.get("bytes"))

    @property
    def is_started(self) -> bool:
        """Whether there is work to lose."""
        return (self.path / "metrics.json").exists() or self.checkpoints.exists()

    @property
    def is_empty(self) -> bool:
        return not self.path.exists() or all(
            file.name == LOCK or file.name.endswith(".saving") for file in self.path.iterdir()
        )

    @property
    def metrics(self) -> dict[str, Any]:
        found = self._read("metrics.json")
        if not isinstance(found, dict):
            raise RunError(f"{self.path / 'metrics.json'}: missing or damaged; train again with --no-resume")
        return found

    @property
    def task(self) -> Task[Any]:
        """The task that was trained, its classes as they were then.

        Raises:
            RunError: trimtab left no run there.
        """
        run = self.run
        settled = self._read("run.json").get("settled") or run["task"]  # in runs of earlier versions as the recipe was
        spec = {key: value for key, value in settled.items() if key not in SECTIONS}
        kind = TASKS[spec["type"]].spec_class
        if "pool" in kind.model_fields:  # as it was then, whatever the model's files or a later version say
            spec["pool"] = run.get("pool", "model")
        return build_task(run["name"], kind.model_validate(spec), run["seed"])

    def predictions(self, which: str) -> list[Any]:
        """The answers to the test split, of the `tuned` or the `untuned` model.

        Raises:
            RunError: the run is not finished.
        """
        found = self._read("predictions.json")
        if not isinstance(found, dict) or not isinstance(found.get(which), list):
            raise RunError(f"{self.path}: no finished run of trimtab there; give the folder of one task")
        answers: list[Any] = found[which]
        return answers

    def begin(self, run: Mapping[str, Any], content: Mapping[str, str], settled: Mapping[str, Any]) -> None:
        """Write what is run; `settled` is the task with what its data decided, the names of classes."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "run.json", {"run": run, "settled": settled, "content": content, "versions": versions()})

    def finish(self, metrics: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
        """Write what came out; the metrics last, since a run is done when they are there."""
        write_json(self.path / "predictions.json", predictions)
        write_json(self.path / "metrics.json", metrics)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def remove(self) -> None:
        """All but the lock, which is held."""
        for file in self.path.iterdir() if self.path.exists() else ():
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file, ignore_errors=True)
            elif file.name != LOCK:
                file.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder for this process alone.

        Raises:
            RunError: another process trains there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_ino != (self.path / LOCK).stat().st_ino:  # removed since it was opened
                    raise BlockingIOError
            except OSError:
                raise RunError(
                    f"{self.path}: another process trains there; wait for it, or give another output:."
                ) from None
            try:
                yield
            finally:
                (self.path / LOCK).unlink(missing_ok=True)
                if not any(self.path.iterdir()):
                    self.path.rmdir()

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that was written to its end; an interrupted write is passed over."""
        found = sorted(
            self.checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True
        )
        return next((str(path) for path in found if _complete(path)), None)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def _complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())  # the file that Trainer writes last
    except (OSError, ValueError):
        return False
    try:
        with safe_open(checkpoint / WEIGHTS, framework="pt"):  # which reads how long the file must be
            pass
        states = [checkpoint / "optimizer.pt", *checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
        return all(map(_is_whole_zip, states))
    except (OSError, SafetensorError, zipfile.BadZipFile):
        return False


def _is_whole_zip(file: Path) -> bool:
    with zipfile.ZipFile(file) as opened:
        return opened.testzip() is None


def digest_of(file: Path) -> str:
    """SHA-256 of what a file holds."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and on disk before it takes its name."""
    staging = path.with_name(f".{path.name}.saving")
    try:
        staging.write_bytes(content)
        put(staging, path)
    except OSError as error:  # of a full disk, which names no file
        raise OSError(error.errno, error.strerror, str(path)) from None


def put(staging: Path, path: Path) -> None:
    """Give a file its name, once what it holds is on disk."""
    with staging.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(staging, path)


def versions() -> dict[str, str]:
    """What a result depends on besides its settings."""
    packages = ("trimtab", "torch", "transformers", "peft", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def differing(a: Any, b: Any, place: str = "") -> list[str]:
    """The places at which two nested settings differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in {**a, **b} for d in differing(a.get(key), b.get(key), f"{place}.{key}" if place else key)]
    return [] if a == b else [place]
