"""Steering: the direction that was planted is found, and what is written does what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WIDTH, tiny
from peft import PeftModel
from test_config import anatomy
from torch import Tensor, nn

import trimtab
from trimtab.adapter.folder import inspect_adapter
from trimtab.adapter.steering import HOW, steer
from trimtab.errors import DataError

MARK = 5
MODEL = str(Path(__file__).parents[2] / "models/tiny-llama")


def pairs(count: int = 8) -> tuple[list[Tensor], list[Tensor]]:
    """Positives end in one token, negatives in another."""
    random = torch.Generator().manual_seed(0)
    bodies = [torch.randint(10, 96, (4 + i % 3,), generator=random) for i in range(count)]
    return [torch.cat([b, torch.tensor([MARK])]) for b in bodies], [torch.cat([b, torch.tensor([6])]) for b in bodies]


def planted(model: Any) -> Tensor:
    """The embeddings of both tokens differ by this alone."""
    direction = nn.functional.normalize(torch.randn(WIDTH), dim=0)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[MARK] = weight[6] + 3 * direction
    return direction


@pytest.mark.parametrize("how", HOW)
def test_a_planted_direction_is_found(how: str) -> None:
    model = tiny("llama")
    direction = planted(model)
    for parameter in model.model.layers[0].parameters():  # type: ignore[union-attr]
        nn.init.zeros_(parameter)  # so that the first block gives the embeddings
    before = anatomy(model)
    found = steer(model, *pairs(), how=how, positions="l1")
    first = found.layers[0]
    vector = first.strength * first.vector
    torch.testing.assert_close(vector, 3 * direction, atol=1e-4, rtol=1e-4)
    assert (first.accuracy, found.chosen) == (1.0, (0,))
    assert first.gap_closed > 0.99 and max(layer.gap_closed for layer in found.layers) == first.gap_closed
    assert anatomy(model) == before


@pytest.mark.parametrize("positions", ["l1", "all", "generated"])
def test_what_is_written_is_what_was_found(positions: str, tmp_path: Path) -> None:
    model, ids = tiny("llama"), torch.arange(3, 9)[None]
    found = steer(model, *pairs(), layers=[1, -1], positions=positions, strength=0.5)
    assert found.chosen == (1, 2) and {layer.strength for layer in found.layers} == {0.5}
    found.save(model, tmp_path / "it")
    config = inspect_adapter(tmp_path / "it").config
    assert (config.method, config.positions, config.layers) == ("vector", positions, [1, 2])
    one, other = found.layers
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    how["return_dict_in_generate"] = True
    with (
        trimtab.edit(model, one.vector, layers=[1], positions=positions, scale=0.5),
        trimtab.edit(model, other.vector, layers=[2], positions=positions, scale=0.5),
    ):
        expected: Any = model.generate(ids, **how)  # type: ignore[operator]
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "it")).eval()
    torch.testing.assert_close(torch.stack(loaded.generate(ids, **how).logits), torch.stack(expected.logits))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"how": "caa"}, ValueError, "how='caa': must be one of mean, pca"),
        ({"layers": [3]}, ValueError, r"layers=\[3\]: the model has blocks 0 to 2"),
        ({"positions": "x"}, ValueError, "positions='x'"),
        ({"negative": pairs(3)[1]}, DataError, "8 positive and 3 negative texts: give at least 4 pairs"),
        ({"negative": pairs()[0]}, DataError, "the same hidden states at these tokens"),
    ],
)
def test_what_cannot_be_steered_by(fields: dict[str, Any], error: Any, message: str) -> None:
    positive, negative = pairs()
    with pytest.raises(error, match=message):
        steer(tiny("llama"), **{"positive": positive, "negative": negative, **fields})


def test_the_command(tmp_path: Path, trimtab: Any) -> None:
    words = ["cat", "dog", "house", "tree"]
    (tmp_path / "negative.txt").write_text("\n".join(words) + "\n\n")
    (tmp_path / "positive.txt").write_text("".join(f"Translate to French: {word}\n" for word in words))
    files = ("--positive", tmp_path / "positive.txt", "--negative", tmp_path / "negative.txt")
    code, said = trimtab("steer", MODEL, *files, "--positions", "l1", "--layers", "5,6", "-o", tmp_path / "it")
    assert code == 0 and said.count("written") == 2 and "gap closed" in said
    assert inspect_adapter(tmp_path / "it").config.layers == [5, 6]
    code, said = trimtab("generate", "cat", "-a", tmp_path / "it", "--max-new-tokens", 2)
    assert code == 0
    code, said = trimtab("steer", MODEL, *files, "-o", tmp_path / "it")
    assert code == 2 and "is there already" in said
    (tmp_path / "negative.txt").write_bytes(b"\xff\xfe\x00")
    code, said = trimtab("steer", MODEL, *files, "-o", tmp_path / "other")
    assert code == 2 and "not a text file in UTF-8" in said
