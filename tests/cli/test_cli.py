"""The commands as a person runs them: what they print, and what they say of wrong input."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import Command
from safetensors.torch import load_file, save_file

from trimtab.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "models/tiny-llama")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small trained adapters, and the recipe that made them."""
    from trimtab.runs.train import train

    folder = tmp_path_factory.mktemp("runs")
    for task, rows in {
        "plural": [("cat", "cats"), ("dog", "dogs"), ("horse", "horses"), ("river", "rivers")],
        "kind": [("cat", "animal"), ("dog", "animal"), ("bread", "food"), ("horse", "animal")],
    }.items():
        lines = [json.dumps({"input": a, "output": b}) + "\n" for a, b in rows]
        (folder / f"{task}.jsonl").write_text("".join(lines))
    data = "data: {{train: {0}.jsonl, validation: {0}.jsonl}}"
    (folder / "recipe.yaml").write_text(
        f"model: {MODEL}\noutput: {folder / 'out'}\ndtype: float32\nadapter: {{r: 2, positions: f1+l2}}\n"
        "training: {max_steps: 30, batch_size: 4}\ntasks:\n"
        + "".join(
            f'  {task}: {{type: generation, {data.format(task)}, prompt: "{{input}}", answer: "{{output}}"}}\n'
            for task in ("plural", "kind")
        )
    )
    recipe = load_recipe(folder / "recipe.yaml")
    train(recipe.experiments(), recipe.output)
    return folder


def test_init_writes_a_recipe_that_loads_and_compares_with_lora(trimtab: Command, tmp_path: Path, runs: Path) -> None:
    out = tmp_path / "recipe.yaml"
    code, text = trimtab(
        "init", MODEL, "--task", f"a={runs / 'plural.jsonl'}", "--task", f"b={runs / 'kind.jsonl'}", "-o", out
    )
    assert code == 0 and "12,320" in text and "LoRA" in text
    recipe = load_recipe(out)
    assert list(recipe.tasks) == ["a", "b"]
    assert recipe.tasks["a"].type == "generation" and recipe.tasks["a"].prompt == "{input}"
    before = out.read_text()
    code, text = trimtab("init", MODEL, "-o", out)
    assert code == 2 and "there already" in text and out.read_text() == before
    (tmp_path / "all.yaml").write_text(re.sub(r"  # (site|lora):", r"  \1:", before))
    adapter = load_recipe(tmp_path / "all.yaml").tasks["a"].adapter
    assert (adapter.site, adapter.lora) == ("block", {"r": 8})


def test_init_quotes_what_yaml_would_misread(trimtab: Command, tmp_path: Path) -> None:
    """Fields and task names from real files, for a model that does not generate, into a folder that is not there."""
    hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    ).save_pretrained(tmp_path / "bert")
    data = tmp_path / "two words.tsv"
    data.write_text("#1 String\t#2 String\tclass\n" + "a\tb\t1\nc\td\t0\n" * 4)
    out = tmp_path / "new/recipe.yaml"
    code, text = trimtab("init", tmp_path / "bert", "--task", data, "--task", f"2024={data}", "-o", out)
    assert code == 0, text
    tasks = load_recipe(out).tasks
    assert list(tasks) == ["two_words", "2024"] and tasks["2024"].training.max_length == 64
    assert tasks["2024"].text == ["#1 String", "#2 String"] and tasks["2024"].label == "class"
    assert "a new head comes on top" in text and "parameters beside a new head" in out.read_text()


def test_train_again_skips_and_prints_the_table(trimtab: Command, runs: Path) -> None:
    code, text = trimtab("train", runs / "recipe.yaml")
    assert code == 0
    for word in ("plural", "kind", "untuned", "tuned", "parameters", "on disk", "seconds"):
        assert word in text


def test_eval(trimtab: Command, runs: Path) -> None:
    code, text = trimtab("eval", runs / "recipe.yaml", "--task", "plural", "--split", "train")
    assert code == 0 and "plural" in text and "kind" not in text and "majority" in text


