"""Architectures that slots serve, each held to plain `generate`, or refuse by name; the table of them in the docs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import BERT_LIKE, DECODERS, DEPTH, LLAMA_LIKE, VOCAB, tiny
from serve.mixes import KINDS, Asked, Served, mismatches

from trimtab.serve.model import NotServed
from trimtab.serve.slots import SlotsEngine
from trimtab.serve.table import AdapterTable, Layout
from trimtab.where.sites import find_sites


def made(model: Any, config: Any, common: dict[str, Any], **special: Any) -> Callable[[], Any]:
    def build() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(config(**{**common, **special})).float().eval()

    return build


_MAMBA = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": DEPTH, "n_head": 4, "pad_token_id": 0}
_GPTJ = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "rotary_dim": 4, "n_positions": 128}
_LONG = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
_NEXT = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
BUILDS: dict[str, Callable[[], Any]] = {
    **{name: (lambda name=name: tiny(name)) for name in DECODERS},  # type: ignore[misc]
    "qwen2": made(hf.Qwen2ForCausalLM, hf.Qwen2Config, LLAMA_LIKE),
    "gemma2": made(hf.Gemma2ForCausalLM, hf.Gemma2Config, LLAMA_LIKE, head_dim=8, sliding_window=16),
    "olmo2": made(hf.Olmo2ForCausalLM, hf.Olmo2Config, LLAMA_LIKE),
    "phi": made(hf.PhiForCausalLM, hf.PhiConfig, LLAMA_LIKE, num_key_value_heads=4),
    "stablelm": made(hf.StableLmForCausalLM, hf.StableLmConfig, LLAMA_LIKE),
    "cohere2": made(hf.Cohere2ForCausalLM, hf.Cohere2Config, LLAMA_LIKE, sliding_window=16),
    "falcon": made(hf.FalconForCausalLM, hf.FalconConfig, BERT_LIKE),
    "falcon, alibi": made(hf.FalconForCausalLM, hf.FalconConfig, BERT_LIKE, alibi=True),
    "bloom": made(hf.BloomForCausalLM, hf.BloomConfig, _BLOOM),
    "gptj": made(hf.GPTJForCausalLM, hf.GPTJConfig, _GPTJ),
    "gpt_oss": made(
        hf.GptOssForCausalLM, hf.GptOssConfig, LLAMA_LIKE, head_dim=8, num_local_experts=4, sliding_window=16
    ),
    "llama, dynamic rope": made(hf.LlamaForCausalLM, hf.LlamaConfig, LLAMA_LIKE, rope_parameters=_LONG),
    "llama4": made(
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig,
        LLAMA_LIKE,
        head_dim=8,
        num_local_experts=2,
        intermediate_size_mlp=48,
        attention_chunk_size=16,
    ),
    "qwen3_next": made(hf.Qwen3NextForCausalLM, hf.Qwen3NextConfig, LLAMA_LIKE, head_dim=8, **_NEXT),
    "mamba": made(hf.MambaForCausalLM, hf.MambaConfig, _MAMBA),
    "recurrent_gemma": made(hf.RecurrentGemmaForCausalLM, hf.RecurrentGemmaConfig, LLAMA_LIKE, head_dim=8),
    "t5": lambda: tiny("t5"),
}
REFUSED = {
    "falcon, alibi": "ALiBi",
    "bloom": "ALiBi",
    "llama, dynamic rope": r"rotary positions \(dynamic\)",
    "llama4": "layers of kind chunked_attention",
    "qwen3_next": "keys and values",
    "mamba": "keys and values",
    "recurrent_gemma": "keys and values",
    "t5": "encoder-decoder",
}
DOCS = Path(__file__).parents[2] / "docs/serving.md"


def opened(model: Any) -> None:
    """Start an engine on it and close it again."""
    engine = SlotsEngine(model, AdapterTable(Layout(find_sites(model, "block", "all"), 8), 4))
    engine.start()
    engine.close()


@pytest.mark.parametrize("name", [name for name in BUILDS if name not in REFUSED])
def test_an_edited_and_a_plain_prompt(name: str, tmp_path: Path) -> None:
    """Longer than sliding windows, in chunks, from the cache too."""
    served = Served(BUILDS[name](), tmp_path, strength=3, kinds={kind: KINDS[kind] for kind in ("untied", "all")})
    prompt = tuple(range(5, 45))
    asked = [Asked(prompt), *(Asked(prompt[i:], ((adapter, 1.0),)) for i, adapter in enumerate(served.names))]
    engine = served.engine(chunk=16)
    engine.check()
    assert mismatches(served, engine, asked, each=3) == []
    assert mismatches(served, engine, asked[::-1], each=5) == []
    assert served.truth(asked[0]) != served.truth(Asked(prompt, asked[1].adapters))
    engine.close()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_name(name: str) -> None:
    model = BUILDS[name]()
    with pytest.raises(NotServed, match=f"{type(model).__name__}: .*{REFUSED[name]}"):
        opened(model)
    assert not any(site.module._forward_hooks for site in find_sites(model, "block", "all"))


def test_a_forward_that_raises_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.serve.model.ServedModel._masks", lambda self, place, width: "no mask")
    with pytest.raises(NotServed, match="LlamaForCausalLM: cannot be run in rows of a shared cache"):
        opened(tiny("llama"))


def test_the_docs_have_the_table() -> None:
    lines = ["| architecture | |", "|---|---|"]
    for name, build in BUILDS.items():
        model: Any = build()
        said = "served"
        try:
            opened(model)
        except NotServed as error:
            said = str(error).removeprefix(f"{type(model).__name__}: ").split(";")[0].split(". ")[0].rstrip(".")
        kind = f" ({name.partition(', ')[2]})" if ", " in name else ""
        lines.append(f"| `{type(model).__name__}`{kind} | {said} |")
    assert "\n".join(lines) in DOCS.read_text(encoding="utf-8"), "\n".join(lines)
