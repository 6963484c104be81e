"""Tasks: their splits, their examples and their scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trimtab.errors import DataError
from trimtab.runs.summary import odd_data
from trimtab.tasks import TASKS, Task, build_task
from trimtab.tasks.base import share
from trimtab.tasks.scores import (
    ACCURACY,
    F1,
    MCC,
    PEARSON,
    SPEARMAN,
    Score,
    Truth,
    last_number,
    named_choice,
    overlap,
    ranks,
    same_number,
)

MODEL = Path(__file__).parents[2] / "models/tiny-llama"
PLURAL = {"type": "generation", "prompt": "{input}", "answer": "{output}"}
MOOD = {"type": "classification", "text": "text", "label": "label"}
Make = Callable[..., Task[Any]]
several = settings(max_examples=100, deadline=None)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A task over rows written to a file for each split."""

    def build(fields: dict[str, Any], data: dict[str, Any] | None = None, **splits: list[dict[str, Any]]) -> Task[Any]:
        for split, rows in splits.items():
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        files = {split: str(tmp_path / f"{split}.jsonl") for split in splits}
        kind = TASKS[fields["type"]].spec_class
        return build_task("words", kind.model_validate({**fields, "data": {**files, **(data or {})}}))

    return build


def value(score: Score, predicted: Any, wanted: Any, classes: int = 0) -> float:
    return score.value(predicted, Truth(wanted, classes))


def words(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"input": f"in{i}", "output": f"out{i}"} for i in range(start, start + n)]


def prompts(task: Task[Any], split: str) -> list[str]:
    return [e.texts[0] for e in task.examples(split)]


def test_every_type_of_a_recipe_has_a_task() -> None:
    assert set(TASKS) == {
        "generation",
        "conversation",
        "classification",
        "multi_label_classification",
        "token_classification",
        "regression",
    }


@pytest.mark.parametrize(("rows", "cut"), [(2, 1), (9, 1), (20, 2), (200, 20), (6000, 500)])
def test_validation_is_a_seeded_share_of_train(make: Make, rows: int, cut: int) -> None:
    task = make(PLURAL, train=words(rows))
    left, held = prompts(task, "train"), prompts(task, "validation")
    assert sorted(left + held) == sorted(f"in{i}" for i in range(rows))
    assert left == [prompt for prompt in (f"in{i}" for i in range(rows)) if prompt not in set(held)]
    assert held == prompts(build_task("again", task.spec), "validation")
    if rows >= 20:
        assert held != prompts(build_task("other", task.spec, seed=1), "validation")
    assert len(prompts(task, "validation")) == cut
    assert task.validation_is_cut
    assert task.test_is_validation
    assert task.examples("test") is task.examples("validation")


