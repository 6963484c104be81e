"""Files to rows, rows to tokens, tokens to batches."""

from __future__ import annotations

import copy
import csv
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trimtab.errors import DataError
from trimtab.tasks.files import field, locate, read_rows
from trimtab.tasks.messages import one_turn
from trimtab.tasks.templates import render
from trimtab.tasks.tokens import Collator, Encoded, encode, encode_texts

ROWS = [{"input": "cat", "output": "cats"}, {"input": "ox", "output": "oxen"}]
MODEL = Path(__file__).parents[2] / "models/tiny-llama"
once = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    writer.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("b.json", json.dumps({"data": ROWS, "version": 1})),
        ("c.json", "\n".join(map(json.dumps, ROWS))),
        ("d.jsonl", "\ufeff" + "\r\n\n".join(map(json.dumps, ROWS)) + "\n"),
        ("e.csv", 'input,output\r\ncat,cats\r\n"ox",oxen\r\n'),
        ("f.tsv", "input\toutput\ncat\tcats\n\nox\toxen\n"),
        ("g.csv", "\ufeffinput;output\r\ncat;cats\r\nox;oxen\r\n"),
        ("h.csv", "input\toutput\ncat\tcats\nox\toxen\n"),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_rows(tmp_path / name) == ROWS


def test_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(ROWS))
    assert read_rows(tmp_path / "a.parquet") == ROWS


def test_a_field_of_an_object_is_not_read() -> None:
    with pytest.raises(DataError, match="'data' is an object: make its fields the row's"):
        field({"data": {"text": "a"}}, "data.text", "row 1")


def test_classes_of_a_data_set_come_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["neg", "pos"])
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-P"]))
    features = {"text": datasets.Value("string"), "label": label, "tags": tags, "count": datasets.Value("int64")}
    columns = {"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], []], "count": [1, 0]}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    wanted = [
        {"text": "a", "label": "pos", "tags": ["O", "B-P"], "count": 1},
        {"text": "b", "label": -1, "tags": [], "count": 0},
    ]
    data.to_parquet(tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == wanted
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    assert read_rows("some", "train") == wanted


def test_tsv_keeps_stray_quotes_and_columns_name_a_file_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('1\t" It \'s" good\n0\t"bad\n')
    assert read_rows(tmp_path / "a.tsv", columns=["label", "text"]) == [
        {"label": "1", "text": '" It \'s" good'},
        {"label": "0", "text": '"bad'},
    ]


def test_a_header_line_that_columns_repeat_is_none_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("input,output\ncat,cats\nox,oxen\n")
    assert read_rows(tmp_path / "a.csv", columns=["input", "output"]) == ROWS


def test_the_index_that_pandas_writes_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",input,output\n0,cat,cats\n1,ox,oxen\n")
    assert read_rows(tmp_path / "a.csv") == [{"Unnamed: 0": str(i), **row} for i, row in enumerate(ROWS)]
    with pytest.raises(DataError, match="empty or repeated name"):
        read_rows(tmp_path / "a.csv", columns=["", "input", "output"])  # which nobody's program wrote
    (tmp_path / "a.csv").write_text("input,,output\ncat,,cats\n")
    with pytest.raises(DataError, match="empty or repeated name"):
        read_rows(tmp_path / "a.csv")


@once
@given(st.lists(st.fixed_dictionaries({"a": text, "b": st.none() | st.integers() | text}), min_size=1, max_size=5))
def test_jsonl_round_trip(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8", newline="")
    assert read_rows(path) == rows


@once
@given(st.lists(st.tuples(text, text), min_size=1, max_size=5))
def test_csv_round_trip(tmp_path: Path, cells: list[tuple[str, str]]) -> None:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("a", "b"), *cells])
    (tmp_path / "rows.csv").write_text(out.getvalue(), encoding="utf-8", newline="")
    assert read_rows(tmp_path / "rows.csv") == [{"a": a, "b": b} for a, b in cells]


@pytest.mark.parametrize(
    ("text", "separator", "row"),
    [
        ("a;b\n1,5;2,5\n", None, {"a": "1,5", "b": "2,5"}),
        ('a,b\n"x;y",1\n', None, {"a": "x;y", "b": "1"}),
        ("text\nwell, no\n", None, None),  # one column, and cells that hold commas: an error, not a guess
        ("a|b\n1|2\n", None, {"a": "1", "b": "2"}),
        ("a#b\n1#2\n", "#", {"a": "1", "b": "2"}),
        ("a,b;c\n1,2;3\n", ";", {"a,b": "1,2", "c": "3"}),
    ],
)
def test_a_separator_is_found_or_given(
    tmp_path: Path, text: str, separator: str | None, row: dict[str, str] | None
) -> None:
    (tmp_path / "a.csv").write_text(text)
    if row is None:
        with pytest.raises(DataError, match="2 cells where there are 1 columns"):
            read_rows(tmp_path / "a.csv")
    else:
        assert read_rows(tmp_path / "a.csv", separator=separator) == [row]


