"""Positions against a reference that loops over tokens: any lengths, padding, batch and chunks."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab import Positions, parse_positions
from trimtab.where.plan import ordinals

TEXTS = st.one_of(
    st.sampled_from(["prompt", "generated", "all"]),
    st.integers(1, 9).map(lambda n: f"f{n}"),
    st.integers(1, 9).map(lambda n: f"l{n}"),
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda n: f"f{n[0]}+l{n[1]}"),
    st.integers(1, 9).map(lambda n: f"random{n}"),
)


def hashed(ordinal: int, length: int) -> int:
    mixed = ((ordinal + 1) * 2654435761 + length * 40503) % 2**32
    for _ in range(2):
        mixed = (mixed ^ mixed >> 16) * 73244475 % 2**32
    return mixed


def edited_columns(text: str, prompt_length: int, real: list[bool]) -> list[int]:
    """The columns of one row that are edited, prefix before suffix, as the paper says it."""
    columns = [column for column, is_real in enumerate(real) if is_real]
    prompt, generated = columns[:prompt_length], columns[prompt_length:]
    if text in ("prompt", "generated", "all"):
        return {"prompt": prompt, "generated": generated, "all": columns}[text]
    if text.startswith("random"):
        drawn = sorted(range(prompt_length), key=lambda i: hashed(i, prompt_length))[: int(text[6:])]
        return [prompt[i] for i in sorted(drawn)]
    counts = {part[0]: int(part[1:]) for part in text.split("+")}
    first, last, n = counts.get("f", 0), counts.get("l", 0), prompt_length
    if n < first + last:
        first, last = min(first, n // 2), min(last, -(-n // 2))
    return prompt[:first] + prompt[n - last :]


@st.composite
def batches(draw: st.DrawFn, padded: bool = True) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Real tokens (B, T) with padding on the left, on the right or anywhere, and a prompt length for each row."""
    width, batch = draw(st.integers(1, 24)), draw(st.integers(1, 4))
    rows = []
    for _ in range(batch):
        n = draw(st.integers(0, width))
        left = [False] * (width - n) + [True] * n
        holes = draw(st.lists(st.booleans(), min_size=width, max_size=width))
        rows.append(draw(st.sampled_from([left, left[::-1], holes])) if padded else [True] * width)
    real = torch.tensor(rows)
    lengths = torch.tensor([draw(st.integers(0, int(row.sum()))) for row in real])
    return (real if padded else None), lengths if padded else lengths.clamp(max=width)


def found(
    positions: Positions, lengths: torch.Tensor, width: int, start: int, real: torch.Tensor | None
) -> list[list[int]]:
    """What `rows` gives for a chunk, as columns of the whole row."""
    index, valid = positions.rows(lengths, width, start, real)
    assert index.shape == valid.shape and ((index >= 0) & (index < max(width, 1))).all()
    return [(row[ok] + start).tolist() for row, ok in zip(index, valid, strict=True)]


