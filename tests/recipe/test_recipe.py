"""The recipe: what a good one gives, and what each bad one is told (the line, the place and the remedy)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.errors import RecipeError
from trimtab.recipe.foreign import FOREIGN
from trimtab.recipe.load import SECTIONS, load_recipe
from trimtab.recipe.schema import Recipe
from trimtab.recipe.yaml_lines import parse_yaml
from trimtab.runs.ways import AdapterSpec
from trimtab.tasks.generation import GenerationSpec
from trimtab.tasks.templates import parse_template

GOOD = """\
model: some/model
adapter: {method: loreft, r: 2}
training:
  learning_rate: 4e-3
  epochs: 5
tasks:
  plural:
    type: generation
    data: {train: rows.jsonl}
    prompt: "{input}"
    answer: "{output}"
  mood:
    type: classification
    data: {train: rows.jsonl}
    text: input
    label: output
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"input": "cat", "output": "cats"}\n')
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "words.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text))
    return str(caught.value)


def test_a_good_recipe_has_defaults_numbers_and_files(folder: Path) -> None:
    recipe = load_recipe(write(folder, GOOD))
    plural = recipe.tasks["plural"]
    assert isinstance(plural, GenerationSpec)
    assert (recipe.seed, recipe.dtype, recipe.output) == (0, "auto", "runs")
    assert plural.training.learning_rate == 0.004
    assert plural.data.train == str(folder / "rows.jsonl")
    experiments = recipe.experiments()
    assert (experiments["plural"].adapter.r, experiments["plural"].source.name) == (2, "some/model")
    assert [e.task.task_type for e in experiments.values()] == ["CAUSAL_LM", "SEQ_CLS"]


def test_a_task_overrides_only_what_it_names(folder: Path) -> None:
    own = "    adapter: {positions: f1+l2}\n    training: {max_steps: 9, batch_size: 3}\n"
    recipe = load_recipe(write(folder, GOOD.replace("  mood:", own + "  mood:")))
    plural, mood = recipe.tasks["plural"], recipe.tasks["mood"]
    assert (plural.adapter.r, plural.adapter.positions, mood.adapter.positions) == (2, "f1+l2", "f7+l7")
    assert (plural.training.epochs, plural.training.max_steps) == (None, 9)
    assert (mood.training.epochs, mood.training.max_steps, mood.training.batch_size) == (5, None, 16)
    assert plural.training.learning_rate == mood.training.learning_rate == 0.004


def test_the_resolved_recipe_loads_again(folder: Path) -> None:
    import yaml

    recipe = load_recipe(write(folder, GOOD.replace("epochs: 5", "max_steps: 5")))
    assert load_recipe(write(folder, yaml.safe_dump(recipe.model_dump()))) == recipe


def test_a_model_folder_beside_the_file_is_found(folder: Path) -> None:
    (folder / "tiny").mkdir()
    recipe = load_recipe(write(folder, GOOD.replace("some/model", "tiny")))
    assert recipe.model == str(folder / "tiny")


def test_words_that_yaml_1_1_takes_for_something_else_stay_words() -> None:
    value, _ = parse_yaml("labels: [no, yes, on, 2020-01-01, 1:30]\nrate: 4e-3\nother: [true, null, 1, 1.5, .5]")
    assert value["labels"] == ["no", "yes", "on", "2020-01-01", "1:30"]
    assert value["rate"] == 0.004
    assert value["other"] == [True, None, 1, 1.5, 0.5]


def test_anchors_and_merges_work(folder: Path) -> None:
    text = GOOD.replace("    data: {train: rows.jsonl}\n    prompt", "    data: &d {train: rows.jsonl}\n    prompt")
    text = text.replace("    data: {train: rows.jsonl}\n    text", "    data: {<<: *d, limit: {train: 3}}\n    text")
    assert load_recipe(write(folder, text)).tasks["mood"].data.limit.train == 3


def test_settings_replace_what_the_file_says(folder: Path) -> None:
    settings = [
        "model=a",
        "adapter.r=3",
        "tasks.plural.training={batch_size: 7}",
        "tasks.mood.labels=[no, yes]",
        "seed=5",
    ]
    recipe = load_recipe(write(folder, GOOD), settings)
    plural, mood = recipe.tasks["plural"], recipe.tasks["mood"]
    assert (recipe.model, recipe.seed, plural.adapter.r, mood.adapter.r) == ("a", 5, 3, 3)
    assert (plural.training.batch_size, mood.training.batch_size, plural.training.epochs) == (7, 16, 5)
    assert mood.type == "classification" and mood.labels == ["no", "yes"]
    assert list(recipe.tasks) == ["plural", "mood"]


