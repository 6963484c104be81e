"""TRL's trainers with nothing but `peft_config=ReftConfig(...)`: one table; for each row, which tokens it edits."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from peft import get_peft_model
from torch import nn
from trainers import MODELS, Probe, adapter_of, base, check_saved, logged, reft, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import trimtab

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402  (TRL needs it)

COMPLETIONS = [
    {"prompt": "a cat is", "completion": " an animal"},
    {"prompt": "the word dog in the plural", "completion": " is dogs"},
] * 4
TALKS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in COMPLETIONS
]
PROMPTS = [{"prompt": row["prompt"]} for row in COMPLETIONS]
PREFERENCES = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " wood and stone"} for row in COMPLETIONS
]
JUDGED = [{**row, "label": i % 2 == 0} for i, row in enumerate(COMPLETIONS)]
MESSAGES = [{"messages": [*row["prompt"], *row["completion"]]} for row in TALKS]
ASKED = [{"prompt": row["prompt"]} for row in TALKS]


def told(trainer: type, method: str, lengths: Callable[..., Any]) -> type:
    """The trainer, saying where prompts end around a loss that calls the model without labels."""

    def call(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with trimtab.prompts(self.accelerator.unwrap_model(model), lengths(*args, **kwargs)):
            return getattr(super(subclass, self), method)(model, *args, **kwargs)

    subclass = type(trainer.__name__, (trainer,), {method: call})
    return subclass


def of_pairs(batch: dict[str, Any], *_: Any) -> torch.Tensor:
    return batch["prompt_attention_mask"].sum(1).repeat(2)  # chosen, then rejected


def of_prompts(inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
    return inputs["prompt_attention_mask"].sum(1)


def of_masks(inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
    return inputs["prompt_mask"].sum(1)


def of_rollouts(prompt_ids: Any, prompt_mask: torch.Tensor, *_: Any) -> torch.Tensor:
    return prompt_mask.sum(1)


def in_the_plural(completions: list[str], **_: Any) -> list[float]:
    """The bundled model knows plural, translation and kind of a word, and cannot know which is wanted."""
    return [float(text.strip().endswith("s")) for text in completions]


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@dataclass(frozen=True)
class Row:
    trainer: str
    """Of TRL, or `module.Trainer` of its experimental part."""
    data: list[dict[str, Any]]
    args: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    told: tuple[str, Callable[..., Any]] | None = None
    """The method that calls the model without labels, and the prompts' lengths by its arguments."""
    teacher: bool = False
    reference: bool = False
    """A reference runs beside the policy, by disabling the adapter."""
    reward: str | None = None
    """What is logged of the reward, for trainers that sample; their loss does not fall."""


