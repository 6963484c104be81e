"""Steering: the direction that was planted is found, and what is written does what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WIDTH, tiny
from peft import PeftModel
from test_config import anatomy
from torch import Tensor, nn

import trimtab
from trimtab.adapter.compose import compose
from trimtab.adapter.folder import inspect_adapter
from trimtab.adapter.steering import ACTIONS, HOW, steer
from trimtab.errors import DataError

MARK = 5
MODEL = str(Path(__file__).parents[2] / "models/tiny-llama")


def pairs(count: int = 8, lengths: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Positives end in one token, negatives in another."""
    random = torch.Generator().manual_seed(0)
    bodies = [torch.randint(10, 96, (4 + i % lengths,), generator=random) for i in range(count)]
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
    vector = first.change(torch.zeros(1, WIDTH))[0]
    torch.testing.assert_close(vector, 3 * direction, atol=1e-4, rtol=1e-4)
    assert (first.accuracy, found.chosen) == (1.0, (0,))
    assert first.gap_closed > 0.99 and max(layer.gap_closed for layer in found.layers) == first.gap_closed
    assert anatomy(model) == before


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("positions", ["l1", "all", "generated"])
def test_what_is_written_is_what_was_found(positions: str, action: str, tmp_path: Path) -> None:
    model, ids = tiny("llama"), torch.arange(3, 9)[None]
    given = None if action == "erase" else 0.5
    found = steer(model, *pairs(), layers=[1, -1], positions=positions, strength=given, action=action)
    assert found.chosen == (1, 2) and {layer.strength for layer in found.layers} == {given}
    found.save(model, tmp_path / "it")
    config = inspect_adapter(tmp_path / "it").config
    assert (config.method, config.positions) == (ACTIONS[action].fields["method"], positions)
    one, other = found.layers
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    how["return_dict_in_generate"] = True
    with (
        trimtab.edit(model, one.change, layers=[1], positions=positions),
        trimtab.edit(model, other.change, layers=[2], positions=positions),
    ):
        expected: Any = model.generate(ids, **how)  # type: ignore[operator]
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "it")).eval()
    torch.testing.assert_close(torch.stack(loaded.generate(ids, **how).logits), torch.stack(expected.logits))
    compose([tmp_path / "it", tmp_path / "it"], [0.5, -1], tmp_path / "both")


def states_at(model: Any, texts: list[Tensor], block: int, positions: str) -> Tensor:
    """(tokens, d) that leave a block at these positions, whatever edits it, of texts of one length."""
    seen: list[Tensor] = []

    def look(h: Tensor) -> Tensor:
        seen.append(h)
        return h

    with torch.no_grad(), trimtab.edit(model, look, layers=[block], positions=positions):
        model(input_ids=torch.stack(texts), prompt_lengths=[len(text) for text in texts])
    return torch.cat(seen)


def told_apart(plus: Tensor, minus: Tensor, fitted: slice) -> float:
    """The share of states on their side of a linear probe that was fitted to a part of them by least squares."""
    kinds = torch.cat([torch.ones(len(plus)), -torch.ones(len(minus))])
    part = torch.cat([torch.arange(len(plus))[fitted], len(plus) + torch.arange(len(minus))[fitted]])
    states = torch.cat([plus, minus]).double()
    states = torch.cat([states, torch.ones(len(states), 1)], 1)
    probe = torch.linalg.lstsq(states[part], kinds[part, None].double(), driver="gelsd").solution[:, 0]
    rest = torch.ones(len(states), dtype=torch.bool).index_fill(0, part, False)
    return float(((states @ probe).sign() == kinds)[rest].float().mean())


