"""Which tokens a classifier's head reads: exact, the same wherever the adapter goes, and never changed in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from trimtab import ReftConfig, set_pool
from trimtab.adapter.readout import pool_of
from trimtab.errors import ModelError, RunError
from trimtab.recipe.load import load_recipe
from trimtab.runs.apply import Applied
from trimtab.runs.experiment import Trial
from trimtab.runs.models import pool_for
from trimtab.runs.train import evaluate_runs, train
from trimtab.runs.ways import AdapterSpec, as_way
from trimtab.tasks import Head

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"vocab_size": 4096, "pad_token_id": 0}


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**SIZES, **IDS)).eval()


def distilbert() -> Any:
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, **IDS)).eval()


def llama() -> Any:
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, **IDS, num_key_value_heads=2)).eval()


HEADS: dict[Any, Any] = {
    bert: lambda model, v: model.classifier(v),
    distilbert: lambda model, v: model.classifier(model.pre_classifier(v).relu()),
    llama: lambda model, v: model.score(v),
}


@pytest.mark.parametrize("how", ["mean", "first", "last"])
@pytest.mark.parametrize("made", HEADS)
@torch.no_grad()
def test_the_head_reads_what_a_plain_loop_does(made: Any, how: str) -> None:
    model = made()
    ids = torch.randint(1, 4096, (3, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3])  # whole, padded right, padded left
    batch = {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}
    plain = model(**batch).logits
    hidden = model.base_model(**batch).last_hidden_state
    rows = [states[real.bool()] for states, real in zip(hidden, mask, strict=True)]
    pick = {"mean": lambda row: row.mean(0), "first": lambda row: row[0], "last": lambda row: row[-1]}[how]
    set_pool(model, how)
    assert torch.allclose(
        model(**batch).logits, HEADS[made](model, torch.stack([pick(row) for row in rows])), atol=1e-6
    )
    assert torch.allclose(model(ids).logits, model(ids, torch.ones_like(ids)).logits)  # no mask: all are real
    set_pool(model, "model")
    assert torch.equal(model(**batch).logits, plain) and pool_of(model) == "model"


def test_what_cannot_be_pooled_is_refused() -> None:
    with pytest.raises(ValueError, match="pool='max': must be one of mean, first, last, model"):
        set_pool(bert(), "max")
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    small = BartConfig(**sizes, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, **IDS)
    for model in (BartForSequenceClassification(small), BertModel(BertConfig(**SIZES, **IDS))):
        with pytest.raises(ValueError, match="is no encoder with a head"):
            set_pool(model, "mean")
        set_pool(model, "model")
    with pytest.raises(ValueError, match="pool='max': must be null or one of"):
        ReftConfig(pool="max")


@pytest.mark.parametrize(
    ("said", "pool"),
    [
        (None, "model"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
    ],
)
def test_the_default_is_what_the_model_was_trained_with(said: Any, pool: str | None, tmp_path: Path) -> None:
    if said is not None:
        sentence_transformers(tmp_path, said)
    assert pool_for(Head("any", pool="first"), str(tmp_path)) == "first"  # what the recipe says goes
    if pool is None:
        with pytest.raises(ModelError, match="give pool: mean, first, last or model"):
            pool_for(Head("any", pool=None), str(tmp_path))
    else:
        assert pool_for(Head("any", pool=None), str(tmp_path)) == pool


def sentence_transformers(folder: Path, said: dict[str, Any]) -> None:
    """The files that sentence-transformers leaves with a model."""
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(said))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    BertModel(BertConfig(**SIZES, **IDS)).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(ROOT / "models/tiny-llama").save_pretrained(tmp_path / "bert")
    sentence_transformers(tmp_path / "bert", {"pooling_mode_mean_tokens": True})
    rows = [{"text": f"{'good' if i % 2 else 'bad, really'} day {i}", "mood": i % 2} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "rows.jsonl"))
    said = {
        "model": str(tmp_path / "bert"),
        "output": str(tmp_path / "runs"),
        "adapter": {"r": 2, "positions": "f2"},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.05},
        "tasks": {"mood": {"type": "classification", "text": "text", "label": "mood", "data": data}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(said))
    return path


def test_pooling_is_the_same_in_training_scoring_predicting_and_after_a_plain_reload(
    recipe: Path, tmp_path: Path
) -> None:
    found = load_recipe(recipe)
    metrics = train(found.experiments(), found.output)["mood"]
    assert evaluate_runs(found.experiments(), found.output)["mood"]["tuned"] == metrics["tuned"]["accuracy"]
    folder = tmp_path / "runs/mood"
    assert json.loads((folder / "adapter_config.json").read_text())["pool"] == "mean"

    applied = Applied(folder)
    lines = [line for some in applied.lines(applied.examples(tmp_path / "rows.jsonl")) for line in some]
    told = json.loads((folder / "predictions.json").read_text())["tuned"]
    assert [line["prediction"] for line in lines] == told

    tokenizer, base = AutoTokenizer.from_pretrained(tmp_path / "bert"), classifier(tmp_path)
    with pytest.raises(ValueError, match=r"First call trimtab.set_pool\(model, 'mean'\)"):
        PeftModel.from_pretrained(classifier(tmp_path), str(folder))
    set_pool(base, "mean")
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    for line in lines[:3]:
        with torch.no_grad():
            logits = model(**tokenizer(line["text"], return_tensors="pt")).logits[0]
        assert logits.softmax(0).tolist() == pytest.approx([line["p(0)"], line["p(1)"]], abs=1e-5)
    assert "trimtab.set_pool(base, 'mean')" in (folder / "README.md").read_text()


def classifier(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)


def test_a_run_of_before_is_read_as_it_was_trained(recipe: Path, tmp_path: Path) -> None:
    """Then no model's files were asked: the head read as the architecture does."""
    found = load_recipe(recipe, settings=["tasks.mood.pool=model"])
    train(found.experiments(), found.output)
    file = tmp_path / "runs/mood/run.json"
    run = json.loads(file.read_text())
    del run["settled"]["pool"], run["run"]["task"]["pool"]
    file.write_text(json.dumps(run))
    applied = Applied(file.parent)
    told = [line for some in applied.lines(applied.examples(tmp_path / "rows.jsonl")) for line in some]
    assert [line["prediction"] for line in told] == json.loads((file.parent / "predictions.json").read_text())["tuned"]
    with pytest.raises(RunError, match=r"trained under other settings .*pool"):
        evaluate_runs(load_recipe(recipe).experiments(), found.output)


