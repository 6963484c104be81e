"""The recipes of the LoReFT paper: they run by name on data in the real files' formats, with the paper's parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)
from typer.testing import CliRunner

from trimtab import ReftConfig
from trimtab.cli import app
from trimtab.errors import RecipeError
from trimtab.recipe.load import SHIPPED, load_recipe
from trimtab.runs.predict import predict
from trimtab.tasks.tokens import encode

TOKENIZER = Path(__file__).parents[2] / "models/tiny-llama"
SMALL = ["training.epochs=null", "training.max_steps=2", "training.batch_size=2", "training.gradient_accumulation=1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama of 25 blocks, since `instruct` edits block 24, and a random RoBERTa."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**size, **special, num_hidden_layers=25)),
        "roberta": RobertaForMaskedLM(RobertaConfig(**size, **special, num_hidden_layers=2)),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, model in made.items():
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def write(path: Path, content: str | list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def row(instruction: str, answer: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


COMMONSENSE = {
    "BoolQ": ("boolq", "true"),
    "PIQA": ("piqa", "solution1"),
    "SIQA": ("social_i_qa", "answer3"),
    "HellaSwag": ("hellaswag", "ending4"),
    "WinoGrande": ("winogrande", "option2"),
    "ARC-e": ("ARC-Easy", "answer1"),
    "ARC-c": ("ARC-Challenge", "answer2"),
    "OBQA": ("openbookqa", "answer4"),
}
ARITHMETIC = ["AQuA", "gsm8k", "mawps", "SVAMP", "MultiArith", "AddSub", "SingleEq"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of the files that the recipes name, two or so rows each."""
    folder = tmp_path / "data"
    choices = {
        name: row(f"Please choose.\n\nAnswer format: {answer}/other", answer, f"the correct answer is {answer}")
        for name, (_, answer) in COMMONSENSE.items()
    }
    write(folder / "ft-training_set/commonsense_170k.json", list(choices.values()))
    for name, (place, _) in COMMONSENSE.items():
        write(folder / f"dataset/{place}/test.json", [choices[name]] * 2)
    write(
        folder / "ft-training_set/math_10k.json",
        [
            row("3 + 4?", "7.0", "\nA: 3 + 4 = 7. The answer is 7."),
            row("Which? Answer Choices: (A) one (B) two", "B", "two is right. The answer is (B)."),  # no number
            row("5 - 2?", "3.0", ""),
        ],
    )
    for place in ARITHMETIC:
        answer = "A" if place == "AQuA" else "8.0"
        write(folder / f"dataset/{place}/test.json", [row("4 + 4?", answer, "" if place == "mawps" else "so 9")] * 2)
    both = [row("Name a colour.", "", "Red."), {"instruction": "Shout.", "input": "hello", "output": "HELLO " * 999}]
    write(
        folder / "ultrafeedback.json", "".join(json.dumps(r) + "\n" for r in both)
    )  # JSON lines, as pyreft's sample is
    asked = {"dataset": "koala", "instruction": "Name a fish.", "output": "Cod.", "generator": "text_davinci_003"}
    write(folder / "alpaca_eval.json", [asked, {**asked, "output": ""}])

    def table(name: str, header: str, *lines: str, dev: str = "dev") -> None:
        for split in ("train", dev):
            write(folder / name / f"{split}.tsv", "\n".join([*([header] if header else []), *lines]) + "\n")

    mnli = "index\tpairID\tsentence1\tsentence2\tlabel1\tgold_label"
    labels = ("entailment", "neutral", "contradiction")
    table("MNLI", mnli, *(f"{i}\tp\ta\tb\tneutral\t{label}" for i, label in enumerate(labels)), dev="dev_matched")
    table("SST-2", "sentence\tlabel", 'a "fine film \t1', "dull \t0")
    table("MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t1\t2\ta\tb", "0\t3\t4\tc\td")
    table("CoLA", "", "gj04\t1\t\tThe sailors rode.", "gj04\t0\t*\tThe rode sailors.")
    table("QNLI", "index\tquestion\tsentence\tlabel", "0\tq\ts\tentailment", "1\tq\ts\tnot_entailment")
    torn = ("2\t5\t6\tin two", "lines\tb\t1")
    table("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\ta\tb\t0", "1\t3\t4\tc\t\t1", *torn)
    table("RTE", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment", "1\ta\tb\tnot_entailment")
    stsb = "index\tsentence1\tsentence2\tscore"
    table("STS-B", stsb, "0\ta\tb\t5.000", "1\ta\tc\t2.25", "2\td\tc\t0.5")
    return folder


def trimtab(*arguments: object, settings: list[str] | tuple[str, ...] = ()) -> str:
    sets = [part for setting in settings for part in ("--set", setting)]
    result = CliRunner().invoke(app, [*map(str, arguments), *sets], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("commonsense", list(COMMONSENSE)),
        ("arithmetic", [{"gsm8k": "GSM8K", "mawps": "MAWPS"}.get(s, s) for s in ARITHMETIC]),
    ],
)
def test_a_recipe_of_several_sets_runs(
    name: str, sets: list[str], models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    settings = [*SMALL, f"tasks.{name}.max_new_tokens=4", "dtype=float32"]
    options = ["--model", models["llama"], "--data", data, "--output", tmp_path / "runs"]
    shown = trimtab("train", name, *options, settings=settings)
    metrics = json.loads((tmp_path / f"runs/{name}/metrics.json").read_text())
    assert list(metrics["sets"]) == list(metrics["tuned"])[1:] == sets
    assert metrics["examples"] == 2 * len(sets)
    assert f"mean of {len(sets)}" in shown
    again = trimtab("eval", name, *options, settings=settings)
    for label in sets:
        assert label in shown and label in again
    if name == "arithmetic":
        assert (metrics["train_examples"], metrics["left_out_as_bad"]) == (2, 1)
        assert {s: m["score"] for s, m in metrics["sets"].items() if m["score"] != "number"} == {"AQuA": "choice"}


def test_instruct_runs_and_writes_what_alpaca_eval_reads(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    settings = [*SMALL, "tasks.instruct.max_new_tokens=6", "dtype=float32"]
    options = ["--model", models["llama"], "--data", data, "--output", tmp_path / "runs"]
    trimtab("train", "instruct", *options, settings=settings)
    metrics = json.loads((tmp_path / "runs/instruct/metrics.json").read_text())
    assert (metrics["train_examples"], metrics["left_out_as_too_long"]) == (2, 1)  # too long, so cut
    trimtab("outputs", tmp_path / "runs/instruct", "-o", tmp_path / "out.json", "--generator", "mine")
    predicted = json.loads((tmp_path / "runs/instruct/predictions.json").read_text())["tuned"]
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"instruction": "Name a fish.", "output": text.strip(), "generator": "mine", "dataset": "koala"}
        for text in predicted
    ]
    with pytest.raises(FileExistsError, match="is there already"):
        trimtab("outputs", tmp_path / "runs/instruct", "-o", tmp_path / "out.json")
    write(data / "alpaca_eval.json", [{"instruction": "Other.", "output": "x"}])
    with pytest.raises(ValueError, match="2 answers to 1 test rows; the data has changed"):
        trimtab("outputs", tmp_path / "runs/instruct", "-o", tmp_path / "other.json")
    with pytest.raises(ValueError, match="no run of trimtab there"):
        trimtab("outputs", tmp_path, "-o", tmp_path / "other.json")