def test_a_setting_puts_aside_what_it_replaces(folder: Path) -> None:
    steps = load_recipe(write(folder, GOOD), ["training.max_steps=3"]).tasks["mood"].training
    assert (steps.epochs, steps.max_steps) == (None, 3)
    epochs = load_recipe(write(folder, GOOD.replace("epochs: 5", "max_steps: 5")), ["tasks.mood.training.epochs=2"])
    assert [(t.training.epochs, t.training.max_steps) for t in epochs.tasks.values()] == [(None, 5), (2, None)]
    kept = load_recipe(write(folder, GOOD), ["training.max_steps=null"]).tasks["mood"].training
    assert (kept.epochs, kept.max_steps) == (5, None)


def test_a_setting_changes_one_place_where_an_alias_shows_two(folder: Path) -> None:
    text = GOOD.replace("    prompt", "    training: &t {epochs: 1, batch_size: 2}\n    prompt", 1)
    text = text.replace("    text", "    training: *t\n    text").replace("  mood:", "  mood: ")
    recipe = load_recipe(write(folder, text), ["tasks.mood.training.epochs=4"])
    assert [(t.training.epochs, t.training.batch_size) for t in recipe.tasks.values()] == [(1, 2), (4, 2)]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("training.epoch=3", "command line, training.epoch: is not a known key; did you mean 'epochs'"),
        ("adapter.r=0", "command line, adapter.r: r=0"),
        ("training={epochs: 2, max_steps: 3}", "command line, training: epochs and max_steps are both given"),
        ("tasks.plural.data={train: none.jsonl}", "command line, tasks.plural.data.train: no file 'none.jsonl'"),
        ("tasks.plural.prompt={a: b}", "command line, tasks.plural.prompt"),
        ("model.x=3", "command line: 'model.x=3': there is no mapping to set 'x' in"),
        ("model", "command line: 'model' is no setting; write key.path=value"),
        ("seed=[", "command line: 'seed=[': not valid YAML"),
    ],
)
def test_a_bad_setting_is_told_so(folder: Path, setting: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, GOOD), [setting])
    assert said in str(caught.value)


def test_data_files_come_from_the_folder_named(folder: Path) -> None:
    (folder / "else").mkdir()
    (folder / "else/rows.jsonl").write_text('{"input": "cat", "output": "cats"}\n')
    path = write(folder, GOOD)
    assert load_recipe(path, data=folder / "else").tasks["plural"].data.train == str(folder / "else/rows.jsonl")
    assert load_recipe(path).tasks["plural"].data.train == str(folder / "rows.jsonl")


# Keys of other tools at the places where people put them, then what the answer must hold.
FOREIGN_KEYS = {
    "training": {
        "num_train_epochs": "epochs:",
        "per_device_train_batch_size": "batch_size:",
        "gradient_accumulation_steps": "gradient_accumulation",
        "save_steps": "checkpoint_every:",
        "logging_steps": "remove it",
        "warmup_ratio": "warmup",
        "lr": "learning_rate:",
        "bf16": "dtype:",
        "fp32": "dtype:",
        "optim": "AdamW",
    },
    "adapter": {"lora_r": "r:", "lora_alpha": "remove it", "target_modules": "site:", "lora_dropout": "dropout"},
    None: {
        "output_dir": "output",
        "device": "CUDA_VISIBLE_DEVICES",
        "base_model": "model:",
        "num_train_epochs": "epochs",
    },
}


@pytest.mark.parametrize(
    ("section", "key", "said"), [(s, key, said) for s, keys in FOREIGN_KEYS.items() for key, said in keys.items()]
)
def test_a_key_of_another_tool_is_told_its_name_here(folder: Path, section: str | None, key: str, said: str) -> None:
    message = refusal(folder, f"model: x\n{section}: {{{key}: 1}}\n" if section else f"model: x\n{key}: 1\n")
    (line,) = [line for line in message.splitlines() if f"{key}: " in line]
    assert said in line, message