def turns(*pairs: tuple[str, str], names: tuple[str, str] = ("role", "content")) -> dict[str, Any]:
    return {"talk": [dict(zip(names, pair, strict=True)) for pair in pairs]}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (turns(("user", "a"), ("assistant", "b")), {"system": "", "user": "a", "assistant": "b"}),
        (turns(("system", "s"), ("user", "a")), {"system": "s", "user": "a"}),
        (turns(("human", "a"), ("gpt", "b"), names=("from", "value")), {"system": "", "user": "a", "assistant": "b"}),
        (turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), "goes user, assistant, user"),
        (turns(("assistant", "a")), "goes assistant; a generation takes one user turn"),
        ({"talk": "a text"}, "row 1: the field 'talk' holds no list of messages"),
        ({"chat": []}, "row 1: no field 'talk'"),
    ],
)
def test_a_conversation_of_one_turn_is_fields(row: dict[str, Any], found: dict[str, str] | str) -> None:
    if isinstance(found, str):
        with pytest.raises(DataError, match=found):
            one_turn(row, "talk", "row 1")
    else:
        assert one_turn(row, "talk", "row 1") == found


# A file's name and content, then what the message must hold.
BAD: list[tuple[str, bytes, list[str]]] = [
    ("a.jsonl", b"", ["a.jsonl", "empty"]),
    ("a.json", b"[]", ["a.json", "no rows"]),
    ("a.csv", b"x,y\n", ["a.csv", "no rows"]),
    ("a.jsonl", b'{"a": 1}\n{"a": "cu', ["a.jsonl, line 2", "cut short", "remove the line"]),
    ("a.json", b'[{"a": 1},\n{"a"', ["a.json, line 2", "cut short"]),
    ("a.json", b'{"rows": 3}', ["a.json", '{"data": [...]}', "one object"]),
    ("a.json", b"[[1]]", ["a.json, row 1", "named fields", "list"]),
    ("a.jsonl", b"[1]", ["a.jsonl, line 1", "named fields", "list"]),
    ("a.csv", b"name,b\n\xe9t\xe9,1\n", ["a.csv, line 2", "not UTF-8", "iconv"]),
    ("a.json", pickle.dumps([{"a": 1}]), ["a.json", "pickle", "export", ".jsonl"]),
    ("a.csv", b"\x1f\x8b\x08\x00", ["a.csv", "gzip", ".jsonl"]),
    ("a.csv", b"a,b\n1,2\n\n1,2,3\n", ["a.csv, line 4", "3 cells", "2 columns (a, b)", "quote"]),
    ("a.tsv", b"a\tb\n1\n", ["a.tsv, line 2", "1 cells", "2 columns"]),
    (
        "a.tsv",
        b'a\tb\n"1\n2"\tx\n',
        ["a.tsv, line 2", "quotes are plain characters in a .tsv file", "copy called .csv"],
    ),
    ("a.tsv", b'"a"\t"b"\n"1"\t"x"\n', ["a.tsv, line 1", "the names are in quotes", "copy called .csv"]),
    ("a.jsonl.gz", b"\x1f\x8b", ["unknown suffix '.gz'", "Unpack it first"]),
    ("data-00000-of-00001.arrow", b"x", ["`datasets` wrote its folder", "to_parquet"]),
    ("a.csv", b'a,b\n1,"2\n', ["a.csv, line 2", "quotes"]),
    ("a.csv", b"a,a\n1,2\n", ["a.csv, line 1", "repeated", "columns:"]),
    ("a.txt", b"hello", ["a.txt", "unknown suffix", ".jsonl, .csv", "a copy called a.csv"]),
    ("a.parquet", b"PAR1 but not whole", ["a.parquet", "not a whole parquet"]),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD)
def test_a_bad_file_is_told_where_and_what_to_do(tmp_path: Path, name: str, content: bytes, said: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert [part for part in said if part not in str(caught.value)] == [], caught.value


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "plural.train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no file 'plural.trian.jsonl'; did you mean plural.train.jsonl\?"):
        locate("plural.trian.jsonl", tmp_path)
    with pytest.raises(DataError, match="there is no folder nowhere"):
        locate("nowhere/x.jsonl", tmp_path)
    with pytest.raises(DataError, match="columns: is for"):
        read_rows(tmp_path / "plural.train.jsonl", columns=["a", "b"])


def test_the_hub_out_of_reach_says_how_to_use_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        calls.append((name, config, split))
        if name == "gone":
            raise ConnectionError("no network\ndetails")
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("glue", "train", config="rte") == ROWS
    assert calls == [("glue", "rte", "train")]
    with pytest.raises(DataError, match=r"'train' of the Hub dataset 'gone' \(ConnectionError: no network\).*save it"):
        read_rows("gone", "train")