def test_glue_runs(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    tasks = load_recipe("glue", data=data).tasks
    settings = [f"tasks.{t}.training.{s}" for t in tasks for s in ("epochs=null", "max_steps=2")]
    options = ["--model", models["roberta"], "--data", data, "--output", tmp_path / "runs"]
    trimtab("train", "glue", *options, settings=settings)
    metrics = {task: json.loads((tmp_path / f"runs/{task}/metrics.json").read_text()) for task in tasks}
    assert list(metrics) == ["MNLI", "SST-2", "MRPC", "CoLA", "QNLI", "QQP", "RTE", "STS-B"]
    assert {task: m["score"] for task, m in metrics.items() if m["score"] != "accuracy"} == {
        "CoLA": "mcc",
        "STS-B": "pearson",
    }
    assert {task: m["train_examples"] for task, m in metrics.items() if m["train_examples"] != 2} == {
        "MNLI": 3,
        "STS-B": 3,
    }  # and 2 of QQP, whose torn question is left out


def test_glue_large_differs_from_base_in_the_values_of_the_papers_table(data: Path) -> None:
    base, large = (load_recipe(name, data=data).tasks for name in ("glue", "glue-large"))
    assert list(base) == list(large)
    values = [
        (t.training.learning_rate, t.training.warmup, t.training.epochs, t.adapter.dropout) for t in large.values()
    ]
    assert values[0] == (6e-4, 0.0, 20, 0.05)
    assert values[3] == (1e-4, 0.2, 30, 0.2)
    assert values[7] == (8e-4, 0.2, 30, 0.05)
    assert [t.adapter.positions for t in large.values()] == ["f1", "f3", "f3", "f3", "f11", "f11", "f3", "f3"]
    same = {"adapter", "training"}
    assert [t.model_dump(exclude=same) for t in base.values()] == [t.model_dump(exclude=same) for t in large.values()]


def llama(width: int, blocks: int, heads: int, inner: int, vocabulary: int = 32000, kv_heads: int | None = None) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads,
            intermediate_size=inner,
            vocab_size=vocabulary,
        )
    )


