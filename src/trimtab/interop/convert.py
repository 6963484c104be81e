"""Adapters from and to other libraries' formats: read into one form, written from it, and both sides run.

A format is one file in `formats/` with a subclass of `Format`; nothing else lists it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.folder import as_edit, fresh
from trimtab.adapter.loading import as_saved
from trimtab.edits import Edit
from trimtab.edits.orthonormal import TOLERANCE as TOLERANCE_OF_R
from trimtab.edits.orthonormal import orthonormality_error
from trimtab.errors import ConversionError, ModelError
from trimtab.interop import formats
from trimtab.interop.base import Base, Runner, samples

TOLERANCE = 1e-3
"""Of the largest logit: what float32 sums in another order may differ by, over all of a large model's blocks."""


@dataclass(frozen=True)
class Given:
    """What the user says of the source, or of the target, that the source itself may leave out."""

    base: str | None = None
    positions: str | None = None
    layers: list[int] | None = None
    method: str | None = None
    activation: str | None = None
    task: str | None = None
    lora_bias: bool = True
    """Whether what runs the LoRA takes `lora_bias`, as PEFT itself does."""

    def open(self, named: str | None, task: str | None = None, labels: int | None = None) -> Base:
        """The base model: the given one, or else the one that the source names.

        Raises:
            ConversionError: neither.
        """
        name = self.base or named
        if not name:
            raise ConversionError("the source does not name its base model: give --base, a local folder or Hub name.")
        return Base(name, self.task or task, labels)

    def need(self, name: str, why: str, value: str | None = None) -> str:
        """What the source says (`value`), or else the user, who may not contradict it.

        Raises:
            ConversionError: nobody says it, or they say different things.
        """
        given: str | None = getattr(self, name)
        if given is None and value is None:
            raise ConversionError(f"the source does not say its {name}: give --{name}, {why}.")
        if given is not None and value is not None and given != value:
            raise ConversionError(f"--{name} {given}: the source itself says {value}; leave the option out.")
        return str(given if value is None else value)


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """What every format is read into and written from."""

    base: Base
    config: ReftConfig
    edits: dict[tuple[str, str], Edit]
    """By the name of the module whose output is edited, and part: `edit`, `prefix` or `suffix`."""
    modules: dict[str, Tensor] = field(default_factory=dict)
    """Parameters of modules trained whole, such as a classifier, by their names in the base."""
    unsaid: tuple[str, ...] = ()
    """What the source does not say, and what was taken instead."""

    @property
    def tensors(self) -> dict[tuple[str, str], dict[str, Tensor]]:
        """Of each edit, as trimtab's files hold them."""
        own = {key: as_saved(edit.state_dict(prefix=".")) for key, edit in self.edits.items()}
        return {key: {name[1:]: tensor for name, tensor in saved.items()} for key, saved in own.items()}

    @property
    def indices(self) -> dict[str, int]:
        """The block of each edited module, counted from 0.

        Raises:
            ConversionError: the site is a pattern, so modules are not one a block.
        """
        if self.config.site not in ("block", "attention", "mlp"):
            raise ConversionError(
                f"site={self.config.site!r}: this format counts blocks. Exact: site block, attention or mlp."
            )
        names = [site.name for site in self.base.sites(self.config.site)]
        return {name: names.index(name) for name, _ in self.edits}

    @property
    def rank(self) -> int:
        """Rows of an edit's Bᵀ(A h + c), also of a method that has no rank of its own. Raises ConversionError."""
        return self.config.r or max(len(constant) for _, _, constant in self.affine().values())

    def affine(self) -> dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]]:
        """Each edit as h + Bᵀ(A h + c): B and A (r, d) and c (r,) in float64.

        Raises:
            ConversionError: an activation, or the method, is in the way.
        """
        found = {key: edit.affine() for key, edit in self.edits.items()}
        if any(form is None for form in found.values()):
            raise ConversionError(
                f"method={self.config.method!r}, activation={self.config.activation!r}: not of the form "
                "h + Bᵀ(A h + c), which is all that this format holds. Exact: LoReFT or a relative without activation."
            )
        return {key: form for key, form in found.items() if form is not None}

    def constants(self) -> dict[str, Tensor]:
        """By module the vector (d,), in float64, that its edit adds to every hidden state.

        Raises:
            ConversionError: an edit depends on the hidden state.
        """
        if any(bool((a != 0).any()) for _, a, _ in self.affine().values()):
            raise ConversionError(
                f"method={self.config.method!r}: the edit depends on the hidden state, and this format only adds a "
                "vector. Exact: method lobireft or vector."
            )
        return {module: c @ b for (module, _), (b, _, c) in self.affine().items()}


