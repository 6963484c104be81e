"""A LoRA at chosen tokens: PEFT's own layer at those, the frozen weights at all others; never taken for a plain one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSIFIERS, DECODERS, VOCAB, batch_for, outputs_of, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_batches import NEW, TOLERANCE, padded, prompts, search
from test_config import leaves_no_trace
from torch import Tensor, nn

from trimtab.adapter.lora_at import LoraAtConfig
from trimtab.adapter.weights import WEIGHTS
from trimtab.where.plan import edited
from trimtab.where.positions import parse_positions

POSITIONS = ["f2+l3", "l1", "prompt", "generated", "all", "random3"]
ROWS = prompts([21, 4, 13])


def trained(name: str = "llama", positions: str = "f2+l3", task_type: str = "CAUSAL_LM", **fields: Any) -> PeftModel:
    """With a change that is large enough to be seen."""
    config = LoraAtConfig(
        **{"task_type": task_type, "r": 2, "target_modules": "all-linear", "positions": positions, **fields}
    )
    return disturbed(get_peft_model(tiny(name), config))


def disturbed(model: Any) -> Any:
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.3)
    return model.eval()


class Loop:
    """PEFT's own LoRA on the same weights, each of its layers called token by token, or not."""

    def __init__(self, model: PeftModel, name: str = "llama") -> None:
        config = model.peft_config["default"]
        kept = {k: v for k, v in config.to_dict().items() if k in ("r", "target_modules", "lora_alpha", "use_rslora")}
        self.model = get_peft_model(tiny(name), LoraConfig(task_type=config.task_type, **kept)).eval()
        self.model.load_state_dict(model.state_dict())
        self.positions = parse_positions(config.positions)
        self.chosen: set[int] = set()
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                layer.forward = self._forward(layer, layer.forward)

    def _forward(self, layer: Any, own: Any) -> Any:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            ways = [own if t in self.chosen else layer.base_layer for t in range(x.shape[1])]
            return torch.cat([way(x[:, t : t + 1]) for t, way in enumerate(ways)], 1)

        return forward

    @torch.no_grad()
    def __call__(self, row: Tensor, prompt: int) -> Tensor:
        """Logits (T, V) of one row without padding."""
        self.chosen = set(edited(self.positions, prompt, 0, len(row)))
        found: Tensor = self.model(input_ids=row[None], use_cache=False).logits[0]
        return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_batch_is_the_plain_loop(positions: str, side: str) -> None:
    model = trained(positions=positions, use_rslora=True)
    loop, lengths = Loop(model), [9, 4, 11]
    batch = padded(ROWS, side)
    with torch.no_grad():
        logits = model(**batch, prompt_lengths=lengths).logits
    for i, row in enumerate(ROWS):
        expected = loop(row, lengths[i])
        assert (logits[i][batch["attention_mask"][i].bool()] - expected).abs().max() < TOLERANCE
    assert (expected - tiny("llama")(input_ids=ROWS[2][None]).logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_every_kind(name: str) -> None:
    try:
        model = trained(name, target_modules=None)
    except ValueError as error:
        pytest.skip(str(error))
    loop = Loop(model, name)
    with torch.no_grad():
        logits = model(**padded(ROWS, "right"), prompt_lengths=[9, 4, 11]).logits
    for i, (row, length) in enumerate(zip(ROWS, [9, 4, 11], strict=True)):
        assert (logits[i][: len(row)] - loop(row, length)).abs().max() < TOLERANCE


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
def test_generation(positions: str, use_cache: bool) -> None:
    model = trained(positions=positions)
    loop, batch = Loop(model), {k: v for k, v in padded(ROWS).items() if k != "position_ids"}
    out = model.generate(**batch, **search(use_cache=use_cache))
    logits = torch.stack(out.logits, 1)
    for i, row in enumerate(ROWS):
        whole = torch.cat([row, out.sequences[i, -NEW:]])
        assert (logits[i] - loop(whole, len(row))[len(row) - 1 : -1]).abs().max() < TOLERANCE


def test_decoding_steps_are_the_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the prompt no LoRA layer multiplies anything."""
    model = trained(positions="prompt")
    seen: list[int] = []
    for name, module in model.named_modules():
        if ".lora_A." in name and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model.generate(input_ids=ROWS[0][None], attention_mask=torch.ones(1, 21).long(), **search())
    assert set(seen) == {21} and len(seen) == 3 * 7


@pytest.mark.parametrize("positions", ["f2+l3", "prompt", "generated"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_labels(positions: str, checkpointing: bool) -> None:
    """Loss and gradients are the loop's, rows of several lengths in one batch; nothing else has a gradient."""
    model = trained(positions=positions).double()
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = padded(ROWS, "right")
    labels, lengths = batch["input_ids"].clone(), [9, 2, 11]
    for i, row in enumerate(ROWS):
        labels[i, : lengths[i]], labels[i, len(row) :] = -100, -100
    model(**batch, labels=labels).loss.backward()
    loop = Loop(model)
    loop.model.double().load_state_dict(model.state_dict())
    losses = []
    for i, row in enumerate(ROWS):
        loop.chosen = set(edited(loop.positions, lengths[i], 0, len(row)))
        logits = loop.model(input_ids=row[None], use_cache=False).logits[0, lengths[i] - 1 : -1]
        losses.append(nn.functional.cross_entropy(logits, row[lengths[i] :], reduction="none"))
    torch.cat(losses).mean().backward()
    expected = dict(loop.model.named_parameters())
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in key)
        if parameter.requires_grad:
            assert (parameter.grad - expected[key].grad).abs().max() < 1e-5, key  # type: ignore[operator]
    assert any(p.grad is not None and p.grad.abs().max() > 1e-3 for p in model.parameters())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_read_rows_as_alone(name: str) -> None:
    model = trained(name, task_type="SEQ_CLS" if name.endswith("seq_cls") else "TOKEN_CLS")
    batch = batch_for(name)
    with torch.no_grad():
        both, alone = model(**batch).logits, model(input_ids=batch["input_ids"][1:, :7]).logits
        with model.disable_adapter():
            off = model(**batch).logits
    last = both[1:] if both.dim() == 2 else both[1:, :7]
    assert (last - alone).abs().max() < TOLERANCE
    assert (both - off).abs().max() > 1e-4


