"""The trainers people use, as they are: transformers' and TRL's, on tiny models, offline."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, tiny
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from trimtab import ReftConfig, prompts, with_prompts
from trimtab.adapter.running import Forwards
from trimtab.adapter.tuner import ReftLayer
from trimtab.edits.orthonormal import orthonormality_error

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402  (TRL needs it)

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODELS / "tiny-llama")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base(tokenizer: PreTrainedTokenizerBase | None = None, name: str = "llama", **overrides: Any) -> nn.Module:
    if tokenizer is not None:
        overrides |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "num_hidden_layers": 2}
    return tiny(name, **overrides)


def reft(**config: Any) -> ReftConfig:
    return ReftConfig(**{"task_type": "CAUSAL_LM", "r": 2, "positions": "f2+l3", "init_weights": "paper", **config})


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    steps = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}
    shown = {"output_dir": str(folder), "report_to": [], "logging_steps": 1, "disable_tqdm": True}
    return {**steps, **shown, "use_cpu": True, "bf16": False, "save_steps": 3, "weight_decay": 0.1, **more}


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "reft_" in n}


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def check_saved(trainer: Any, fresh_base: nn.Module, folder: Path) -> None:
    """The checkpoint, loaded on a new base, is the very model that was trained."""
    trained = trainer.model.eval()
    (checkpoint,) = folder.glob("checkpoint-3")
    loaded = PeftModel.from_pretrained(fresh_base, checkpoint).eval()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)
    with loaded.disable_adapter():
        assert not torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)
    for layer in (m for m in trained.modules() if isinstance(m, ReftLayer)):
        assert orthonormality_error(layer.edits("default")["edit"].rotation()) < 1e-6


# ---- transformers ----------------------------------------------------------------------------------------------------


def answers(count: int = 8) -> list[dict[str, list[int]]]:
    """Prompts of several lengths, whose answer is always the same."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        prompt = torch.randint(5, VOCAB, (3 + i % 4 * 2,), generator=random).tolist()
        rows.append({"input_ids": [*prompt, 7, 8, 2], "labels": [-100] * len(prompt) + [7, 8, 2]})
    return rows


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    full = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {k: torch.tensor([row[k] + [v] * (width - len(row[k])) for row in full]) for k, v in fill.items()}


def causal_trainer(folder: Path, **more: Any) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(base(), reft(dropout=0.1))
    args = TrainingArguments(**settings(folder, seed=3, **more))
    return Trainer(model=model, args=args, train_dataset=Dataset.from_list(answers()), data_collator=pad)


@pytest.mark.parametrize("special", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_trainer(tmp_path: Path, special: dict[str, Any]) -> None:
    trainer = causal_trainer(tmp_path, **special)
    before = adapter_of(trainer.model)
    trainer.train()
    after = adapter_of(trainer.model)
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    assert all(not torch.equal(before[name], after[name]) for name in before)
    check_saved(trainer, base(), tmp_path)


def test_trainer_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    whole = causal_trainer(tmp_path / "whole", max_steps=6, save_steps=3)
    whole.train()
    stopped = causal_trainer(tmp_path / "parts", max_steps=3, save_steps=3)
    stopped.train()
    resumed = causal_trainer(tmp_path / "parts", max_steps=6, save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    expected = adapter_of(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in adapter_of(resumed.model).items())
    assert losses_of(resumed)[-3:] == losses_of(whole)[-3:]


@pytest.mark.parametrize(("name", "head"), [("bert_seq_cls", "classifier"), ("llama_seq_cls", "score")])
@pytest.mark.parametrize("said", [True, False])
def test_classification(tmp_path: Path, name: str, head: str, said: bool) -> None:
    """The head is trained and saved too, named in modules_to_save or not, and scores the same when loaded."""
    rows = [{"input_ids": row["input_ids"], "labels": len(row["input_ids"]) % 3} for row in answers(9)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        padded = pad([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in batch])
        return {**padded, "labels": torch.tensor([row["labels"] for row in batch])}

    torch.manual_seed(0)
    config = reft(task_type="SEQ_CLS", modules_to_save=[head] if said else None)
    model = get_peft_model(base(name=name), config)
    head_before = {n: p.clone() for n, p in model.named_parameters() if f"{head}.modules_to_save" in n}
    assert head_before
    data = Dataset.from_list(rows)
    args = TrainingArguments(**settings(tmp_path, max_steps=4, save_steps=4, per_device_train_batch_size=9))
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=collate)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    assert all(not torch.equal(p, head_before[n]) for n, p in model.named_parameters() if n in head_before)
    (checkpoint,) = tmp_path.glob("checkpoint-4")
    loaded = PeftModel.from_pretrained(base(name=name), checkpoint)
    again = Trainer(model=loaded, args=args, eval_dataset=data, data_collator=collate)
    assert torch.equal(torch.tensor(again.predict(data).predictions), torch.tensor(trainer.predict(data).predictions))
    assert again.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


# ---- trainers that take the labels away ----------------------------------------------------------------------------


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    if logits.shape[1] == labels.shape[1] and labels[0, 0] == -100:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


TAKES_AWAY: dict[str, dict[str, Any]] = {
    "compute_loss_func": {"compute_loss_func": cross_entropy},
    "label_smoothing": {"label_smoothing_factor": 1e-9},
}


def pad_free(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """One row; the first label of each sequence is ignored, as in transformers' flattening collator."""
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row["input_ids"]]]),
        "labels": torch.tensor([[i for row in rows for i in [-100, *row["labels"][1:]]]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row["labels"]))]]),
    }


