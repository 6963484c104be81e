"""EasySteer (August 2026): trained `steering_adapter.json` files, and lists of payloads as its server takes them.

A payload travels as JSON: float32 tensors in base64 with a digest. An adapter becomes a steering spec, a list of
vectors, each with a payload and an `apply` clause that says at which tokens (`--steering-config` of its vLLM).
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import ConversionError
from trimtab.interop.base import Runner, by_hand
from trimtab.interop.convert import Adapter, Format, Given, as_constant, as_loreft, make_adapter
from trimtab.where.positions import Positions

_TRAINED = "steering_adapter.json"
_WIRE = 1
Clause = dict[str, Any]


class EasySteer(Format):
    """One JSON file."""

    name = "easysteer"
    file = "steering.json"

    def recognises(self, path: Path) -> bool:
        """A folder with one of the two files, or a JSON file with a payload."""
        place = _place(path)
        if place is None or place.suffix != ".json":
            return False
        try:
            return isinstance(json.loads(place.read_text()), dict) and bool(_specs(place))
        except (ValueError, ConversionError, KeyError):
            return False

    def read(self, path: Path, given: Given) -> Adapter:
        """Vectors of the algorithms `direct` and `loreft`, at one choice of tokens."""
        specs = _specs(_place(path) or path)
        clauses = list({json.dumps(clause, sort_keys=True): clause for _, _, clause in specs if clause}.values())
        parts, said = _parts(clauses)
        positions = given.need("positions", "the tokens that the payload was made for, such as l1 or all", said)
        base = given.open(None)
        vectors = all(kind == "direct" for kind, _, _ in specs)
        tensors = {}
        for _, edits, clause in specs:
            for block, form in edits.items():
                key = base.module_of("block", block), parts.get(json.dumps(clause, sort_keys=True), "edit")
                if key in tensors:
                    raise ConversionError(
                        f"{path}: two vectors for block {block} at the same tokens; convert them apart."
                    )
                b, _, c = form
                tensors[key] = as_constant(c @ b) if vectors else as_loreft(*form)
        unsaid = (f"base model: {base.name}, as given", *([] if said else [f"positions: {positions}, as given"]))
        return make_adapter(base, "lobireft" if vectors else "loreft", positions, tensors, unsaid=unsaid)

    def write(self, adapter: Adapter, path: Path, given: Given) -> list[str]:
        """One vector for a constant edit of all blocks; otherwise one for each block (and end of the prompt)."""
        config = adapter.config
        if config.site != "block":
            raise ConversionError(f"site={config.site!r}: EasySteer edits what blocks give out. Exact: site block.")
        if adapter.modules:
            raise ConversionError(f"modules_to_save={config.modules_to_save}: EasySteer holds no head.")
        indices, positions = adapter.indices, config.parsed_positions
        forms = {(indices[module], part): form for (module, part), form in adapter.affine().items()}
        if config.tied and all(not a.any() for _, a, _ in forms.values()):
            tensors = {f"layer.{i}": c @ b for (i, _), (b, _, c) in forms.items()}
            vectors = [_vector("direct", wire("direction", tensors, {}), _clause(positions, "edit"))]
        else:
            vectors = [
                _vector("loreft", _reft(block, as_loreft(*form)), _clause(positions, part))
                for (block, part), form in sorted(forms.items(), key=lambda item: item[0])
            ]
        path.write_text(json.dumps({"vectors": vectors, "conflict": "priority"}, indent=2) + "\n")
        return _limits(positions, config.tied)

    def run(self, path: Path, adapter: Adapter) -> Runner:
        """Each payload's own formula, at the tokens that its clause says."""
        specs = _specs(_place(path) or path)
        parts, _ = _parts(list({json.dumps(c, sort_keys=True): c for _, _, c in specs if c}.values()))
        functions = {
            (adapter.base.module_of("block", block), parts.get(json.dumps(clause, sort_keys=True), "edit")): _edited(
                form
            )
            for _, edits, clause in specs
            for block, form in edits.items()
        }
        return by_hand(adapter.base, functions, adapter.config.parsed_positions)


