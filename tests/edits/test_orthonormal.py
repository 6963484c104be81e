"""R stays orthonormal whatever is done to it, and what is saved is what was used."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import outputs_of, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.optimization import Adafactor

from trimtab import ReftConfig
from trimtab.adapter.tuner import ReftLayer
from trimtab.edits import METHODS, LoReFT
from trimtab.edits.orthonormal import TOLERANCE, Rotation, as_rotation, orthonormality_error, restore, retract

D, R = 48, 4
Loop = Callable[[nn.Module, Callable[[], Tensor]], None]


def error_of(rotation: Tensor) -> float:
    """Measured in float64."""
    wide = rotation.detach().double()
    return float((wide @ wide.mT - torch.eye(wide.shape[-2], dtype=torch.float64)).abs().max())


def by(optimizer: type[torch.optim.Optimizer], **options: Any) -> Loop:
    """20 steps of an optimizer."""

    def loop(edit: nn.Module, loss: Callable[[], Tensor]) -> None:
        steps = optimizer(edit.parameters(), **options)
        for _ in range(20):

            def closure() -> Tensor:
                steps.zero_grad()
                value = loss()
                value.backward()
                return value

            if optimizer is torch.optim.LBFGS:
                steps.step(closure)
            else:
                closure()
                steps.step()

    return loop


def by_hand(subtract: Callable[[nn.Parameter, Tensor], Any]) -> Loop:
    """20 steps of a loop that no optimizer's hook sees."""

    def loop(edit: nn.Module, loss: Callable[[], Tensor]) -> None:
        for _ in range(20):
            edit.zero_grad()
            loss().backward()
            for parameter in edit.parameters():
                assert parameter.grad is not None
                subtract(parameter, parameter.grad)

    return loop


def _sub_data(parameter: nn.Parameter, grad: Tensor) -> None:
    parameter.data.sub_(0.002 * grad)


@torch.no_grad()
def _sub(parameter: nn.Parameter, grad: Tensor) -> None:
    parameter.sub_(0.002 * grad)


OPTIMIZERS: dict[str, Loop] = {
    "sgd": by(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": by(torch.optim.Adam, lr=0.02),
    "adamw": by(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "rmsprop": by(torch.optim.RMSprop, lr=0.01),
    "adagrad": by(torch.optim.Adagrad, lr=0.05),
    "adadelta": by(torch.optim.Adadelta, lr=5.0),
    "nadam": by(torch.optim.NAdam, lr=0.02),
    "radam": by(torch.optim.RAdam, lr=0.02),
    "adamax": by(torch.optim.Adamax, lr=0.02),
    "asgd": by(torch.optim.ASGD, lr=0.1, t0=5),
    "lbfgs": by(torch.optim.LBFGS, lr=0.2, max_iter=4),
    "lbfgs_wolfe": by(torch.optim.LBFGS, lr=1.0, max_iter=4, line_search_fn="strong_wolfe"),
    "adafactor": by(Adafactor, lr=0.02, relative_step=False, scale_parameter=False),
    "by_hand_data": by_hand(_sub_data),
    "by_hand": by_hand(_sub),
}


def fitting(edit: nn.Module, width: int = D) -> Callable[[], Tensor]:
    """A loss that pulls the edit towards one that swaps the first R coordinates for others."""
    h = torch.randn(64, width)
    target = torch.zeros(64, width)
    target[:, :R] = h[:, R : 2 * R] - h[:, :R]
    return lambda: (edit(h) - target).square().sum(1).mean()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name: str) -> None:
    edit = LoReFT(D, R, init_weights="paper")
    loss, start = fitting(edit), edit.rotation().detach().clone()
    first = loss().item()
    OPTIMIZERS[name](edit, loss)
    saved = edit.state_dict()["rotation.halved"] * 2  # a save restores what no hook could see
    assert error_of(saved) <= 1e-6
    assert error_of(edit.rotation()) <= 1e-6
    assert (edit.rotation() - start).abs().max() > 1e-3, "R learned"
    assert loss().item() < first


def test_a_copy_that_an_optimizer_steps_instead_does_not_drift() -> None:
    """As ZeRO does: the optimizer owns a copy, steps that, and writes it over the parameter."""
    edit = LoReFT(D, R, init_weights="paper")
    copies = [parameter.detach().clone() for parameter in edit.parameters()]
    optimizer, loss = torch.optim.AdamW(copies, lr=0.02), fitting(edit)
    for _ in range(300):
        restore([edit.rotation])
        edit.zero_grad()
        loss().backward()
        for copied, parameter in zip(copies, edit.parameters(), strict=True):
            copied.grad = parameter.grad
        optimizer.step()
        for copied, parameter in zip(copies, edit.parameters(), strict=True):
            parameter.data.copy_(copied)
    assert error_of(edit.rotation().detach()) < 0.7  # 7 to 30 without the pull
    restore([edit.rotation])
    assert error_of(edit.rotation()) <= 1e-6 and loss().item() < 0.1


def test_averages_written_through_state_dict_reach_the_parameter() -> None:
    edit, average = LoReFT(D, R, init_weights="paper"), LoReFT(D, R, init_weights="paper")
    parameters = dict(average.named_parameters())
    assert {k: v.data_ptr() for k, v in average.state_dict().items()} == {
        k: p.data_ptr() for k, p in parameters.items()
    }
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), edit.state_dict().values(), strict=True):
            mine.copy_(theirs)
    h = torch.randn(5, D)
    assert torch.equal(average(h), edit(h))


