"""Each edit against its formula written out with loops; how it starts, learns, and keeps its precision."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import outputs_of, tiny
from peft import get_peft_model
from torch import Tensor

from trimtab import METHODS, ReftConfig
from trimtab.edits import ACTIVATIONS, Edit, LoReFT, parameter_count
from trimtab.edits.lowrank import LowRank
from trimtab.edits.orthonormal import restore

D, R = 12, 3
NAMES = list(METHODS)
CANNOT_START_AT_IDENTITY = {"consreft"}
CAN_START_AT_IDENTITY = set(NAMES) - CANNOT_START_AT_IDENTITY
LOW_RANK = [name for name in NAMES if issubclass(METHODS[name], LowRank)]
ROTATED = [name for name in NAMES if "rotation" in METHODS[name].shapes(D, R)]
Act = Callable[[float], float]

SCALAR_ACTIVATIONS: dict[str | None, Act] = {
    None: lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


def by_loops(method: str, h: Any, rows: Any, weight: Any, bias: Any, act: Act) -> list[float]:
    """Φ(h) of the paper for one hidden state, in plain Python: table 17."""
    read = [sum(rows[k][j] * h[j] for j in range(D)) for k in range(R)]
    source = [act(sum(weight[k][j] * h[j] for j in range(D)) + bias[k]) for k in range(R)] if weight else None
    inner = {
        "loreft": lambda k: source[k] - read[k],
        "noreft": lambda k: source[k] - read[k],
        "direft": lambda k: source[k],
        "direft_orthonormal": lambda k: source[k],
        "consreft": lambda k: bias[k] - read[k],
        "lobireft": lambda k: bias[k],
    }[method]
    return [h[j] + sum(rows[k][j] * inner(k) for k in range(R)) for j in range(D)]


def red_by_loops(h: Any, act: Act, scale: Any, bias: Any) -> list[float]:
    return [scale[j] * h[j] + bias[j] for j in range(D)]


def vector_by_loops(h: Any, act: Act, vector: Any, strength: Any) -> list[float]:
    return [h[j] + strength[0] * vector[j] for j in range(D)]


def postblock_by_loops(h: Any, act: Act, down: Any, up: Any) -> list[float]:
    inner = [act(sum(down[k][j] * h[j] for j in range(D))) for k in range(R)]
    return [h[j] + sum(up[k][j] * inner[k] for k in range(R)) for j in range(D)]


def gated_by_loops(h: Any, act: Act, gate: Any, vector: Any) -> list[float]:
    opening = max(sum(gate[j] * h[j] for j in range(D)), 0.0)
    return [h[j] + opening * vector[j] for j in range(D)]


OTHERS: dict[str, Callable[..., list[float]]] = {
    "red": red_by_loops,
    "vector": vector_by_loops,
    "postblock": postblock_by_loops,
    "gated": gated_by_loops,
}
"""Methods that are no `LowRank`: Φ(h) from h, the activation and the saved tensors."""


def random_edit(method: str, **options: Any) -> Any:
    edit = METHODS[method](D, R, init_weights="paper", **options).eval()
    if method == "red":  # which its paper starts at the identity
        with torch.no_grad():
            for parameter in edit.parameters():
                parameter.add_(torch.randn(D))
    return edit


def test_every_method_has_a_reference_here() -> None:
    assert set(NAMES) == set(OTHERS) | set(LOW_RANK) and set(NAMES) >= CANNOT_START_AT_IDENTITY


@pytest.mark.parametrize(
    ("method", "activation"),
    [
        (method, act)
        for method in NAMES
        for act in SCALAR_ACTIVATIONS
        if act is None or "activation" in METHODS[method].takes
    ],
)
def test_formula(method: str, activation: str | None) -> None:
    edit, h = random_edit(method, activation=activation).double(), torch.randn(5, D, dtype=torch.float64)
    act = SCALAR_ACTIVATIONS[activation]
    if method in OTHERS:
        tensors = {name: parameter.tolist() for name, parameter in edit.named_parameters()}
        expected = [OTHERS[method](row, act, **tensors) for row in h.tolist()]
    else:
        bias = edit.bias.tolist()
        weight = edit.weight.tolist() if edit.has_weight else None
        expected = [by_loops(method, row, edit.basis().tolist(), weight, bias, act) for row in h.tolist()]
    assert (h + edit(h) - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12


def test_every_activation_has_a_reference_here_and_keeps_zero() -> None:
    assert set(SCALAR_ACTIVATIONS) == {None, *ACTIVATIONS}
    assert all(float(activation(torch.zeros(()))) == 0 for activation in ACTIVATIONS.values())


@pytest.mark.parametrize("method", sorted(CAN_START_AT_IDENTITY))
def test_a_fresh_edit_is_exactly_zero(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit = METHODS[method](D, R)
    assert torch.equal(edit(torch.randn(7, D) * 100), torch.zeros(7, D))
    assert not torch.equal(random_edit(method)(torch.randn(7, D)), torch.zeros(7, D))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("method", ["direft", "direft_orthonormal"])
def test_a_fresh_edit_with_an_activation_is_zero_where_it_adds(method: str, activation: str) -> None:
    assert torch.equal(METHODS[method](D, R, activation=activation)(torch.randn(7, D)), torch.zeros(7, D))


@pytest.mark.parametrize(("method", "activation"), [("consreft", None), ("loreft", "relu"), ("noreft", "tanh")])
def test_what_cannot_start_at_the_identity_warns(method: str, activation: str | None) -> None:
    with pytest.warns(UserWarning, match="has no start that leaves the model unchanged"):
        edit = METHODS[method](D, R, activation=activation)
    assert edit(torch.randn(7, D)).abs().max() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS[method](D, R, activation=activation, init_weights="paper")


@pytest.mark.parametrize("method", NAMES)
def test_a_fresh_edit_can_learn(method: str) -> None:
    """At the identity not every gradient is zero, so training leaves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit = METHODS[method](D, R)
    (edit(torch.randn(7, D)) * torch.randn(7, D)).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in edit.parameters())


