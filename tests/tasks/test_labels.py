"""Several classes a text, and tags for words: labels, tokens and scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trimtab.errors import DataError
from trimtab.tasks import TASKS, Task, build_task
from trimtab.tasks.scores import ENTITY_F1, MICRO_F1, SUBSET, TAG_ACCURACY, Truth, entities
from trimtab.tasks.tokens import Collator, encode_words

MODEL = Path(__file__).parents[2] / "models/tiny-llama"
TAGS = ["O", "B-A", "I-A", "B-B", "I-B"]
TAGGING = {"type": "token_classification", "text": "words", "label": "tags"}
SEVERAL = {"type": "multi_label_classification", "text": "text", "label": "about"}
Make = Callable[..., Task[Any]]
sentences = st.lists(st.lists(st.sampled_from(range(5)), min_size=1, max_size=7), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(fields: dict[str, Any], rows: list[dict[str, Any]]) -> Task[Any]:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "rows.jsonl")}
        return build_task("some", TASKS[fields["type"]].spec_class.model_validate({**fields, "data": data}))

    return build


# ---- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-PER I-PER O", {("PER", 0, 2)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("O I-PER I-PER", {("PER", 1, 3)}),
        ("I-PER B-PER I-PER", {("PER", 0, 1), ("PER", 1, 3)}),
        ("B-PER O I-PER", {("PER", 0, 1), ("PER", 2, 3)}),
        ("B I O", {("", 0, 2)}),
        ("O B-PER", {("PER", 1, 2)}),
    ],
)
def test_entities_by_hand(tags: str, found: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == found


def naive_entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """Every stretch of words that is one: it begins at B-X, or at an I-X that nothing before leads to; I-X goes on."""
    found = set()
    for start, tag in enumerate(tags):
        kind = tag[2:]
        leads = start > 0 and tags[start - 1] in (f"B-{kind}", f"I-{kind}")
        if tag.startswith("B-") or (tag.startswith("I-") and not leads):
            end = start + 1
            while end < len(tags) and tags[end] == f"I-{kind}":
                end += 1
            found.add((kind, start, end))
    return found


@given(sentences, sentences)
def test_tag_scores_against_the_definitions(wanted: list[list[int]], drawn: list[list[int]]) -> None:
    said = [(drawn[i % len(drawn)] * 7)[: len(w)] for i, w in enumerate(wanted)]
    truth = Truth(wanted, choices=TAGS)
    flat = [a == b for s, w in zip(said, wanted, strict=True) for a, b in zip(s, w, strict=True)]
    assert TAG_ACCURACY.value(said, truth) == pytest.approx(sum(flat) / len(flat))
    both = [[naive_entities([TAGS[i] for i in tags]) for tags in side] for side in (said, wanted)]
    right = sum(len(a & b) for a, b in zip(*both, strict=True))
    seen = sum(len(e) for side in both for e in side)
    assert ENTITY_F1.value(said, truth) == pytest.approx(2 * right / seen if seen else 0.0)


@given(st.lists(st.tuples(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3))), min_size=1, max_size=8))
def test_scores_of_several_classes_against_the_definitions(items: list[tuple[set[int], set[int]]]) -> None:
    said, wanted = ([sorted(side) for side in sides] for sides in zip(*items, strict=True))
    cells = [(c in s, c in w) for s, w in items for c in range(4)]
    hit, false, missed = cells.count((True, True)), cells.count((True, False)), cells.count((False, True))
    below = 2 * hit + false + missed
    assert MICRO_F1.value(said, Truth(wanted)) == pytest.approx(2 * hit / below if below else 0.0)
    assert SUBSET.value(said, Truth(wanted)) == pytest.approx(sum(s == w for s, w in items) / len(items))


def test_words_without_a_tag_are_missed() -> None:
    truth = Truth([[1, 2, 0, 1]], choices=TAGS)
    assert TAG_ACCURACY.value([[1, 2]], truth) == 0.5
    assert ENTITY_F1.value([[1, 2]], truth) == pytest.approx(2 / 3)


# ---- tokens ------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(categories=("Ll", "Lu", "Nd", "Po", "So")), min_size=1, max_size=9), min_size=1))
def test_each_word_has_its_label_at_its_first_token(words: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    encoded, cut = encode_words(tokenizer, words, range(len(words)), 10_000)
    places = [i for i, label in enumerate(encoded.labels) if label != -100]  # type: ignore[arg-type]
    assert [encoded.labels[i] for i in places] == list(range(len(words))) and not cut  # type: ignore[index]
    offsets = tokenizer(" ".join(words), return_offsets_mapping=True)["offset_mapping"]
    starts = [len(" ".join(words[:i])) + (i > 0) for i in range(len(words))]
    for place, start, word in zip(places, starts, words, strict=True):
        begin, end = offsets[place]
        assert begin < start + len(word) and end > start  # the token is of the word
        assert all(e <= start or b == e for b, e in offsets[:place])  # and none before it is


def test_labels_of_padding_and_of_what_is_cut_are_not_there(tokenizer: PreTrainedTokenizerBase) -> None:
    long, was_cut = encode_words(tokenizer, ["unbelievable"] * 9, [1] * 9, 12)
    short, _ = encode_words(tokenizer, ["a"], [0], 12)
    assert was_cut and 0 < sum(label == 1 for label in long.labels) < 9  # type: ignore[union-attr]
    labels = Collator(tokenizer)([long, short])["labels"]
    assert labels.shape == (2, 12) and (labels[1] != -100).sum() == 1
    with pytest.raises(DataError, match="the word '' in 'a  b' becomes no token"):
        encode_words(tokenizer, ["a", "", "b"], [0, 0, 0], 12)


# ---- rows --------------------------------------------------------------------------------------------------------


def test_tags_come_as_lists_or_as_texts(make: Make, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"words": ["Ada", "met", "Al"], "tags": ["B-P", "O", "B-P"]},
        {"words": "Ada met Al", "tags": "B-P O B-P"},
        {"words": ["Ada"], "tags": ["O"]},
    ]
    task = make(TAGGING, rows)
    assert task.labels == ["B-P", "O"]
    first, second, _ = task.examples("train")
    assert (first.texts, first.answer, first.label) == (("Ada met Al",), "B-P O B-P", (0, 1, 0))
    assert (second.texts, second.label) == (first.texts, first.label)
    assert [s.name for s in task.shown] == ["accuracy", "f1"]
    assert task.scores([[0, 1, 0], [0, 0, 0], [1]], task.examples("train")) == {
        "accuracy": pytest.approx(6 / 7),
        "f1": pytest.approx(8 / 9),
    }
    assert task.told([[[1.0, 0.0], [0.0, 1.0]]]) == [{"prediction": "B-P O"}]
    assert task.census(task.examples("train"))[0] == "B-P (4), O (3)"
    (encoded, *_), cut = task.encode(tokenizer, task.examples("train"), training=True)
    assert [label for label in encoded.labels if label != -100] == [0, 1, 0] and not cut
    numbers = make(TAGGING | {"labels": ["O", "B-P"]}, [{"words": ["a", "b"], "tags": [0, 1]}])
    assert numbers.examples("train")[0].label == (0, 1)


def test_a_text_with_two_labels_is_told(make: Make) -> None:
    fields = {"type": "classification", "text": "text", "label": "label"}
    rows = [{"text": t, "label": x} for t, x in (("so so", "good"), ("fine", "good"), ("so so", "bad"), ("bad", "bad"))]
    task = make(fields, rows)
    _, odd = task.census(task.examples("train"))
    assert odd == ["a text has more than one label; 'so so' has 'bad' and 'good'; keep the right one"]
    first, second, _, fourth = task.examples("train")
    assert task.census([first, second, first, fourth])[1] == []  # the same twice is no contradiction


def test_several_classes_come_as_lists_or_as_texts(make: Make, tokenizer: PreTrainedTokenizerBase) -> None:
    about: list[Any] = [["war", "art"], "art, war", [], "", ["tax"], "art", ["art", "art"]]
    task = make(SEVERAL, [{"text": "a", "about": value} for value in about])
    assert task.labels == ["art", "tax", "war"]
    assert [e.label for e in task.examples("train")] == [(0, 2), (0, 2), (), (), (1,), (0,), (0,)]
    encoded, _ = task.encode(tokenizer, task.examples("train"), training=True)
    batch = Collator(tokenizer)(encoded)
    assert batch["labels"].tolist()[:3] == [[1, 0, 1], [1, 0, 1], [0, 0, 0]] and batch["labels"].is_floating_point()
    assert "prompt_lengths" not in batch
    assert task.head.config["problem_type"] == "multi_label_classification"
    assert task.told([[3.0, -1.0, 0.1]]) == [
        {"prediction": "art, war", "p(art)": 0.952574, "p(tax)": 0.268941, "p(war)": 0.524979}
    ]
    assert task.told([[-1e4, 1e4, -1.0]])[0]["prediction"] == "tax"
    assert make(SEVERAL | {"split_by": "|"}, [{"text": "a", "about": v} for v in ("x, y|z", "z")]).labels == [
        "x, y",
        "z",
    ]


@pytest.mark.parametrize(
    ("fields", "row", "said"),
    [
        (TAGGING, {"words": ["a", "b"], "tags": ["O"]}, "row 3: 2 words but 1 tags in 'tags'"),
        (TAGGING, {"words": [], "tags": []}, "row 3: the field 'tags' is empty"),
        (TAGGING, {"words": ["a"], "tags": None}, "row 3: the field 'tags' is None"),
        (TAGGING, {"words": ["a", "b"], "tags": ["B-A", None]}, "row 3: the field 'tags' has an empty place"),
        (TAGGING, {"words": ["a", None], "tags": ["B-A", "O"]}, "row 3: the field 'words' has an empty place"),
        (TAGGING, {"words": ["a"], "tags": [{"x": 1}]}, "row 3: the field 'tags' holds a dict"),
        (TAGGING | {"labels": ["O", "B-P"]}, {"words": ["a"], "tags": ["B-Q"]}, "tags is 'B-Q', not one of the labels"),
        (TAGGING | {"score": "f1"}, {"words": ["a"], "tags": ["NOUN"]}, "score: f1 is of entities in BIO tags"),
        (SEVERAL, {"text": "a", "about": None}, r"row 3: the field 'about' is None; give a list of names, \[\] for"),
        (SEVERAL, {"text": "a", "about": ["x", None]}, r"row 3: the field 'about' is \['x', None\]; give a list"),
        (SEVERAL, {"text": "a", "about": float("nan")}, r"row 3: the field 'about' is nan; give a list of names"),
        (SEVERAL, {"text": "a"}, "row 3: no field 'about'"),
        (SEVERAL | {"labels": ["x", "y"]}, {"text": "a", "about": ["z"]}, "about is 'z', not one of the labels x, y"),
    ],
)
def test_rows_that_cannot_be_used_are_named(make: Make, fields: dict[str, Any], row: dict[str, Any], said: str) -> None:
    good = {"words": ["a", "b"], "tags": ["O", "B-P"], "text": "a", "about": ["x", "y"]}
    with pytest.raises(DataError, match=said):
        make(fields, [good, good, row]).examples("train")
