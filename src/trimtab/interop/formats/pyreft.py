"""pyreft's checkpoints (0.1.0, pyvene 0.1.8): pickled tensors, one file an intervention, beside a `config.json`.

They keep neither positions nor activation, dropout or base model. `#0` and `#1` in a file's name count the
interventions of one place: with both, prefix and suffix are edited apart.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from trimtab.adapter.weights import read_pickle
from trimtab.edits import ACTIVATIONS
from trimtab.errors import AdapterError, ConversionError
from trimtab.interop.base import Base, Runner, by_hand
from trimtab.interop.convert import Adapter, Format, Given, as_loreft, make_adapter

METHODS = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
    "DireftIntervention": "direft_orthonormal",
    "NodireftIntervention": "direft",
}
SITES = {"block_output": "block", "mlp_output": "mlp", "attention_output": "attention"}
MODELS = ("gpt2", "llama", "gpt_neo", "gpt_neox", "mistral", "gemma", "gemma2", "olmo", "qwen2", "esm")
"""Types of models whose components pyvene knows by name, without which it cannot load what it saved."""
_FILE = re.compile(r"intkey_layer_(\d+)_comp_(\w+)_unit_pos_nunit_1#(\d+)\.bin")
HEAD = "pytorch_model.bin"


@dataclass(frozen=True)
class Intervention:
    """One file."""

    module: str
    count: int
    """Which of those at one place."""
    kind: str
    file: Path

    def tensors(self) -> dict[str, Tensor]:
        """As trimtab names and lays them out, float32.

        Raises:
            ConversionError: other tensors than pyreft saves for this kind.
        """
        saved = {key: tensor.float() for key, tensor in _load(self.file).items()}
        try:
            found: dict[str, Tensor] = _READ[self.kind](saved)
        except KeyError as error:
            raise ConversionError(f"{self.file}: holds {sorted(saved)}, without {error} of a {self.kind}.") from None
        if "rotation" in found and not found["rotation"].any():
            raise ConversionError(
                f"{self.file}: R is 0, as any weight decay leaves it in pyreft, so the checkpoint edits nothing. Train "
                "it again without weight decay."
            )
        return found


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return read_pickle(file)
    except AdapterError as error:
        raise ConversionError(str(error)) from None


class _Columns(nn.Module):
    """What pyreft parametrizes: a weight (d, r)."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(like))


def _rotation(saved: dict[str, Tensor]) -> Tensor:
    """R (r, d): stored as it is by LoReFT, and by the others as a parametrization that torch has to work out."""
    if "rotate_layer" in saved:
        return saved["rotate_layer"].T.contiguous()
    prefix = "rotate_layer.parametrizations.weight."
    layer = parametrizations.orthogonal(_Columns(saved[prefix + "original"]))
    layer.load_state_dict({k.removeprefix("rotate_layer."): v for k, v in saved.items() if k.startswith(prefix)})
    columns: Any = layer.weight
    return columns.detach().T.contiguous()  # type: ignore[no-any-return]