def test_every_hint_names_keys_that_are_there() -> None:
    known = {*Recipe.model_fields, *(field for spec in SECTIONS.values() for field in spec.model_fields)}
    known |= {*AdapterSpec.model_fields}
    for key, said in FOREIGN.items():
        assert key not in known, key
        named = re.findall(r"([a-z_]+):", said)
        assert set(named) <= known, (key, set(named) - known)


FIRST_DATA = "train: rows.jsonl}\n    prompt"

# A change to GOOD, then what the message must hold.
BAD = [
    ("model: some/model", "modle: some/model", ["line 1, modle", "did you mean 'model'", "model: is missing"]),
    ("model: some/model", "model: ./nowhere", ["line 1, model", "./nowhere", "beside this file"]),
    ("model: some/model", "model: 3", ["line 1, model", "string", "'3'"]),
    ("model: some/model", "model: a\nmodel: b", ["line 2", "'model' is already given on line 1", "keep one"]),
    ("r: 2", "r: two", ["line 2, adapter.r", "integer", "'two'"]),
    ("r: 2", "rank: 2", ["line 2, adapter.rank", "not a known key; here it is adapter: r:"]),
    ("r: 2", "hue: 2", ["line 2, adapter.hue", "not a known key", "method, r, positions"]),
    ("  learning_rate: 4e-3", "\tlearning_rate: 4e-3", ["line 4", "a tab; YAML is indented with spaces"]),
    ("tasks:", "epochs: 3\ntasks:", ["line 6, epochs", "belongs under training:"]),
    ("tasks:", "label: x\ntasks:", ["line 6, label", "belongs to a task"]),
    ("    type: generation", "    type: generation\n    r: 3", ["line 9, tasks.plural.r", "belongs under adapter:"]),
    ("r: 2", "r: -1", ["line 2, adapter.r", "r=-1", "at least 1"]),
    ("method: loreft", "method: lorefft", ["line 2, adapter.method", "lorefft", "Did you mean 'loreft'"]),
    ("r: 2", "layers: 3.5", ["line 2, adapter.layers", "string or a valid list", "3.5"]),
    ("learning_rate: 4e-3", "learning_rate: -1", ["line 4, training.learning_rate", "greater than 0", "-1"]),
    ("learning_rate: 4e-3", "learning_rate: .nan", ["line 4, training.learning_rate", "finite"]),
    ("epochs: 5", "epochs: 5\n  max_steps: 3", ["line 3, training", "epochs and max_steps", "keep one"]),
    ("epochs: 5", "schedule: cosin", ["line 5, training.schedule", "'cosin'", "did you mean 'cosine'"]),
    ("epochs: 5", "warmup: 100", ["line 5, training.warmup", "less than 1"]),
    ("  plural:", "  ../plural:", ["line 7, tasks.../plural", "folder", "letters, digits"]),
    ("type: generation", "type: generate", ["line 7, tasks.plural", "classification or regression", "'generate'"]),
    ("type: generation", "type: regression", ["tasks.plural.prompt", "belongs to type: generation", "text: is"]),
    (FIRST_DATA, "train: row.jsonl}\n    prompt", ["line 9", "data.train", "did you mean rows.jsonl"]),
    (FIRST_DATA, "train: rows.jsonl, test: {a: rows.jsonl, b: x}}\n    prompt", ["line 9", "data.test.b: no file"]),
    (FIRST_DATA, "train: rows.jsonl, test: {a: {file: row.jsonl}}}\n    prompt", ["line 9", "test.a.file", "mean"]),
    (FIRST_DATA, "train: rows.jsonl, test: {a: {fil: x}}}\n    prompt", ["test.a.fil:", "mean 'file'", "missing"]),
    (FIRST_DATA, "train: rows.jsonl, test: {a: 3}}\n    prompt", ["line 9", "data.test.a", "mapping of keys"]),
    (FIRST_DATA, "train: rows.jsonl, test: {}}\n    prompt", ["line 9", "data.test", "at least 1"]),
    (FIRST_DATA, "train: rows.jsonl, test: {exact_match: rows.jsonl}}\n    prompt", ["line 7", "as the score is"]),
    (FIRST_DATA, "train: rows.jsonl, test: {a: {file: rows.jsonl, score: choice}}}\n    prompt", ["test.a", "choices"]),
    ("rows.jsonl}\n    text", "rows.jsonl, test: {a: {file: rows.jsonl, answer: x}}}\n    text", ["line 12"]),
    (FIRST_DATA, "train: rows.jsonl, validation: false}\n    prompt", ["line 9", "give test"]),
    ('"{input}"', '["{input}", "{"]', ["line 10, tasks.plural.prompt.1", "doubled"]),
    (FIRST_DATA, "name: x, tran: y}\n    prompt", ["line 9", "data.tran", "'train'", "is missing"]),
    (FIRST_DATA, "train: rows.jsonl, config: a}\n    prompt", ["line 9", "config goes with a Hub"]),
    ('"{input}"', '"{input"', ["line 10, tasks.plural.prompt", "'{input'", "doubled"]),
    ('"{input}"', "{input}", ["line 10, tasks.plural.prompt", "not a mapping", "quotes"]),
    ('"{input}"', '"{input!r}"', ["line 10, tasks.plural.prompt", "no conversion"]),
    ('    answer: "{output}"\n', "", ["line 7, tasks.plural.answer", "is missing", '"{output}"']),
    ("answer:", "score: exact\n    answer:", ["line 11, tasks.plural.score", "'exact'", "'exact_match', 'number'"]),
    ("answer:", "score: choice\n    answer:", ["line 7, tasks.plural", "choices: list go together"]),
    ("answer:", "chat: maybe\n    answer:", ["line 11, tasks.plural.chat", "true, false or 'auto'", "'maybe'"]),
    ("answer:", "max_new_tokens: 0\n    answer:", ["line 11, tasks.plural.max_new_tokens", "greater than 0"]),
    ("label: output", "label: output\n    score: number", ["line 17, tasks.mood.score", "'accuracy', 'f1' or 'mcc'"]),
    ("label: output", "label: output\n    labels: [no, no]", ["line 17, tasks.mood.labels", "twice"]),
    ("label: output", "label: output\n    adapter: {positions: x7}", ["line 17, tasks.mood.adapter.positions", "x7"]),
    ("text: input", "text: [a, b, c]", ["line 15, tasks.mood.text", "at most 2"]),
    ("tasks:", "tasks: [", ["line", "not valid YAML"]),
    ("tasks:", "seed: !!python/name:os.system\ntasks:", ["line 6", "not valid YAML"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), BAD, ids=[new.strip()[:40] for _, new, _ in BAD])
def test_a_bad_recipe_is_told_where_and_what_to_do(folder: Path, old: str, new: str, said: list[str]) -> None:
    assert old in GOOD
    message = refusal(folder, GOOD.replace(old, new, 1))
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty; a recipe starts with model: and tasks:"),
        ("- a\n- b\n", "is not a mapping"),
        ("model: x\ntasks: {}\n", "line 2, tasks: has no task: give at least one"),
        ("model: x\ntasks: 3\n", "line 2, tasks: must have a name for each task"),
        ("model: x\ntasks: {a: }\n", "line 2, tasks.a: must be a mapping"),
        ("model: &a [*a]\n", "an alias stands inside its own anchor"),
    ],
)
def test_a_recipe_without_its_parts_is_told_so(folder: Path, text: str, said: str) -> None:
    assert said in refusal(folder, text)


def test_every_problem_is_listed_in_order_on_one_screen(folder: Path) -> None:
    text = GOOD.replace("r: 2", "r: 0").replace("epochs: 5", "epoch: 5").replace("label: output", "lable: output")
    lines = refusal(folder, text).splitlines()
    assert lines[0].endswith("has 4 problems:")
    assert [line.split(",")[0].strip() for line in lines[1:]] == ["line 2", "line 5", "line 12", "line 16"]
    many = refusal(folder, GOOD + "".join(f"key{i}: 1\n" for i in range(30))).splitlines()
    assert len(many) == 12
    assert many[-1] == "  and 20 more"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_templates() -> None:
    assert parse_template("Q: {a b}\n{{x}}") == [("Q: ", "a b"), ("\n{", None), ("x}", None)]
    assert parse_template("{#1 String}.") == [("", "#1 String"), (".", None)]
    with pytest.raises(ValueError, match="bare name"):
        parse_template("{}")