def test_a_fresh_one_a_switched_off_one_and_one_taken_off_change_nothing() -> None:
    base = outputs_of(tiny("llama"), "llama")
    fresh = get_peft_model(tiny("llama"), LoraAtConfig(task_type="CAUSAL_LM", target_modules="all-linear")).eval()
    assert torch.equal(outputs_of(fresh, "llama"), base)
    model = trained()
    assert not torch.equal(outputs_of(model, "llama"), base)
    leaves_no_trace(model)


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = trained(positions="f1+l2")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert torch.equal(outputs_of(again, "llama"), outputs_of(model, "llama"))
    assert "import trimtab" in (tmp_path / "README.md").read_text()
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(outputs_of(again, "llama"), outputs_of(model, "llama"))


@torch.no_grad()
def test_a_cache_of_the_base_model_is_refused() -> None:
    model, ids = trained(positions="f2"), torch.arange(5, 17)[None]
    with model.disable_adapter():
        cache = model(input_ids=ids[:, :9]).past_key_values
    with pytest.raises(ValueError, match="filled with no adapter"):
        model.generate(ids, past_key_values=cache, max_new_tokens=1)


@pytest.mark.parametrize("fields", [{"positions": "l2"}, {"lora_alpha": 3}])
def test_others_do_not_take_its_place(fields: dict[str, Any], tmp_path: Path) -> None:
    trained(**fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"saved with {next(iter(fields))}=.* Load it under another name"):
        trained().load_adapter(tmp_path, "default")


def test_a_file_is_never_taken_for_a_plain_lora(tmp_path: Path) -> None:
    """Neither by its config, nor by its tensors where another program does not look at the method; nor one for it."""
    model = trained()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["peft_type"] == "LORA_AT"
    tensors = load_file(tmp_path / WEIGHTS)
    assert not any(key.endswith(("lora_A.weight", "lora_B.weight")) for key in tensors)
    plain = {key.replace("lora_at_", "lora_"): tensor for key, tensor in tensors.items()}
    for wrong in (plain, {**tensors, "base_model.model.model.layers.0.x.lora_A.weight": torch.ones(1)}, {}):
        save_file(wrong, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match="does not fit this model and config"):
            PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_what_would_change_every_token_is_refused() -> None:
    model = trained()
    for call in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="no change of the weights"):
            call()
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model(**batch_for("llama"), adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "x7"}, "positions='x7'"),
        ({"edit_turns": "last"}, "edit_turns='last': must be one of each, first"),
        ({"use_dora": True}, "use_dora=True: does not go with positions"),
        ({"bias": "all"}, "bias='all': does not go with positions"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': must be one of"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraAtConfig(task_type="CAUSAL_LM", **fields)


def test_models_without_a_place_for_it() -> None:
    with pytest.raises(ValueError, match="encoder-decoder"):
        get_peft_model(tiny("t5"), LoraAtConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"]))
    with pytest.raises(ValueError, match="embed_tokens is no linear layer"):
        get_peft_model(tiny("llama"), LoraAtConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]))
    base = tiny("llama")
    before = outputs_of(base, "llama")
    mixed = LoraAtConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    with pytest.raises(ValueError, match="embed_tokens is no linear layer"):
        get_peft_model(base, mixed)
    assert torch.equal(outputs_of(base, "llama"), before)
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
    outside = trained()
    with pytest.raises(RuntimeError, match="outside a forward of its model"):
        outside.base_model.model.model.layers[0].mlp(torch.randn(1, 2, 32))
    ids = torch.randint(3, VOCAB, (1, 6))
    with pytest.raises(ValueError, match="the end of the prompt must be known"):
        outside.train()(input_ids=ids)


def test_weights_made_in_inference_mode_have_no_version() -> None:
    config = LoraAtConfig(task_type="CAUSAL_LM", r=2, positions="f1", target_modules=["q_proj"])
    with torch.inference_mode():
        model = get_peft_model(tiny("llama"), config).eval()
        past = model(input_ids=torch.arange(5, 11)[None], use_cache=True).past_key_values
        model(input_ids=torch.tensor([[7]]), past_key_values=past)
