"""Random mixes on vLLM: every answer is plain `generate`'s. Run by `make vllm`."""

from typing import Any

import pytest
import torch
from mixes import Asked, Served
from on_vllm import Waiting, answers, engine_of, mismatches
from served import MODEL

from trimtab.runs.models import ModelSource, load_model
from trimtab.serve.engine import BadRequest

pytestmark = pytest.mark.vllm

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole prompts": ({}, {"max_num_batched_tokens": 2048}),
    "chunks of 40": ({}, {"max_num_batched_tokens": 40, "enable_chunked_prefill": True}),
    "nothing shared": ({"prefix_bytes": 0}, {"max_num_batched_tokens": 64}),
    "preempted": ({}, {"max_num_batched_tokens": 64, "num_gpu_blocks_override": 14}),
    "compiled": ({}, {"max_num_batched_tokens": 64, "enforce_eager": False}),
    "two processes": ({}, {"max_num_batched_tokens": 64, "tensor_parallel_size": 2}),
}
COUNT = 200


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    model = load_model(ModelSource(MODEL, "float32"))
    return Served(model, tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_mixes_are_what_generate_says(served: Served, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second round finds every cache warm from other adapters and longer and shorter prompts."""
    limits, options = VARIANTS[variant]
    if "tensor_parallel_size" in options:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core each, on a machine of one NUMA node
    asked = served.mixes(COUNT, seed=1, longest=150, vocabulary=4096)
    with engine_of(served, MODEL, limits, **options) as engine:
        assert mismatches(served, engine, asked) == []
        assert mismatches(served, engine, asked[::-1][: COUNT // 2], "again") == []
        shared = engine.stats().cached_tokens
        assert (shared == 0) == (variant == "nothing shared")
        assert engine.stats().pinned_adapters == engine.stats().running == 0


def test_what_ends_an_answer(served: Served) -> None:
    tokens = tuple(torch.randint(5, 4096, (40,), generator=torch.Generator().manual_seed(3)).tolist())
    one = Asked(tokens, (("plain1", 1.0),), 8)
    truth = served.truth(one)
    with engine_of(served, MODEL) as engine:
        stopped = answers(served, engine, [one], "stop", stop_token_ids=(truth[3],))
        last = stopped.last("stop0")
        assert (last.finish_reason, last.stop) == ("stop", truth[3])
        assert stopped.tokens("stop0") == truth[: truth.index(truth[3]) + 1]
        scored = answers(served, engine, [one], "score", max_tokens=0, prompt_logprobs=2)
        assert len(scored.last("score0").prompt_logprobs) == 40 and scored.tokens("score0") == []
        seeded = [answers(served, engine, [one] * 3, f"seed{i}", temperature=1.0, seed=7) for i in range(2)]
        assert len({tuple(inbox.tokens(id)) for inbox in seeded for id in inbox.events}) == 1
        inbox = Waiting(1)
        with engine.pause():
            engine.submit(served.request("paused", one), inbox.of("paused"))
            assert not inbox.done.wait(0.5)
        assert inbox.done.wait(60) and inbox.tokens("paused") == truth
        with pytest.raises(BadRequest, match="0 to 4095"):
            engine.submit(served.request("bad", Asked((5000,))), print)


def test_a_request_that_is_cancelled_says_so_once_and_frees_what_it_held(served: Served) -> None:
    long = Asked((7, 8, 9), (("plain1", 1.0),), 200)
    with engine_of(served, MODEL) as engine:
        inbox = Waiting(12)
        for i in range(12):
            engine.submit(served.request(f"r{i}", long), inbox.of(f"r{i}"))
        for i in range(12):
            engine.cancel(f"r{i}")
        assert inbox.done.wait(60)
        assert {inbox.last(f"r{i}").finish_reason for i in range(12)} == {"abort"}
        assert mismatches(served, engine, [Asked((7, 8, 9), (("plain2", 1.0),), 4)], "after") == []
        assert engine.stats().pinned_adapters == engine.stats().running == engine.stats().waiting == 0
