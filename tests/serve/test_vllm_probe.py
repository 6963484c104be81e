"""What is broken in the plugin is found at the start, and said. Run by `make vllm`."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from mixes import Served
from on_vllm import engine_of, make_engine
from served import MODEL

from trimtab.runs.models import ModelSource, load_model
from trimtab.serve.model import NotServed
from trimtab.serve.vllm import keys, probe

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(load_model(ModelSource(MODEL, "float32")), tmp_path_factory.mktemp("adapters"))


FAULTS = {
    "no key": "keys.extra_keys = lambda request, start, end: ()",
    "a key of the adapter alone": """
def alone(request, start, end):
    carried = read(request.sampling_params.extra_args)
    return tuple((NAME, (edit.digest, edit.scale)) for edit in carried.edits) if carried else ()
keys.extra_keys = alone""",
    "no rows are planned": "worker.stages = lambda runner, scheduled: []",
    "the operator does nothing": "worker.WorkerTable.edit = lambda self, hidden, residual, name: None",
    "the residual is left out": """
edit = worker.WorkerTable.edit
worker.WorkerTable.edit = lambda self, hidden, residual, name: edit(self, hidden, None, name)""",
    "vectors are not put": "worker.WorkerTable.put = lambda self, vectors: len(vectors)",
    "the plugin is not there": "from trimtab.serve.vllm import probe; probe.wrong = lambda: ['broken']",
}
"""Run in each of vLLM's processes as it starts."""
IMPORTS = """
from trimtab.serve.vllm import keys, worker
from trimtab.serve.vllm.carried import NAME, read
"""


def _start(served: Served, monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str) -> None:
    (folder / "sitecustomize.py").write_text(IMPORTS + fault)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with engine_of(served, MODEL):
        pass


def test_unbroken_it_starts(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _start(served, monkeypatch, tmp_path, "")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_found_at_the_start(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    message = "no table of edits" if "plugin" in fault else "differ from those of transformers"
    with pytest.raises(NotServed, match=message):
        _start(served, monkeypatch, tmp_path, FAULTS[fault])


def test_another_version_or_signature_is_refused_before_anything_starts(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "version", lambda name: "0.33.1")
    with pytest.raises(NotServed, match=r"0\.33\.1 is not among the versions that were tested: 0\.32"):
        make_engine(served, MODEL)
    monkeypatch.undo()
    target = "vllm.v1.worker.gpu_worker:Worker.load_model"
    monkeypatch.setitem(probe.TARGETS, target, "self other")
    assert probe.wrong() == [f"{target} takes (self load_dummy_weights), not (self other)"]
    monkeypatch.setitem(probe.TARGETS, target.replace("load_model", "gone"), "self")
    assert f"{target.replace('load_model', 'gone')} is not there" in probe.wrong()


def test_a_module_that_keeps_the_old_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    keys.install()
    assert keys.missing() == []
    late = types.ModuleType("vllm.late")
    late.generate_block_hash_extra_keys = lambda request: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.late", late)
    assert keys.missing() == ["vllm.late"]
    keys.install()
    assert keys.missing() == []


REFUSED: dict[str, dict[str, Any]] = {
    "pipeline parallelism": {"pipeline_parallel_size": 2},
    "data parallelism": {"data_parallel_size": 2},
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    },
    "KV connectors": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "logprobs_mode": {"logprobs_mode": "processed_logprobs"},
    "no_such_option": {"no_such_option": 1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_not_tested_is_refused_by_name(served: Served, name: str) -> None:
    engine = make_engine(served, MODEL, **REFUSED[name])
    with pytest.raises(NotServed, match=name):
        engine.start()
