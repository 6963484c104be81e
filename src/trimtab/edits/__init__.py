"""Edits: tensor code that knows no model. A new method is one class in a file here and one row of `METHODS`."""

from trimtab.edits.base import ACTIVATIONS, Edit, InitWeights, Term
from trimtab.edits.lowrank import ConsReFT, DiReFT, DiReFTOrthonormal, LobiReFT, LoReFT, NoReFT

__all__ = [
    "ACTIVATIONS",
    "METHODS",
    "ConsReFT",
    "DiReFT",
    "DiReFTOrthonormal",
    "Edit",
    "InitWeights",
    "LoReFT",
    "LobiReFT",
    "NoReFT",
    "Term",
    "parameter_count",
]

METHODS: dict[str, type[Edit]] = {
    "loreft": LoReFT,
    "direft": DiReFT,
    "noreft": NoReFT,
    "consreft": ConsReFT,
    "lobireft": LobiReFT,
    "direft_orthonormal": DiReFTOrthonormal,
}


def parameter_count(method: str, width: int, r: int) -> int:
    """Trainable values of one edit: r d for the rows, r d for W where there is one, r for b."""
    return r * width * (2 if METHODS[method].has_weight else 1) + r
