"""The benchmarks run, and what they compare computes the same; nothing here is about seconds."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import importable

FOLDER = Path(__file__).parents[2] / "benchmarks"
METHODS = ["floor", "base-forward", "trimtab", "trimtab-all-logits", "peft-lora", "peft-lora-supervised"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark scripts as modules, which find each other as they do when run."""
    with importable(monkeypatch, FOLDER):
        import train
        import worker

        yield argparse.Namespace(train=train, worker=worker)


@pytest.fixture
def run(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`train.run` with its workers in this process."""

    class Here(scripts.worker.Worker):
        def __init__(self, *_: Any) -> None:
            pass

        def ask(self, call: str, **arguments: Any) -> Any:
            return json.loads(json.dumps(getattr(self, call)(**json.loads(json.dumps(arguments)))))

        def close(self) -> None:
            pass

    monkeypatch.setattr(scripts.train, "WorkerProcess", Here)
    return scripts.train.run


def arguments(scripts: Any, *more: str) -> argparse.Namespace:
    words = ["--shape", "toy", "--lengths", "fixed:40", "--batch", "2", "--repeats", "2", "--threads", "1"]
    return scripts.train.arguments().parse_args([*words, "--memory-repeats", "0", *more])


def test_all_methods_compute_the_same_and_the_result_is_whole(scripts: Any, run: Any) -> None:
    result = run(arguments(scripts, "--methods", *METHODS))
    assert {"command", "date", "machine", "threads", "versions", "model", "batches", "methods"} <= result.keys()
    assert result["model"]["weights"] == "random"
    rows = {row["method"]: row for row in result["methods"]}
    assert rows.keys() == set(METHODS)
    losses = [row["loss_at_identity"] for row in rows.values()]
    assert max(losses) - min(losses) < 1e-4
    assert result["losses_agree"]["at_identity"]
    for row in rows.values():
        assert row["step_seconds"]["n"] == row["ratio_to_floor"]["n"] == 2
        assert row["ratio_to_floor"]["min"] <= row["ratio_to_floor"]["median"] <= row["ratio_to_floor"]["max"]
        assert row["tokens_per_second"] > 0
    assert rows["floor"]["ratio_to_floor"]["median"] == 1
    json.dumps(result)
    assert "trimtab" in scripts.train.table(result)


def test_sizes_are_those_of_the_formulas(scripts: Any, run: Any) -> None:
    rows = {row["method"]: row for row in run(arguments(scripts, "--methods", *METHODS))["methods"]}
    shape = scripts.train.SHAPES["toy"]
    edit = 2 * 8 * shape["hidden_size"] + 8
    assert rows["trimtab"]["trainable_parameters"] == shape["num_hidden_layers"] * edit
    assert rows["trimtab"]["adapter_bytes"] == 4 * rows["trimtab"]["trainable_parameters"]
    assert rows["floor"]["adapter_bytes"] == rows["base-forward"]["bytes_kept_for_backward"] == 0
    assert rows["trimtab"]["bytes_kept_for_backward"] < rows["trimtab-all-logits"]["bytes_kept_for_backward"]


def test_given_edits_change_the_loss_alike_with_and_without_all_logits(scripts: Any, run: Any) -> None:
    result = run(arguments(scripts, "--methods", "trimtab", "trimtab-all-logits"))
    one, other = (row for row in result["methods"] if row["method"] != "floor")
    assert one["loss_with_given_edits"] == pytest.approx(other["loss_with_given_edits"], abs=1e-4)
    assert abs(one["loss_with_given_edits"] - one["loss_at_identity"]) > 1e-3
    assert result["losses_agree"]["with_given_edits"]


@pytest.mark.parametrize("method", ["trimtab-l4-reuse", "trimtab-upper-reuse"])
def test_reused_steps_have_the_loss_of_plain_ones(scripts: Any, run: Any, method: str) -> None:
    plain = method.removesuffix("-reuse")
    rows = {row["method"]: row for row in run(arguments(scripts, "--methods", plain, method))["methods"]}
    assert rows[method]["loss_with_given_edits"] == pytest.approx(rows[plain]["loss_with_given_edits"], abs=1e-4)


@pytest.mark.slow
def test_peak_memory_is_reported_beside_the_floors(scripts: Any, run: Any) -> None:
    rows = run(arguments(scripts, "--methods", "trimtab", "--memory-repeats", "1"))["methods"]
    assert [row["method"] for row in rows] == ["floor", "trimtab"]
    assert rows[0]["peak_ratio_to_floor"] == 1
    assert all(row["peak_bytes"]["n"] == 1 for row in rows)


def test_the_floor_is_measured_wherever_a_method_is(scripts: Any) -> None:
    found = scripts.train.places(["floor", "trimtab", "pyreft"], ["own", "peers"])
    assert found == [("own", "floor"), ("peers", "floor"), ("own", "trimtab"), ("peers", "pyreft")]
    assert scripts.train.places(["trimtab", "pyreft"], ["own"]) == [("own", "floor"), ("own", "trimtab")]


def test_a_worker_process_answers_and_reports_errors(scripts: Any) -> None:
    process = scripts.worker.WorkerProcess(sys.executable, threads=1)
    try:
        with pytest.raises(RuntimeError, match="no_such_shape"):
            process.ask("load", shape="no_such_shape", device="cpu", names=[], plan={}, batches=[])
        assert process.ask("load", shape="toy", device="cpu", names=[], plan={}, batches=[])["parameters"] > 0
    finally:
        process.close()


@pytest.mark.slow
def test_a_server_is_asked_from_another_process(tmp_path: Path) -> None:
    """Clients that ask again, and arrivals; the parts that a result file holds already stay."""
    out = tmp_path / "serve.json"
    out.write_text('{"prefix": {"found": 1}}')
    words = ["--parts", "load", "--adapters", "3", "--in-flight", "2", "--seconds", "3", "--out", str(out)]
    subprocess.run([sys.executable, str(FOLDER / "serve.py"), *words], cwd=FOLDER.parent, check=True, timeout=300)
    result = json.loads(out.read_text())
    assert result["prefix"] == {"found": 1}
    found = result["load"]["found"]
    assert [(row["adapters"], row["in_flight"]) for row in found["clients"]] == [(0, 2), (3, 2)]
    assert [(row["adapters"], row["rate"]) for row in found["arrivals"]] == [
        (n, r) for n in (0, 3) for r in (0.5, 0.8, 2)
    ]
    assert all(row["answered"] >= 2 and row["refused"] == 0 for row in found["clients"])
    for row in found["clients"]:
        assert 0 < row["between_tokens_ms"]["p50"] <= row["between_tokens_ms"]["p99"]
        assert 0 < row["first_token_ms"]["p50"] <= row["first_token_ms"]["p99"]
        assert row["tokens_per_second"] > 0