@given(st.lists(st.integers(2, 60), min_size=1, max_size=5), st.integers(0, 3))
@several
def test_each_class_gives_its_part_of_validation(sizes: list[int], seed: int) -> None:
    strata = [str(k) for k, size in enumerate(sizes) for _ in range(size)]  # sorted, as files often are
    count = max(1, len(strata) // 10)
    held = Counter(strata[i] for i in share(strata, count, seed))
    assert sum(held.values()) == count == len(set(share(strata, count, seed)))
    assert all(abs(held[str(k)] - count * size / len(strata)) < 1 for k, size in enumerate(sizes))


def test_the_only_row_of_a_class_is_trained_on() -> None:
    assert all(0 not in share(["a", *"bbbb"], 1, seed) for seed in range(9))
    assert len(share(["a", "b", "c"], 1, 0)) == 1


def test_given_splits_are_used_and_a_limit_counts_after_the_cut(make: Make) -> None:
    task = make(PLURAL, train=words(10), validation=words(3, 10), test=words(4, 20))
    assert [len(task.examples(s)) for s in ("train", "validation", "test")] == [10, 3, 4]
    assert (task.validation_is_cut, task.test_is_validation) == (False, False)
    limited = make(PLURAL, {"limit": {"train": 5, "validation": 1}}, train=words(100))
    assert prompts(limited, "train") == prompts(make(PLURAL, train=words(100)), "train")[:5]
    held = prompts(make(PLURAL, train=words(100)), "validation")
    assert prompts(limited, "validation") == held[:1]
    with pytest.raises(ValueError, match="split='dev': must be one of train, validation, test"):
        task.examples("dev")


@pytest.mark.parametrize(
    ("fields", "rows", "said"),
    [
        (
            PLURAL,
            [{"input": "a", "outputs": "b"}] * 3,
            r"row 1, for '{output}': no field 'output'; the fields are input, outputs",
        ),
        (PLURAL, [*words(2), {"input": "a", "output": None}, *words(2)], r"row 3: the field 'output' is None; fill it"),
        (PLURAL, [{"input": "a", "output": math.nan}] * 3, r"row 1: the field 'output' is nan"),
        (PLURAL, [{"input": " ", "output": "b"}] * 3, r"row 1: the prompt .* comes out empty; fill .* the row$"),
        (
            PLURAL,
            [*words(4), {"input": " ", "output": "b"}],
            r"row 5: .* leave out such rows, 1 of 4: data: skip_bad_rows: true$",
        ),
        (PLURAL | {"score": "number"}, words(2) + [{"input": "a", "output": "no"}] * 2, r"row 3: .*needs a number"),
        (PLURAL | {"score": "choice", "choices": ["yes", "no"]}, words(3), r"row 1: .*'out0' names none of choices"),
        (PLURAL, words(1), "one row cannot be split; give data: validation:"),
        (MOOD, [{"text": "a", "label": 1}] * 3, "'label' is always '1'; a task needs two classes"),
        (MOOD | {"labels": ["no", "yes"]}, [{"text": "a", "label": "maybe"}] * 3, "not one of the labels no, yes"),
        (MOOD | {"type": "regression"}, [{"text": "a", "label": "x"}] * 3, "'x', not a finite number"),
    ],
)
def test_bad_rows_name_their_place(make: Make, fields: dict[str, Any], rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        make(fields, train=rows).examples("train")


def test_null_in_a_prompt_is_empty_and_numbers_are_text(make: Make) -> None:
    rows = [{"q": 3, "note": None, "output": 5}] * 2
    example = make(PLURAL | {"prompt": "{q}{note}?"}, train=rows).examples("train")[0]
    assert (example.texts, example.answer) == (("3?",), "5")


def test_training_leaves_out_what_is_too_long_and_evaluation_nothing(make: Make) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [*words(2), {"input": "long " * 99, "output": "x"}]
    task = make(PLURAL, train=rows, validation=rows)
    encoded, dropped = task.encode(tokenizer, task.examples("train"), training=True, max_length=40)
    assert (len(encoded), dropped) == (2, 1)
    encoded, dropped = task.encode(tokenizer, task.examples("train"), training=False)
    assert (len(encoded), dropped, encoded[0].labels) == (3, 0, None)
    with pytest.raises(DataError, match="none of 1 training examples fits in max_length 40; the shortest has"):
        task.encode(tokenizer, task.examples("train")[2:], training=True, max_length=40)


def test_labels_are_names_or_numbers(make: Make) -> None:
    rows = [{"text": "a", "label": v} for v in ("neg", "pos", 0, 1)]
    task = make(MOOD | {"labels": ["neg", "pos"]}, train=rows, validation=rows)
    assert [e.label for e in task.examples("train")] == [0, 1, 0, 1]
    derived = make(MOOD, train=[{"text": "a", "label": v} for v in (10, 2.0, "9", 10)], validation=rows)
    assert derived.labels == ["2", "9", "10"]
    assert [e.label for e in derived.examples("train")] == [2, 0, 1, 2]
    with pytest.raises(DataError, match="label is '0', not one of the labels 2, 9, 10"):
        derived.place("0", "row 1")  # not the first class
    assert make(MOOD, train=[{"text": "a", "label": v} for v in (True, False)]).labels == ["false", "true"]


def test_numbers_are_no_names_that_nobody_put_in_order(make: Make) -> None:
    """AG News with names in train and numbers in test, which are not those of the sorted names."""
    train = [{"text": "a", "label": name} for name in ("World", "Sports", "Business")]
    task = make(MOOD, train=train, validation=train)
    assert task.labels == ["Business", "Sports", "World"]
    with pytest.raises(DataError, match=r"label is '0', not one of .* or in the order of its numbers"):
        task.place("0", "row 1")
    assert make(MOOD | {"labels": ["World", "Sports", "Business"]}, train=train).place("0", "row 1") == 0
    ends = MOOD | {"labels": ["World", "Sports", "Business", "Science"]}
    with pytest.raises(DataError, match=r"label is 1, 2, 3, with neither 0 nor 4, so that the first of labels: may be"):
        make(ends, train=[{"text": "a", "label": n} for n in (1, 2, 3)]).examples("train")
    points = make(MOOD, train=[{"text": "a", "label": n} for n in ("1.0", "2.0", "3.0")])
    assert [points.place(n, "row 1") for n in ("1", "3", "2.00")] == [0, 2, 1]
    with pytest.raises(DataError, match="label is '4', not one of the labels"):
        points.place("4", "row 1")


def test_numbers_of_named_labels_count_from_one_where_train_does(make: Make) -> None:
    named = MOOD | {"labels": ["world", "sports", "tech"]}
    rows = [{"text": "a", "label": v} for v in (3, "1", 2)]
    task = make(named, train=rows, validation=rows[:1], test=rows[1:])
    assert [e.label for split in ("train", "validation", "test") for e in task.examples(split)] == [2, 0, 1, 2, 0, 1]
    with pytest.raises(DataError, match="label is '0', not one of the labels world, sports, tech; mend the row, or"):
        task.place("0", "row 1")
    rows = [{"text": "a", "label": v} for v in (1, 2, 0, None)]
    fewer = make(named, {"skip_bad_rows": True}, train=rows, validation=rows[:2])
    assert [e.label for e in fewer.examples("train")] == [1, 2, 0]


def test_scores_of_each_type(make: Make) -> None:
    task = make(PLURAL, train=words(4), validation=words(2))
    assert task.scores(["out0\n", "out"], task.examples("validation")) == {"exact_match": 0.5}
    assert task.score.per_item(["out0\n", "out"], task.truth(task.examples("validation"))) == [1.0, 0.0]
    number = make(PLURAL | {"score": "number"}, train=words(4), validation=words(2))
    assert number.scores(["it is 0.0", "none"], number.examples("validation")) == {"number": 0.5, "answered": 0.5}
    yes = [{"input": "a", "output": "the answer is yes"}, {"input": "b", "output": "no"}]
    choice = make(PLURAL | {"score": "choice", "choices": ["yes", "no"]}, train=yes, validation=yes)
    assert choice.scores(["Yes!", "(B)"], choice.examples("validation")) == {"choice": 1.0, "answered": 1.0}
    numbers = [{"text": "a", "label": v} for v in ("1", 2, 3.5)]
    regression = make(MOOD | {"type": "regression"}, train=numbers, validation=numbers)
    assert regression.scores([0.0, 1.0, 2.5], regression.examples("train"))["correlation"] == pytest.approx(1.0)
    pair = make(
        MOOD | {"text": ["text", "label"], "score": "mcc"}, train=[{"text": "a", "label": v} for v in (0, 1)] * 2
    )
    assert list(pair.scores([1] * 3, pair.examples("train"))) == ["mcc", "accuracy", "f1"]
    with pytest.raises(ValueError, match="1 predictions for 2 examples"):
        task.scores(["a"], task.examples("validation"))


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("so 3 + 4 = 7.", 7),
        ("#### 1,234,567", 1234567),
        ("$1,234.50 in all", 1234.5),
        ("-$3", -3),
        ("5-3", 3),
        ("it is -3", -3),
        ("3, 4", 4),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("none", None),
        ("1.", 1),
    ],
)
def test_the_last_number(said: str, number: float | None) -> None:
    assert last_number(said) == number