def test_eval_shows_where_an_adapter_fails_and_writes_every_answer(
    trimtab: Command, runs: Path, tmp_path: Path
) -> None:
    settings = ["--set", "tasks.kind.data.test=wrong.jsonl", "--set", "tasks.kind.score=choice"]
    settings += ["--set", "tasks.kind.choices=[animal, food]"]
    rows = [("cat", "animal"), ("dog", "food"), ("bread", "food")]
    (runs / "wrong.jsonl").write_text("".join(json.dumps({"input": a, "output": b}) + "\n" for a, b in rows))
    answers = tmp_path / "answers.json"
    command = ["eval", runs / "recipe.yaml", "--task", "kind", *settings, "--predictions", answers]
    code, text = trimtab(*command)
    assert code == 0 and "kind: the worst of 3 on test" in text and "kind: by class" in text, text
    assert "│ dog" in text and "animal 1" in text and "50%" in text and "1 more without a mistake" in text
    found = json.loads(answers.read_text())["kind"]
    assert found["input"] == ["cat", "dog", "bread"] and found["expected"] == ["animal", "food", "food"]
    assert found["tuned"] == ["animal", "animal", "food"]
    code, text = trimtab(*command)
    assert code == 2 and "there already" in text


def test_generate_answers_under_every_adapter_in_one_batch(trimtab: Command, runs: Path) -> None:
    code, text = trimtab("generate", "dog", "-a", runs / "out")
    assert code == 0
    assert "dogs" in text and "animal" in text and "(base model)" in text


def test_generate_without_adapters_is_the_base_model(trimtab: Command) -> None:
    code, text = trimtab("generate", "cat", "--model", MODEL, "--max-new-tokens", 4)
    assert code == 0 and "(base model)" in text


def test_chat_switches_adapters(trimtab: Command, runs: Path) -> None:
    stdin = "/use plural\ndog\n/new\n/use kind\ndog\n/use nobody\n/what\n/quit\n"
    code, text = trimtab("chat", "-a", runs / "out", stdin=stdin)
    assert code == 0
    assert "dogs" in text and "animal" in text and "No adapter 'nobody'" in text


def test_chat_goes_on_after_what_cannot_be_answered(
    trimtab: Command, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.runs.generate import Answerer

    stdin = "word " * 600 + "\ndog\ncat\n/quit\n"
    code, text = trimtab("chat", "-a", runs / "out/plural", stdin=stdin)
    flat = " ".join(text.split())
    assert code == 0 and "Not asked: plural: " in flat and "/new starts over" in flat and "dogs" in flat

    def stop(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "reply", stop)
    code, text = trimtab("chat", "-a", runs / "out/plural", stdin="dog\n/quit\n")
    assert code == 0 and "Stopped; that was not asked." in text


def test_show(trimtab: Command, runs: Path) -> None:
    code, text = trimtab("show", runs / "out/kind")
    assert code == 0
    assert "loreft, rank 2" in text and "f1+l2" in text and "model.layers.7" in text and "6,160" in text


def test_show_prints_hostile_names_as_they_are(trimtab: Command, runs: Path, tmp_path: Path) -> None:
    folder = damaged(runs, tmp_path, reconfigure(base_model_name_or_path="[/red]\x1b[2J\ud800", site="[bold]x"))
    extra = {"base_model.model.[/red]\x1b[2J.weight": torch.zeros(2)}
    rewrite(lambda tensors: tensors.update(extra))(folder)
    reconfigure(modules_to_save=["[/red]\x1b[2J"])(folder)
    named = folder.rename(folder.with_name("[red]\x1b[2J"))
    code, text = trimtab("show", named)
    assert code == 0 and "[/red]\\x1b[2J\\xd800" in text and "[bold]x" in text and "\x1b" not in text
    assert "base_model.model.[/red]" in text.replace("\n", "")


def damaged(runs: Path, tmp_path: Path, damage: Callable[[Path], object]) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(runs / "out/plural", folder)
    damage(folder)
    return folder


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def reconfigure(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))

    return damage