def test_what_a_process_does_not_hold_is_left_alone() -> None:
    """ZeRO-3 keeps a parameter empty between forwards; that is no rotation that became linearly dependent."""
    module = Rotation(R, D)
    module.halved.data = torch.empty(0)
    restore([module])
    assert not module.changed()


def test_vmap_over_gradients() -> None:
    edit, h = LoReFT(D, R, init_weights="paper"), torch.randn(4, D)
    parameters = {name: p.detach() for name, p in edit.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(edit, parameters, (row[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, h)
    for i, row in enumerate(h):
        alone = torch.func.grad(loss)(parameters, row)
        assert all((each[name][i] - alone[name]).abs().max() < 1e-5 for name in parameters)


def trained_model(loop: str = "adamw", **fields: Any) -> PeftModel:
    config = ReftConfig(**{"task_type": "CAUSAL_LM", "r": R, "positions": "f2+l2", "init_weights": "paper", **fields})
    model = get_peft_model(tiny("llama"), config)
    train(model, loop)
    return model.eval()


def train(model: nn.Module, loop: str) -> None:
    ids = torch.randint(3, 90, (2, 8))
    labels = ids.clone()
    labels[:, :4] = -100
    trainable = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    model.train()
    OPTIMIZERS[loop](trainable, lambda: model(input_ids=ids, labels=labels).loss)


def rotations_of(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    layers = [m for m in model.modules() if isinstance(m, ReftLayer)]
    return [edit.rotation().detach() for layer in layers for edit in layer.edits(adapter).values()]


@pytest.mark.parametrize("loop", ["adamw", "sgd", "by_hand", "by_hand_data"])
def test_a_save_straight_after_a_step_loads_to_the_same_bits(tmp_path: Path, loop: str) -> None:
    model = trained_model(loop)
    model.save_pretrained(tmp_path)
    expected = outputs_of(model, "llama")
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(outputs_of(loaded, "llama"), expected)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(error_of(t) <= 1e-6 for k, t in saved.items() if k.endswith("rotation"))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[k], t) for k, t in saved.items())


@pytest.mark.parametrize("loop", ["adamw", "by_hand", "by_hand_data"])
def test_evaluation_after_a_step_sees_what_is_saved(tmp_path: Path, loop: str) -> None:
    model = trained_model(loop)
    before_the_save = outputs_of(model, "llama")
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs_of(PeftModel.from_pretrained(tiny("llama"), tmp_path), "llama"), before_the_save)


def test_resuming_continues_to_the_same_bits(tmp_path: Path) -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        ids = torch.arange(3, 19).reshape(2, 8)
        for _ in range(count):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids.clone().index_fill_(1, torch.arange(4), -100)).loss.backward()
            optimizer.step()

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)

    model = get_peft_model(tiny("llama"), ReftConfig(task_type="CAUSAL_LM", positions="f2+l2"))
    optimizer = adam(model)
    steps(model, optimizer, 5)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    steps(model, optimizer, 5)

    resumed = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    optimizer = adam(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(resumed, optimizer, 5)
    for ours, theirs in zip(resumed.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("convert", ["bfloat16", "half", "double", "float"])
def test_dtype_changes_never_round_R(convert: str) -> None:
    model = trained_model()
    before = rotations_of(model)
    getattr(model, convert)()
    after = rotations_of(model)
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(before, after, strict=True))
    assert all(error_of(rotation) <= 1e-6 for rotation in after)
    model.float()
    train(model, "adamw")
    assert all(error_of(rotation) <= 1e-6 for rotation in rotations_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_R_stored_in_low_precision_is_mended(dtype: torch.dtype) -> None:
    rotation = retract(torch.randn(8, 256))
    mended = as_rotation("R", rotation.to(dtype))
    assert error_of(mended) <= 1e-6 and (mended - rotation).abs().max() < 0.01
    assert torch.equal(as_rotation("R", rotation), rotation)


def test_autocast_around_the_model_leaves_R_alone() -> None:
    model = trained_model()
    before = rotations_of(model)
    model.train()
    ids = torch.randint(3, 90, (2, 8))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids.clone().index_fill_(1, torch.arange(4), -100)).loss
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, rotations_of(model), strict=True))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_deepcopies_are_kept_orthonormal_apart() -> None:
    edit = LoReFT(D, R, init_weights="paper")
    twin = copy.deepcopy(edit)
    OPTIMIZERS["adamw"](twin, fitting(twin))
    assert error_of(twin.rotation()) <= 1e-6
    assert not torch.equal(twin.rotation(), edit.rotation())
    assert error_of(edit.rotation()) <= 1e-6


