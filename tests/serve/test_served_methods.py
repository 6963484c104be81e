"""Every method of the registry, at every site, is served as plain `generate` runs it, in one batch of them all."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest
from helpers import tiny
from serve.mixes import Asked, Served, mismatches

from trimtab.edits import ACTIVATIONS, METHODS

EVERY = [(m, a) for m, own in METHODS.items() for a in (None, *ACTIVATIONS) if a is None or "activation" in own.takes]
POSITIONS = ("f2+l3", "all", "prompt", "l4", "generated")
KINDS = {
    f"{method}-{activation}-": {
        "method": method,
        "activation": activation,
        "r": 3 if "r" in METHODS[method].takes else None,
        "positions": positions,
        "tied": positions != "f2+l3",
    }
    for (method, activation), positions in zip(EVERY, cycle(POSITIONS), strict=False)
}


@pytest.mark.parametrize(
    "site", ["block", *(pytest.param(site, marks=pytest.mark.slow) for site in ("attention", "mlp", "heads"))]
)
def test_every_method_in_one_batch(site: str, tmp_path: Path) -> None:
    served = Served(tiny("llama"), tmp_path, strength=3, kinds=KINDS, site=site)
    prompt = tuple(range(5, 5 + 17))
    asked = [Asked(prompt, ((name, 1.0),), 4) for name in served.names if name.endswith("1")] + [Asked(prompt, new=4)]
    moved = [served.truth(one) != served.truth(asked[-1]) for one in asked[:-1]]
    assert sum(moved) > 0.7 * len(moved)
    engine = served.engine(slots=len(asked), entries=2 * len(asked))
    assert mismatches(served, engine, asked, each=len(asked)) == []
    engine.close()
