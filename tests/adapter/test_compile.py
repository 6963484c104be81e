"""torch.compile with an adapter attached: one graph, the same numbers, and no new graph at each step."""

from __future__ import annotations

import copy

import pytest
import test_batches
import test_gradients
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

pytestmark = pytest.mark.slow


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_training_steps(name: str) -> None:
    eager = test_gradients.adapted(name)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for m in (eager, model)
    ]
    for step in range(3):
        batch = test_gradients.padded(test_gradients.examples(step))
        losses = []
        for forward, optimizer in zip((eager, compiled), optimizers, strict=True):
            loss = forward(**batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 1e-6
        assert graphs() == 1
    with torch.no_grad():
        logits = compiled.eval()(**batch).logits
        assert (logits - eager.eval()(**batch).logits).abs().max() < 1e-5
        with model.disable_adapter(), eager.disable_adapter():
            assert (compiled(**batch).logits - eager(**batch).logits).abs().max() < 1e-5


@pytest.mark.parametrize("positions", ["f3+l4", "generated"])
def test_decoding_with_a_static_cache(positions: str) -> None:
    """What generate compiles by itself on an accelerator: one graph for every decode step."""
    model, rows = test_batches.adapted(a={"r": 2, "positions": positions}), test_batches.prompts()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    batch = test_batches.without_positions(test_batches.padded(rows))
    out = model.generate(**batch, **test_batches.search(cache_implementation="static", compile_config=config))
    test_batches.check_generated(model, out, rows, ["a"] * 3)
    assert 0 < graphs() <= 2  # the prompt, and any step


def test_blocks_compiled_one_by_one() -> None:
    """As accelerate's regional compilation does; each in one graph, and none anew at the next step."""
    model, batch = test_gradients.adapted(), test_gradients.padded(test_gradients.examples())
    plain = test_gradients.gradients(model, model(**batch, use_cache=False).loss)
    for block in model.base_model.model.model.layers:
        block.compile(fullgraph=True)
    made = []
    for _ in range(2):
        found = test_gradients.gradients(model, model(**batch, use_cache=False).loss)
        assert all((found[name] - plain[name]).abs().max() < 1e-5 for name in plain)
        made.append(graphs())
    assert made[0] == made[1] > 0


@torch.no_grad()
def test_packed_rows() -> None:
    """Where they end is found in the data, so this is more than one graph, but it is right."""
    model = test_gradients.adapted()
    batch = test_gradients.packed(test_gradients.examples())
    compiled = torch.compile(model, backend="eager")
    assert (compiled(**batch, use_cache=False).logits - model(**batch, use_cache=False).logits).abs().max() < 1e-5


class Logits(nn.Module):
    """What `torch.export` is given: tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


@torch.no_grad()
@pytest.mark.parametrize("positions", ["f2+l2", "prompt", "all"])
def test_exported_once_for_batches_of_any_size(positions: str) -> None:
    model = Logits(test_batches.adapted(a={"r": 2, "positions": positions})).eval()
    traced, other = (
        test_batches.without_positions(test_batches.padded(test_batches.prompts(lengths, seed)))
        for lengths, seed in (([5, 9], 1), ([4, 13, 2, 8], 2))
    )
    sizes = {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("columns", min=4, max=100)}
    exported = torch.export.export(model, (), traced, dynamic_shapes=dict.fromkeys(traced, sizes)).module()
    for batch in (traced, other):
        assert torch.equal(exported(**batch), model(**batch))
