"""Tiny models of many architectures, random but seeded, built from configs without any download.

`MODELS` is one table; a new row is picked up by every test that parametrizes over `MODELS`, `DECODERS`, `ENCODERS` and
so on. `tiny(name)` builds a row, in float32 and eval mode; `batch_for(name)` gives it something to eat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 96
WIDTH = 32
DEPTH = 3
PAD = 0


@dataclass(frozen=True)
class Row:
    """How a model is built, and what is known of it."""

    build: Callable[..., nn.Module]
    kind: str
    """decoder, encoder, seq_cls, token_cls, encoder_decoder, vision, two_stacks or plain."""
    blocks: tuple[str, ...]
    """Module names of its blocks, in the order of the forward pass."""
    task_type: str | None = None
    attention: str | None = None
    """Name of the attention module within the first block; None for none."""
    mlp: str | None = None


def _blocks(path: str, depth: int = DEPTH) -> tuple[str, ...]:
    return tuple(f"{path}.{i}" for i in range(depth))


LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def _of(
    model: type[nn.Module], config: Callable[..., Any], common: dict[str, Any], **special: Any
) -> Callable[..., nn.Module]:
    def build(**overrides: Any) -> nn.Module:
        return model(config(**{**common, **special, **overrides}))  # type: ignore[call-arg]

    return build


def _clip(**overrides: Any) -> nn.Module:
    text = {**BERT_LIKE, "eos_token_id": VOCAB - 1}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16, **overrides))


def _llava(**overrides: Any) -> nn.Module:
    vision = hf.CLIPVisionConfig(**VISION)
    text = hf.LlamaConfig(**{**LLAMA_LIKE, **overrides})
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCAB - 1, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config)


class PlainBlock(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.up(hidden).relu())


class PlainModel(nn.Module):
    """A user's own model: no config, blocks in a ModuleList."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(self.make_block(width) for _ in range(depth))
        self.head = nn.Linear(width, VOCAB)

    def make_block(self, width: int) -> nn.Module:
        return PlainBlock(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(hidden)
        return logits


class SequentialModel(PlainModel):
    """The same, each block an nn.Sequential."""

    def make_block(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


_LAYERS, _BERT = _blocks("model.layers"), "encoder.layer"
_MIXTRAL = _of(hf.MixtralForCausalLM, hf.MixtralConfig, LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
_GEMMA3 = _of(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, LLAMA_LIKE, head_dim=8, sliding_window=16)
_QWEN3 = _of(hf.Qwen3ForCausalLM, hf.Qwen3Config, LLAMA_LIKE, head_dim=8)
_QWEN3_MOE = _of(
    hf.Qwen3MoeForCausalLM,
    hf.Qwen3MoeConfig,
    LLAMA_LIKE,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": DEPTH,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "ffn_dim": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": WIDTH,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": DEPTH,
    "num_heads": 4,
    "pad_token_id": PAD,
    "eos_token_id": 2,
    "decoder_start_token_id": PAD,
}
_T5_BLOCKS = _blocks("encoder.block", 2) + _blocks("decoder.block")
_MODERNBERT: dict[str, Any] = dict(BERT_LIKE, cls_token_id=1, sep_token_id=2, local_attention=8)

MODELS: dict[str, Row] = {
    "llama": Row(
        _of(hf.LlamaForCausalLM, hf.LlamaConfig, LLAMA_LIKE), "decoder", _LAYERS, "CAUSAL_LM", "self_attn", "mlp"
    ),
    "qwen3": Row(_QWEN3, "decoder", _LAYERS, "CAUSAL_LM", "self_attn", "mlp"),
    "gemma3": Row(_GEMMA3, "decoder", _LAYERS, "CAUSAL_LM", "self_attn", "mlp"),
    "mistral": Row(
        _of(hf.MistralForCausalLM, hf.MistralConfig, LLAMA_LIKE, sliding_window=16),
        "decoder",
        _LAYERS,
        "CAUSAL_LM",
        "self_attn",
        "mlp",
    ),
    "phi3": Row(
        _of(hf.Phi3ForCausalLM, hf.Phi3Config, LLAMA_LIKE), "decoder", _LAYERS, "CAUSAL_LM", "self_attn", "mlp"
    ),
    "mixtral": Row(_MIXTRAL, "decoder", _LAYERS, "CAUSAL_LM", "self_attn", "mlp"),
    "qwen3_moe": Row(_QWEN3_MOE, "decoder", _LAYERS, "CAUSAL_LM", "self_attn", "mlp"),
    "gpt2": Row(
        _of(hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2), "decoder", _blocks("transformer.h"), "CAUSAL_LM", "attn", "mlp"
    ),
    "gpt_neox": Row(
        _of(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, BERT_LIKE),
        "decoder",
        _blocks("gpt_neox.layers"),
        "CAUSAL_LM",
        "attention",
        "mlp",
    ),
    "opt": Row(
        _of(hf.OPTForCausalLM, hf.OPTConfig, _OPT),
        "decoder",
        _blocks("model.decoder.layers"),
        "CAUSAL_LM",
        "self_attn",
        None,
    ),
    "bert": Row(
        _of(hf.BertModel, hf.BertConfig, BERT_LIKE), "encoder", _blocks(_BERT), "FEATURE_EXTRACTION", "attention", None
    ),
    "roberta": Row(
        _of(hf.RobertaModel, hf.RobertaConfig, BERT_LIKE),
        "encoder",
        _blocks(_BERT),
        "FEATURE_EXTRACTION",
        "attention",
        None,
    ),
    "modernbert": Row(
        _of(hf.ModernBertModel, hf.ModernBertConfig, _MODERNBERT),
        "encoder",
        _blocks("layers"),
        "FEATURE_EXTRACTION",
        "attn",
        "mlp",
    ),
    "bert_seq_cls": Row(
        _of(hf.BertForSequenceClassification, hf.BertConfig, BERT_LIKE, num_labels=3),
        "seq_cls",
        _blocks(f"bert.{_BERT}"),
        "SEQ_CLS",
        "attention",
        None,
    ),
    "llama_seq_cls": Row(
        _of(hf.LlamaForSequenceClassification, hf.LlamaConfig, LLAMA_LIKE, num_labels=3),
        "seq_cls",
        _LAYERS,
        "SEQ_CLS",
        "self_attn",
        "mlp",
    ),
    "roberta_token_cls": Row(
        _of(hf.RobertaForTokenClassification, hf.RobertaConfig, BERT_LIKE, num_labels=5),
        "token_cls",
        _blocks(f"roberta.{_BERT}"),
        "TOKEN_CLS",
        "attention",
        None,
    ),
    "t5": Row(
        _of(hf.T5ForConditionalGeneration, hf.T5Config, _T5),
        "encoder_decoder",
        _T5_BLOCKS,
        "SEQ_2_SEQ_LM",
        "layer.0.SelfAttention",
        "layer.1.DenseReluDense",
    ),
    "vit": Row(_of(hf.ViTModel, hf.ViTConfig, VISION), "vision", _blocks("layers", 2), None, "attention", "mlp"),
    "clip": Row(_clip, "two_stacks", _blocks("text_model.encoder.layers"), None, "self_attn", "mlp"),
    "llava": Row(_llava, "two_stacks", _blocks("model.language_model.layers"), "CAUSAL_LM", "self_attn", "mlp"),
    "plain": Row(PlainModel, "plain", _blocks("blocks")),
    "sequential": Row(SequentialModel, "plain", _blocks("blocks")),
}


def names_of(*kinds: str) -> list[str]:
    return [name for name, row in MODELS.items() if row.kind in kinds]


DECODERS = names_of("decoder")
ENCODERS = names_of("encoder")
CLASSIFIERS = names_of("seq_cls", "token_cls")
ENCODER_DECODERS = names_of("encoder_decoder")


def tiny(name: str, **overrides: Any) -> nn.Module:
    """A model of the table, the same for the same arguments, in eval mode and float32; overrides go to its config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name].build(**overrides)
    return model.float().eval()


def batch_for(name: str, batch: int = 2, length: int = 10) -> dict[str, Tensor]:
    """Inputs for `tiny(name)`: the last row's prompt is 3 tokens shorter, padded on the right, if there is a mask."""
    kind = MODELS[name].kind
    random = torch.Generator().manual_seed(1)
    if kind == "vision":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=random)}
    ids = torch.randint(3, VOCAB - 1, (batch, length), generator=random)
    if kind == "plain":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[-1, length - 3 :] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    if kind == "encoder_decoder":
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB - 1, (batch, 6), generator=random)
    if name == "clip":
        inputs["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=random)
    return inputs


def logits_of(output: Any) -> Tensor:
    """The tensor to compare, of whatever kind of model."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "logits_per_text"):
        if getattr(output, name, None) is not None:
            tensor: Tensor = getattr(output, name)
            return tensor
    raise TypeError(f"no logits in {type(output).__name__}")


@torch.no_grad()
def outputs_of(model: nn.Module, name: str, **kwargs: Any) -> Tensor:
    """What the model says to `batch_for(name)`."""
    return logits_of(model(**batch_for(name), **kwargs))