def _linear(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """W and b; LoReFT's are saved without the name of their layer."""
    own = "" if "rotate_layer" in saved else "learned_source."
    return {"weight": saved[own + "weight"], "bias": saved[own + "bias"]}


def _noreft(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """P may come with a bias p: W h + b - (P h + p)."""
    linear = _linear(saved)
    linear["bias"] = linear["bias"] - saved.get("proj_layer.bias", torch.zeros(()))
    return {**linear, "projection": saved["proj_layer.weight"]}


_READ: dict[str, Any] = {
    "LoreftIntervention": lambda saved: {**_linear(saved), "rotation": _rotation(saved)},
    "DireftIntervention": lambda saved: {**_linear(saved), "rotation": _rotation(saved)},
    "ConsreftIntervention": lambda saved: {"bias": saved["learned_source"], "rotation": _rotation(saved)},
    "LobireftIntervention": lambda saved: {"bias": saved["learned_source"], "rotation": _rotation(saved)},
    "NoreftIntervention": _noreft,
    "NodireftIntervention": lambda saved: {**_linear(saved), "projection": saved["proj_layer.weight"]},
}


def _parametrized(rotation: Tensor) -> dict[str, Tensor]:
    """R (r, d) as torch's parametrization keeps it, with the sizes that pyvene's modules hold."""
    layer = parametrizations.orthogonal(_Columns(rotation.T))
    layer.weight = rotation.T
    width = torch.tensor(rotation.shape[1])
    return {"embed_dim": width, "interchange_dim": width} | {
        f"rotate_layer.{key}": tensor for key, tensor in layer.state_dict().items()
    }


_WRITE: dict[str, Any] = {
    "loreft": lambda own: {
        "weight": own["weight"],
        "bias": own["bias"],
        "rotate_layer": own["rotation"].T.contiguous(),
    },
    "direft_orthonormal": lambda own: {
        "learned_source.weight": own["weight"],
        "learned_source.bias": own["bias"],
        **_parametrized(own["rotation"]),
    },
    "consreft": lambda own: {"learned_source": own["bias"], **_parametrized(own["rotation"])},
    "lobireft": lambda own: {"learned_source": own["bias"], **_parametrized(own["rotation"])},
}
"""The kinds that pyreft can load again."""


def _formula(kind: str, saved: dict[str, Tensor], activation: str | None, h: Tensor) -> Tensor:
    """h (n, d) edited as pyreft writes its formulas, from the tensors as it saves them."""
    act = ACTIVATIONS[activation] if activation else nn.Identity()
    if "proj_layer.weight" in saved:
        up, read = saved["proj_layer.weight"], F.linear(h, saved["proj_layer.weight"], saved.get("proj_layer.bias"))
    else:
        up = _rotation(saved)
        read = h @ up.T
    source = saved["learned_source"] if "learned_source" in saved else act(F.linear(h, *_linear(saved).values()))
    return h + (source - read if kind in ("Loreft", "Noreft", "Consreft") else source) @ up


class Pyreft(Format):
    """A folder of `intkey_...bin` files. A Trainer's own has no `config.json`."""

    name = "pyreft"

    def recognises(self, path: Path) -> bool:
        """By its file names."""
        return path.is_dir() and any(path.glob("intkey_*.bin"))

    def read(self, path: Path, given: Given) -> Adapter:
        """One edit for each file; a model's own trained parameters, a classifier, from `pytorch_model.bin`."""
        positions = given.need("positions", "those of the unit_locations it was trained with, such as f7+l7")
        modules = _load(path / HEAD) if (path / HEAD).exists() else {}
        labels = [tensor.shape[0] for tensor in modules.values() if tensor.dim() == 2]
        base = given.open(None, labels=labels[-1] if labels else None)
        found = interventions(path, base, given)
        kinds = {METHODS[own.kind] for own in found}
        if len(kinds) > 1:
            raise ConversionError(f"{path}: interventions of several kinds, {', '.join(sorted(kinds))}; one is needed.")
        if max(own.count for own in found) > 1:
            raise ConversionError(
                f"{path}: more than two interventions at one place; pyreft's ReFT has a prefix and a suffix."
            )
        untied = any(own.count for own in found)
        biased = any("proj_layer.bias" in _load(own.file) for own in found)
        if biased and given.activation and "direft" not in kinds:
            raise ConversionError("NoReFT with add_bias and an activation: has no equal here. Exact: without either.")
        return make_adapter(
            base,
            kinds.pop(),
            positions,
            {(own.module, ("prefix", "suffix")[own.count] if untied else "edit"): own.tensors() for own in found},
            activation=given.activation,
            modules={name: tensor.float() for name, tensor in modules.items()},
            unsaid=(
                f"positions: {positions}, as given",
                f"base model: {base.name}, as given",
                f"activation: {given.activation or 'none'} (pyreft keeps no act_fn; --activation says another)",
                "dropout: 0 (pyreft keeps none; it matters in training only)",
            ),
        )

    def write(self, adapter: Adapter, path: Path, given: Given) -> list[str]:
        """As `reft_model.save(..., include_model=True)` would."""
        config, base = adapter.config, adapter.base
        indices = adapter.indices
        _check_expressible(adapter)
        component = next(name for name, site in SITES.items() if site == config.site)
        kind, edits, notes = _interventions(adapter)
        order = [("edit", "prefix", "suffix").index(part) for _, part in edits]
        ordered = [
            key for _, key in sorted(zip(order, edits, strict=True), key=lambda pair: (pair[0], indices[pair[1][0]]))
        ]
        keys = [f"layer_{indices[m]}_comp_{component}_unit_pos_nunit_1#{int(part == 'suffix')}" for m, part in ordered]
        width = next(iter(adapter.edits.values())).width
        path.mkdir()
        for key, own in zip(keys, ordered, strict=True):
            torch.save(OrderedDict(edits[own]), path / f"intkey_{key}.bin")
        if adapter.modules:
            torch.save(adapter.modules, path / HEAD)
        saved = {
            "intervention_constant_sources": [True] * len(keys),
            "intervention_dimensions": [width] * len(keys),
            "intervention_types": [f"<class 'pyreft.interventions.{kind}'>"] * len(keys),
            "mode": "parallel",
            "representations": [[indices[m], component, "pos", 1, adapter.rank, *[None] * 9] for m, _ in ordered],
            "sorted_keys": keys,
        }
        (path / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
        return [
            *notes,
            f"pyreft keeps no positions: pass unit_locations for {config.positions} in every call",
            f"pyreft keeps no base model: load it onto {base.name}",
            "ReftModel.load rounds W and b to bfloat16, pyreft's default; give the interventions dtype=torch.float32 "
            "and load each file's tensors for all of the precision",
        ]

    def run(self, path: Path, adapter: Adapter) -> Runner:
        """pyreft's formulas on the files as they are."""
        config = adapter.config
        functions = {}
        for own in interventions(path, adapter.base, Given(method=config.method)):
            saved = {key: tensor.float() for key, tensor in _load(own.file).items()}
            kind = own.kind.removesuffix("Intervention")
            part = ("prefix", "suffix")[own.count] if not config.tied else "edit"
            functions[own.module, part] = _bind(kind, saved, config.activation)
        return by_hand(adapter.base, functions, config.parsed_positions, adapter.modules)


def _bind(kind: str, saved: dict[str, Tensor], activation: str | None) -> Any:
    return lambda h: _formula(kind, saved, activation, h)


def interventions(path: Path, base: Base, given: Given) -> list[Intervention]:
    """The files of a checkpoint, placed on the base.

    Raises:
        ConversionError: a component or kind of intervention that is not an edit of a module's output.
    """
    config = path / "config.json"
    if not config.exists():
        return _by_file_names(path, base, given)
    saved = json.loads(config.read_text())
    found = []
    for key, kind, place in zip(
        saved["sorted_keys"], saved["intervention_types"], saved["representations"], strict=True
    ):
        name = kind.removesuffix("'>").rpartition(".")[2]
        if name not in METHODS:
            raise ConversionError(f"{config}: intervention {name}: known are {', '.join(METHODS)}.")
        layer, component, unit, units = place[:4]
        if unit != "pos" or units != 1:
            raise ConversionError(
                f"{config}: unit {unit!r}, {units} a time: only 'pos', one at a time, is an edit of tokens."
            )
        found.append(
            Intervention(_module(base, layer, component), int(key.rpartition("#")[2]), name, path / f"intkey_{key}.bin")
        )
    return found


def _by_file_names(path: Path, base: Base, given: Given) -> list[Intervention]:
    """Of a Trainer's checkpoint, which has no config."""
    method = given.need("method", f"of {', '.join(METHODS.values())}: a Trainer's checkpoint has no config.json")
    kinds = {ours: theirs for theirs, ours in METHODS.items()}
    if method not in kinds:
        raise ConversionError(f"--method {method}: pyreft has {', '.join(kinds)}.")
    matches = [(file, _FILE.fullmatch(file.name)) for file in sorted(path.glob("intkey_*.bin"))]
    bad = [file.name for file, match in matches if not match]
    if bad:
        raise ConversionError(
            f"{path}: {bad[0]}: without config.json only files named by layer and component are known."
        )
    return [Intervention(_module(base, int(m[1]), m[2]), int(m[3]), kinds[method], file) for file, m in matches if m]


def _module(base: Base, layer: int, component: str) -> str:
    """The module whose output a component is: by name and layer, or a path such as `model.layers[3].output`."""
    if component in SITES:
        return base.module_of(SITES[component], int(layer))
    if "." in component and component.endswith(".output"):
        return re.sub(r"\[(\d+)\]", r".\1", component.removesuffix(".output"))
    raise ConversionError(
        f"component {component!r}: not the output of a module. Known are {', '.join(SITES)}, and paths such as "
        "'model.layers[3].mlp.output'."
    )


def _check_expressible(adapter: Adapter) -> None:
    config = adapter.config
    if config.activation:
        raise ConversionError(
            f"activation={config.activation!r}: pyreft's checkpoints keep none, so it would load another function. "
            "Exact: an adapter without activation."
        )
    if config.parsed_positions.scope == "generated":
        raise ConversionError("positions='generated': pyreft edits prompts. Exact: fN, lN, fN+lM, prompt, all.")
    if adapter.base.config.model_type not in MODELS:
        raise ConversionError(
            f"{adapter.base.name} is a {adapter.base.config.model_type}: pyreft 0.1.0 can load checkpoints onto "
            f"{', '.join(MODELS)} only."
        )


def _interventions(adapter: Adapter) -> tuple[str, dict[tuple[str, str], dict[str, Tensor]], list[str]]:
    """The kind, tensors as pyreft's `state_dict` has them, and what to say of it."""
    kinds = {ours: theirs for theirs, ours in METHODS.items()}
    write = _WRITE.get(adapter.config.method)
    if write is not None:
        return kinds[adapter.config.method], {key: write(tensors) for key, tensors in adapter.tensors.items()}, []
    note = (
        f"{adapter.config.method} is written as the LoreftIntervention that computes the same: pyreft 0.1.0 has "
        "no kind for it that it can load"
    )
    return "LoreftIntervention", {k: _WRITE["loreft"](as_loreft(*form)) for k, form in adapter.affine().items()}, [note]