def seq2seq(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    batch = pad([{"input_ids": row["input_ids"][:-3], "labels": row["labels"][:-3]} for row in rows])
    labels = torch.tensor([row["labels"][-3:] for row in rows])
    return {**batch, "labels": labels, "decoder_input_ids": nn.functional.pad(labels[:, :-1], (1, 0), value=0)}


def bart() -> nn.Module:
    sizes = {f"{half}_{part}": n for half in ("encoder", "decoder") for part, n in BART.items()}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, d_model=32, pad_token_id=0, **sizes, dropout=0.0))


BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def takes_away(folder: Path, collate: Any, name: str, positions: str, special: dict[str, Any]) -> Trainer:
    torch.manual_seed(0)
    config = reft(positions=positions, task_type="CAUSAL_LM" if name == "llama" else "SEQ_2_SEQ_LM")
    model = get_peft_model(bart() if name == "bart" else base(name=name), config)
    function = special.get("compute_loss_func")
    rest = {k: v for k, v in special.items() if k != "compute_loss_func"}
    args = TrainingArguments(**settings(folder, save_strategy="no", per_device_eval_batch_size=4, **rest))
    data = Dataset.from_list(answers())
    return Trainer(
        model, args, train_dataset=data, eval_dataset=data, data_collator=collate, compute_loss_func=function
    )


@pytest.mark.parametrize("special", TAKES_AWAY)
@pytest.mark.parametrize("positions", ["f2+l2", pytest.param("generated", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "collate"), [("llama", pad), ("llama", pad_free), ("t5", seq2seq), ("bart", seq2seq)])
def test_labels_that_are_taken_away(tmp_path: Path, name: str, collate: Any, positions: str, special: str) -> None:
    """Told by the collator, the model edits as with labels: the same losses, in training and evaluation."""
    ways = {}
    for way, how in {"plain": {}, "told": TAKES_AWAY[special]}.items():
        trainer = takes_away(tmp_path, with_prompts(collate) if how else collate, name, positions, how)
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.train()
        ways[way] = [evaluated, *losses_of(trainer)]
    assert ways["told"] == pytest.approx(ways["plain"], abs=2e-4)
    untold = takes_away(tmp_path, collate, name, positions, TAKES_AWAY[special])
    if name == "llama":
        with pytest.raises(ValueError, match=r"data_collator=trimtab\.with_prompts\(collator\)"):
            untold.train()


def test_a_guess_is_said_once(tmp_path: Path) -> None:
    model = get_peft_model(base(), reft()).eval()
    ids = torch.arange(3, 12)[None]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.generate(ids, max_new_tokens=2)
        model(input_ids=ids, labels=ids.masked_fill(ids < 8, -100))
        model(input_ids=ids, prompt_lengths=[4])
        with prompts(model, [4]):
            model(input_ids=ids)
        assert not [w for w in said if "whole input is taken for the prompt" in str(w.message)]
        model(input_ids=ids)
        model(input_ids=ids)
    assert len([w for w in said if "whole input is taken for the prompt" in str(w.message)]) == 1


@pytest.mark.parametrize("part", ["peft", "base", "inner"])
def test_a_loss_that_calls_the_model_by_itself(part: str) -> None:
    """As TRL's distillation does with the backbone."""
    model = get_peft_model(base(), reft()).train()
    whole: Any = model.get_base_model()
    called = {"peft": model, "base": whole, "inner": whole.model}[part]
    ids = torch.arange(3, 12)[None]
    states = lambda out: out.last_hidden_state if part == "inner" else out.hidden_states[-1]  # noqa: E731
    expected = model(input_ids=ids, prompt_lengths=[5], output_hidden_states=True).hidden_states[-1]
    with prompts(model, [5]):
        assert torch.equal(states(called(input_ids=ids, output_hidden_states=True)), expected)
    with pytest.raises(ValueError, match=r"with trimtab\.prompts\(model, lengths\)"):
        called(input_ids=ids)
    with pytest.raises(ValueError, match="no ReFT adapter"), prompts(base(), [5]):
        pass


# ---- TRL -------------------------------------------------------------------------------------------------------------

COMPLETIONS = [
    {"prompt": "a cat is", "completion": " an animal"},
    {"prompt": "the word dog in the plural", "completion": " is dogs"},
] * 4
PREFERENCES = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " wood and stone"} for row in COMPLETIONS
]