def test_a_pickled_module_is_kept_orthonormal(tmp_path: Path) -> None:
    torch.save(LoReFT(D, R, init_weights="paper"), tmp_path / "edit.pt")
    edit = torch.load(tmp_path / "edit.pt", weights_only=False)
    OPTIMIZERS["sgd"](edit, fitting(edit))
    assert error_of(edit.rotation()) <= 1e-6


def test_the_gradient_is_tangent() -> None:
    rotation = Rotation(R, D)
    (rotation().sin() * torch.randn(R, D)).sum().backward()
    grad = rotation.halved.grad
    assert grad is not None and grad.norm() > 0.1
    symmetric = grad @ rotation().mT
    assert (symmetric + symmetric.mT).abs().max() < 1e-5


def test_the_gradient_is_the_projection_of_the_plain_one_doubled() -> None:
    module = Rotation(R, D).double()
    restore([module])
    weights = torch.randn(R, D, dtype=torch.float64)
    (module() * weights).sum().backward()
    rotation = module().detach()
    normal = weights @ rotation.mT
    expected = 2 * (weights - (normal + normal.mT) / 2 @ rotation)
    assert module.halved.grad is not None and (module.halved.grad - expected).abs().max() < 1e-12


def test_weight_decay_does_not_shrink_the_edit() -> None:
    """Decay of R alone is undone by the retraction: it keeps its very subspace and scale."""
    module = Rotation(R, D)
    start = module().detach().clone()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        (module() * 0).sum().backward()
        optimizer.step()
    assert (module() - start).abs().max() < 1e-5
    assert error_of(module()) <= 1e-6


@pytest.mark.parametrize(("width", "r"), [(4096, 8), (64, 64), (5, 1), (2048, 128)])
def test_sizes(width: int, r: int) -> None:
    rotation = retract(torch.randn(3, r, width) + 0.5)
    assert max(error_of(each) for each in rotation) < 2e-7
    module = Rotation(r, width)
    assert error_of(module()) < 2e-7
    bits = module.halved.detach().clone()
    restore([module])
    assert torch.equal(module.halved, bits), "what is orthonormal keeps its bits"


