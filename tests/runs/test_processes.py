"""`trimtab train` in several processes: the run that one process makes, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from trimtab.errors import RunError
from trimtab.runs import processes
from trimtab.runs.trainer import LengthGrouped, TrainingSpec, training_arguments

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trimtab.cli"]


@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 4))
def test_together_they_take_the_batches_that_one_takes(examples: int, many: int, each: int) -> None:
    """Whatever accelerate gives each process of the order, batch by batch in turn, adds up to one's own batches."""
    size, lengths = many * each, [i % 7 + 1 for i in range(examples)]
    alone, joint = LengthGrouped(lengths, size, 3), LengthGrouped(lengths, size, 3, many, blank=examples)
    order = list(joint)
    assert len(order) == len(joint) and len(order) % size == 0
    parts = [order[i : i + each] for i in range(0, len(order), each)]
    steps = [[i for part in parts[at : at + many] for i in part] for at in range(0, len(parts), many)]
    expected = list(alone)
    assert [sorted(i for i in step if i != examples) for step in steps] == [
        sorted(expected[at : at + size]) for at in range(0, examples, size)
    ]
    real = [sum(i != examples for i in part) for part in parts[-many:]]
    assert max(real) - min(real) <= 1  # so that no process has a batch of nothing while another has two


@pytest.fixture
def pretends(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*processes._ELSEWHERE, "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    return monkeypatch


def test_what_is_refused(pretends: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"batch_size 16 is the batch of all 3 processes.*make it a multiple"):
        training_arguments(TrainingSpec(batch_size=16), tmp_path, 0, 10)
    pretends.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match=r"FSDP was asked to share it out.*MULTI_GPU.*Trainer of your own"):
        processes.meet()


def test_other_commands_run_alone(pretends: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from trimtab.cli import app

    result = CliRunner().invoke(app, ["show", "nowhere"])
    assert "show runs in one process; start it without torchrun" in str(result.exception)


def recipe(folder: Path, **training: Any) -> Path:
    """On suffixes, so that the two processes also keep what the frozen model makes the same at every step."""
    text = (ROOT / "recipes/words.yaml").read_text().replace("positions: f1+l2", "positions: l2")
    text = text.replace("data/", f"{ROOT}/recipes/data/").replace("models/tiny-llama", f"{ROOT}/models/tiny-llama")
    for key, value in training.items():
        text = text.replace("training: {", f"training: {{{key}: {value}, ")
    text = text.replace("epochs: 30, ", "")
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def environment() -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **threads, "PYTHONPATH": str(ROOT / "src")}


def run(command: list[str], file: Path, output: Path, task: str = "plural") -> None:
    subprocess.run([*command, "train", str(file), "--task", task, "-o", str(output)], env=environment(), check=True)


def same(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (one, other))
    assert before["steps"] == after["steps"] and before["tuned"] == after["tuned"]
    assert after["train_loss"] == pytest.approx(before["train_loss"], abs=1e-5)
    assert not [file for file in other.iterdir() if file.name.startswith(".") or file.name == "checkpoints"]


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(tmp_path: Path) -> None:
    """150 examples are no multiple of the batch, and the first process is killed on the way."""
    file = recipe(tmp_path, epochs=4, checkpoint_every=5)
    run([sys.executable, "-m", "trimtab.cli"], file, tmp_path / "one")
    run(TORCHRUN, file, tmp_path / "two")
    same(tmp_path / "one/plural", tmp_path / "two/plural")

    command = [*TORCHRUN, "train", str(file), "--task", "plural", "-o", str(tmp_path / "killed")]
    started = subprocess.Popen(command, env=environment(), start_new_session=True)
    checkpoints = tmp_path / "killed/plural/checkpoints"
    while not list(checkpoints.glob("*/trainer_state.json")):
        assert started.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert started.wait() != 0  # torchrun ends the other
    assert not (tmp_path / "killed/plural/metrics.json").exists()
    run(TORCHRUN, file, tmp_path / "killed")
    same(tmp_path / "one/plural", tmp_path / "killed/plural")


def test_one_process_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.shared(lambda part: [2 * i for i in part], [1, 2, 3]) == [2, 4, 6]
    assert processes.count() == 1 and not torch.distributed.is_initialized()