def test_trials_of_before_are_found_where_the_model_says_nothing_else(recipe: Path, tmp_path: Path) -> None:
    def described() -> dict[str, Any]:
        experiment = load_recipe(recipe).experiments()["mood"]
        return Trial(experiment, as_way("lora", experiment.adapter), 0.1, 0).described({})

    pooled = described()
    (tmp_path / "bert/modules.json").unlink()
    plain = described()
    assert "pool" not in plain and "pool" not in plain["task"]
    assert pooled == {**plain, "pool": "mean"}


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt", "full", "head"])
def test_every_way_reads_the_pooled_vector(name: str) -> None:
    model, (first, second) = bert(), torch.randint(1, 4096, (2, 5))
    set_pool(model, "mean")
    adapted = as_way(name, AdapterSpec()).build(model, "SEQ_CLS", ["classifier"]).eval()
    short, longer = [*first.tolist()], [*second.tolist(), *first.tolist()]
    ids = torch.tensor([[*short, *[0] * 5], longer])
    mask = (ids != 0).long()
    with torch.no_grad():
        together = adapted(input_ids=ids, attention_mask=mask).logits
        alone = adapted(input_ids=torch.tensor([short]), attention_mask=torch.ones(1, 5).long()).logits
    assert torch.allclose(together[:1], alone, atol=1e-5)
    assert not torch.equal(together[0], together[1])