def test_the_retraction_is_the_nearest() -> None:
    """Against the polar factor U Vᵀ of the singular value decomposition."""
    matrix = torch.randn(R, D, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert (retract(matrix) - u @ vt).abs().max() < 1e-12


def test_restore_touches_only_what_moved() -> None:
    still, moved = Rotation(R, D), Rotation(R, D)
    with torch.no_grad():
        moved.halved.mul_(1.1)
    bits = still.halved.detach().clone()
    restore([still, moved])
    assert torch.equal(still.halved, bits) and error_of(moved()) <= 1e-6
    assert not still.changed() and not moved.changed()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "linearly dependent: the learning rate or the weight decay is far too high"),
        (1.0, "linearly dependent"),
        (math.nan, r"NaN or infinity .* Lower the learning rate, clip gradients"),
        (math.inf, "NaN or infinity"),
    ],
)
def test_what_cannot_be_restored_says_why(value: float, message: str) -> None:
    module = Rotation(R, D)
    nn.init.constant_(module.halved, value)
    with pytest.raises(FloatingPointError, match=message):
        restore([module])
    # and from the optimizer's step, where training code meets it
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    module.halved.grad = torch.zeros_like(module.halved)
    with pytest.raises(FloatingPointError, match=message):
        optimizer.step()


def test_one_diverged_run_does_not_stop_another() -> None:
    diverged, other = Rotation(R, D), Rotation(R, D)
    nn.init.constant_(diverged.halved, math.nan)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other().sin().sum().backward()
    optimizer.step()
    assert error_of(other()) <= 1e-6


@pytest.mark.parametrize("error", [0.1, math.nan])
def test_a_loaded_R_that_is_none(error: float) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.rotation: the rows are not orthonormal"):
        as_rotation("layers.0.rotation", retract(torch.randn(R, D)) * (1 + error))


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if "rotation" in cls.shapes(D, R)])
def test_every_orthonormal_method_of_the_table(method: str) -> None:
    edit = METHODS[method](D, R, init_weights="paper")
    OPTIMIZERS["adamw"](edit, fitting(edit))
    assert error_of(edit.rotation()) <= 1e-6
    assert float(orthonormality_error(edit.rotation())) <= TOLERANCE


@pytest.mark.slow
def test_upkeep_is_a_small_share_of_a_training_step() -> None:
    """At d = 4096, r = 8, on four blocks and 4 x 64 tokens: `pytest -m slow -s` prints the numbers."""
    layers = 4
    config = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    base = tiny("llama", num_hidden_layers=layers, **config)
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=8, positions="f7+l7"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(3, 90, (4, 64))
    labels = ids.clone().index_fill_(1, torch.arange(48), -100)
    rotations = [m for m in model.modules() if isinstance(m, Rotation)]

    def seconds(run: Callable[[], Any], times: int) -> float:
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return sorted(taken)[times // 2]

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()

    def upkeep() -> None:
        with torch.no_grad():
            for rotation in rotations:
                rotation.halved.mul_(1.01)
        restore(rotations)  # after the step: all retracted
        restore(rotations)  # in the next forward: all only looked at

    step()
    whole, share = seconds(step, 3), seconds(upkeep, 9)
    print(f"\nstep {whole:.3f} s, upkeep {1000 * share:.2f} ms, share {share / whole:.3%}")
    assert share / whole < 0.02


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_steps_r_itself_meets_no_pull(fused: bool) -> None:
    """A fused step leaves no trace in the parameter's version; what it did must not pass for the step of a copy."""
    rotation = Rotation(2, 16)
    optimizer = torch.optim.AdamW(rotation.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        (rotation() * torch.randn(2, 16)).sum().backward()
        optimizer.step()
        assert float(orthonormality_error(rotation.halved.detach() * 2)) < 1e-6
        restore([rotation])  # as the next forward does
        assert rotation._drift is None