def make_adapter(
    base: Base,
    method: str,
    positions: str,
    tensors: Mapping[tuple[str, str], Tensors],
    *,
    dropout: float = 0.0,
    activation: str | None = None,
    modules: Mapping[str, Tensor] | None = None,
    unsaid: tuple[str, ...] = (),
) -> Adapter:
    """The adapter with these edits, by module and part; `site`, `layers`, `r` and `tied` follow from them.

    Raises:
        ConversionError: the edits are not of one rank, or not prefix and suffix of the same modules.
    """
    if not tensors:
        raise ConversionError("the source holds no edit.")
    parts = [{part for own, part in tensors if own == module} for module, _ in tensors]
    ranks = {own["bias"].shape[0] for own in tensors.values()}
    if len(ranks) > 1 or any(part != parts[0] for part in parts):
        raise ConversionError(
            f"edits of ranks {sorted(ranks)} and of parts {sorted({tuple(sorted(p)) for p in parts})}: one adapter has "
            "one rank, and edits prefix and suffix of every block alike. Convert each of them apart."
        )
    site, layers = base.place_of(module for module, _ in tensors)
    config = ReftConfig(
        task_type=base.task,
        base_model_name_or_path=base.name,
        inference_mode=True,
        method=method,
        r=ranks.pop(),
        positions=positions,
        layers=layers,  # type: ignore[arg-type]
        site=site,
        tied=parts[0] == {"edit"},
        dropout=dropout,
        activation=activation,
        modules_to_save=base.whole_modules(modules) if modules else None,
    )
    edits = {key: as_edit(config, dict(own)) for key, own in tensors.items()}
    return Adapter(base, config, edits, dict(modules or {}), unsaid)


def as_loreft(basis: Tensor, reads: Tensor, constant: Tensor) -> dict[str, Tensor]:
    """The LoReFT edit, float32, that computes h + Bᵀ(A h + c): with Bᵀ = Rᵀ S it is h + Rᵀ(S A h + S c).

    Args:
        basis, reads, constant: B and A (r, d) and c (r,).
    """
    rotation, mix = basis, torch.eye(len(basis), dtype=basis.dtype)
    if float(orthonormality_error(basis)) > TOLERANCE_OF_R:
        columns, mix = torch.linalg.qr(basis.mT)
        rotation = columns.mT
    edit = {"rotation": rotation, "weight": mix @ reads + rotation, "bias": mix @ constant}
    return {name: tensor.float().contiguous() for name, tensor in edit.items()}


def as_constant(vector: Tensor) -> dict[str, Tensor]:
    """The LobiReFT edit of rank 1, float32, that adds a vector (d,)."""
    wide = vector.double()
    length = wide.norm()
    unit = wide / length if length > 0 else torch.eye(len(wide), dtype=wide.dtype)[0]
    return {"rotation": unit[None].float(), "bias": length[None].float()}


