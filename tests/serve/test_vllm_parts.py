"""What of the vLLM engine needs no vLLM: what requests carry, and what tells blocks of a cache apart."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.serve.engine import Applied, Request
from trimtab.serve.registry import Adapter
from trimtab.serve.vllm import keys, probe
from trimtab.serve.vllm.carried import read, written
from trimtab.where.plan import Edited, block_keys
from trimtab.where.positions import parse_positions

POSITIONS = ("f3+l2", "l5", "f4", "prompt", "generated", "all", "random6")


def _applied(digest: int, positions: str, scale: float, tied: bool) -> Applied:
    parts: dict[Any, torch.Tensor] = dict.fromkeys(["edit"] if tied else ["prefix", "suffix"], torch.zeros(1))
    return Applied(Adapter("name", bytes([digest]), parse_positions(positions), parts), scale)


def _request(length: int, adapters: list[Applied], end: int | None) -> Request:
    return Request("id", list(range(length)), adapters=tuple(adapters), prompt_end=end and min(end, length))


applied = st.builds(
    _applied, st.integers(0, 1), st.sampled_from(POSITIONS), st.sampled_from([1.0, 0.5, 0.0]), st.booleans()
)
requests = st.builds(_request, st.integers(1, 40), st.lists(applied, max_size=2), st.none() | st.integers(1, 40))


def _carried(request: Request) -> Any:
    entries = {(one.adapter.digest, part): i for i, one in enumerate(request.adapters) for part in one.adapter.parts}
    return json.loads(json.dumps(written(request, entries)))


@given(requests)
def test_what_a_request_carries_is_read_again(request: Request) -> None:
    carried = read(_carried(request))
    if not request.adapters:
        assert carried is None
        return
    assert carried is not None and carried.prompt == (request.prompt_end or len(request.tokens))
    for one, edit, entries in zip(request.adapters, carried.edits, carried.entries, strict=True):
        assert edit == Edited(one.adapter.digest, one.scale, one.adapter.positions, tuple(one.adapter.parts))
        assert [part for _, part in entries] == list(one.adapter.parts)


@given(requests, requests, st.sampled_from([4, 8]))
def test_blocks_are_told_apart_as_by_the_plan(first: Request, other: Request, block: int) -> None:
    """Two requests of the same tokens: their first blocks share a key on vLLM exactly where they do in slots."""

    def both(request: Request) -> list[tuple[Any, bytes]]:
        hashed = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=_carried(request)))
        adapters = [(one.adapter, one.scale) for one in request.adapters]
        edits = [Edited(a.digest, scale, a.positions, tuple(a.parts)) for a, scale in adapters]
        prompt = request.prompt_end or len(request.tokens)
        starts, chain = range(0, 40, block), block_keys(list(range(40)), edits, prompt, block)
        own = [keys.extra_keys(hashed, start, start + block) for start in starts]
        return [(tuple(own[: i + 1]), key) for i, key in enumerate(chain)]

    for (ours, key), (others, other_key) in zip(both(first), both(other), strict=True):
        assert (ours == others) == (key == other_key)


def test_what_carries_no_edit_gets_no_key() -> None:
    for params in (None, SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"other": 1})):
        assert keys.extra_keys(SimpleNamespace(sampling_params=params), 0, 16) == ()


def test_without_vllm_it_is_named_and_nothing_imports_it() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import trimtab.serve.vllm.engine, trimtab.serve.vllm.plugin, trimtab.cli\n"
        "print(sorted(name for name in sys.modules if name.startswith('vllm.')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    if not any(Path(path, "vllm-0.32.0+cpu.dist-info").exists() for path in sys.path):
        assert probe.wrong() == ["vllm is not installed"]