@pytest.mark.parametrize(
    ("said", "choices", "chosen"),
    [
        ("the correct answer is true", ["true", "false"], 0),
        ("False, not true", ["true", "false"], 1),
        ("untrue", ["true", "false"], None),
        ("not_entailment", ["entailment", "not_entailment"], 1),
        ("very good", ["very", "very good"], 1),
        ("b", ["A", "B"], 1),
        ("a guess: B", ["A", "B"], 1),
        ("(B)", ["red", "blue"], 1),
        ("It is B.", ["red", "blue"], 1),
        ("A dog", ["red", "blue"], None),
        ("answer12", ["answer1", "answer2"], None),
        ("", ["yes", "no"], None),
        ("C++ of course", ["Java", "C++"], 1),
    ],
)
def test_the_choice_named(said: str, choices: list[str], chosen: int | None) -> None:
    assert named_choice(said, choices) == chosen


pairs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12)


@several
@given(pairs)
def test_classification_scores_against_the_definitions(items: list[tuple[int, int]]) -> None:
    predicted, wanted = zip(*items, strict=True)
    assert value(ACCURACY, predicted, wanted) == sum(p == w for p, w in items) / len(items)

    def naive_f1(c: int) -> float:
        tp, fp = items.count((c, c)), sum(p == c != w for p, w in items)
        fn = sum(w == c != p for p, w in items)
        return 2 * tp / (2 * tp + fp + fn) if tp else 0.0

    seen = set(predicted) | set(wanted)
    assert value(F1, predicted, wanted, 3) == pytest.approx(sum(map(naive_f1, seen)) / len(seen))
    assert value(F1, predicted, wanted, 2) == pytest.approx(naive_f1(1))
    # The multiclass MCC is the correlation of one-hot vectors, centred by class (Gorodkin 2004).
    n = len(items)

    def covariance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
        both = sum(x == y for x, y in zip(a, b, strict=True)) / n
        return both - sum(a.count(k) / n * b.count(k) / n for k in range(3))

    spread = covariance(predicted, predicted) * covariance(wanted, wanted)
    naive = covariance(predicted, wanted) / math.sqrt(spread) if spread > 1e-12 else 0.0
    assert value(MCC, predicted, wanted) == pytest.approx(naive)