GROUPS = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6}
TABLE = {
    "sft": Row("SFTTrainer", COMPLETIONS),
    "sft conversations": Row("SFTTrainer", TALKS),
    "sft packed": Row("SFTTrainer", COMPLETIONS, {"packing": True, "packing_strategy": "bfd", "max_length": 48}),
    "sft padding-free": Row("SFTTrainer", COMPLETIONS, {"padding_free": True, "max_length": None}),
    "dpo": Row("DPOTrainer", PREFERENCES, reference=True),
    "dpo precomputed": Row("DPOTrainer", PREFERENCES, {"precompute_ref_log_probs": True}),
    "dpo padding-free": Row("DPOTrainer", PREFERENCES, {"padding_free": True, "max_length": None}, reference=True),
    "dpo checkpointed": Row("DPOTrainer", PREFERENCES, {"gradient_checkpointing": True}, reference=True),
    "kto": Row("KTOTrainer", JUDGED, {"per_device_train_batch_size": 4}, reference=True),
    "reward": Row("RewardTrainer", PREFERENCES, config={"task_type": "SEQ_CLS", "modules_to_save": ["score"]}),
    "grpo": Row("GRPOTrainer", PROMPTS, {**GROUPS, "beta": 0.1, "num_iterations": 2}, {"reward_funcs": length},
                reference=True, reward="reward"),
    "rloo": Row("RLOOTrainer", PROMPTS, GROUPS, {"reward_funcs": length}, reference=True, reward="reward"),
    "orpo": Row("orpo.ORPOTrainer", PREFERENCES, told=("concatenated_forward", of_pairs)),
    "cpo": Row("cpo.CPOTrainer", PREFERENCES, told=("concatenated_forward", of_pairs)),
    "gkd": Row("gkd.GKDTrainer", MESSAGES, {"max_new_tokens": 6, "lmbda": 0.0}, teacher=True,
               told=("compute_loss", of_prompts)),
    "gkd on policy": Row("gkd.GKDTrainer", MESSAGES, {"max_new_tokens": 6, "lmbda": 1.0}, teacher=True,
                         told=("compute_loss", of_prompts)),
    "distillation": Row("DistillationTrainer", ASKED, {"max_completion_length": 6, "max_steps": 8, "save_steps": 8},
                        teacher=True, told=("_compute_loss", of_masks)),
    "online dpo": Row("online_dpo.OnlineDPOTrainer", PROMPTS, {"max_new_tokens": 6}, {"reward_funcs": length},
                      told=("_forward", of_rollouts), reference=True, reward="objective/scores"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODELS / "tiny-llama")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def classes(name: str) -> tuple[type, type]:
    """The trainer and its arguments."""
    module, _, trainer = name.rpartition(".")
    where = importlib.import_module(f"trl.experimental.{module}") if module else trl
    return getattr(where, trainer), getattr(where, trainer.replace("Trainer", "Config"))


def start(tokenizer: PreTrainedTokenizerBase, row: Row) -> nn.Module:
    if row.trainer == "RewardTrainer":
        return base(tokenizer, "llama_seq_cls", num_labels=1)
    return base(tokenizer)


def build(row: Row, folder: Path, tokenizer: PreTrainedTokenizerBase, silent: bool = False, **config: Any) -> Any:
    trainer, args = classes(row.trainer)
    if row.told and not silent:
        trainer = told(trainer, *row.told)
    torch.manual_seed(0)
    more = {**row.more, **({"teacher_model": teacher(tokenizer)} if row.teacher else {})}
    return trainer(
        start(tokenizer, row),
        args=args(**settings(folder, **{"seed": 3, **row.args})),
        train_dataset=Dataset.from_list(row.data),
        processing_class=tokenizer,
        peft_config=reft(**{**row.config, **config}),
        **more,
    )


def teacher(tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    torch.manual_seed(5)
    model = base(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.1)
    return model


def prompts_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[list[int]] | None:
    if row.trainer == "RewardTrainer":
        return None
    talks = [r.get("prompt") or r["messages"][:1] for r in row.data]
    found = [
        tokenizer(p)["input_ids"] if isinstance(p, str)
        else tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)
        for p in talks
    ]  # fmt: skip
    return [*found, *([tokenizer.bos_token_id, *p] for p in found)]  # which ORPO and CPO put first


@pytest.mark.parametrize("name", TABLE)
def test_trainer(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = TABLE[name]
    trainer = build(row, tmp_path, tokenizer)
    before = adapter_of(trainer.model)
    probe = Probe(trainer.model, prompts_of(row, tokenizer))
    trainer.train()
    probe.stop()
    assert all(not torch.equal(value, before[name]) for name, value in adapter_of(trainer.model).items())
    assert probe.seen["edited"] >= 6 and (probe.seen["reference"] > 0) == row.reference, probe.seen
    losses = logged(trainer)
    assert row.reward or sum(losses[-2:]) < 2 * losses[0]
    check_saved(trainer, start(tokenizer, row), tmp_path, trainer.state.global_step)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.reward])