def sft(
    folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Any], config: ReftConfig | None = None, **more: Any
) -> Any:
    return trl.SFTTrainer(
        base(tokenizer),
        args=trl.SFTConfig(**settings(folder, **more)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config or reft(),
    )


@pytest.mark.parametrize(
    "special", [{}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 48}]
)
def test_sft(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, special: dict[str, Any]) -> None:
    trainer = sft(tmp_path, tokenizer, COMPLETIONS, **special)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    check_saved(trainer, base(tokenizer), tmp_path)


def test_sft_is_the_same_packed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Without padding, and with it: the same steps."""
    trainers = [
        sft(tmp_path, tokenizer, COMPLETIONS, max_length=None, shuffle_dataset=False, save_strategy="no", **special)
        for special in ({}, {"padding_free": True})
    ]
    for trainer in trainers:
        trainer.train()
    assert max(abs(a - b) for a, b in zip(*map(losses_of, trainers), strict=True)) < 1e-4


@pytest.mark.parametrize("special", [{}, {"packing": True, "max_length": 48}])
def test_sft_on_plain_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, special: dict[str, Any]) -> None:
    """It has no prompt, so there is nothing to edit: that is said, with what to do; `all` edits every token."""
    rows = [{"text": row["prompt"] + row["completion"]} for row in COMPLETIONS]
    with pytest.raises(ValueError, match=r"every prompt in the batch is empty.*prompt-completion.*positions='all'"):
        sft(tmp_path, tokenizer, rows, **special).train()
    trainer = sft(tmp_path, tokenizer, rows, reft(positions="all"), **special)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


def test_sft_on_conversations(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in COMPLETIONS
    ]
    trainer = sft(tmp_path, tokenizer, rows)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


@pytest.mark.parametrize("special", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}])
def test_dpo(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, special: dict[str, Any]) -> None:
    """The reference is the model with its adapter disabled."""
    trainer = trl.DPOTrainer(
        base(tokenizer),
        args=trl.DPOConfig(**settings(tmp_path, **special)),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
        peft_config=reft(),
    )
    before = adapter_of(trainer.model)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in adapter_of(trainer.model).items())
    assert losses_of(trainer)[-1] < 0.7 and losses_of(trainer)[-1] < losses_of(trainer)[0]
    check_saved(trainer, base(tokenizer), tmp_path)


def test_reward(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def build() -> nn.Module:
        return base(tokenizer, "llama_seq_cls", num_labels=1)

    trainer = trl.RewardTrainer(
        build(),
        args=trl.RewardConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
        peft_config=reft(task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    check_saved(trainer, build(), tmp_path)


def test_grpo(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-prob passes hand over labels, -100 on the prompt: the prompt ends where it did while sampling."""
    ends: list[list[int]] = []
    original = Forwards._pass

    def spy(self: Forwards, role: Any, arguments: dict[str, Any], call: Any) -> Any:
        result = original(self, role, arguments, call)
        if arguments.get("labels") is not None:
            ends.append(result.prompt.lengths.tolist())
        return result

    monkeypatch.setattr(Forwards, "_pass", spy)
    trainer = trl.GRPOTrainer(
        base(tokenizer),
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        args=trl.GRPOConfig(
            **settings(tmp_path, per_device_train_batch_size=4),
            num_generations=2,
            max_completion_length=6,
            beta=0.1,
            num_iterations=2,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in COMPLETIONS]),
        processing_class=tokenizer,
        peft_config=reft(),
    )
    before = adapter_of(trainer.model)
    trainer.train()
    allowed = {len(tokenizer(row["prompt"])["input_ids"]) for row in COMPLETIONS}
    assert ends and {n for rows in ends for n in rows} == allowed and len(allowed) == 2
    assert all(not torch.equal(value, before[name]) for name, value in adapter_of(trainer.model).items())
    check_saved(trainer, base(tokenizer), tmp_path)