@given(TEXTS, batches())
def test_edits_what_the_paper_says(text: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, lengths = batch
    columns = found(parse_positions(text), lengths, real.shape[1], 0, real)
    assert columns == [edited_columns(text, int(n), row.tolist()) for n, row in zip(lengths, real, strict=True)]


@given(TEXTS, st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_without_padding(text: str, lengths: list[int]) -> None:
    width = max(20, *lengths)
    columns = found(parse_positions(text), torch.tensor(lengths), width, 0, None)
    assert columns == [edited_columns(text, n, [True] * width) for n in lengths]


@given(TEXTS, batches(), st.lists(st.integers(1, 6), min_size=1, max_size=24), st.booleans())
def test_chunks_edit_what_the_whole_does(
    text: str, batch: tuple[torch.Tensor, torch.Tensor], sizes: list[int], padded: bool
) -> None:
    """Slot by slot, so that the edits of prefix and suffix stay apart too."""
    real, lengths = batch
    width = real.shape[1]
    real = real if padded else torch.ones_like(real)
    positions = parse_positions(text)
    whole = found(positions, lengths, width, 0, real if padded else None)
    together: list[list[int]] = [[] for _ in lengths]
    start = 0
    for size in [*sizes, width]:
        size = min(size, width - start)
        if size == 0:
            break
        seen = real[:, : start + size] if padded else None
        for row, columns in zip(together, found(positions, lengths, size, start, seen), strict=True):
            row.extend(columns)
        start += size
    assert [sorted(row) for row in together] == [sorted(row) for row in whole]


@given(TEXTS, st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4), st.integers(1, 5))
def test_rows_may_start_at_different_tokens(text: str, rows: list[tuple[int, int]], size: int) -> None:
    """As in a server, where every row of the batch stands elsewhere in its own sequence."""
    lengths, starts = (torch.tensor(values) for values in zip(*rows, strict=True))
    index, valid = parse_positions(text).rows(lengths, size, starts)
    for row, (n, start) in enumerate(rows):
        everything = edited_columns(text, n, [True] * 30)
        assert (index[row][valid[row]] + start).tolist() == [c for c in everything if start <= c < start + size]


@given(TEXTS, st.integers(0, 20))
def test_no_token_twice_and_slots_in_their_part(text: str, n: int) -> None:
    positions = parse_positions(text)
    if positions.scope:
        return
    ordinals, valid = positions.slots(torch.tensor([n]))
    chosen = ordinals[valid].tolist()
    asked = positions.first + positions.last + positions.random
    assert len(set(chosen)) == len(chosen) == min(n, asked) or n < asked
    assert chosen == sorted(chosen)
    assert int(valid[0, : positions.first].sum()) <= positions.first


@pytest.mark.parametrize(
    ("n", "prefix", "suffix"), [(0, 0, 0), (1, 0, 1), (5, 2, 3), (13, 6, 7), (14, 7, 7), (40, 7, 7)]
)
def test_short_prompts_share_their_tokens(n: int, prefix: int, suffix: int) -> None:
    _, valid = parse_positions("f7+l7").slots(torch.tensor([n]))
    assert (int(valid[0, :7].sum()), int(valid[0, 7:].sum())) == (prefix, suffix)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("x7", "'x7' is not a position"),
        ("", "'' is not a position"),
        ("f0", "'f0' edits nothing"),
        ("f3+l0", "'l0' edits nothing"),
        ("l3+f2", "write the prefix first, as in 'f2+l3'"),
        ("f2+f3", "'f' is given twice"),
        ("f1+l1+l2", "'l' is given twice"),
        ("F3", "'F3' is not a position"),
        ("f-1", "'f-1' is not a position"),
        ("f 3", "'f 3' is not a position"),
        ("f3 + l2", "'f3 ' is not a position"),
        ("f", "'f' is not a position"),
        ("f1.5", "'f1.5' is not a position"),
        ("f٣", "'f٣' is not a position"),
        ("f07+", "'' is not a position"),
        ("all+f1", "'all' is not a position"),
        ("f1+prompt", "'prompt' is not a position"),
    ],
)
def test_mistakes_are_named(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wrong)) as error:
        parse_positions(text)
    assert f"positions={text!r}" in str(error.value)


@pytest.mark.parametrize("value", [None, 7, ("f7",), b"f7", True])
def test_only_strings(value: object) -> None:
    with pytest.raises(ValueError, match="must be a string"):
        parse_positions(value)  # type: ignore[arg-type]


def test_unhashable() -> None:
    with pytest.raises(ValueError, match="must be a string"):
        parse_positions(["f7"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "needs"), [("f3", False), ("all", False), ("l1", True), ("f1+l1", True), ("prompt", True)]
)
def test_who_needs_the_end_of_the_prompt(text: str, needs: bool) -> None:
    assert parse_positions(text).needs_prompt_end is needs


@pytest.mark.parametrize(("text", "enough"), [("f7", 7), ("f1", 0), ("f7+l1", 0), ("l3", 0), ("all", 0), ("prompt", 0)])
def test_from_which_length_on_a_prefix_needs_no_end(text: str, enough: int) -> None:
    assert parse_positions(text).enough == enough
    for n in range(enough, 12) if enough else ():
        assert ordinals(parse_positions(text), n) == tuple(range(enough))


def test_parsed_once() -> None:
    assert parse_positions("f7+l7") is parse_positions("f7+l7") == Positions("f7+l7", first=7, last=7)


@pytest.mark.parametrize("text", ["f300000000", "l100001", "random" + "9" * 5000])
def test_more_tokens_than_there_can_be_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at most 100,000 tokens"):
        parse_positions(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("f7+l7", "the first 7 tokens and the last 7 tokens of the prompt"),
        ("f1+l2", "the first token and the last 2 tokens of the prompt"),
        ("l1", "the last token of the prompt"),
        ("f3", "the first 3 tokens of the prompt"),
        ("random4", "4 tokens of the prompt, drawn at random"),
        ("prompt", "every token of the prompt"),
        ("generated", "every token after the prompt"),
        ("all", "every token"),
    ],
)
def test_in_words(text: str, words: str) -> None:
    assert parse_positions(text).words == words