def _edited(form: tuple[Tensor, Tensor, Tensor]) -> Any:
    b, a, c = (tensor.float() for tensor in form)
    return lambda h: h + (h @ a.T + c) @ b


def _place(path: Path) -> Path | None:
    """The file meant: itself, or one of the two names in a folder."""
    places = [path] if path.is_file() else [path / _TRAINED, path / EasySteer.file]
    return next((place for place in places if place.is_file()), None)


def _specs(place: Path) -> list[tuple[str, dict[int, tuple[Tensor, Tensor, Tensor]], Clause | None]]:
    """Algorithm, edits h + Bᵀ(A h + c) by block, and `apply` clause (None: a payload alone) of each vector."""
    saved = json.loads(place.read_text())
    if "vectors" in saved:
        vectors = saved["vectors"]
    elif "payload" in saved:
        config = saved["config"]
        vectors = [{"data": saved["payload"], "algorithm": config["algorithm"], "apply": config["apply"]}]
    elif "kind" in saved and "tensors" in saved:
        vectors = [
            {"data": saved, "algorithm": {"reft": "loreft", "direction": "direct"}.get(saved["kind"], saved["kind"])}
        ]
    else:
        return []
    return [
        (v.get("algorithm", "direct"), _edits(place, v), _named(v["apply"]) if "apply" in v else None) for v in vectors
    ]


def _named(clause: Clause) -> Clause:
    """Without what it leaves open."""
    return {key: value for key, value in clause.items() if value not in (None, [], {})}


