"""Models whose input is audio: masks count frames, and Whisper's `generate` decodes several prompts in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from trimtab import ReftConfig
from trimtab.adapter.forward import Pass

Edited = list[tuple[int, list[int]]]
"""Of the calls that edit the decoder: how many columns, and which of them in the first row."""


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> Edited:
    found: Edited = []
    original = Pass.rows

    def rows(self: Pass, adapter: str, positions: Any, hidden: Tensor, parts: Any) -> Any:
        result = original(self, adapter, positions, hidden, parts)
        if result is not None:
            found.append((hidden.shape[1], result.flat[0][result.valid[0, :, 0]].tolist()))
        return result

    monkeypatch.setattr(Pass, "rows", rows)
    return found


def adapted(base: nn.Module, **fields: Any) -> PeftModel:
    return get_peft_model(base.eval(), ReftConfig(r=2, positions="f2+l1", init_weights="paper", **fields))


def whisper(layers: list[int]) -> PeftModel:
    """Blocks 0 and 1 are the encoder's, over 20 states of 40 frames; 2 and 3 are the decoder's."""
    common = {"vocab_size": 96, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 20}
    sizes = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in SIZES.items()}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    none = {"suppress_tokens": None, "begin_suppress_tokens": None}
    base = hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**common, **sizes, **ids, **none, max_target_positions=40)
    )
    base.generation_config = hf.GenerationConfig(
        is_multilingual=True,
        lang_to_id={"<|en|>": 50, "<|de|>": 51},
        task_to_id={"transcribe": 60},
        no_timestamps_token_id=70,
        prev_sot_token_id=4,
        max_initial_timestamp_index=None,
        **ids,
        **none,
    )
    return adapted(base, layers=layers)


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


@pytest.mark.parametrize("use_cache", [True, False])
def test_whisper_detects_the_language_and_then_has_another_prompt(edited: Edited, use_cache: bool) -> None:
    whisper([2]).generate(input_features=torch.randn(2, 8, 40), max_new_tokens=4, use_cache=use_cache)
    assert edited[:2] == [(1, [0]), (3, [0, 1, 2])]
    assert all(columns == [0, 1, 2] for _, columns in edited[1:])


def test_whisper_has_a_prompt_for_each_segment(edited: Edited) -> None:
    whisper([2]).generate(
        input_features=torch.randn(1, 8, 100),
        attention_mask=torch.ones(1, 100, dtype=torch.long),
        language="en",
        return_timestamps=True,
        max_new_tokens=4,
        condition_on_prev_tokens=True,
    )
    assert len(edited) > 1
    assert edited == [(length, [0, 1, length - 1]) for length, _ in edited]


def test_a_mask_over_frames_does_not_count_states(edited: Edited) -> None:
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, 30:] = 0  # silence, which Whisper's encoder hears like anything else
    features = torch.randn(1, 8, 40)
    model = whisper([0])
    model.generate(input_features=features, attention_mask=mask, language="en", max_new_tokens=2)
    model(input_features=features, decoder_input_ids=torch.tensor([[3]]))
    assert edited == [(20, [0, 1, 19])] * 2


def test_padded_audio_needs_lengths_for_a_suffix(edited: Edited) -> None:
    config = hf.Wav2Vec2Config(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(4, 4),
        conv_kernel=(8, 8),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = adapted(hf.Wav2Vec2ForCTC(config), layers=[0])
    batch = {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400, dtype=torch.long)}
    model(**batch)
    batch["attention_mask"][0, 300:] = 0
    with pytest.raises(ValueError, match=r"f2\+l1.*Pass prompt_lengths"):
        model(**batch)
    model(**batch, prompt_lengths=[17, 23])
    assert edited == [(23, [0, 1, 22]), (23, [0, 1, 16])]
