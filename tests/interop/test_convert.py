"""Adapters from and to other formats: the same logits on both sides, or a refusal that names what is in the way."""

import base64
import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MODELS, VOCAB, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from trimtab import ReftConfig
from trimtab.errors import ConversionError
from trimtab.interop import formats
from trimtab.interop.base import Base
from trimtab.interop.convert import Check, Given, Report, all_formats, as_constant, as_loreft, convert, recognise
from trimtab.interop.formats.easysteer import unwire, wire
from trimtab.interop.merge import merge

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = torch.arange(3, 21).unsqueeze(0)
Make = Callable[..., Path]
Bases = Callable[[str], Path]


def named(value: Any) -> str | None:
    """What pytest shows of a parameter."""
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("bases")

    def base(name: str) -> Path:
        if not (folder / name).exists():
            tiny(name, initializer_range=0.2).save_pretrained(folder / name)  # type: ignore[operator]
        return folder / name

    return base


_READ: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Base.load` as a copy of what it gave before for the same base."""
    load = Base.load

    def remembered(self: Base, dtype: Any = torch.float32) -> Any:
        key = self.name, self.task, self.labels, dtype
        if key not in _READ:
            _READ[key] = load(self, dtype)
        return copy.deepcopy(_READ[key])

    monkeypatch.setattr(Base, "load", remembered)


@pytest.fixture
def make(bases: Bases, tmp_path: Path) -> Make:
    """A random adapter of ours, saved."""

    def adapter(name: str = "llama", **config: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(bases(name))
        reft = get_peft_model(model, ReftConfig(**{"task_type": "CAUSAL_LM", "init_weights": "paper", **config}))
        reft.save_pretrained(tmp_path / "ours")
        return tmp_path / "ours"

    return adapter


def logits(folder: Path) -> Tensor:
    config = json.loads((folder / "adapter_config.json").read_text())
    base = Base(config["base_model_name_or_path"], config["task_type"])
    model = PeftModel.from_pretrained(base.load(), folder).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def agreed(report: Report) -> Report:
    assert isinstance(report.check, Check), report.check
    assert report.check.difference <= 1e-5 * max(1.0, report.check.scale)
    return report


# ---- there and back ------------------------------------------------------------------------------------------------

LINEAR = ("loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft")
ROUND_TRIPS = [
    *(("pyreft", {"method": m, "positions": "f2+l3", "tied": i % 2 > 0}) for i, m in enumerate(LINEAR)),
    ("pyreft", {"method": "loreft", "positions": "all", "site": "mlp", "layers": [2, 0]}),
    ("pyreft", {"method": "direft_orthonormal", "positions": "l1", "site": "attention", "r": 32}),
    *(("easysteer", {"method": m, "positions": "f2+l3"}) for m in LINEAR),
    *(("easysteer", {"method": "loreft", "positions": p}) for p in ("f3", "l1", "prompt", "generated", "all")),
    ("easysteer", {"method": "lobireft", "positions": "f2+l1", "tied": False, "layers": [1]}),
    ("gguf", {"method": "lobireft", "positions": "all", "layers": [1, 2]}),
    ("gguf", {"method": "vector", "positions": "all", "layers": [1, 2]}),
    *((to, {"method": m, "positions": "l1"}) for to in ("pyreft", "easysteer") for m in ("vector", "postblock")),
    *(("trimtab", {"method": m, "positions": "l2"}) for m in ("red", "vector", "postblock", "gated")),
    ("trimtab", {"method": "loreft", "positions": "f1+l1", "activation": "relu", "dropout": 0.1}),
]


@pytest.mark.parametrize(("to", "config"), ROUND_TRIPS, ids=named)
def test_there_and_back(to: str, config: dict[str, Any], make: Make, bases: Bases, tmp_path: Path) -> None:
    ours = make(**config)
    agreed(convert(ours, tmp_path / "theirs", to))
    assert recognise(tmp_path / "theirs").name == to
    given = Given(base=str(bases("llama")), positions=config["positions"] if to in ("pyreft", "gguf") else None)
    convert(tmp_path / "theirs", tmp_path / "back", given=given, check=False)
    before, after = logits(ours), logits(tmp_path / "back")
    base = Base(str(bases("llama"))).load()
    with torch.no_grad():
        moved = (base(input_ids=IDS).logits - before).abs().max()
    assert moved > 1e-2 or config["positions"] == "generated" or config["method"] == "red"  # which starts at h
    assert (before - after).abs().max() < 1e-5 * before.abs().max()


def test_a_base_without_padding_is_checked_too(tmp_path: Path) -> None:
    """As Llama, Mistral and Qwen2 come."""
    tiny("llama", initializer_range=0.2, pad_token_id=None).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.config.pad_token_id is None
    for config in ({"positions": "f2+l3"}, {"positions": "random3"}):
        settings = ReftConfig(task_type="CAUSAL_LM", init_weights="paper", **config)  # type: ignore[arg-type]
        get_peft_model(copy.deepcopy(model), settings).save_pretrained(tmp_path / "ours")
        agreed(convert(tmp_path / "ours", tmp_path / config["positions"], "pyreft"))


def test_as_loreft_computes_the_same() -> None:
    basis, reads, constant = torch.randn(3, 8).double(), torch.randn(3, 8).double(), torch.randn(3).double()
    basis[2] = basis[0] - basis[1]  # of rank 2
    edit, h = as_loreft(basis, reads, constant), torch.randn(5, 8)
    rotation = edit["rotation"]
    assert (rotation @ rotation.T - torch.eye(3)).abs().max() < 1e-6
    wanted = h.double() + (h.double() @ reads.T + constant) @ basis
    assert (h + (h @ edit["weight"].T + edit["bias"] - h @ rotation.T) @ rotation - wanted).abs().max() < 1e-5


def test_the_zero_vector_is_an_edit_too() -> None:
    edit = as_constant(torch.zeros(6))
    assert edit["rotation"].norm() == 1 and edit["bias"] == 0


# ---- LoRA and merged weights ---------------------------------------------------------------------------------------

LORAS = {
    "llama": "mlp",
    "qwen3": "attention",
    "gpt2": "mlp",
    "mistral": "mlp",
    "gemma3": "mlp",
    "phi3": "attention",
    "gpt_neox": "attention",
}
STOCK_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for case in json.loads(sys.argv[1]):
    base = AutoModelForCausalLM.from_pretrained(case["base"]).eval()
    model = PeftModel.from_pretrained(base, case["lora"]).eval()
    ids = torch.tensor(case["ids"])
    mask = (ids != 0).long()
    tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    logits = model(input_ids=ids, attention_mask=mask).logits
    torch.save({"logits": logits.detach(), "tokens": tokens}, case["lora"] + "/said.pt")
assert "trimtab" not in sys.modules
"""


@pytest.mark.slow
def test_lora_by_stock_peft(make: Make, bases: Bases, tmp_path: Path) -> None:
    """Greedy tokens and logits of a left-padded batch, in a process without trimtab."""
    ids = torch.randint(3, VOCAB, (2, 9))
    ids[1, :4] = 0
    mask = (ids != 0).long()
    cases, wanted = [], []
    for name, site in LORAS.items():
        ours = make(name, r=3, positions="all", site=site)
        lora = tmp_path / f"{name}-{site}"
        convert(ours, lora, "lora", check=False)
        model = PeftModel.from_pretrained(Base(str(bases(name))).load(), ours).eval()
        with torch.no_grad():
            tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
            wanted.append((model(input_ids=ids, attention_mask=mask).logits, tokens))
        cases.append({"base": str(bases(name)), "lora": str(lora), "ids": ids.tolist()})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK_PEFT, json.dumps(cases)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for case, (logits_here, tokens) in zip(cases, wanted, strict=True):
        said = torch.load(Path(str(case["lora"])) / "said.pt", weights_only=True)
        difference = (said["logits"] - logits_here)[mask.bool()].abs().max()
        assert difference < 1e-5 * logits_here.abs().max(), case["lora"]
        assert torch.equal(said["tokens"], tokens), case["lora"]


@pytest.mark.parametrize("method", ["vector", "postblock"])
def test_lora_of_other_methods(method: str, make: Make, tmp_path: Path) -> None:
    agreed(convert(make(method=method, positions="all", site="mlp"), tmp_path / "lora", "lora"))


def test_lora_names_its_targets_as_servers_know_them(make: Make, tmp_path: Path) -> None:
    convert(make(positions="all", site="mlp"), tmp_path / "all", "lora")
    convert(make(positions="all", site="mlp", layers=[1]), tmp_path / "one", "lora")
    targets = [json.loads((tmp_path / n / "adapter_config.json").read_text())["target_modules"] for n in ("all", "one")]
    assert targets == [["down_proj"], ["model.layers.1.mlp.down_proj"]]


@pytest.mark.parametrize(
    ("name", "site"), [("llama", "mlp"), ("llama", "attention"), ("gpt2", "mlp"), ("opt", "attention")]
)
def test_merged(name: str, site: str, make: Make, tmp_path: Path) -> None:
    ours = make(name, positions="all", site=site, layers=[0, 2], method="noreft")
    agreed(merge(ours, tmp_path / "merged"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted = logits(ours)
        assert (model(input_ids=IDS).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


def without_bias(folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file({k: t * 0 if k.endswith("bias") else t for k, t in load_file(file).items()}, file, {"format": "pt"})
    return folder


def test_without_a_bias_any_target_will_do(make: Make, tmp_path: Path) -> None:
    ours = without_bias(make("mistral", positions="all", site="mlp"))
    agreed(convert(ours, tmp_path / "lora", "lora", Given(lora_bias=False)))
    assert not any("bias" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    agreed(merge(ours, tmp_path / "merged"))


def test_merged_in_half_precision(make: Make, bases: Bases, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(bases("llama"), dtype=torch.bfloat16).save_pretrained(half)
    report = merge(make(positions="all", site="mlp"), tmp_path / "merged", Given(base=str(half)))
    assert report.target == "weights (bfloat16)" and isinstance(report.check, Check) and report.check.difference > 1e-5


# ---- what cannot be exact ------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("lora", "llama", {"positions": "f7+l7", "site": "mlp"}, "positions='f7.l7'.* Exact: positions all"),
    ("lora", "llama", {"positions": "all"}, "residual sum.* Exact: a site that ends with its projection"),
    (
        "lora",
        "llama",
        {"positions": "all", "site": "mlp", "activation": "relu"},
        "activation='relu'.* without activation",
    ),
    ("lora", "mixtral", {"positions": "all", "site": "mlp"}, "MixtralSparseMoeBlock.* experts"),
    ("merge", "llama", {"positions": "l1", "site": "mlp"}, "positions='l1'"),
    ("merge", "mistral", {"positions": "all", "site": "mlp"}, "need a bias.* would be lost.* lora_bias"),
    ("gguf", "llama", {"positions": "all"}, "method='loreft'.* Exact: method lobireft"),
    ("gguf", "llama", {"positions": "l1", "method": "lobireft"}, "positions='l1'.* Exact: positions all"),
    ("gguf", "llama", {"positions": "all", "method": "lobireft", "site": "mlp"}, "site='mlp'.* Exact: site block"),
    ("easysteer", "llama", {"site": "attention"}, "site='attention'.* Exact: site block"),
    ("easysteer", "llama", {"positions": "random3"}, "positions='random3'"),
    ("easysteer", "llama", {"activation": "tanh"}, "activation='tanh'"),
    ("pyreft", "llama", {"activation": "gelu"}, "activation='gelu'.* keep none"),
    ("pyreft", "llama", {"positions": "generated"}, "positions='generated'"),
    ("pyreft", "llama", {"site": r".*q_proj"}, "counts blocks.* Exact: site block, attention or mlp"),
    ("pyreft", "opt", {}, "is a opt.* gpt2, llama"),
    ("vectors", "llama", {}, "vectors: can be read, not written"),
    ("pyreft", "llama", {"method": "red"}, "method='red'.* Exact: LoReFT or a relative"),
    ("nemo", "llama", {}, "--to nemo: must be one of .*gguf"),
]


@pytest.mark.parametrize(("to", "name", "config", "words"), REFUSED, ids=named)
def test_refused_by_name(to: str, name: str, config: dict[str, Any], words: str, make: Make, tmp_path: Path) -> None:
    ours = make(name, **config)
    with pytest.raises(ConversionError, match=f"(?s){words}"):
        merge(ours, tmp_path / "out") if to == "merge" else convert(ours, tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_a_lora_without_bias_is_refused_where_it_would_be_lost(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"need a bias.*would be lost.*Exact"):
        convert(make(positions="all", site="mlp"), tmp_path / "out", "lora", Given(lora_bias=False))


def test_nothing_is_overwritten(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out is there already"):
        convert(make(), tmp_path / "out", "pyreft")


def test_two_sides_that_differ_are_an_error(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.interop.formats import pyreft

    right = pyreft._WRITE["loreft"]
    monkeypatch.setitem(pyreft._WRITE, "loreft", lambda own: right({**own, "bias": own["bias"] + 1}))
    ours = make()
    with pytest.raises(ConversionError, match="the two sides differ"):
        convert(ours, tmp_path / "out", "pyreft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_without_the_weights_of_the_base_nothing_is_checked_and_that_is_said(
    make: Make, bases: Bases, tmp_path: Path
) -> None:
    ours = make()
    skeleton = tmp_path / "skeleton"
    skeleton.mkdir()
    (skeleton / "config.json").write_text((bases("llama") / "config.json").read_text())
    report = convert(ours, tmp_path / "out", "pyreft", Given(base=str(skeleton)))
    assert isinstance(report.check, str) and "cannot load the model" in report.check
    with pytest.raises(ValueError, match="cannot load the model"):  # its numbers are needed here
        convert(make(positions="all", site="mlp"), tmp_path / "lora", "lora", Given(base=str(skeleton)))


# ---- what the source does not say ----------------------------------------------------------------------------------

LEFT_OUT = [
    ("pyreft_checkpoint_loreft_tied", {}, "does not say its positions: give --positions"),
    (
        "pyreft_checkpoint_loreft_tied",
        {"positions": "f3+l3", "base": None},
        "does not name its base model: give --base",
    ),
    ("adapterhub_checkpoint_noreft", {}, "does not say its method: give --method.*noreft or direft"),
    ("adapterhub_checkpoint_loreft", {"positions": "f7+l7"}, "--positions f7.l7: the source itself says f3.l3"),
    ("adapterhub_checkpoint_loreft", {"method": "noreft"}, "--method noreft: the source itself says loreft"),
    ("pyreft_checkpoint_loreft_tied", {"positions": "x7"}, "positions='x7'"),
]


@pytest.mark.parametrize(("case", "given", "words"), LEFT_OUT)
def test_what_is_left_out_has_to_be_given(case: str, given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        convert(GOLDEN / case, tmp_path / "out", given=Given(**{"base": str(GOLDEN / "model"), **given}))
    assert not list(tmp_path.iterdir())


def test_a_base_of_another_shape(bases: Bases, tmp_path: Path) -> None:
    given = Given(base=str(bases("llama")), positions="f3+l3")
    with pytest.raises(ConversionError, match=r"layer 3: .* has blocks 0 to 2"):
        convert(GOLDEN / "pyreft_checkpoint_loreft_tied", tmp_path / "out", given=given)


# ---- pyreft's and AdapterHub's files -------------------------------------------------------------------------------


class Attack:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_a_pickle_that_runs_code_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in (GOLDEN / "pyreft_checkpoint_loreft_tied").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ConversionError, match=r"layer_2.*not a pickle of tensors alone"):
        convert(source, tmp_path / "out", given=Given(base=str(GOLDEN / "model"), positions="l1"))
    assert "run" not in capsys.readouterr().out


def altered(tmp_path: Path, **changes: Any) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    golden = GOLDEN / "pyreft_checkpoint_loreft_tied"
    for file in golden.glob("*.bin"):
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((golden / "config.json").read_text())
    for key, change in changes.items():
        config[key] = [change(value) for value in config[key]]
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"representations": lambda r: [r[0], "block_input", *r[2:]]}, "'block_input': not the output of a module"),
        ({"representations": lambda r: [0, "model.layers[9].output", *r[2:]]}, "no module 'model.layers.9'"),
        ({"representations": lambda r: [*r[:2], "h.pos", *r[3:]]}, "unit 'h.pos'"),
        ({"intervention_types": lambda t: t.replace("Loreft", "Boundless")}, "intervention BoundlessIntervention"),
        ({"intervention_types": lambda t: t.replace("Loreft", "Noreft")}, "without 'proj_layer.weight'"),
    ],
)
def test_pyreft_files_that_are_no_edit(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=words):
        convert(altered(tmp_path, **changes), tmp_path / "out", given=Given(base=str(GOLDEN / "model"), positions="l1"))


def test_a_trainers_checkpoint_of_pyreft_has_no_config(tmp_path: Path) -> None:
    source = altered(tmp_path)
    (source / "config.json").unlink()
    given = {"base": str(GOLDEN / "model"), "positions": "f3+l3"}
    with pytest.raises(ConversionError, match="give --method"):
        convert(source, tmp_path / "out", given=Given(**given))
    agreed(convert(source, tmp_path / "out", given=Given(**given, method="loreft")))
    convert(GOLDEN / "pyreft_checkpoint_loreft_tied", tmp_path / "same", given=Given(**given))
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "same"))


def test_rotation_that_weight_decay_made_zero(tmp_path: Path) -> None:
    source = altered(tmp_path)
    file = source / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"
    saved = torch.load(file, weights_only=True)
    torch.save({**saved, "rotate_layer": saved["rotate_layer"] * 0}, file)
    with pytest.raises(ConversionError, match=r"layer_1.*R is 0, as any weight decay leaves it"):
        convert(source, tmp_path / "out", given=Given(base=str(GOLDEN / "model"), positions="l1"))


def test_adapterhubs_safetensors(tmp_path: Path) -> None:
    """`save_adapter(..., use_safetensors=True)`: the same tensors in another file."""
    golden, source = GOLDEN / "adapterhub_checkpoint_loreft", tmp_path / "source"
    source.mkdir()
    (source / "adapter_config.json").write_text((golden / "adapter_config.json").read_text())
    save_file(torch.load(golden / "pytorch_adapter.bin", weights_only=True), source / "adapter.safetensors")
    for folder in (golden, source):
        convert(folder, tmp_path / f"of-{folder.name}", given=Given(base=str(GOLDEN / "model")))
    assert torch.equal(logits(tmp_path / f"of-{golden.name}"), logits(tmp_path / "of-source"))


def test_a_flexible_head_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in (GOLDEN / "adapterhub_checkpoint_loreft").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    head = {"config": {"head_type": "classification"}, "model_class": "LlamaAdapterModel"}
    (source / "head_config.json").write_text(json.dumps(head))
    with pytest.raises(ConversionError, match=r"flexible head \(classification\) of LlamaAdapterModel"):
        convert(source, tmp_path / "out", given=Given(base=str(GOLDEN / "model")))


def test_the_base_that_is_given_is_the_one_that_is_written(make: Make, bases: Bases, tmp_path: Path) -> None:
    copied = shutil.copytree(bases("llama"), tmp_path / "copy")
    ours = make(positions="all")
    convert(ours, tmp_path / "out", given=Given(base=str(copied)))
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(copied)


# ---- vectors -------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, vectors: dict[int, np.ndarray]) -> Path:
    save_file({f"layer_{i}": torch.from_numpy(v) for i, v in vectors.items()}, path / "v.safetensors")
    return path / "v.safetensors"


def write_npz(path: Path, vectors: dict[int, np.ndarray]) -> Path:
    np.savez(path / "v.npz", **{f"direction.{i}": v.astype(np.float16) for i, v in vectors.items()})
    return path / "v.npz"


def write_gguf(path: Path, vectors: dict[int, np.ndarray]) -> Path:
    """In repeng's order of calls."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for i, vector in vectors.items():
        writer.add_tensor(f"direction.{i}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / "v.gguf"


def added(base: Path, vectors: dict[int, Tensor], rows: slice = slice(None)) -> Tensor:
    """Logits with vectors added to what blocks give out, by hooks written here."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()

    def hook(vector: Tensor) -> Any:
        def add(module: Any, args: Any, output: Any) -> Any:
            hidden = (output if isinstance(output, Tensor) else output[0]).clone()
            hidden[:, rows] += vector
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        return add

    for i, vector in vectors.items():
        model.model.layers[i].register_forward_hook(hook(vector))
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("write", [write_safetensors, write_npz, write_gguf])
@pytest.mark.parametrize(("positions", "rows"), [("all", slice(None)), ("l1", slice(-1, None))])
def test_vectors(write: Any, positions: str, rows: slice, bases: Bases, tmp_path: Path) -> None:
    vectors = {i: np.random.default_rng(i).integers(-9, 9, 32).astype(np.float32) / 8 for i in (2, 1)}
    file = write(tmp_path, vectors)
    agreed(convert(file, tmp_path / "out", given=Given(base=str(bases("llama")), positions=positions)))
    wanted = added(bases("llama"), {i: torch.from_numpy(v) for i, v in vectors.items()}, rows)
    assert (logits(tmp_path / "out") - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_rows_of_vectors_go_to_the_layers_in_the_order_given(bases: Bases, tmp_path: Path) -> None:
    rows = torch.randn(2, 32)
    save_file({"directions": rows}, tmp_path / "v.safetensors")
    given = Given(base=str(bases("llama")), positions="all", layers=[2, 0])
    agreed(convert(tmp_path / "v.safetensors", tmp_path / "out", given=given))
    wanted = added(bases("llama"), {2: rows[0], 0: rows[1]})
    assert (logits(tmp_path / "out") - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_control_vector_read_back_by_its_own_package(make: Make, bases: Bases, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    ours = make(method="lobireft", positions="all")
    report = agreed(convert(ours, tmp_path / "v.gguf", "gguf"))
    assert any("llama.cpp refuses" in note for note in report.notes)  # since block 0 is edited
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    vectors = {int(t.name.split(".")[1]): torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert {t.tensor_type.name for t in reader.tensors} == {"F32"}
    wanted = logits(ours)
    assert (added(bases("llama"), vectors) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("tensors", "layers", "words"),
    [
        ({"up.1.2": torch.ones(32)}, None, "'up.1.2' does not name one block"),
        ({"a.1": torch.ones(32), "b.1": torch.ones(32)}, None, "does not name one block of its own"),
        ({"a.1": torch.ones(2, 32)}, None, "has shape"),
        ({"vector": torch.ones(32)}, None, "give --layers"),
        ({"vector": torch.ones(5, 32)}, [0, 1], "give --layers, as many"),
        ({"a.7": torch.ones(32)}, None, "layer 7: .* has blocks 0 to 2"),
        ({"vector": torch.ones(32)}, [1], None),
        ({"vectors": torch.ones(3, 32)}, None, None),
    ],
)
def test_names_of_vectors(
    tensors: dict[str, Tensor],
    layers: list[int] | None,
    words: str | None,
    bases: Bases,
    tmp_path: Path,
) -> None:
    save_file(tensors, tmp_path / "v.safetensors")
    given = Given(base=str(bases("llama")), positions="all", layers=layers)
    if words is None:
        assert agreed(convert(tmp_path / "v.safetensors", tmp_path / "out", given=given)).config.layers == (
            layers or "all"
        )
    else:
        with pytest.raises(ConversionError, match=words):
            convert(tmp_path / "v.safetensors", tmp_path / "out", given=given)


# ---- EasySteer -----------------------------------------------------------------------------------------------------


def packed(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "data": base64.b64encode(tensor.numpy().astype("<f4").tobytes()).decode()}


def trained(algorithm: str, payload: dict[str, Any], apply: dict[str, Any], version: int = 1) -> str:
    """A `steering_adapter.json`, as EasySteer's training writes it."""
    config = {"algorithm": algorithm, "component": "hidden_states", "layer": 1, "rank": 3, "prompt_template": "%s"}
    return json.dumps({"version": version, "config": {**config, "apply": apply}, "payload": payload})


def test_easysteers_trained_adapter(bases: Bases, tmp_path: Path) -> None:
    rotate = torch.linalg.qr(torch.randn(32, 3))[0].contiguous()
    weight, bias = torch.randn(3, 32), torch.randn(3)
    tensors = {"rotate_layer": rotate, "learned_source_weight": weight, "learned_source_bias": bias}
    payload = wire("reft", tensors, {"layer": 1})
    assert payload["tensors"] == {name: packed(tensor) for name, tensor in sorted(tensors.items())}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "steering_adapter.json").write_text(trained("loreft", payload, {"prompt_positions": [-1]}))
    report = agreed(convert(tmp_path / "run", tmp_path / "out", given=Given(base=str(bases("llama")))))
    assert (report.config.positions, report.config.layers, report.config.method) == ("l1", [1], "loreft")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.reft.reft_edit."
    assert (saved[key + "rotation"] - rotate.T).abs().max() < 1e-6
    assert (saved[key + "weight"] - weight).abs().max() < 1e-6 and torch.equal(saved[key + "bias"], bias)


def test_a_damaged_payload() -> None:
    payload = wire("direction", {"layer.1": torch.ones(4)}, {})
    assert torch.equal(unwire(payload)["layer.1"], torch.ones(4).double())
    payload["tensors"]["layer.1"] = packed(torch.zeros(4))
    with pytest.raises(ConversionError, match="do not fit its sha256"):
        unwire(payload)


CLAUSES: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt_positions": [-1]}, "l1"),
    ({"prompt_positions": [-2, -1], "prompt_window": None}, "l2"),
    ({"prompt_window": [0, 7], "prompt_positions": [-1]}, "f7+l1"),
    ({"prompt_window": [-3, None]}, "l3"),
    ({"prompt_positions": [0, 1]}, "f2"),
    ({"prompt": "all"}, "prompt"),
    ({"generation": "all"}, "generated"),
    ({"prompt": "all", "generation": "all"}, "all"),
    ({"prompt_window": [0, None]}, None),
    ({"prompt_positions": [-2]}, None),
    ({"prompt_positions": [3]}, None),
    ({"prompt": "all", "exclude_prompt_positions": [0]}, None),
    ({"generation_window": [0, 4]}, None),
    ({"prompt_tokens": [5]}, None),
]


@pytest.mark.parametrize(("clause", "positions"), CLAUSES, ids=named)
def test_easysteers_clauses(clause: dict[str, Any], positions: str | None, bases: Bases, tmp_path: Path) -> None:
    payload = wire("direction", {"layer.2": torch.ones(32)}, {})
    (tmp_path / "steering_adapter.json").write_text(trained("direct", payload, clause, version=2))
    given = Given(base=str(bases("llama")))
    if positions is None:
        with pytest.raises(ConversionError, match=r"apply .* are none of"):
            convert(tmp_path / "steering_adapter.json", tmp_path / "out", given=given)
    else:
        assert convert(tmp_path / "steering_adapter.json", tmp_path / "out", given=given).config.positions == positions


def test_scaled_vectors_and_the_limits_that_are_said(bases: Bases, make: Make, tmp_path: Path) -> None:
    vector = {"data": wire("direction", {"layer.1": torch.ones(32)}, {}), "algorithm": "direct", "scale": -2.0}
    spec = {"vectors": [{**vector, "apply": {"prompt": "all", "generation": "all"}}]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    agreed(convert(tmp_path / "spec.json", tmp_path / "out", given=Given(base=str(bases("llama")))))
    wanted = added(bases("llama"), {1: -2 * torch.ones(32)})
    assert (logits(tmp_path / "out") - wanted).abs().max() < 1e-5 * wanted.abs().max()
    notes = {p: convert(make(positions=p), tmp_path / p, "easysteer").notes for p in ("f2+l2", "f2+l3", "l1", "l2")}
    assert {p: bool(n) for p, n in notes.items()} == {"f2+l2": False, "f2+l3": True, "l1": False, "l2": True}


# ---- the formats as files, and the command -------------------------------------------------------------------------

THROW_AWAY = '''
"""A throw-away format: one tensor file, edits at the last token."""
from safetensors.torch import load_file
from trimtab.interop.convert import Format, make_adapter

class Blob(Format):
    name = "blob"

    def recognises(self, path):
        return path.suffix == ".blob"

    def read(self, path, given):
        base = given.open(None)
        return make_adapter(base, "loreft", "l1", {(base.module_of("block", 1), "edit"): load_file(path)})

    def run(self, path, adapter):
        from trimtab.interop.base import by_hand
        own = load_file(path)
        edit = lambda h: h + (h @ (own["weight"] - own["rotation"]).T + own["bias"]) @ own["rotation"]
        return by_hand(adapter.base, {("model.layers.1", "edit"): edit}, adapter.config.parsed_positions)
'''


def test_a_converter_is_one_file(trimtab: Any, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "blob.py").write_text(THROW_AWAY)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "plugins")])
    monkeypatch.delitem(sys.modules, "trimtab.interop.formats.blob", raising=False)
    rotation = torch.linalg.qr(torch.randn(32, 2))[0].T.contiguous()
    save_file({"rotation": rotation, "weight": torch.randn(2, 32), "bias": torch.randn(2)}, tmp_path / "x.blob")
    code, said = trimtab("convert", tmp_path / "x.blob", tmp_path / "out", "--base", bases("llama"))
    assert code == 0, said
    code, said = trimtab("show", tmp_path / "out")
    assert code == 0 and "l1" in said
    sys.modules.pop("trimtab.interop.formats.blob")


def test_formats_are_found_by_looking(make: Make, tmp_path: Path) -> None:
    assert set(all_formats()) == {"trimtab", "pyreft", "adapterhub", "easysteer", "lora", "gguf", "vectors"}
    assert recognise(make()).name == "trimtab"
    (tmp_path / "empty").mkdir()
    for place, words in (
        (tmp_path / "empty", "looks like none of them"),
        (tmp_path / "nowhere", "no such file or folder"),
    ):
        with pytest.raises(ConversionError, match=words):
            recognise(place)


def test_the_commands(trimtab: Any, make: Make, bases: Bases, tmp_path: Path) -> None:
    golden = GOLDEN / "pyreft_checkpoint_loreft_untied"
    arguments = ("convert", golden, tmp_path / "out", "--base", GOLDEN / "model")
    code, said = trimtab(*arguments)
    assert code == 2 and "give --positions" in said and "Traceback" not in said
    code, said = trimtab(*arguments, "--positions", "f3+l3")
    assert code == 0, said
    for words in (
        "pyreft to trimtab",
        "prefix and suffix edited apart",
        "3 prompts",
        "not in the source",
        "pyreft keeps",
    ):
        assert words in said, words
    code, said = trimtab(*arguments, "--positions", "f3+l3")
    assert code == 2 and "is there already" in said
    ours = make(positions="all", site="mlp")
    code, said = trimtab("merge", ours, tmp_path / "merged")
    assert code == 0 and "mlp_bias" in said
    code, said = trimtab("convert", ours, tmp_path / "lora", "--to", "lora", "--no-check")
    assert code == 0 and "not asked for" in said


def test_every_model_of_the_helpers_is_a_base(bases: Bases) -> None:
    for name in ("bert_seq_cls", "llama_seq_cls", "roberta_token_cls", "t5", "bert"):
        base = Base(str(bases(name)))
        assert (base.task, type(base.skeleton)) == (MODELS[name].task_type, type(tiny(name)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "heads", "positions": "all"}, "no other format edits what attention's heads give"),
        ({"lora": {"r": 2, "target_modules": ["q_proj"]}}, "has a LoRA beside its edits"),
    ],
)
def test_what_only_our_own_format_holds(make: Make, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    ours = make(r=2, **fields)
    for target in ("lora", "pyreft", "trimtab"):
        with pytest.raises(ConversionError, match=message):
            convert(ours, tmp_path / target, target)


def test_formats_that_know_no_turns_refuse_the_first_alone() -> None:
    config, formats = ReftConfig(positions="f1+l1", edit_turns="first"), all_formats()
    with pytest.raises(ConversionError, match="edit_turns='first': easysteer takes all that comes before an answer"):
        formats["easysteer"].check_turns(config)
    formats["trimtab"].check_turns(config)
    formats["easysteer"].check_turns(ReftConfig(positions="all", edit_turns="first"))
