"""A run's folder: when it is done, whose it is, and what changed under it."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trimtab.adapter.weights import WEIGHTS
from trimtab.errors import RunError
from trimtab.runs.folder import RunFolder, digest_of, write_json


@pytest.fixture
def done(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.begin({"name": "words"}, {"train": "1"}, {})
    save_file({"x": torch.zeros(3)}, folder.path / WEIGHTS)
    folder.finish({"digest": digest_of(folder.path / WEIGHTS)}, {"tuned": ["a"]})
    return folder


@pytest.mark.parametrize("harm", ["gone", "cut", "changed", "metrics cut", "metrics empty"])
def test_a_run_whose_files_are_not_whole_is_not_done(done: RunFolder, harm: str) -> None:
    assert done.is_done
    adapter, metrics = done.path / WEIGHTS, done.path / "metrics.json"
    whole = adapter.read_bytes()
    {
        "gone": adapter.unlink,
        "cut": lambda: adapter.write_bytes(whole[:-1]),
        "changed": lambda: adapter.write_bytes(whole[:-1] + b"\1"),
        "metrics cut": lambda: metrics.write_text('{"digest": '),
        "metrics empty": lambda: metrics.write_text(""),
    }[harm]()
    assert not done.is_done and done.is_started


def test_a_run_from_before_there_were_digests_is_done_by_its_size(done: RunFolder) -> None:
    size = (done.path / WEIGHTS).stat().st_size
    for said, is_done in ((size, True), (size + 1, False)):
        write_json(done.path / "metrics.json", {"bytes": said})
        assert done.is_done is is_done


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with (
        folder.locked(),
        pytest.raises(RunError, match="another process trains there"),
        RunFolder(folder.path).locked(),
    ):
        pass
    assert not folder.path.exists()  # nothing was left there
    with folder.locked():
        assert folder.is_empty


def test_a_lock_that_another_process_took_away_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, flock = RunFolder(tmp_path / "run"), fcntl.flock

    def removed(*how: Any) -> None:
        (folder.path / ".lock").unlink()
        flock(*how)

    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(RunError, match="another process trains there"), folder.locked():
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": 3}'])
def test_what_is_no_run_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"no run of trimtab there \(run.json\)"):
        _ = RunFolder(tmp_path).run


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_json(tmp_path / "metrics.json", {})
    assert caught.value.filename == str(tmp_path / "metrics.json")
    assert not (tmp_path / "metrics.json").exists()


def test_a_checkpoint_that_was_cut_is_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (2, 4):
        place = folder.checkpoints / f"checkpoint-{step}"
        place.mkdir(parents=True)
        save_file({"x": torch.zeros(3)}, place / WEIGHTS)
        for state in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, place / state)
        (place / "trainer_state.json").write_text(json.dumps({}))
    assert (folder.last_checkpoint() or "").endswith("checkpoint-4")
    for name in (WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        file = folder.checkpoints / "checkpoint-4" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-2])
        assert (folder.last_checkpoint() or "").endswith("checkpoint-2"), name
        file.write_bytes(whole)