def _edits(place: Path, vector: dict[str, Any]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    algorithm, payload, scale = vector.get("algorithm", "direct"), vector.get("data"), float(vector.get("scale", 1.0))
    if algorithm not in ("direct", "loreft") or payload is None:
        raise ConversionError(f"{place}: algorithm {algorithm!r}: only payloads of 'direct' and 'loreft' are read.")
    if vector.get("normalize"):
        raise ConversionError(f"{place}: normalize: rescales hidden states, which no edit here does.")
    tensors = unwire(payload)
    if algorithm == "direct":
        layers = {int(name.removeprefix("layer.")): tensor for name, tensor in tensors.items()}
        return {
            i: (v[None], torch.zeros_like(v)[None], torch.tensor([scale], dtype=v.dtype)) for i, v in layers.items()
        }
    rotation, weight = tensors["rotate_layer"].T, tensors["learned_source_weight"]
    bias = tensors.get("learned_source_bias", torch.zeros(len(weight), dtype=weight.dtype))
    layer = payload["extra"].get("layer")
    layers_of = [layer] if layer is not None else vector.get("layers") or []
    if not layers_of:
        raise ConversionError(f"{place}: a LoReFT payload without a layer.")
    return {int(i): (rotation, scale * (weight - rotation), scale * bias) for i in layers_of}


def wire(kind: str, tensors: dict[str, Tensor], extra: dict[str, Any]) -> dict[str, Any]:
    """A payload as JSON, with the digest that EasySteer knows it by."""
    arrays = {name: np.ascontiguousarray(tensor.float().numpy()) for name, tensor in sorted(tensors.items())}
    digest = hashlib.sha256(f"{kind}:{_WIRE}".encode())
    for name, array in arrays.items():
        digest.update(f"{name}{array.shape}".encode() + array.tobytes())
    for key in sorted(extra):
        digest.update(f"{key}={extra[key]!r}".encode())
    packed = {n: {"shape": list(a.shape), "data": base64.b64encode(a.tobytes()).decode()} for n, a in arrays.items()}
    return {"version": _WIRE, "kind": kind, "tensors": packed, "extra": extra, "sha256": digest.hexdigest()}


def unwire(payload: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a payload, in float64.

    Raises:
        ConversionError: another version, or bytes that are not what the digest says.
    """
    if payload.get("version") != _WIRE:
        raise ConversionError(f"a payload of version {payload.get('version')}; version {_WIRE} is known.")
    tensors = {}
    for name, entry in payload["tensors"].items():
        array = np.frombuffer(base64.b64decode(entry["data"]), dtype=np.float32).reshape(entry["shape"])
        tensors[name] = torch.from_numpy(array.copy())
    found = wire(payload["kind"], tensors, payload["extra"])["sha256"]
    if payload.get("sha256", found) != found:
        raise ConversionError("a payload whose bytes do not fit its sha256: the file is damaged.")
    return {name: tensor.double() for name, tensor in tensors.items()}


def _reft(block: int, edit: dict[str, Tensor]) -> dict[str, Any]:
    tensors = {
        "rotate_layer": edit["rotation"].T,
        "learned_source_weight": edit["weight"],
        "learned_source_bias": edit["bias"],
    }
    return wire("reft", tensors, {"layer": block})


def _vector(algorithm: str, payload: dict[str, Any], clause: Clause) -> dict[str, Any]:
    return {"data": payload, "algorithm": algorithm, "scale": 1.0, "apply": clause}


def _clause(positions: Positions, part: str) -> Clause:
    """The tokens of an edit's part. Of one clause a token that two selectors mean is edited once."""
    if positions.random:
        raise ConversionError(
            f"positions={positions.text!r}: EasySteer draws no tokens. Exact: fN, lN, fN+lM, prompt, all."
        )
    if positions.scope:
        phases = {"prompt": ["prompt"], "generated": ["generation"], "all": ["prompt", "generation"]}[positions.scope]
        return dict.fromkeys(phases, "all")
    clause: Clause = {}
    if positions.first and part != "suffix":
        clause["prompt_window"] = [0, positions.first]
    if positions.last and part != "prefix":
        clause["prompt_positions"] = list(range(-positions.last, 0))
    return clause


def _limits(positions: Positions, tied: bool) -> list[str]:
    total = positions.first + positions.last
    whole = tied and positions.first == positions.last  # all tokens of a short prompt, here and there
    if positions.scope or total == 1 or whole:
        return []
    return [
        f"exact for prompts of at least {total} tokens: EasySteer does not halve shorter ones as {positions.text} does"
    ]


def _read_clause(clause: Clause) -> str:
    """The positions that a clause means.

    Raises:
        ConversionError: none of ours.
    """
    phases = sorted(clause.items())
    if phases in ([("generation", "all"), ("prompt", "all")], [("prompt", "all")], [("generation", "all")]):
        return "all" if len(phases) == 2 else {"prompt": "prompt", "generation": "generated"}[phases[0][0]]
    first = last = 0
    window, places = clause.get("prompt_window"), clause.get("prompt_positions")
    if window is not None and window[0] == 0 and (window[1] or 0) > 0:
        first, window = window[1], None
    elif window is not None and window[0] < 0 and window[1] is None:
        last, window = -window[0], None
    if places is not None and sorted(places) == list(range(-len(places), 0)) and not last:
        last, places = len(places), None
    elif places is not None and sorted(places) == list(range(len(places))) and not first:
        first, places = len(places), None
    if window is not None or places is not None or set(clause) - {"prompt_window", "prompt_positions"}:
        raise ConversionError(
            f"apply {json.dumps(clause)}: these tokens are none of fN, lN, fN+lM, prompt, generated, all."
        )
    return "+".join(part for part, count in ((f"f{first}", first), (f"l{last}", last)) if count)


def _parts(clauses: list[Clause]) -> tuple[dict[str, str], str | None]:
    """Which part of an edit each clause is, and the positions of them together; None where there is no clause.

    Raises:
        ConversionError: they are not one edit's.
    """
    said = {json.dumps(clause, sort_keys=True): _read_clause(clause) for clause in clauses}
    if len(said) <= 1:
        return {}, next(iter(said.values()), None)
    prefix = [key for key, text in said.items() if text.startswith("f") and "+" not in text]
    suffix = [key for key, text in said.items() if text.startswith("l")]
    if len(said) != 2 or len(prefix) != 1 or len(suffix) != 1:
        raise ConversionError(f"vectors at several choices of tokens ({', '.join(said.values())}); convert each apart.")
    return {prefix[0]: "prefix", suffix[0]: "suffix"}, f"{said[prefix[0]]}+{said[suffix[0]]}"
