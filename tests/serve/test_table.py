"""Edits of many adapters in one table are the edits that each adapter's own module makes."""

from __future__ import annotations

import pytest
import torch
from helpers import WIDTH
from torch import Tensor, nn

from trimtab.edits import ACTIVATIONS, METHODS, Edit
from trimtab.serve.table import AdapterTable, Layout
from trimtab.where.plan import Span
from trimtab.where.positions import parse_positions
from trimtab.where.sites import Site

EVERY = [(m, a) for m, own in METHODS.items() for a in (None, *ACTIVATIONS) if a is None or "activation" in own.takes]


def edit_of(method: str, activation: str | None = None, r: int = 3) -> Edit:
    edit = METHODS[method](WIDTH, r, activation=activation, init_weights="paper").requires_grad_(False)
    for name, parameter in edit.named_parameters():
        if "rotation" not in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # RED starts at the identity
    return edit


class Tabled:
    """Edits in a table on one module, which gives what it gets."""

    def __init__(self, edits: list[Edit], entries: int | None = None) -> None:
        self.edits, self.module = edits, nn.Identity()
        self.table = AdapterTable(Layout([Site("here", self.module, WIDTH)], rank=8), entries or len(edits))
        self.vectors = [self.table.layout.vector({"here": edit.terms()}) for edit in edits]

    def key(self, i: int) -> tuple[bytes, str]:
        return (bytes([i]), "edit")

    def acquire(self, *edits: int) -> list[int] | None:
        entries = self.table.acquire({self.key(i): self.vectors[i] for i in edits})
        return entries and [entries[self.key(i)] for i in edits]

    def run(self, h: Tensor, *stages: list[Span]) -> Tensor:
        with self.table.editing(stages):
            out: Tensor = self.module(h)
        return out


def span(entry: int, positions: str, length: int, offset: int = 0, scale: float = 1.0) -> Span:
    return Span(entry, parse_positions(positions), length, 0, length, offset, scale)


@pytest.mark.parametrize(("method", "activation"), EVERY)
def test_the_terms_of_every_method_are_its_edit(method: str, activation: str | None) -> None:
    edit, h = edit_of(method, activation), torch.randn(5, WIDTH)
    total = torch.zeros_like(h)
    for term in edit.terms():
        source = nn.functional.linear(h, term.rows, term.bias)
        total = total + (term.activation(source) if term.activation else source) @ term.basis
        total = total + (0 if term.diagonal is None else term.diagonal * h)
    torch.testing.assert_close(total, edit(h))


def test_what_a_module_is_given_is_edited_where_the_site_is_its_input() -> None:
    edit, linear, h = edit_of("loreft"), nn.Linear(WIDTH, 7), torch.randn(5, WIDTH)
    table = AdapterTable(Layout([Site("o_proj", linear, WIDTH, of_input=True)], rank=8), 1)
    entry = (table.acquire({(b"", "edit"): table.layout.vector({"o_proj": edit.terms()})}) or {})[b"", "edit"]
    with table.editing([[span(entry, "l2", 5)]]):
        found = linear(h)
    torch.testing.assert_close(found, linear(torch.cat([h[:3], h[3:] + edit(h[3:])])))
    table.close()
    assert not linear._forward_pre_hooks


def test_a_module_is_served_once() -> None:
    with pytest.raises(ValueError, match="here is meant by two of the sites to be served"):
        Layout([Site("here", nn.Identity(), WIDTH)] * 2, rank=8)


def test_every_method_in_one_batch() -> None:
    """A line each of three sequences of seven tokens, of which positions of other lengths are edited."""
    tabled, texts = Tabled([edit_of(m, a) for m, a in EVERY]), ["f1", "l3", "all"]
    entries, h = tabled.acquire(*range(len(EVERY))), torch.randn(len(EVERY), 7, WIDTH)
    assert entries is not None
    spans = [span(entry, texts[i % 3], 7, 7 * i, scale=1 - 0.5 * (i % 2)) for i, entry in enumerate(entries)]
    expected = h.clone()
    for i, edit in enumerate(tabled.edits):
        rows = {"f1": slice(0, 1), "l3": slice(4, 7), "all": slice(0, 7)}[texts[i % 3]]
        expected[i, rows] += edit(h[i, rows]) * spans[i].scale
    out = tabled.run(h, spans)
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[0, 1:], h[0, 1:])  # what is not edited keeps its bits


def test_a_later_stage_reads_what_an_earlier_one_wrote() -> None:
    tabled, h = Tabled([edit_of("loreft"), edit_of("direft", "gelu")]), torch.randn(1, 4, WIDTH)
    entries = tabled.acquire(0, 1)
    assert entries is not None
    one, other = tabled.edits
    between = h + one(h[0])
    out = tabled.run(h, [span(entries[0], "all", 4)], [span(entries[1], "all", 4)])
    torch.testing.assert_close(out, between + other(between[0]))


def test_nothing_is_edited_outside_a_plan_nor_after_closing() -> None:
    tabled, h = Tabled([edit_of("loreft")]), torch.randn(1, 4, WIDTH)
    entries = tabled.acquire(0)
    assert entries is not None and not torch.equal(tabled.run(h, [span(entries[0], "all", 4)]), h)
    assert torch.equal(tabled.module(h), h)
    tabled.table.close()
    assert not tabled.module._forward_hooks
    assert torch.equal(tabled.run(h, [span(entries[0], "all", 4)]), h)


def test_the_least_recently_used_leaves_but_never_a_pinned_one() -> None:
    tabled = Tabled([edit_of("loreft") for _ in range(4)], entries=2)
    first, second = tabled.acquire(0), tabled.acquire(1)
    assert first != second and tabled.acquire(2) is None  # both are in use
    tabled.table.release([tabled.key(1)])
    assert tabled.acquire(2, 0) is not None and tabled.acquire(0) == first
    assert tabled.acquire(3) is None
    assert (tabled.table.resident, tabled.table.pinned, tabled.table.evictions) == (2, 2, 1)
    for key in (0, 0, 0, 2):
        tabled.table.release([tabled.key(key)])
    assert tabled.table.pinned == 0 and tabled.acquire(1, 3) is not None


def test_half_precision_states_are_edited_in_float32() -> None:
    tabled, h = Tabled([edit_of("loreft")]), torch.randn(1, 4, WIDTH).bfloat16()
    entries = tabled.acquire(0)
    assert entries is not None
    out = tabled.run(h, [span(entries[0], "all", 4)])
    assert torch.equal(out, h + tabled.edits[0](h[0]).bfloat16())


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"elsewhere": (WIDTH, 3)}, "elsewhere.*not served.*here"),
        ({"here": (WIDTH - 1, 3)}, f"width {WIDTH - 1}.*{WIDTH}.*another base model"),
        ({"here": (WIDTH, 9)}, "9 rows of a table of 8.*max_rank"),
    ],
)
def test_what_does_not_fit_is_refused(edits: dict[str, tuple[int, int]], said: str) -> None:
    layout = Layout([Site("here", nn.Identity(), WIDTH)], rank=8)
    with pytest.raises(ValueError, match=said):
        layout.vector({name: METHODS["direft"](*size).terms() for name, size in edits.items()})