def roberta(width: int, blocks: int, heads: int) -> Any:
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=50265,
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=514,
            type_vocab_size=1,
        )
    )


LLAMA_7B = (4096, 32, 32, 11008)
COUNTS = [  # the recipe, the model, its parameters, the paper's share of them
    ("commonsense", lambda: llama(*LLAMA_7B), 6_738_415_616, "0.031"),
    ("commonsense", lambda: llama(5120, 40, 40, 13824), 13_015_864_320, "0.025"),
    ("commonsense", lambda: llama(4096, 32, 32, 14336, 128256, 8), 8_030_261_248, "0.026"),
    ("arithmetic", lambda: llama(*LLAMA_7B), 6_738_415_616, "0.031"),
    ("instruct", lambda: llama(*LLAMA_7B), 6_738_415_616, "0.0039"),
    ("glue", lambda: roberta(768, 12, 12), 124_647_170, "0.015"),
    ("glue-large", lambda: roberta(1024, 24, 16), 355_361_794, "0.014"),
]


@pytest.mark.parametrize(("name", "build", "size", "share"), COUNTS)
def test_trainable_parameters_are_the_papers(name: str, build: Any, size: int, share: str, data: Path) -> None:
    for experiment in load_recipe(name, data=data).experiments().values():
        with torch.device("meta"):
            model = build()
        assert sum(p.numel() for p in model.parameters()) == size
        adapted = get_peft_model(
            model, ReftConfig(task_type=experiment.task.task_type, **experiment.adapter.model_dump())
        )
        edits = sum(p.numel() for key, p in adapted.named_parameters() if ".reft." in key and p.requires_grad)
        assert f"{100 * edits / size:.{len(share) - 2}f}" == share


def test_a_missing_file_is_named_with_where_the_data_comes_from(data: Path) -> None:
    (data / "dataset/hellaswag/test.json").unlink()
    with pytest.raises(RecipeError) as caught:
        load_recipe("commonsense", data=data)
    message = str(caught.value)
    for part in (
        "1 problem",
        "test.HellaSwag",
        "dataset/hellaswag/test.json",
        str(data),
        "AGI-Edgerunners/LLM-Adapters",
    ):
        assert part in message
    less = load_recipe("commonsense", ["tasks.commonsense.data.test.HellaSwag=null"], data=data)
    assert "HellaSwag" not in less.tasks["commonsense"].data.sets and len(less.tasks["commonsense"].data.sets) == 7


def test_only_the_files_of_the_tasks_asked_for_are_needed(data: Path) -> None:
    (data / "MNLI/train.tsv").unlink()
    assert load_recipe("glue", data=data, only=["RTE"]).tasks["RTE"].data.train == str(data / "RTE/train.tsv")
    with pytest.raises(RecipeError, match=r"tasks\.MNLI\.data\.train"):
        load_recipe("glue", data=data)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(SHIPPED) == {"commonsense", "arithmetic", "instruct", "glue", "glue-large", "words"}
    with pytest.raises(
        RecipeError, match=r"cannot read the recipe gleu.*go by a name are arithmetic, commonsense, glue"
    ):
        load_recipe("gleu")
    with pytest.raises(RecipeError, match="'nowhere' is no folder"):
        load_recipe("glue", data="nowhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glue").write_text("model: x\n")  # a file comes before a name
    with pytest.raises(RecipeError, match="tasks: is missing"):
        load_recipe("glue")


def test_a_penalty_on_repetition_does_not_see_the_padding(models: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = None  # so that eos fills, as in Llama's
    model = AutoModelForCausalLM.from_pretrained(TOKENIZER, dtype=torch.float32)
    prompts = [encode(tokenizer, text) for text in ("dog", "cat", "The plural of horse is", "a b c d e f g h i j")]
    how: dict[str, Any] = {"max_new_tokens": 12, "repetition_penalty": 3.0, "no_repeat_ngram_size": 5}
    together = predict(model, tokenizer, prompts, **how)
    assert together == [predict(model, tokenizer, [prompt], **how)[0] for prompt in prompts]
    assert together != predict(model, tokenizer, prompts, max_new_tokens=12)
