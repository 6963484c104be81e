"""Blocks, attention and MLP found on every architecture of the table; an edit takes effect at each; mistakes say so."""

import re
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import DEPTH, MODELS, VISION, VOCAB, WIDTH, PlainModel, batch_for, logits_of, outputs_of, tiny
from peft import get_peft_model
from torch import Tensor, nn

from trimtab import ReftConfig
from trimtab.adapter.tuner import ReftLayer
from trimtab.where.sites import find_blocks, find_sites

ALL = list(MODELS)


def edited(name: str, **fields: Any) -> nn.Module:
    fields = {"task_type": MODELS[name].task_type, "r": 2, "positions": "f2", **fields}
    return get_peft_model(tiny(name), ReftConfig(**fields)).eval()


def hidden_states_after(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Outputs of the blocks during one forward, by name."""
    seen: dict[str, Tensor] = {}

    def keep(block: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[block] = (output if isinstance(output, Tensor) else output[0]).detach().clone()

        return hook

    handles = [model.get_submodule(block).register_forward_hook(keep(block)) for block in MODELS[name].blocks]
    try:
        outputs_of(model, name)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("name", ALL)
def test_blocks(name: str) -> None:
    model = tiny(name)
    sites = find_sites(model, "block", "all")
    assert tuple(site.name for site in sites) == MODELS[name].blocks
    hidden = hidden_states_after(name, model)
    assert {site.width for site in sites} == {h.shape[-1] for h in hidden.values()}
    assert all(site.module is model.get_submodule(site.name) for site in sites)


@pytest.mark.parametrize("site", ["attention", "mlp"])
@pytest.mark.parametrize("name", ALL)
def test_parts_of_blocks(name: str, site: str) -> None:
    part = getattr(MODELS[name], site)
    if part is None:
        with pytest.raises(ValueError, match=f"site='{site}': found no {site} module in .* regular expression"):
            find_sites(tiny(name), site, "all")
        return
    assert [s.name for s in find_sites(tiny(name), site, "all")][:1] == [f"{MODELS[name].blocks[0]}.{part}"]
    model = edited(name, site=site, init_weights="paper")
    with model.disable_adapter():
        base = outputs_of(model, name)
    assert torch.equal(base, outputs_of(tiny(name), name))
    assert not torch.equal(outputs_of(model, name), base)


@pytest.mark.parametrize("name", ALL)
def test_heads_are_edited_before_their_projection(name: str) -> None:
    """A head that is scaled to nothing is one whose columns of the projection are zero."""
    if MODELS[name].attention is None:
        with pytest.raises(ValueError, match="found no attention module"):
            find_sites(tiny(name), "heads", "all")
        return
    model = edited(name, site="heads", method="red", positions="all", layers=[0])
    layer = next(m for m in model.modules() if isinstance(m, ReftLayer))
    head = slice(layer.site.width // 4, layer.site.width // 2)  # the second of four
    with torch.no_grad():
        layer.edits("default")["edit"].scale[head] = 0  # type: ignore[operator, index]
    expected = tiny(name)
    projection: Any = expected.get_submodule(layer.site.name)
    with torch.no_grad():
        (projection.weight if isinstance(projection, nn.Linear) else projection.weight.T)[:, head] = 0
    found, wanted, base = (outputs_of(each, name) for each in (model, expected, tiny(name)))
    mask = batch_for(name).get("attention_mask", torch.ones(found.shape[:2])).bool()  # padding is not edited
    real = mask if mask.shape == found.shape[:2] else slice(None)
    torch.testing.assert_close(found[real], wanted[real])
    assert not torch.equal(found[real], base[real])


def test_heads_without_a_projection_that_runs() -> None:
    """PyTorch's own attention takes its projection's weights without running it."""
    model = PlainModel()
    model.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 4, batch_first=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"site='heads': found no one output projection .* in blocks.0.self_attn"):
        find_sites(model, "heads", "all")
    model = tiny("llama")
    for block in model.model.layers:  # type: ignore[union-attr]
        block.self_attn.o_proj = nn.Identity()
    with pytest.raises(ValueError, match="with the linear layers q_proj, k_proj, v_proj"):
        find_sites(model, "heads", "all")


@pytest.mark.parametrize("sites", [("heads", r".*\.o_proj"), (r".*\.o_proj", "heads")])
def test_both_sides_of_one_module_are_not_mistaken_for_each_other(sites: tuple[str, str]) -> None:
    model: Any = edited("llama", site=sites[0])
    with pytest.raises(ValueError, match=r"o_proj: an adapter edits its (input|output) already"):
        model.add_adapter("other", ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2", site=sites[1]))


@pytest.mark.parametrize("name", ALL)
def test_a_fresh_edit_changes_nothing(name: str) -> None:
    assert torch.equal(outputs_of(edited(name), name), outputs_of(tiny(name), name))


@pytest.mark.parametrize("name", ALL)
def test_an_edit_takes_effect_at_each_block(name: str) -> None:
    base = hidden_states_after(name, tiny(name))
    for i, block in enumerate(MODELS[name].blocks):
        model = edited(name, layers=[i], init_weights="paper").base_model.model
        after = hidden_states_after(name, model)
        before_it = MODELS[name].blocks[:i] if MODELS[name].kind != "encoder_decoder" else ()
        assert all(torch.equal(after[b], base[b]) for b in before_it)
        changed = (after[block] != base[block]).any(-1)
        assert (changed[:, :2].all() and not changed[:, 2:].any()) or MODELS[name].kind == "encoder_decoder"
        assert changed.any()


def test_encoder_decoder_numbers_the_encoder_first() -> None:
    base = hidden_states_after("t5", tiny("t5"))
    decoder_only = hidden_states_after("t5", edited("t5", layers=[2, 3, 4], init_weights="paper").base_model.model)
    assert all(torch.equal(base[b], decoder_only[b]) == b.startswith("encoder") for b in base)
    encoder = hidden_states_after("t5", edited("t5", layers=[0], init_weights="paper").base_model.model)
    assert not any(torch.equal(base[b], encoder[b]) for b in base)


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", [0, 1, 2]), ([1], [1]), ([-1, 0], [0, 2]), ([2, 0], [0, 2]), ([-3], [0])]
)
def test_layers(layers: Any, expected: list[int]) -> None:
    sites = find_sites(tiny("llama"), "block", layers)
    assert [site.name for site in sites] == [f"model.layers.{i}" for i in expected]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3], r"layers=\[3\]: \[3\] not there; the model has blocks 0 to 2 \(or -3 to -1\)"),
        ([0, -4, 7], r"\[-4, 7\] not there"),
        ([2, -1], r"layers=\[2, -1\]: names a block twice"),
    ],
)
def test_layers_that_are_not_there(layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_sites(tiny("llama"), "block", layers)


@pytest.mark.parametrize(
    ("name", "pattern", "width"),
    [
        ("llama", r"model\.layers\.[02]", WIDTH),
        ("llama", r"model\.layers\.1\.mlp\.up_proj", 48),
        ("llama", r".*\.k_proj", 16),
        ("llama", r"model\.embed_tokens", WIDTH),
        ("llama", r"model\.norm", WIDTH),
        ("gpt2", r".*\.c_attn", 3 * WIDTH),
        ("bert", r"encoder\.layer\.\d+\.output", WIDTH),
        ("bert", r".*\.intermediate", 48),
        ("llava", r".*vision_tower.*encoder\.layers\.\d|.*vision_tower\.layers\.\d|.*vision.*\.layers\.\d", 24),
        ("plain", r"blocks\.\d\.down", WIDTH),
        ("sequential", r"blocks\.\d\.0", 2 * WIDTH),
    ],
)
def test_patterns(name: str, pattern: str, width: int) -> None:
    sites = find_sites(tiny(name), pattern, "all")
    assert sites and {site.width for site in sites} == {width}
    if name == "llava":  # a vision tower runs only on images, which this batch has none of
        return
    model = edited(name, site=pattern, init_weights="paper", positions="all")
    assert not torch.equal(outputs_of(model, name), outputs_of(tiny(name), name))
    chosen = edited(name, site=pattern, layers=[-1])
    assert [m.site.name for m in chosen.modules() if isinstance(m, ReftLayer)] == [sites[-1].name]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("no_such", r"site='no_such': matches no module name as a whole; it is block, attention, mlp, "),
        ("layers", r"matches no module name as a whole"),
        ("(", r"site='\(': not a regular expression .* nor block, attention, mlp or heads"),
        (r"model\.layers", r"model.layers only lists modules and never runs itself. .* site=r'model\\.layers\\.\\d\+'"),
        (r".*rotary_emb", r"cannot tell the width of model.rotary_emb"),
    ],
)
def test_sites_that_are_not_there(site: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny("llama"), ReftConfig(site=site, task_type="CAUSAL_LM"))


def test_a_site_that_mixes_rows_and_tokens_is_refused_when_it_runs() -> None:
    """OPT flattens (batch, tokens) before its linear layers."""
    model = edited("opt", site=r".*\.fc2")
    with pytest.raises(RuntimeError, match=r"fc2 gives hidden states of shape \(20, 32\), but \(batch, tokens, 32\)"):
        outputs_of(model, "opt")


def test_a_second_adapter_never_lands_on_the_edits_of_the_first() -> None:
    first = get_peft_model(tiny("plain"), ReftConfig(r=2, positions="f2"), adapter_name="attention").base_model.model
    with pytest.raises(ValueError, match="found no attention module"):
        find_sites(first, "attention", "all")
    assert not [
        site.name
        for site in find_sites(first, r"blocks\.\d.*(up|down|projection|bias)|blocks\.\d", "all")
        if "reft" in site.name
    ]
    assert [(site.name, site.width) for site in find_sites(first, "block", "all")] == [
        (f"blocks.{i}", WIDTH) for i in range(DEPTH)
    ]


def test_no_blocks() -> None:
    with pytest.raises(
        ValueError, match=r"site='block': Linear has no nn.ModuleList of blocks. Give site as a regular"
    ):
        find_blocks(nn.Linear(4, 4))


def test_two_stacks_alike_are_not_guessed_between() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = PlainModel(), PlainModel()

    with pytest.raises(ValueError, match=re.escape("one.blocks (3), two.blocks (3). Say which with a regular")):
        find_blocks(Two())


def test_the_text_config_decides_between_stacks_of_one_depth() -> None:
    vision = hf.CLIPVisionConfig(**{**VISION, "num_hidden_layers": DEPTH})
    text = tiny("llama").config
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCAB - 1)
    model = hf.LlavaForConditionalGeneration(config)
    assert find_blocks(model)[0][0] == "model.language_model.layers.0"


def test_a_layer_shared_by_several_sequentials_does_not_hide_their_edits() -> None:
    model = PlainModel()
    relu = nn.ReLU()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), relu) for _ in range(3))
    model.eval()
    base = logits_of(model(**batch_for("plain")))
    peft = get_peft_model(model, ReftConfig(r=2, positions="f2", layers=[2], init_weights="paper"))
    only_last = logits_of(peft(**batch_for("plain")))
    peft.add_adapter("first", ReftConfig(r=2, positions="f2", layers=[0], init_weights="paper"))
    peft.set_adapter("first")
    assert len({id(base), id(only_last)}) == 2
    outputs = [base, only_last, logits_of(peft(**batch_for("plain")))]
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "gpt_neox", "bert"])
def test_blocks_that_give_tuples_keep_the_rest(name: str) -> None:
    """Blocks give a tensor or a tuple; whatever comes after the hidden states is passed on untouched."""
    model = tiny(name)
    block = model.get_submodule(MODELS[name].blocks[0])
    extra = object()
    block.register_forward_hook(lambda m, a, o: (o, extra) if isinstance(o, Tensor) else (*o, extra))
    get_peft_model(model, ReftConfig(r=2, positions="f2", init_weights="paper", task_type=MODELS[name].task_type))
    seen: list[Any] = []

    def look(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append(output)
        return output[0] if len(output) == 2 else output[:-1]

    block.register_forward_hook(look)
    outputs_of(model, name)
    assert isinstance(seen[0], tuple) and seen[0][-1] is extra


def test_too_large_a_rank_names_the_site() -> None:
    with pytest.raises(ValueError, match=r"r=33: larger than the width 32 of model.layers.0"):
        edited("llama", r=33)


def test_a_pattern_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.where.sites.PATTERN_SECONDS", 0.1)
    model = nn.ModuleDict({"a" * 40: nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="takes too long to match"):
        find_sites(model, r"(a|a|aa)+$b", "all")


@pytest.mark.parametrize("site", ["block", "attention", r"layers\.\d+\.linear2"])
def test_time_before_batch_is_refused(site: str) -> None:
    """As torch makes its own layers: the first time steps of row 0 would be taken for the first tokens of every row."""
    for batch_first in (False, True):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        if batch_first:
            assert len(find_sites(model, site, "all")) == 2
        else:
            with pytest.raises(ValueError, match=r"layers\.0.* takes \(time, batch, width\).*batch_first=True"):
                find_sites(model, site, "all")


def test_models_that_put_time_first_are_refused() -> None:
    model = hf.XLNetModel(hf.XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=2, n_head=2, d_inner=16))
    with pytest.raises(ValueError, match="xlnet puts time before the batch in its blocks"):
        get_peft_model(model, ReftConfig(r=2, positions="f1"))
