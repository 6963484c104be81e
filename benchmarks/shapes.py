"""Llamas of several sizes with random weights. No figure of these benchmarks depends on what a model says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}

SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "60m": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "300m": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "1b": {
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "3b": {
        **_LLAMA3,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
"""The last three are those of Llama 3.2 1B, Llama 3.2 3B and Llama 3.1 8B."""

BFLOAT16 = ("1b", "3b", "8b")


def dtype_of(shape: str) -> torch.dtype:
    """bfloat16 for the shapes that are meant for a GPU, float32 for the others."""
    return torch.bfloat16 if shape in BFLOAT16 else torch.float32


def build_llama(shape: str, device: str = "cpu", seed: int = 0) -> LlamaForCausalLM:
    """The frozen model: the same weights in every environment, whatever order its transformers draws them in."""
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, bos_token_id=1, eos_token_id=4, pad_token_id=0, use_cache=False
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype_of(shape))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
    return model
