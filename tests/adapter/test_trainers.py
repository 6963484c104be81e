"""transformers' own trainers and pipelines, as they are, on tiny models, offline."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import VOCAB
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from trainers import MODELS, adapter_of, base, check_saved, logged, reft, settings
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    pipeline,
)

from trimtab import prompts, with_prompts


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
    args, data = TrainingArguments(**settings(folder, seed=3, **more)), Dataset.from_list(answers())
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=pad)


@pytest.mark.parametrize("special", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_trainer(tmp_path: Path, special: dict[str, Any]) -> None:
    trainer = causal_trainer(tmp_path, **special)
    before = adapter_of(trainer.model)
    trainer.train()
    after = adapter_of(trainer.model)
    assert logged(trainer)[-1] < logged(trainer)[0]
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
    assert logged(resumed)[-3:] == logged(whole)[-3:]


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
    assert logged(trainer)[-1] < logged(trainer)[0]
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
        ways[way] = [evaluated, *logged(trainer)]
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


# ---- other heads, trainers and what they bring --------------------------------------------------------------------


def questions(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = pad([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows])
    where = torch.tensor([len(row["input_ids"]) % 3 for row in rows])
    return {k: v for k, v in batch.items() if k != "labels"} | {"start_positions": where, "end_positions": where + 1}


def tags(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = pad([{"input_ids": row["input_ids"], "labels": [i % 3 for i in row["input_ids"]]} for row in rows])
    return batch


def qa(**_: Any) -> nn.Module:
    torch.manual_seed(0)
    return BertForQuestionAnswering(BertConfig(**SMALL_BERT))


SMALL_BERT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 48, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("task_type", "build", "collate"),
    [("QUESTION_ANS", qa, questions), ("TOKEN_CLS", lambda: base(name="roberta_token_cls"), tags)],
)
def test_heads_of_encoders(tmp_path: Path, task_type: str, build: Any, collate: Any) -> None:
    """The whole input is the prompt, whatever the labels; the head is trained, and both come back."""
    model = get_peft_model(build(), reft(task_type=task_type))
    data = Dataset.from_list(answers())
    args = TrainingArguments(**settings(tmp_path, max_steps=6, save_steps=6, remove_unused_columns=False))
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, data_collator=collate)
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]
    loaded = PeftModel.from_pretrained(build(), tmp_path / "checkpoint-6").eval()
    batch = collate(answers())
    trained, again = model.eval()(**batch), loaded(**batch)
    assert torch.equal(trained.loss, again.loss) and torch.equal(trained[1], again[1])
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    assert torch.equal(loaded(**inputs)[0], again[1])  # labels say nothing of where an encoder's prompt ends


def test_seq2seq_trainer(tmp_path: Path) -> None:
    """Generation within evaluation edits as `generate` does."""
    shape = {"num_decoder_layers": 2}  # as many as the encoder has: transformers' cache counts those
    model = get_peft_model(base(name="t5", **shape), reft(task_type="SEQ_2_SEQ_LM"))
    args = Seq2SeqTrainingArguments(
        **settings(tmp_path, predict_with_generate=True, generation_max_length=6, save_strategy="no")
    )
    data = Dataset.from_list(answers())
    trainer = Seq2SeqTrainer(model, args, train_dataset=data, eval_dataset=data, data_collator=seq2seq)
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]
    predicted = torch.tensor(trainer.predict(data).predictions)
    batch = seq2seq(answers())
    alone = model.eval().generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=6, do_sample=False
    )
    assert torch.equal(predicted[:, : alone.shape[1]], alone)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """The highest loss counts as best here, so that the best checkpoint is the first."""
    trainer = causal_trainer(
        tmp_path,
        max_steps=6,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert trainer.state.best_metric == losses[0] > losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-6)


@pytest.mark.slow
def test_a_compiled_trainer_takes_the_same_steps(tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(base(), reft())
        args = TrainingArguments(**settings(tmp_path, save_strategy="no", torch_compile=compiled, seed=3))
        trainer = Trainer(model, args, train_dataset=Dataset.from_list(answers()), data_collator=pad)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_pipelines(tmp_path: Path) -> None:
    """Of a loaded adapter: what `generate` and the classifier's own forward give, in batches too."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-llama")
    texts = ["<|user|>cat<|assistant|>", "<|user|>a house and<|assistant|>"]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llama"), reft(positions="f1+l2")).eval()
    model.save_pretrained(tmp_path / "words")
    loaded = AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llama")
    loaded.load_adapter(str(tmp_path / "words"))
    expected = [
        tokenizer.decode(model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5)[0]) for text in texts
    ]
    for size, whose in ((1, model), (2, model), (2, loaded)):
        write = pipeline("text-generation", whose, tokenizer=tokenizer, batch_size=size)
        written = write(texts, max_new_tokens=5, do_sample=False, skip_special_tokens=False, return_full_text=True)
        found = [row[0]["generated_text"] for row in written]
        assert [t.removesuffix("<|end|>") for t in found] == [t.removesuffix("<|end|>") for t in expected]

    judge = get_peft_model(base(tokenizer, "llama_seq_cls"), reft(task_type="SEQ_CLS")).eval()
    classify = pipeline("text-classification", judge, tokenizer=tokenizer, batch_size=2, top_k=None)
    for text, rows in zip(texts, classify(texts), strict=True):
        alone = judge(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].sort(descending=True).values
        assert [row["score"] for row in rows] == pytest.approx(alone.tolist(), abs=1e-5)
