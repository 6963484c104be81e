"""Edits: tensor code that knows no model. A new method is one class in a file here and one row of `METHODS`."""

import math

from trimtab.edits.base import ACTIVATIONS, Edit, InitWeights, Term, as_parameters, check_dtype
from trimtab.edits.lowrank import ConsReFT, DiReFT, DiReFTOrthonormal, LobiReFT, LoReFT, NoReFT
from trimtab.edits.postblock import PostBlock
from trimtab.edits.red import RED
from trimtab.edits.vectors import Gated, Vector

__all__ = [
    "ACTIVATIONS",
    "METHODS",
    "RED",
    "ConsReFT",
    "DiReFT",
    "DiReFTOrthonormal",
    "Edit",
    "Gated",
    "InitWeights",
    "LoReFT",
    "LobiReFT",
    "NoReFT",
    "PostBlock",
    "Term",
    "Vector",
    "as_parameters",
    "check_dtype",
    "parameter_count",
]

METHODS: dict[str, type[Edit]] = {
    "loreft": LoReFT,
    "direft": DiReFT,
    "noreft": NoReFT,
    "consreft": ConsReFT,
    "lobireft": LobiReFT,
    "direft_orthonormal": DiReFTOrthonormal,
    "red": RED,
    "vector": Vector,
    "postblock": PostBlock,
    "gated": Gated,
}


def parameter_count(method: str, width: int, r: int | None) -> int:
    """Trainable values of one edit: those of its saved tensors, which are all it has."""
    return sum(math.prod(shape) for shape in METHODS[method].shapes(width, r).values())
