"""Checkpoints that pyreft and AdapterHub wrote give, converted, the logits that those libraries computed."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from trimtab.interop.base import Base
from trimtab.interop.convert import Check, Given, convert, recognise

GOLDEN = Path(__file__).parents[1] / "golden"
META = json.loads((GOLDEN / "meta.json").read_text())
PEERS = Path(__file__).parent / "peers"
CASES = sorted(path.parent.name for path in PEERS.glob("*/facts.json"))


def converted(source: Path, output: Path, given: Given) -> PeftModel:
    report = convert(source, output, given=given)
    assert isinstance(report.check, Check) and report.check.difference < 2e-5
    config = PeftConfig.from_pretrained(str(output))
    return PeftModel.from_pretrained(Base(config.base_model_name_or_path, config.task_type, 3).load(), output).eval()


def largest_difference(model: PeftModel, rows: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return max(float((model(input_ids=ids).logits[0] - expected).abs().max()) for ids, expected in rows)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_peer(case: str, tmp_path: Path) -> None:
    folder = PEERS / case
    facts = json.loads((folder / "facts.json").read_text())
    facts["base"] = str(PEERS / "bases" / facts["base"])
    model = converted(folder / "adapter", tmp_path / "ours", Given(**facts))
    saved = load_file(folder / "expected.safetensors")
    rows = [(saved[f"ids.{i}"], saved[f"logits.{i}"]) for i in range(len(saved) // 2)]
    assert largest_difference(model, rows) < 2e-5


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.glob("*_checkpoint_*") if path.is_dir()))
def test_logits_of_the_golden_checkpoints(case: str, tmp_path: Path) -> None:
    peer, _, kind = case.split("_")[0], *case.split("_checkpoint_")
    positions = META["positions"] if peer == "pyreft" else None
    given = Given(base=str(GOLDEN / "model"), positions=positions, method=kind if peer == "adapterhub" else None)
    assert recognise(GOLDEN / case).name == peer
    model = converted(GOLDEN / case, tmp_path / "ours", given)
    batch = load_file(GOLDEN / "batch.safetensors")
    expected = load_file(GOLDEN / f"{case}_expected.safetensors")
    if peer == "pyreft":
        with torch.no_grad():
            assert (model(**batch).logits - expected["logits"]).abs().max() < 2e-5
    else:
        lengths = enumerate(META["prompt_lengths"])
        rows = [(batch["input_ids"][i : i + 1, :n], expected[f"logits.{i}"]) for i, n in lengths]
        assert largest_difference(model, rows) < 2e-5
