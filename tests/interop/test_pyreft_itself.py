"""pyreft 0.1.0 itself loads what is exported to it, in the environment of `make peers`, and computes the same.

`ReftModel.load` builds the interventions with W and b in bfloat16, whatever the file holds: so the first test puts them
back to float32 and loads the tensors again, by pyreft's own `load_state_dict`, and the second takes it as it is.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import tiny
from peft import get_peft_model

from trimtab import ReftConfig
from trimtab.interop.convert import convert

PYTHON = Path(os.environ.get("TRIMTAB_PEERS", Path(__file__).parents[2] / ".venv-peers")) / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="needs the environment of `make peers`, or TRIMTAB_PEERS=its folder"
    ),
]
SCRIPT = """
import json, sys, torch, pyreft, transformers
for case in json.loads(sys.argv[1]):
    base = transformers.AutoModelForCausalLM.from_pretrained(case["base"], dtype=torch.float32).eval()
    reft = pyreft.ReftModel.load(case["folder"], base)
    for key, intervention in reft.interventions.items():
        intervention.float()
        if case["again"]:
            intervention.load_state_dict(torch.load(f"{case['folder']}/intkey_{key}.bin"))
    ids = torch.tensor([case["ids"]])
    n, first, last = len(case["ids"]), case["first"], case["last"]
    prefix, suffix = list(range(first)), list(range(n - last, n))
    groups = [prefix + suffix] if case["tied"] else [prefix, suffix]
    where = [[group] for group in groups for _ in range(case["edited"])]
    with torch.no_grad():
        _, output = reft({"input_ids": ids}, unit_locations={"sources->base": (None, where)})
    torch.save(output.logits, case["folder"] + "/said.pt")
"""
CASES = [
    (name, method, tied, site)
    for name, site in (("llama", "block"), ("gpt2", "mlp"))
    for method, tied in (
        ("loreft", True),
        ("loreft", False),
        ("direft_orthonormal", False),
        ("consreft", True),
        ("lobireft", False),
        ("noreft", True),
        ("direft", False),
    )
]


@pytest.mark.parametrize(("again", "tolerance"), [(True, 2e-5), (False, 1e-1)])
def test_pyreft_loads_the_export(again: bool, tolerance: float, tmp_path: Path) -> None:
    ids = torch.randint(3, 96, (17,)).tolist()
    cases, wanted = [], []
    for i, (name, method, tied, site) in enumerate(CASES):
        base = tmp_path / name
        if not base.exists():
            tiny(name, initializer_range=0.2).save_pretrained(base)  # type: ignore[operator]
        model = tiny(name, initializer_range=0.2)
        config = ReftConfig(
            task_type="CAUSAL_LM",
            method=method,
            positions="f2+l3",
            tied=tied,
            site=site,
            layers=[2, 0],
            init_weights="paper",
            base_model_name_or_path=str(base),
        )
        reft = get_peft_model(model, config).eval()
        config.base_model_name_or_path = str(base)
        reft.save_pretrained(tmp_path / f"ours-{i}")
        folder = tmp_path / f"pyreft-{i}"
        convert(tmp_path / f"ours-{i}", folder, "pyreft", check=False)
        with torch.no_grad():
            wanted.append(reft(input_ids=torch.tensor([ids])).logits)
        facts = {"first": 2, "last": 3, "tied": tied, "edited": 2, "again": again, "ids": ids}
        cases.append({"base": str(base), "folder": str(folder), **facts})
    command = [str(PYTHON), "-W", "ignore", "-c", SCRIPT, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    for case, logits, row in zip(cases, wanted, CASES, strict=True):
        said = torch.load(Path(str(case["folder"])) / "said.pt", weights_only=True)
        assert (said - logits).abs().max() < tolerance, row