def test_chat_prompt_and_answer_join_to_the_rendered_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    both = encode(tokenizer, "cat", "cats")
    assert tokenizer.decode(both.input_ids) == "<|bos|><|user|>cat<|assistant|>cats<|end|>"
    assert both.input_ids[: both.prompt_length] == encode(tokenizer, "cat").input_ids
    assert both.labels == [-100] * both.prompt_length + both.input_ids[both.prompt_length :]


def test_a_plain_prompt_has_no_template(tokenizer: PreTrainedTokenizerBase) -> None:
    both = encode(tokenizer, "cat", " cats", chat=False)
    assert tokenizer.decode(both.input_ids) == "cat cats<|end|>"
    assert encode(tokenizer, "cat", chat=False).input_ids == both.input_ids[: both.prompt_length]


@once
@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20), st.booleans())
def test_training_begins_with_what_generation_sees(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, chat: bool
) -> None:
    seen = encode(tokenizer, prompt, chat=chat).input_ids
    trained = encode(tokenizer, prompt, answer, chat=chat)
    assert trained.input_ids[: len(seen)] == seen
    assert trained.input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "<|end|>"),  # writes no end of turn
        ("{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}", "<|end|>"),
        ("{% for m in messages %}{{ m['content'] }}<|user|>\n{% endfor %}", "<|user|>"),  # an end that is not eos
    ],
)
def test_the_end_of_turn_is_the_templates(tokenizer: PreTrainedTokenizerBase, template: str, end: str) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    encoded = encode(other, "a", "b")
    assert other.decode(encoded.input_ids[encoded.prompt_length :]) == "b" + end


def test_a_missing_or_refusing_template_says_what_to_set(tokenizer: PreTrainedTokenizerBase) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    with pytest.raises(DataError, match="no chat template; in a recipe set chat: false"):
        encode(other, "a", chat=True)
    other.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"no system role.*remove system:"):
        encode(other, "a", system="b")


def test_training_batches_pad_right_and_prompts_left(tokenizer: PreTrainedTokenizerBase) -> None:
    collate, pad = Collator(tokenizer), tokenizer.pad_token_id
    batch = collate([Encoded([5, 6, 7], 1, [-100, 6, 7]), Encoded([8, 9], 1, [-100, 9])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["prompt_lengths"].tolist() == [1, 1]
    prompts = collate([Encoded([5, 6, 7], 3, None), Encoded([8], 1, None)])
    assert prompts["input_ids"].tolist() == [[5, 6, 7], [pad, pad, 8]]
    assert prompts["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert set(prompts) == {"input_ids", "attention_mask"}


def test_without_a_pad_token_eos_fills_and_the_mask_still_tells(tokenizer: PreTrainedTokenizerBase) -> None:
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    batch = Collator(other)([Encoded([5, 1], 1, [-100, 1]), Encoded([8], 1, [-100])])
    assert batch["input_ids"].tolist() == [[5, 1], [8, other.eos_token_id]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_classes_are_long_numbers_are_float_and_long_texts_are_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    pair, cut = encode_texts(tokenizer, ["a cat", "an ox"], 1, 64)
    short, was_cut = encode_texts(tokenizer, ["one two three four"], 0, 2)
    assert (cut, was_cut, len(short.input_ids)) == (False, True, 2)
    batch = Collator(tokenizer)([pair, short])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.long
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    scored = Collator(tokenizer)([Encoded([3], 1, 0.5, [0]), Encoded([3, 4], 2, 1.0, [0, 1])])
    assert scored["labels"].dtype == torch.float
    assert scored["token_type_ids"].tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"cat", "holds a bytes, not text or a number"),
        (["a", "b"], "holds a list"),
        ({"a": 1}, "holds a dict"),
        ("\ud800", "has half a character"),
    ],
)
def test_what_is_no_text_does_not_become_a_prompt(value: object, said: str) -> None:
    with pytest.raises(DataError, match=rf"row 1: the field 'input' {said}"):
        render("{input}", {"input": value}, "row 1")


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("rows.csv", "a,b\n1,2\n".encode("utf-16"), "UTF-16 text; convert it: iconv -f UTF-16"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16-le"), "UTF-16 text; convert it: iconv -f UTF-16LE"),
        ("rows.csv", b"BZh91AY", "its content is bzip2"),
        ("rows.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "its content is Excel"),
        ("rows.json", b'{"train": [], "test": []}', "it holds lists, train, test: write each to a file of its own"),
        ("rows.csv", b'a\tb\nx\t"well\ny\tno"\n', "make a copy called .tsv"),
        ("SMSSpam", b"ham\tOk\n", "read from a copy called SMSSpam.tsv"),
        ("rows.json", b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        ("rows.jsonl", b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "line 1: nested too deeply"),
    ],
)
def test_files_that_are_odd_are_named(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=said):
        read_rows(tmp_path / name)


def test_a_folder_that_datasets_saved_is_told_from_others(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    with pytest.raises(DataError, match="is a folder; name a file of rows in it"):
        locate("saved", tmp_path)
    (tmp_path / "saved/dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="a folder that `datasets` wrote; in Python, load_from_disk"):
        locate("saved", tmp_path)
