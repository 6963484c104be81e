"""The folder that a run leaves: what was run, its scores, its answers, and the adapter beside them."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trimtab.errors import RunError
from trimtab.tasks import TASKS, Task, build_task

SETTINGS = ("adapter", "training")
"""What `run.json` says of a task beside its spec."""


class RunFolder:
    """One task's folder: `run.json`, `metrics.json`, `predictions.json`, and while training `checkpoints`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.reuse = self.path / "reuse"

    @property
    def run(self) -> dict[str, Any]:
        """What was run.

        Raises:
            RunError: trimtab left no run there.
        """
        found = self._read("run.json")
        if not isinstance(found, dict) or not isinstance(found.get("run"), dict):
            raise RunError(f"{self.path}: no run of trimtab there (run.json); give the folder of one task")
        run: dict[str, Any] = found["run"]
        return run

    @property
    def content(self) -> dict[str, str] | None:
        """The digests of data and model that the run saw; None of a run from before they were kept."""
        found = self._read("run.json")
        return found.get("content") if isinstance(found, dict) else None

    @property
    def is_done(self) -> bool:
        return (self.path / "metrics.json").exists()

    @property
    def is_started(self) -> bool:
        """Whether there is work to lose."""
        return self.is_done or self.checkpoints.exists()

    @property
    def is_empty(self) -> bool:
        return not self.path.exists() or all(file.name.endswith(".saving") for file in self.path.iterdir())

    @property
    def metrics(self) -> dict[str, Any]:
        found = self._read("metrics.json")
        if not isinstance(found, dict):
            raise RunError(f"{self.path / 'metrics.json'}: missing or damaged; train again with --no-resume")
        return found

    @property
    def task(self) -> Task[Any]:
        """The task that was trained, as the recipe gave it.

        Raises:
            RunError: trimtab left no run there.
        """
        run = self.run
        spec = {key: value for key, value in run["task"].items() if key not in SETTINGS}
        return build_task(run["name"], TASKS[spec["type"]].spec_class.model_validate(spec))

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

    def begin(self, run: Mapping[str, Any], content: Mapping[str, str]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "run.json", {"run": run, "content": content, "versions": versions()})

    def finish(self, metrics: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
        """Write what came out; the metrics last, since a run is done when they are there."""
        write_json(self.path / "predictions.json", predictions)
        write_json(self.path / "metrics.json", metrics)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

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
    return (checkpoint / "adapter_model.safetensors").exists() and (checkpoint / "optimizer.pt").exists()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, and on disk before it takes its name."""
    staging = path.with_name(f".{path.name}.saving")
    with staging.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
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