def test_rewards_rise(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["cat", "dog", "tree", "horse", "river", "house", "book", "king"]
    row, data = TABLE[name], [{"prompt": f"<|user|>{word}<|assistant|>"} for word in words]
    steps = {"max_steps": 24, "learning_rate": 8e-3, "per_device_train_batch_size": 16, "save_strategy": "no"}
    drawn = {"max_new_tokens": 4} if "num_generations" not in row.args else {"num_generations": 8, "beta": 0.0}
    row = replace(row, data=data, args={**row.args, **steps, **drawn}, more={"reward_funcs": in_the_plural})
    monkeypatch.setattr("test_trl.start", lambda *_: AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llama"))
    trainer = build(row, tmp_path, tokenizer, init_weights=True, r=4)
    trainer.train()
    rewards = logged(trainer, row.reward or "")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:2]) / 2 + 0.2, rewards


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.told])
def test_a_loss_without_labels_is_refused(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"with trimtab\.prompts\(model, lengths\)"):
        build(TABLE[name], tmp_path, tokenizer, silent=True).train()


@pytest.mark.parametrize("name", ["grpo", "rloo", "online dpo"])
def test_sampling_through_vllm_is_refused(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is sampled from weights without the edits. A stand-in takes the place of vLLM's server."""
    online = "trl.experimental.online_dpo.online_dpo_trainer"
    for module in ("trl.generation.vllm_generation", online):
        monkeypatch.setattr(f"{module}.is_vllm_available", lambda: True)
        monkeypatch.setattr(f"{module}.VLLMClient", MagicMock())
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(f"{online}.SamplingParams", MagicMock(), raising=False)  # not there without vLLM
    served = {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_correction": False}
    known = classes(TABLE[name].trainer)[1].__dataclass_fields__
    args = {**TABLE[name].args, **{key: value for key, value in served.items() if key in known}}
    with pytest.raises(NotImplementedError, match=r"set use_vllm=False.*`trimtab serve MODEL --engine vllm`"):
        build(replace(TABLE[name], args=args), tmp_path, tokenizer).train()


def test_sft_is_the_same_packed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Without padding, and with it: the same steps."""
    losses = []
    for special in ({}, {"padding_free": True}):
        args = {"max_length": None, "shuffle_dataset": False, "save_strategy": "no", **special}
        trainer = build(Row("SFTTrainer", COMPLETIONS, args), tmp_path, tokenizer)
        trainer.train()
        losses.append(logged(trainer))
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4


@pytest.mark.parametrize("special", [{}, {"packing": True, "max_length": 48}])
def test_sft_on_plain_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, special: dict[str, Any]) -> None:
    """It has no prompt, so there is nothing to edit: that is said, with what to do; `all` edits every token."""
    row = Row("SFTTrainer", [{"text": row["prompt"] + row["completion"]} for row in COMPLETIONS], special)
    with pytest.raises(ValueError, match=r"every prompt in the batch is empty.*prompt-completion.*positions='all'"):
        build(row, tmp_path, tokenizer).train()
    trainer = build(row, tmp_path, tokenizer, positions="all")
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_the_policy_scores_as_it_samples(tokenizer: PreTrainedTokenizerBase) -> None:
    """GRPO's ratios are 1 before the first update: what was sampled with a cache, scored in one forward."""
    model = get_peft_model(base(tokenizer), reft()).eval()
    batch = tokenizer([row["prompt"] for row in PROMPTS[:2]], return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(0)
    drawn = model.generate(**batch, max_new_tokens=6, do_sample=True, output_logits=True, return_dict_in_generate=True)
    sampled = torch.stack(drawn.logits, 1).log_softmax(-1)
    width = batch["input_ids"].shape[1]
    mask = nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
    with torch.no_grad():
        scored = model(drawn.sequences, attention_mask=mask, prompt_lengths=batch["attention_mask"].sum(1)).logits
    assert (sampled - scored[:, width - 1 : -1].log_softmax(-1)).abs().max() < 5e-6