@pytest.mark.parametrize("method", NAMES)
def test_dropout_is_on_the_edit_alone(method: str) -> None:
    edit, h = random_edit(method, dropout=0.5), torch.randn(50, D)
    whole = edit(h)
    edit.train()
    dropped = edit(h)
    zero = dropped == 0
    assert 0.3 < zero[whole != 0].float().mean() < 0.7
    assert (dropped - 2 * whole)[~zero].abs().max() < 1e-5
    assert torch.equal(edit.eval()(h), whole)


def test_dropout_leaves_the_hidden_state_whole() -> None:
    """With dropout 0.9 nine entries in ten of the edited rows are the block's own output."""
    config = ReftConfig(task_type="CAUSAL_LM", positions="f2", layers=[-1], dropout=0.9, init_weights="paper")
    model = get_peft_model(tiny("llama"), config)
    block, seen = model.base_model.model.model.layers[-1], []
    block.register_forward_hook(lambda m, a, o: seen.append(o if isinstance(o, Tensor) else o[0]))
    outputs_of(model.train(), "llama")
    with model.disable_adapter():
        outputs_of(model, "llama")
    same = (seen[0] == seen[1])[:, :2].float().mean()
    assert 0.7 < same < 1
    assert torch.equal(seen[0][:, 2:], seen[1][:, 2:])