KEY = "base_model.model.model.layers.0.reft.reft_edit."
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:3000]),
        "not a whole safetensors file",
    ),
    "pickle": (lambda f: torch.save({}, f / "adapter_model.safetensors"), "a pickle"),
    "bin": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "not a pickle of tensors alone",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "missing"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter"),
    "config damaged": (lambda f: (f / "adapter_config.json").write_text('{"peft_'), "damaged"),
    "lora": (reconfigure(peft_type="LORA"), "method LORA, not ReFT"),
    "bad method": (reconfigure(method="lorefd"), "lorefd"),
    "rank": (reconfigure(r=4), "r=4 asks for"),
    "tied": (reconfigure(tied=False), "do not belong together"),
    "nan": (rewrite(lambda t: t[KEY + "bias"].fill_(float("nan"))), "NaN"),
    "not orthonormal": (rewrite(lambda t: t[KEY + "rotation"].mul_(2)), "not orthonormal"),
    "tensor missing": (rewrite(lambda t: t.pop(KEY + "weight")), "do not belong together"),
    "other weights": (
        rewrite(lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(1)})),
        "another method",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_is_refused_in_one_screen(name: str, trimtab: Command, runs: Path, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    folder = damaged(runs, tmp_path, damage)
    for command in (("show", folder), ("generate", "cat", "-a", folder)):
        code, text = trimtab(*command)
        assert code == 2 and message in text.replace("\n", " "), text
        assert str(folder) in text.replace("\n", "") and len(text.splitlines()) < 25 and "Traceback" not in text


def test_an_adapter_of_another_base_model_is_refused(trimtab: Command, runs: Path) -> None:
    code, text = trimtab("generate", "cat", "-a", runs / "out/plural", "--model", ROOT / "tests/golden/model")
    assert code == 2 and "Traceback" not in text


def test_a_base_model_that_was_moved_is_asked_for(trimtab: Command, runs: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(runs / "out/plural", tmp_path / "plural")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/base/model"}))
    code, text = trimtab("generate", "cat", "-a", adapter)
    assert code == 2 and "cannot load the model 'gone/base/model'" in text and "say where it is: --model" in text
    assert trimtab("generate", "cat", "-a", adapter, "--model", MODEL)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        (["train", "{runs}/recipe.yaml", "--task", "plurals"], "not in the recipe"),
        (["eval", "{runs}/recipe.yaml", "--split", "tset"], "must be one of train, validation, test"),
        (["generate", "cat", "-a", "{runs}"], "no adapter there"),
        (["generate", "cat", "-a", "{runs}/out/plurl"], "out/plural?"),
        (["show", "{runs}/out/plurl"], "out/plural?"),
        (["generate", " ", "-a", "{runs}/out/plural"], "the prompt is empty"),
        (["generate", "cat"], "give an adapter's folder with --adapter, or a --model"),
        (["init", MODEL, "-o", "{runs}/recipe.yaml/new.yaml"], "recipe.yaml: "),
        (["init", "models/none-such", "-o", "{runs}/new.yaml"], "models/none-such"),
        (["show", "{runs}"], "no adapter_config.json"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, trimtab: Command, runs: Path) -> None:
    code, text = trimtab(*(a.replace("{runs}", str(runs)) for a in arguments))
    assert code == 2 and message in text.replace("\n", " "), text
    assert text.startswith("error: ") and "Traceback" not in text  # no table before it


@pytest.mark.parametrize(
    ("command", "what", "said"),
    [
        (["train", "{runs}/recipe.yaml"], "trimtab.runs.train.train", "goes on from the last checkpoint"),
        (["tune", "{runs}/recipe.yaml"], "trimtab.study.search.tune", "the same command goes on from there"),
        (
            ["predict", "{runs}/kind.jsonl", "-a", "{runs}/out/kind", "-o", "{runs}/new.csv"],
            "trimtab.runs.apply.Applied.write",
            "the same command goes on from there",
        ),
    ],
)
def test_ctrl_c_says_in_a_line_how_to_go_on(
    command: list[str], what: str, said: str, trimtab: Command, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(what, stop)
    code, text = trimtab(*(part.replace("{runs}", str(runs)) for part in command))
    assert code == 130 and said in " ".join(text.split()) and "Aborted" not in text, text


@pytest.mark.parametrize("asked", [["--help"], ["-h"], []])
def test_the_help_of_lm_eval_is_in_our_words(asked: list[str], trimtab: Command) -> None:
    code, text = trimtab("lm-eval", *asked)
    flat = " ".join(text.split())
    assert code == 0 and "trimtab lm-eval run --help" in flat and "Needs the extra lm-eval" in flat, text


def test_version(trimtab: Command) -> None:
    assert trimtab("--version") == (0, f"trimtab {version('trimtab')}\n")