def test_constant_and_diverged_predictions_score_zero() -> None:
    assert value(MCC, [1, 1, 1], [0, 1, 1]) == 0.0
    assert value(PEARSON, [2.0, 2.0], [1.0, 3.0]) == value(SPEARMAN, [2.0, 2.0], [1.0, 3.0]) == 0.0
    assert value(PEARSON, [math.nan, 1.0], [1.0, 2.0]) == value(SPEARMAN, [math.inf, 1.0], [1.0, 2.0]) == 0.0
    assert value(MCC, [1, 0, 1, 1], [1, 0, 0, 1]) == pytest.approx(0.5773502691896258)  # by hand: 1/sqrt(3)


def test_ties_share_their_rank() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert value(SPEARMAN, [1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # by hand


@several
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=12))
def test_correlations_agree_with_scipy(items: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = ([float(v) for v in side] for side in zip(*items, strict=True))
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert value(PEARSON, a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-9)
        assert value(SPEARMAN, a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-9)


def test_several_test_sets_have_a_score_each_and_their_plain_mean(make: Make, tmp_path: Path) -> None:
    sets = {"short": words(1), "long": words(3), "sums": [{"input": "a", "output": "-", "answer": "so 7"}] * 2}
    for name, rows in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    test: dict[str, Any] = {name: str(tmp_path / f"{name}.jsonl") for name in sets}
    test["sums"] = {"file": test["sums"], "answer": "{answer}", "score": "number"}
    task = make(PLURAL, {"test": test, "limit": {"test": 2}}, train=words(4))
    examples = task.examples("test")
    assert [e.set for e in examples] == ["short", "long", "long", "sums", "sums"]
    assert (task.score.name, task.test_is_validation) == ("exact_match", False)
    predictions = ["out0", "out0", "wrong", "7.0", "8"]
    scores = task.scores(predictions, examples)
    assert list(scores) == ["exact_match", "short", "long", "sums"]
    assert scores == {"exact_match": pytest.approx(2 / 3), "short": 1.0, "long": 0.5, "sums": 0.5}
    (held,) = task.examples("validation")
    assert task.scores([held.answer], [held]) == {"exact_match": 1.0}
    assert task.scores(predictions[::-1], examples[::-1])["exact_match"] == pytest.approx(2 / 3)


def test_sets_of_a_classification_share_the_classes_of_train(make: Make, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": v} for v in ("neg", "pos", "odd")]
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    task = make(MOOD, {"test": {name: str(tmp_path / f"{name}.jsonl") for name in ("one", "two")}}, train=rows)
    assert [e.label for e in task.examples("test")] == [2, 1, 2, 1]
    assert task.scores([2, 1, 2, 2], task.examples("test")) == {"accuracy": 0.75, "one": 1.0, "two": 0.5}


def test_sets_of_a_hub_dataset_are_its_splits(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, split: str, *, config: str) -> list[dict[str, Any]]:
        asked.append((name, split, config))
        return words(2)

    monkeypatch.setattr("trimtab.tasks.base.read_rows", load)
    sets = {"matched": "validation_matched", "other": {"file": "validation_other", "answer": "{input}"}}
    task = make(PLURAL, {"name": "some/data", "config": "c", "train": "train", "validation": False, "test": sets})
    assert [(e.set, e.answer) for e in task.examples("test")] == [
        ("matched", "out0"),
        ("matched", "out1"),
        ("other", "in0"),
        ("other", "in1"),
    ]
    assert asked == [("some/data", "validation_matched", "c"), ("some/data", "validation_other", "c")]


def test_without_validation_every_row_trains(make: Make) -> None:
    task = make(PLURAL, {"validation": False}, train=words(3), test=words(1))
    assert len(task.examples("train")) == 3
    with pytest.raises(DataError, match="no validation split"):
        task.examples("validation")


def test_rows_of_train_that_cannot_be_used_are_left_out_on_request(make: Make) -> None:
    rows = [*words(2), {"input": "a", "output": ""}]
    task = make(PLURAL, {"skip_bad_rows": True}, train=rows, validation=rows)
    assert (len(task.examples("train")), task.skipped) == (2, 1)
    with pytest.raises(DataError, match="row 3"):
        task.examples("validation")
    with pytest.raises(DataError, match="no field 'output'"):
        make(PLURAL, {"skip_bad_rows": True}, train=[{"input": "a"}] * 3, validation=rows).examples("train")


def test_broken_lines_are_left_out_on_request_and_counted(tmp_path: Path, make: Make) -> None:
    lines = ["text,label", *(f"a film{', oh well,' * (i % 3 == 0)} {i},{'no' if i % 2 else 'yes'}" for i in range(12))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    file = str(tmp_path / "rows.csv")
    files = {"train": file, "validation": file, "test": file, "group": "text"}
    with pytest.raises(DataError, match="line 2: 4 cells where there are 2 columns"):
        make(MOOD, files).examples("train")
    task = make(MOOD, {**files, "skip_bad_rows": True})
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [8, 8, 8]
    assert task.skipped == 4 and task.first_flaw == f"{file}, line 2: 4 cells where there are 2 columns"
    said = [one for one in odd_data(task) if "lines of" in one]
    assert len(said) == 2 and said[1].startswith(
        "4 lines of test cannot be used and are left out, so test's score is of"
    )
    cut = make(MOOD, {**files, "validation": None, "skip_bad_rows": True})
    assert len(cut.examples("train")) + len(cut.examples("validation")) == 8 and cut.skipped == 4


def test_rows_without_a_class_are_left_out_on_request(make: Make) -> None:
    rows = [{"text": "a", "label": name} for name in ("x", "y", None, "")]
    with pytest.raises(DataError, match=r"row 3: .* or leave out such rows: data: skip_bad_rows: true"):
        _ = make(MOOD, train=rows).labels
    task = make(MOOD, {"skip_bad_rows": True, "validation": False, "test": "train.jsonl"}, train=rows)
    assert (task.labels, len(task.examples("train")), task.skipped) == (["x", "y"], 2, 2)


def test_a_class_that_looks_like_none_is_remarked(make: Make) -> None:
    rows = [{"text": f"{i}", "label": name} for i, name in enumerate(("x", "y", "NA") * 4)]
    _, odd = make(MOOD, {"validation": False}, train=rows, test=rows).census(
        make(MOOD, {"validation": False}, train=rows, test=rows).examples("train")
    )
    assert odd == ["'NA' is a class; if it marks rows without a label, empty it"]


def test_cells_as_a_spreadsheet_quotes_them_are_remarked(tmp_path: Path, make: Make) -> None:
    text = 'text\tlabel\n"he said ""no"""\tx\n"well" he said, "no"\ty\n'
    for name, remarked in (("rows.tsv", True), ("rows.csv", False)):
        (tmp_path / name).write_text(text if remarked else text.replace('"well" he said, "no"', "well"))
        task = make(MOOD, {"train": str(tmp_path / name), "validation": False, "test": str(tmp_path / name)})
        assert any("1 cells of" in one and "copy called .csv" in one for one in odd_data(task)) is remarked


def test_of_several_prompts_the_first_that_is_filled_is_used(make: Make) -> None:
    rows = [{"input": "a", "note": note, "output": "b"} for note in ("n", "", None)] + [{"input": "a", "output": "b"}]
    task = make(PLURAL | {"prompt": ["{input} ({note})", "{input}."]}, train=rows, validation=rows)
    assert prompts(task, "train") == ["a (n)", "a.", "a.", "a."]


def test_answers_can_be_cut_to_the_length(make: Make) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [*words(1), {"input": "x", "output": "long " * 99}, {"input": "long " * 99, "output": "x"}]
    task = make(PLURAL, train=rows, validation=rows)
    encoded, too_long = task.encode(tokenizer, task.examples("train"), training=True, max_length=40, cut=True)
    assert (len(encoded), too_long) == (2, 2)
    assert len(encoded[1].input_ids) == 40 == len(encoded[1].labels or [])  # type: ignore[arg-type]
    whole, _ = make(PLURAL, train=rows, validation=rows).encode(tokenizer, task.examples("train"), training=True)
    assert whole[1].input_ids[:40] == encoded[1].input_ids


def test_the_overlap_of_words() -> None:
    assert overlap("The red fish.", "the fish is red") == pytest.approx(2 * 3 / 7)
    assert overlap("a a", "a") == pytest.approx(2 / 3)
    assert overlap("", "a") == overlap("a", "") == overlap("+", "-") == 0.0
    assert overlap("", "") == overlap("+", "+\n") == overlap("🙂", "🙂") == 1.0
    assert overlap("हिन्दी", "हिन्द") == 0.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("0.0004", "0.0012", False), ("3.142", "3.1416", True), ("0.25", "0.2502", True), ("0", "0.0", True)],
)
def test_numbers_below_one_are_the_same_by_their_own_size(one: str, other: str, same: bool) -> None:
    assert same_number(one, other) is same_number(other, one) is same


def test_the_best_constant_answer_of_each_type(make: Make) -> None:
    tags = [{"text": "a b c d", "label": "O O O B-X"}] * 2
    task = make({**MOOD, "type": "token_classification", "score": "accuracy"}, train=tags, validation=tags)
    examples = task.examples("validation")
    first, second = task.constants(examples, 5)
    assert first == [[task.labels.index("O")] * 4] * 2 and second == [[task.labels.index("B-X")] * 4] * 2
    assert task.majority(examples) == ("O", 0.75)
    several = [{"text": "a", "label": names} for names in (["x"], ["x"], ["x", "y"], [])]
    task = make({**MOOD, "type": "multi_label_classification"}, train=several, validation=several)
    examples = task.examples("validation")
    assert task.scores(task.constants(examples, 1)[0], examples)["f1"] == pytest.approx(6 / 8)