@pytest.mark.parametrize("method", NAMES)
def test_float32_inside_whatever_surrounds_it(method: str) -> None:
    edit, h = random_edit(method), torch.randn(5, D, dtype=torch.bfloat16)
    expected = edit(h.float())
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = edit(h)
    assert torch.equal(inside, expected) and inside.dtype == torch.float32
    assert torch.equal(edit.bfloat16()(h), expected), "bfloat16() leaves the parameters in float32"


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_are_float32_whatever_the_default(default: torch.dtype) -> None:
    torch.set_default_dtype(default)
    try:
        edits = [random_edit(method) for method in NAMES]
        empty = [METHODS[method](D, R, init_weights=None) for method in NAMES]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for edit in (*edits, *empty) for p in edit.parameters()} == {torch.float32}
    for edit, filled in zip(edits, empty, strict=True):
        filled.load_state_dict(edit.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(edit.parameters(), filled.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "activation"),
    [
        (method, act)
        for method in LOW_RANK
        for act in (None, "tanh")
        if act is None or "activation" in METHODS[method].takes
    ],
)
def test_gradients(method: str, activation: str | None) -> None:
    """gradcheck of the formula in h, W, b and the plain basis; the projection of R's gradient is checked below."""
    edit = random_edit(method, activation=activation).double()
    names = ["weight", "bias"] if edit.has_weight else ["bias"]

    def formula(h: Tensor, basis: Tensor, *parameters: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(edit, dict(zip(names, parameters, strict=True))):
            return edit.inner(h, basis) @ basis

    leaves = [torch.randn(4, D, dtype=torch.float64), edit.basis(), *(getattr(edit, n) for n in names)]
    assert torch.autograd.gradcheck(formula, [leaf.detach().clone().requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("method", OTHERS)
def test_gradients_of_the_others(method: str) -> None:
    edit = random_edit(method, activation="silu" if "activation" in METHODS[method].takes else None).double()
    names = [name for name, _ in edit.named_parameters()]

    def formula(h: Tensor, *parameters: Tensor) -> Tensor:
        change: Tensor = torch.func.functional_call(edit, dict(zip(names, parameters, strict=True)), (h,))
        return change

    leaves = [torch.randn(4, D, dtype=torch.float64), *edit.parameters()]
    assert torch.autograd.gradcheck(formula, [leaf.detach().clone().requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_fresh_postblock_learns_through_every_activation(activation: str) -> None:
    edit = METHODS["postblock"](D, R, activation=activation)
    edit(torch.randn(7, D)).sum().backward()
    assert torch.equal(edit(torch.randn(7, D)), torch.zeros(7, D)) and edit.up.grad.abs().max() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ROTATED)
def test_the_gradient_of_R_is_the_plain_one_along_the_manifold(method: str) -> None:
    edit = random_edit(method).double()
    restore([edit.rotation])
    h, target = torch.randn(4, D, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    (edit(h) - target).square().sum().backward()
    basis = edit.basis().detach().requires_grad_()
    (edit.inner(h, basis) @ basis - target).square().sum().backward()
    plain = basis.grad
    assert plain is not None
    normal = plain @ basis.mT
    projected = plain - (normal + normal.mT) / 2 @ basis
    assert (edit.rotation.halved.grad / 2 - projected).abs().max() < 1e-10


@pytest.mark.parametrize("method", NAMES)
def test_saved_tensors(method: str) -> None:
    edit = random_edit(method)
    shapes = METHODS[method].shapes(D, R)
    saved = {name: edit.rotation() if name == "rotation" else getattr(edit, name) for name in shapes}
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == shapes
    assert sum(p.numel() for p in edit.parameters()) == parameter_count(method, D, R)
    h = torch.randn(5, D)
    for state in (saved, edit.state_dict()):  # as files hold it, and as the module does
        other = random_edit(method)
        other.load_state_dict(state)
        assert torch.equal(other(h), edit(h))


@pytest.mark.parametrize("method", NAMES)
def test_the_size_is_that_of_the_map(method: str) -> None:
    edit = random_edit(method)
    assert edit.size() == pytest.approx(Edit.size(edit), rel=1e-5)
    constant = edit(torch.zeros(1, D))
    assert edit.size() == pytest.approx(float(torch.cat([edit(torch.eye(D)) - constant, constant]).norm()), rel=1e-5)
    if method in CAN_START_AT_IDENTITY:
        assert METHODS[method](D, R).size() == 0


def test_a_parameter_must_be_among_the_shapes() -> None:
    class Sly(LoReFT):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.extra = torch.nn.Parameter(torch.zeros(1))

    with pytest.raises(TypeError, match=r"Sly.extra: a parameter that `shapes` does not declare"):
        Sly(D, R)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.zeros(R, D + 1),
            r"weight has shape \(3, 13\), but the config's r=3 asks for \(3, 12\): .* another base",
        ),
        (torch.zeros(R + 1, D), r"has shape \(4, 12\)"),
        (torch.full((R, D), math.nan), "weight holds NaN or infinity: the run it comes from diverged"),
    ],
)
def test_tensors_that_do_not_fit(tensor: Tensor, message: str) -> None:
    edit = random_edit("loreft")
    with pytest.raises(ValueError, match=message):
        edit.load_state_dict({**edit.state_dict(), "weight": tensor})


@pytest.mark.parametrize("missing", ["rotation.halved", "weight", "bias"])
def test_missing_tensors_are_named(missing: str) -> None:
    edit = random_edit("loreft")
    state = {k: v for k, v in edit.state_dict().items() if k != missing}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{missing}"'):
        edit.load_state_dict(state)
