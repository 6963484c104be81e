"""What an adapter costs while decoding: nothing, counted in operations."""

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import tiny
from peft import PeftModel, get_peft_model
from torch.profiler import ProfilerActivity, profile

from trimtab import ReftConfig


def decode_operations(model: Any, batch: int) -> Counter[str]:
    """Tensor operations of one decode step after a left-padded prompt."""
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (batch, 12))
    mask = torch.ones(batch, 13, dtype=torch.long)
    mask[1:, :3] = 0
    step = torch.randint(3, 90, (batch, 1))
    with torch.no_grad():
        past = model(input_ids=ids, attention_mask=mask[:, :12], use_cache=True).past_key_values
        with profile(activities=[ProfilerActivity.CPU]) as record:
            model(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True)
    return Counter(event.name for event in record.events() if event.name.startswith("aten::"))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_prompt_only_adapter_adds_no_operation_to_a_decode_step(name: str, batch: int, tmp_path: Any) -> None:
    config = ReftConfig(task_type="CAUSAL_LM", positions="f2+l3", init_weights="paper")
    get_peft_model(tiny(name), config).save_pretrained(str(tmp_path))
    adapted = PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval()
    assert decode_operations(adapted, batch) == decode_operations(tiny(name), batch)


def test_the_count_would_show_an_edit_of_generated_tokens() -> None:
    config = ReftConfig(task_type="CAUSAL_LM", positions="all", init_weights="paper", inference_mode=True)
    adapted = get_peft_model(tiny("llama"), config).requires_grad_(False)
    assert (decode_operations(adapted, 2) - decode_operations(tiny("llama"), 2)).total() > 0
