"""What goes into PEFT's method_comparison: its position rule, and that PEFT reads the experiments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import ReftConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks/method_comparison"
sys.path.insert(0, str(FOLDER))

from reft import PromptEnds  # noqa: E402

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
MARKER = TEMPLATE.rpartition("{query}")[2]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "models/tiny-llama")


@pytest.mark.parametrize("experiment", sorted((FOLDER / "experiments/reft").iterdir()), ids=lambda path: path.name)
def test_an_experiment_is_a_config(experiment: Path) -> None:
    config = PeftConfig.from_pretrained(str(experiment))
    assert isinstance(config, ReftConfig) and experiment.name == f"llama-3.2-3B-rank{config.r}-{config.positions}"


def test_a_prompt_ends_behind_the_marker(tokenizer: Any) -> None:
    """Wherever its letters lie in tokens; in a prompt alone, that is its end."""
    ends = PromptEnds(tokenizer, MARKER)
    for query in ("What is 3 and 4?", "A cat has\nAnswer: none. Why?"):
        prompt = TEMPLATE.format(query=query)
        alone = tokenizer(prompt).input_ids
        assert ends(alone) == len(alone)
        for answer in ("To find it, add. The answer is: 7", " 7", "\n7", ""):
            ids = tokenizer(prompt + answer).input_ids
            told, before = tokenizer.decode(ids[: ends(ids)]), tokenizer.decode(ids[: ends(ids) - 1])
            assert MARKER in told and MARKER not in before
    assert ends(tokenizer("no such thing").input_ids) == len(tokenizer("no such thing").input_ids)


def test_joint_tokens() -> None:
    """The token that completes the marker counts, with what it holds beyond."""

    class Words:
        def decode(self, ids: list[int]) -> str:
            return ["<s>", "3?", ".\n", "Answer", ":To", " add"][ids[0]]

    assert PromptEnds(Words(), "\nAnswer:")([0, 1, 2, 3, 4, 5]) == 5


def test_a_model_is_told(tokenizer: Any) -> None:
    """Labels on every real token, as in PEFT's loop: the same loss as with the lengths given."""
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny-llama", dtype="float32")
    torch.manual_seed(0)
    config = ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights="paper")
    model = get_peft_model(base, config).train()
    texts = [TEMPLATE.format(query=query) + answer for query, answer in (("a cat?", "Two. Or three."), ("why?", "No"))]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    lengths = [len(tokenizer(TEMPLATE.format(query=query)).input_ids) for query in ("a cat?", "why?")]
    expected = model(**batch, labels=labels, prompt_lengths=lengths).loss
    with pytest.raises(ValueError, match="every prompt in the batch is empty"):
        model(**batch, labels=labels)
    PromptEnds(tokenizer, MARKER).tell(model)
    assert model(**batch, labels=labels, num_items_in_batch=None).loss == expected
    model.eval()(**batch)  # as their test of what is forgotten calls it, of texts without a prompt