class Format:
    """One format. What it cannot do it leaves out."""

    name: ClassVar[str]
    file: ClassVar[str] = ""
    """Of a format that is one file: its name in a folder, and by its ending the file itself."""

    keeps_turns: ClassVar[bool] = False
    """Whether it says what the prompt is in a conversation."""

    def check_turns(self, config: ReftConfig) -> None:
        """Raises ConversionError where other tokens of a conversation would be edited than the config says."""
        positions = config.parsed_positions
        if positions.turns != "each" and positions.needs_prompt_end and not self.keeps_turns:
            raise ConversionError(
                f"edit_turns={positions.turns!r}: {self.name} takes all that comes before an answer for its prompt. "
                "Exact: edit_turns 'each', or positions all."
            )

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder looks like this format."""
        return False

    def read(self, path: Path, given: Given) -> Adapter:
        """Raises ConversionError."""
        raise ConversionError(f"{self.name}: can be written, not read.")

    def write(self, adapter: Adapter, path: Path, given: Given) -> list[str]:
        """Write to a path that does not exist; what one has to know of the result is returned.

        Raises:
            ConversionError: the format cannot express the adapter exactly; says what it could.
        """
        raise ConversionError(f"{self.name}: can be read, not written.")

    def run(self, path: Path, adapter: Adapter) -> Runner:
        """The base as this file, read again by itself, changes it."""
        raise NotImplementedError

    def path_in(self, output: Path) -> Path:
        """Where the one file of this format is, or goes: `output` itself by its ending, else in that folder."""
        return output / self.file if self.file and output.suffix != Path(self.file).suffix else output


def all_formats() -> dict[str, Format]:
    """Every format by name: the subclasses of `Format` in the files of `formats/`."""
    modules = [import_module(f"{formats.__name__}.{found.name}") for found in pkgutil.iter_modules(formats.__path__)]
    own = [
        kind
        for module in modules
        for kind in vars(module).values()
        if getattr(kind, "__module__", "") == module.__name__
    ]
    return {kind.name: kind() for kind in own if isinstance(kind, type) and issubclass(kind, Format)}


def recognise(path: Path) -> Format:
    """The format of a file or folder, found by looking.

    Raises:
        ConversionError: none, or several.
    """
    if not path.exists():
        raise ConversionError(f"{path}: no such file or folder.")
    known = all_formats()
    found = [kind for kind in known.values() if kind.recognises(path)]
    if len(found) != 1:
        said = " and ".join(kind.name for kind in found) or "none of them"
        raise ConversionError(f"{path}: looks like {said}; formats are {', '.join(known)}. Name the adapter itself.")
    return found[0]


@dataclass(frozen=True)
class Check:
    """Both sides run on the same prompts."""

    prompts: int
    difference: float
    scale: float
    """The largest logit."""


@dataclass(frozen=True)
class Report:
    """What a conversion read, did and checked."""

    source: str
    target: str
    base: str
    config: ReftConfig
    modules: tuple[str, ...]
    """Edited."""
    heads: tuple[str, ...]
    unsaid: tuple[str, ...]
    notes: tuple[str, ...]
    check: Check | str
    """Or why there is none."""


def convert(
    source: Path, output: Path, to: str = "trimtab", given: Given | None = None, *, check: bool = True
) -> Report:
    """Convert an adapter; what is written appears whole, and only if both sides agree.

    Args:
        check: run both sides on a few prompts, where the base model's weights are at hand.
    Raises:
        ConversionError: the source leaves something out that is not given, the target cannot express it exactly, or
            the two sides differ.
        FileExistsError: there is something at `output` already.
    """
    given = given or Given()
    known = all_formats()
    if to not in known:
        raise ConversionError(f"--to {to}: must be one of {', '.join(known)}.")
    reader, writer = recognise(source), known[to]
    with fresh(writer.path_in(output)) as staging:
        adapter = reader.read(source, given)
        writer.check_turns(adapter.config)
        notes = writer.write(adapter, staging, given)
        measured: Check | str = "not asked for"
        if check:
            measured = compare(adapter, lambda: reader.run(source, adapter), lambda: writer.run(staging, adapter))
    return report(reader.name, writer.name, adapter, notes, measured)


def report(source: str, target: str, adapter: Adapter, notes: list[str], check: Check | str) -> Report:
    """What is said of a conversion that was done."""
    modules = tuple(dict.fromkeys(module for module, _ in adapter.edits))
    heads = tuple(adapter.config.modules_to_save or ())
    return Report(
        source, target, adapter.base.name, adapter.config, modules, heads, adapter.unsaid, tuple(notes), check
    )


def compare(
    adapter: Adapter, before: Callable[[], Runner], after: Callable[[], Runner], tolerance: float = TOLERANCE
) -> Check | str:
    """Run both sides on the same prompts, one model in memory at a time; a reason where that cannot be done.

    Raises:
        ConversionError: they differ.
    """
    positions = adapter.config.parsed_positions
    if adapter.base.config.is_encoder_decoder and positions.scope != "all":
        return "of an encoder-decoder only edits of every token are run"
    rows = samples(adapter.base, positions.first + positions.last)
    try:
        wanted, found = [[run(*row) for row in rows] for run in (side() for side in (before, after))]
    except ModelError as error:
        return f"{error}"
    check = Check(
        prompts=len(rows),
        difference=max(float((w - f).abs().max()) for w, f in zip(wanted, found, strict=True)),
        scale=max(float(w.abs().max()) for w in wanted),
    )
    if not check.difference <= tolerance * check.scale:
        raise ConversionError(
            f"the two sides differ: logits by up to {check.difference:.2g}, at a scale of {check.scale:.2g}. Nothing "
            "was written. Is --base the model that the source was trained on?"
        )
    return check