@pytest.mark.parametrize("positions", ["l1", "all"])
def test_no_linear_probe_finds_what_was_erased(positions: str, tmp_path: Path) -> None:
    """On the pairs it was fitted to the means of both kinds are one, so that no probe beats a constant; on others it
    is near chance, where one found them all before."""
    model = tiny("llama")
    planted(model)
    plus, minus = pairs(40, 1)
    fitted = [i for i in range(40) if i % 4 != 3]
    steer(model, plus, minus, action="erase", layers=[0], positions=positions).save(model, tmp_path / "it")
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "it")).eval()
    edited = [states_at(loaded, [kind[i] for i in fitted], 0, positions) for kind in (plus, minus)]
    assert (edited[0].mean(0) - edited[1].mean(0)).abs().max() < 1e-5
    if positions == "all":
        return  # where most tokens say nothing of their kind
    with loaded.disable_adapter():
        before = [states_at(loaded, kind, 0, positions) for kind in pairs(200, 1)]
    after = [states_at(loaded, kind, 0, positions) for kind in pairs(200, 1)]
    assert told_apart(*before, slice(40, 120)) == 1  # type: ignore[misc]
    assert told_apart(*after, slice(40, 120)) < 0.65  # type: ignore[misc]


def test_a_clamped_coordinate_is_where_it_was_told(tmp_path: Path) -> None:
    model = tiny("llama")
    texts = pairs(8, 1)
    found = steer(model, *texts, action="clamp", layers=[1], positions="l1", strength=0.5)
    layer = found.layers[0]
    (unit,), (value,) = layer.plan.tensors["rotation"], layer.plan.tensors["bias"]
    h = 5 * torch.randn(7, WIDTH)
    changed = layer.change(h)
    torch.testing.assert_close(changed @ unit, value.expand(7))
    torch.testing.assert_close(changed - (changed @ unit)[:, None] * unit, h - (h @ unit)[:, None] * unit)
    by_itself = steer(model, *texts, action="clamp", layers=[1], positions="l1").layers[0].plan
    plus = states_at(model, [text for i, text in enumerate(texts[0]) if i % 4 != 3], 1, "l1")
    torch.testing.assert_close(by_itself.tensors["bias"][0], (plus @ unit).mean())


def test_caa_reads_the_last_token_whatever_it_edits() -> None:
    model = tiny("llama")
    read = steer(model, *pairs(), how="caa", layers=[1]).layers[0].plan.reads
    torch.testing.assert_close(read, steer(model, *pairs(), positions="l1", layers=[1]).layers[0].plan.reads)
    assert (read - steer(model, *pairs(), layers=[1]).layers[0].plan.reads).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"how": "svm"}, ValueError, "how='svm': must be one of mean, pca, caa"),
        ({"action": "wipe"}, ValueError, "action='wipe': must be one of add, clamp, erase"),
        ({"action": "erase", "how": "pca"}, ValueError, "how='pca': action='erase' finds a direction of its own"),
        ({"action": "erase", "strength": 1.0}, ValueError, "erasing has none"),
        ({"layers": [3]}, ValueError, r"layers=\[3\]: the model has blocks 0 to 2"),
        ({"positions": "x"}, ValueError, "positions='x'"),
        ({"negative": pairs(3)[1]}, DataError, "8 positive and 3 negative texts: give at least 4 pairs"),
        (
            {"negative": [torch.tensor([5]), *pairs()[1][1:]], "positions": "f3"},
            DataError,
            "none of its 1 tokens is at",
        ),
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
    rows = [{"prompt": f"What is {word}?", "positive": f"{word}!", "negative": word} for word in words]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = ("--pairs", tmp_path / "pairs.jsonl", "--layers", "5", "-o", tmp_path / "erased")
    code, said = trimtab("steer", MODEL, *pairs, *files)
    assert code == 2 and "give --positive and --negative, or --pairs alone" in said
    code, said = trimtab("steer", MODEL, *pairs, "--action", "erase", "--positions", "l1")
    assert code == 0 and "edited too" in said and inspect_adapter(tmp_path / "erased").config.method == "direft"
    (tmp_path / "pairs.jsonl").write_text('{"positive": "a"}\n' * 4)
    code, said = trimtab("steer", MODEL, "--pairs", tmp_path / "pairs.jsonl", "-o", tmp_path / "other")
    assert code == 2 and "every row needs texts 'positive' and 'negative'" in said
    (tmp_path / "negative.txt").write_bytes(b"\xff\xfe\x00")
    code, said = trimtab("steer", MODEL, *files, "-o", tmp_path / "other")
    assert code == 2 and "not a text file in UTF-8" in said
