"""Plans in whole numbers say what `Positions` says in tensors; block keys are equal only where the blocks are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.where.plan import Edited, Span, block_keys, edited, plan
from trimtab.where.positions import parse_positions

TEXTS = ["f1", "l1", "f7+l7", "f3+l1", "f2+l5", "prompt", "generated", "all", "random5"]


@pytest.mark.parametrize("text", TEXTS)
def test_whole_prompts_as_positions_have_them(text: str) -> None:
    positions = parse_positions(text)
    for n in range(301):
        rows = positions.rows(torch.tensor([n]), n + 4)
        wanted = sorted(rows.columns[rows.valid].tolist())
        assert list(edited(positions, n, 0, n + 4)) == wanted, n


@given(st.sampled_from(TEXTS), st.integers(0, 40), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_chunks_make_the_whole(text: str, prompt: int, chunks: list[int]) -> None:
    positions, starts = parse_positions(text), [sum(chunks[:i]) for i in range(len(chunks) + 1)]
    parts = [start + i for start, end in pairwise(starts) for i in edited(positions, prompt, start, end - start)]
    assert parts == list(edited(positions, prompt, 0, starts[-1]))


def test_untied_parts_are_the_whole() -> None:
    positions = parse_positions("f3+l2")
    for n in range(12):
        prefix, suffix = (edited(positions, n, 0, n, part) for part in ("prefix", "suffix"))
        assert (*prefix, *suffix) == edited(positions, n, 0, n)


def test_a_plan_is_grouped_and_complete() -> None:
    spans = [
        Span(entry=1, positions=parse_positions("f2+l2"), prompt=9, start=0, length=9, offset=0, scale=0.5),
        Span(entry=2, positions=parse_positions("all"), prompt=30, start=0, length=30, offset=9),
        Span(entry=3, positions=parse_positions("l1"), prompt=9, start=9, length=1, offset=39),
    ]
    groups = plan(spans)
    assert [group.entry.tolist() for group in groups] == [[1], [2]]  # a decode step edits nothing
    assert groups[0].rows[groups[0].valid].tolist() == [0, 1, 7, 8]
    assert groups[1].rows[groups[1].valid].tolist() == list(range(9, 39))
    assert groups[0].scale.tolist() == [0.5]


def meaning(tokens: list[int], edits: list[Edited], prompt: int, end: int) -> Any:
    """All that the keys and values of the first `end` tokens depend on."""
    own = [
        [(e.digest, e.scale, p) for e in edits for p in e.parts if i in edited(e.positions, prompt, 0, end, p)]
        for i in range(end)
    ]
    return tuple(tokens[:end]), tuple(map(tuple, own))


PARTS: Any = {"f7+l7": ("prefix", "suffix"), "f2+l5": ("prefix", "suffix")}
"""Of adapters that are not tied."""
REQUEST = st.tuples(
    st.lists(st.integers(0, 1), min_size=8, max_size=12),
    st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.sampled_from([0.5, 1.0]), st.sampled_from(TEXTS)), max_size=2),
    st.integers(4, 12),
)


@settings(max_examples=300, deadline=None)
@given(REQUEST, REQUEST, st.sampled_from([2, 4]))
def test_keys_are_equal_only_where_the_blocks_are_and_of_one_adapter_wherever_they_are(
    one: Any, other: Any, block: int
) -> None:
    keys, meanings = [], []
    for tokens, raw, prompt in (one, other):
        # A digest covers the positions too. In another order adapters may miss shared blocks: slower, not wrong.
        edits = [
            Edited(digest + text.encode(), scale, parse_positions(text), PARTS.get(text, ("edit",)))
            for digest, scale, text in raw
        ]
        keys.append(list(block_keys(tokens, edits, prompt, block)))
        meanings.append([meaning(tokens, edits, prompt, (k + 1) * block) for k in range(len(tokens) // block)])
    for (a, b), (c, d) in zip(zip(*keys, strict=False), zip(*meanings, strict=False), strict=True):
        assert c == d or a != b
        assert a == b or c != d or max(len(raw) for _, raw, _ in (one, other)) > 1


def test_a_token_of_the_prefix_here_and_of_the_suffix_there() -> None:
    """The same tokens are edited in the first block of both prompts, the third of them by another edit."""
    edits = [Edited(b"a", 1.0, parse_positions("f3+l2"), ("prefix", "suffix"))]
    four, five = (next(block_keys(list(range(8)), edits, prompt, 4)) for prompt in (4, 5))
    assert four != five


def test_salt_parts_tenants() -> None:
    one, other = (next(block_keys([1, 2], [], 2, 2, salt)) for salt in (b"", b"tenant"))
    assert one != other
