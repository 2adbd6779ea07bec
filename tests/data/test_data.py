"""Documents from every kind of source, and the batches made of them. No network."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from d2dmoe.config import DataConfig, UserError
from d2dmoe.data import Batches, make_batches, read_documents

TEXTS = [f"story {i}: " + "the cat sat. " * (i % 4 + 1) for i in range(20)]
EOS, BOS, PAD = 256, 257, 258


def byte_tokenizer(*, bos: bool = False, pad: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte of ASCII text, its number in `pre_tokenizers.ByteLevel.alphabet()` order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<eos>": EOS, "<bos>": BOS, "<pad>": PAD}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = ({"pad_token": "<pad>"} if pad else {}) | ({"eos_token": "<eos>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def ids(text: str) -> list[int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [letters.index("Ġ" if c == " " else "Ċ" if c == "\n" else c) for c in text]


def texts(source: Path | str, part: str = "all", **options) -> list[str]:
    return [d["text"] for d in read_documents(str(source), part, **options)]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_table(file: Path, rows: list[dict]) -> Path:
    """Rows in the format that the suffix names; `x;y.csv` style names choose the delimiter."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        delimiter = "\t" if file.suffix == ".tsv" else ";" if "semicolon" in file.name else ","
        with file.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return file


TABLES = ["t.jsonl", "t.json", "comma.csv", "semicolon.csv", "t.tsv", "t.parquet"]
in_every_table = pytest.mark.parametrize("name", TABLES)


# Parts


def assert_divided(source: Path | str) -> tuple[list[str], list[str]]:
    """The two parts share nothing and together are everything, in order of `all` or not."""
    calibration, held_out, both = (texts(source, part) for part in ("calibration", "held_out", "all"))
    assert not set(calibration) & set(held_out)
    assert sorted(calibration + held_out) == sorted(both)
    return calibration, held_out


def test_builtin_is_divided():
    calibration, held_out = assert_divided("builtin")
    share = len("".join(held_out)) / len("".join(calibration + held_out))
    assert 0.1 < share < 0.35
    assert len("".join(calibration)) > 300_000
    assert texts("builtin", "calibration") == calibration


@in_every_table
def test_table_is_divided(tmp_path, name):
    file = write_table(tmp_path / name, [{"text": t} for t in TEXTS])
    assert texts(file) == TEXTS
    assert assert_divided(file) == (TEXTS[:18], TEXTS[18:])  # the last tenth is held out


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_few_documents_still_leave_some_to_hold_out(tmp_path, count):
    file = write_table(tmp_path / "t.jsonl", [{"text": t} for t in TEXTS[:count]])
    assert assert_divided(file) == (TEXTS[: count - 1], TEXTS[count - 1 : count])


def test_one_text_is_cut_at_a_line_end(tmp_path):
    lines = [f"line {i:03} of the only text\n" for i in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    calibration, held_out = (texts(tmp_path / "a.txt", part)[0] for part in ("calibration", "held_out"))
    assert calibration + held_out == texts(tmp_path / "a.txt")[0]
    assert calibration == "".join(lines[:89])  # the last end of a line before nine tenths


@pytest.mark.parametrize("head", ["", "title\n"], ids=["no line end", "only an early one"])
def test_one_text_without_lines_is_cut_all_the_same(tmp_path, head):
    text = head + "word " * 400
    (tmp_path / "a.txt").write_text(text)
    calibration, held_out = (texts(tmp_path / "a.txt", part)[0] for part in ("calibration", "held_out"))
    assert calibration + held_out == text
    assert 0.85 < len(calibration) / len(text) < 0.92


# Files


def test_txt_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("\nfirst line\n\n  second — línea\n\n", encoding="utf-8")
    assert texts(tmp_path / "a.txt") == ["first line\n\n  second — línea"]


def test_separator_divides_documents(tmp_path):
    (tmp_path / "a.txt").write_text(
        "one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n  \n<|endoftext|>three<|endoftext|>\n"
    )
    assert texts(tmp_path / "a.txt") == ["one", "two\nlines", "three"]


@pytest.mark.parametrize("name", ["a.md", "noending"])
def test_unknown_endings_are_text(tmp_path, name):
    (tmp_path / name).write_text("some text, with a comma")
    assert texts(tmp_path / name) == ["some text, with a comma"]


AWKWARD = [
    "a, b; c\td | e",
    'she said "no"',
    "two\nlines",
    "odd\u2028separator \x85 and \x0c",
    "naïve — 漢字 🙂",
    " spaces ",
]


@in_every_table
def test_awkward_text_is_read_back_as_written(tmp_path, name):
    file = write_table(tmp_path / name, [{"id": str(i), "text": t} for i, t in enumerate(AWKWARD)])
    assert texts(file) == AWKWARD


@pytest.mark.parametrize("name", ["t.jsonl", "comma.csv", "t.txt"])
def test_byte_order_mark_is_not_text(tmp_path, name):
    file = tmp_path / name
    if name == "t.txt":
        file.write_text("hello")
    else:
        write_table(file, [{"text": "hello", "title": "a"}])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert texts(file) == ["hello"]


@pytest.mark.parametrize("name", ["comma.csv", "t.tsv"])
def test_words_that_look_like_something_else_are_text(tmp_path, name):
    rows = ["NA", "null", "12", "1e3", "true", "2024-01-01"]
    assert texts(write_table(tmp_path / name, [{"text": t, "n": 1} for t in rows])) == rows


@pytest.mark.parametrize("name", ["comma.csv", "t.tsv"])
def test_table_of_one_column(tmp_path, name):
    rows = ["hello world", "two; three", "four, five", "six"]
    assert texts(write_table(tmp_path / name, [{"text": t} for t in rows])) == rows


def test_very_long_field(tmp_path):
    long = "word " * 40_000  # above the csv module's default limit of 131072 characters
    assert texts(write_table(tmp_path / "comma.csv", [{"text": long, "id": 1}])) == [long]


def test_json_lines_may_have_blank_lines_and_lack_keys(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "n": 1}\n\n{"n": 2}\n{"text": ""}\n{"text": "b"}\n')
    assert texts(tmp_path / "t.jsonl") == ["a", "b"]


@in_every_table
def test_labels_come_along(tmp_path, name):
    file = write_table(tmp_path / name, [{"label": i % 3, "sentence": t} for i, t in enumerate(TEXTS)])
    documents = read_documents(str(file))
    assert [d["text"] for d in documents] == TEXTS
    batch = make_batches(documents, byte_tokenizer(), DataConfig(batch_size=20, max_length=8), packed=False)[0]
    assert batch["labels"].tolist() == [i % 3 for i in range(20)]


def test_labels_that_are_not_classes_are_left_out(tmp_path):
    for name, values in (("words.jsonl", ["good", "bad"]), ("scores.jsonl", [0.5, 3.2])):
        file = write_table(tmp_path / name, [{"text": "some text", "label": v} for v in values])
        batch = make_batches(read_documents(str(file)), byte_tokenizer(), DataConfig(), packed=False)[0]
        assert "labels" not in batch


CLASSES = {"sad": 0, "glad": 1, "2": 2}


@pytest.mark.parametrize("name", [*TABLES, "emotion.txt"])
def test_names_of_classes_become_their_numbers(tmp_path, name):
    rows = [{"text": f"some text {i}", "label_name": label} for i, label in enumerate(("glad", "sad", "2", "1"))]
    file = tmp_path / name
    if name == "emotion.txt":
        file.write_text("text;label_name\n" + "".join(f"{r['text']};{r['label_name']}\n" for r in rows))
    else:
        write_table(file, rows)
    batch = make_batches(
        read_documents(str(file)), byte_tokenizer(), DataConfig(max_length=32), packed=False, label2id=CLASSES
    )[0]
    assert batch["labels"].tolist() == [1, 0, 2, 1]
    assert batch["input_ids"].tolist() == [ids(row["text"]) for row in rows]


def test_text_that_happens_to_begin_like_a_table(tmp_path):
    for first in ("a text; a label", "text", "text;more", "Text;Label_name", "label|more"):
        text = f"{first}\nsecond line"
        (tmp_path / "t.txt").write_text(text)
        assert read_documents(str(tmp_path / "t.txt")) == [{"text": text}]


def test_label_column(tmp_path):
    file = write_table(tmp_path / "t.csv", [{"text": "a b", "label": 1, "mood": "sad"}] * 2)
    batch = {}
    for column in (None, "mood", "none"):
        documents = read_documents(str(file), "all", None, column)
        batch[column] = make_batches(documents, byte_tokenizer(), DataConfig(), packed=False, label2id=CLASSES)[0]
    assert batch[None]["labels"].tolist() == [1, 1]
    assert batch["mood"]["labels"].tolist() == [0, 0]
    assert "labels" not in batch["none"]
    with pytest.raises(UserError, match=r"no column 'feeling'; it has text, label, mood"):
        read_documents(str(file), "all", None, "feeling")


def test_a_label_that_is_no_class():
    documents = [{"text": "a b", "label": "glad"}, {"text": "c d", "label": "bored"}]
    with pytest.raises(UserError, match=r"label 'bored' is none of the model's, sad, glad, 2 .*--label-column"):
        make_batches(documents, byte_tokenizer(), DataConfig(), packed=False, label2id=CLASSES)


# Folders


def test_folder_with_its_own_parts(tmp_path):
    (tmp_path / "train.txt").write_text("from train")
    (tmp_path / "validation.txt").write_text("from validation")
    (tmp_path / "test.txt").write_text("from test")
    assert texts(tmp_path, "calibration") == ["from train"]
    assert texts(tmp_path, "held_out") == ["from validation"]
    assert sorted(texts(tmp_path)) == ["from test", "from train", "from validation"]


def test_folder_of_mixed_files_in_shards(tmp_path):
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / "train-0.jsonl", [{"text": "a"}])
    write_table(tmp_path / "data" / "train-1.parquet", [{"text": "b"}])
    write_table(tmp_path / "data" / "test.csv", [{"text": "c", "n": 1}])
    (tmp_path / "data" / "notes.log").write_text("not data")
    assert texts(tmp_path, "calibration") == ["a", "b"]
    assert texts(tmp_path, "held_out") == ["c"]


def test_folder_without_parts_is_divided(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:02}.txt").write_text(text)
    assert assert_divided(tmp_path) == (TEXTS[:18], TEXTS[18:])


# Columns


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"id": "a", "text": "x"}, "text"),
        ({"title": "a", "sentence": "x"}, "sentence"),
        ({"title": "a", "content": "x"}, "content"),
        ({"n": 1, "prose": "x"}, "prose"),
        ({"sentence": "a", "text": "x"}, "text"),
        ({"label": "good", "review": "x"}, "review"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else v,
)
def test_text_column_is_guessed(tmp_path, row, column):
    assert texts(write_table(tmp_path / "t.jsonl", [row, row])) == ["x", "x"]
    assert texts(write_table(tmp_path / "t.jsonl", [row]), text_column=column) == ["x"]


@in_every_table
def test_text_column_that_cannot_be_guessed(tmp_path, name):
    file = write_table(tmp_path / name, [{"question": "why?", "answer": "so"}])
    with pytest.raises(UserError, match=r"question.*answer.*--text-column") as error:
        read_documents(str(file))
    assert str(file) in str(error.value)
    assert texts(file, text_column="answer") == ["so"]


@in_every_table
def test_text_column_that_is_not_there(tmp_path, name):
    file = write_table(tmp_path / name, [{"question": "why?", "answer": "so"}])
    with pytest.raises(UserError, match=r"'body'.*question, answer"):
        read_documents(str(file), text_column="body")


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_token_ids_are_taken_as_they_are(tmp_path, name):
    rows = [{"input_ids": list(range(1, n))} for n in (3, 9, 5)]
    documents = read_documents(str(write_table(tmp_path / name, rows)))
    batches = make_batches(documents, None, DataConfig(batch_size=2, max_length=6), packed=True)
    assert batches[0]["input_ids"].tolist() == [[1, 2, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert batches[1]["input_ids"].tolist() == [[7, 8, 0, 0], [1, 2, 3, 4]]  # the rest of the long row


# What goes wrong


def refused(source: Path | str, pattern: str, part: str = "all") -> None:
    with pytest.raises(UserError, match=pattern) as error:
        read_documents(str(source), part)
    assert str(source) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.jsonl", "folder/"])
def test_missing_path(tmp_path, name):
    refused(f"{tmp_path}/{name}", "no such file")
    refused(f"./{name}", "no such file")


def test_unknown_hub_name_without_a_network():
    refused("someone/no-such-data-set", "hub")


@pytest.mark.parametrize("name", ["e.txt", *TABLES])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_text("")
    refused(tmp_path / name, "empty")


@pytest.mark.parametrize(
    ("name", "content"),
    [("e.txt", " \n\n"), ("e.jsonl", "\n\n"), ("e.json", "[]"), ("e.csv", "text,label\n"), ("e.csv", 'text\n""\n')],
    ids=str,
)
def test_file_without_documents(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, "no usable")


def test_parquet_without_rows(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    refused(tmp_path / "e.parquet", "parquet file with rows")


def test_folder_without_data(tmp_path):
    (tmp_path / "picture.bin").write_bytes(b"\x00")
    refused(tmp_path, "none of .*jsonl")


@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.jsonl"])
def test_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes("text\ncafé au lait\n".encode("latin-1"))
    refused(tmp_path / name, r"not UTF-8.*byte 8\b")


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("b.jsonl", '{"text": "a"}\n{"text": "b"\n', r"not valid JSON.*line 2\b"),
        ("b.jsonl", '{"text": "a"}\nplain words\n', r"line 2\b"),
        ("b.json", '[{"text": "a"},\n {"text": "b"]', r"line 2\b"),
        ("b.json", '["a", "b"]', "object"),
        ("b.jsonl", '"a"\n"b"\n', "object"),
        ("b.jsonl", '{"text": "a"}\n3\n', "object"),
    ],
    ids=str,
)
def test_bad_json(tmp_path, name, content, where):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, where)


@pytest.mark.parametrize("rows", ["fine,1\nnot, quoted,2\n", "not, quoted,2\nnor, this,3\n"], ids=["one", "all"])
def test_csv_row_with_too_many_fields(tmp_path, rows):
    (tmp_path / "b.csv").write_text(f"text,n\n{rows}")
    refused(tmp_path / "b.csv", rf"line {3 if rows.startswith('fine') else 2} .*quote")


def test_bad_parquet(tmp_path):
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    refused(tmp_path / "b.parquet", "parquet")


def test_nothing_to_hold_out(tmp_path):
    file = write_table(tmp_path / "t.jsonl", [{"input_ids": [1, 2, 3]}])
    refused(file, "held-out", "held_out")
    assert len(read_documents(str(file), "calibration")) == 1


# Batches


def documents_of(*values: str) -> list[dict]:
    return [{"text": value} for value in values]


def rows_of(batches: Batches) -> list[list[int]]:
    return [row[mask.bool()].tolist() for batch in batches for row, mask in zip(*list(batch.values())[:2], strict=True)]


def test_packed_joins_with_the_end_token():
    config = DataConfig(max_length=4, batch_size=2)
    batches = make_batches(documents_of("abcde", "fg", "hijkl"), byte_tokenizer(), config, packed=True)
    joined = [*ids("abcde"), EOS, *ids("fg"), EOS, *ids("hijkl")]  # 14 tokens, 3 full sequences
    assert rows_of(batches) == [joined[0:4], joined[4:8], joined[8:12]]
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4), (1, 4)]
    assert all(batch["attention_mask"].all() for batch in batches)


def test_packed_joins_between_documents_only():
    config = DataConfig(max_length=6)
    batches = make_batches(documents_of("ab", "cde"), byte_tokenizer(), config, packed=True)
    assert rows_of(batches) == [[*ids("ab"), EOS, *ids("cde")]]
    with pytest.raises(UserError, match=r"6 tokens.* 7\b"):
        make_batches(documents_of("ab", "cde"), byte_tokenizer(), DataConfig(max_length=7), packed=True)


def test_packed_leaves_the_marks_to_a_tokenizer_that_sets_its_own():
    batches = make_batches(documents_of("ab", "cde"), byte_tokenizer(bos=True), DataConfig(max_length=7), packed=True)
    assert rows_of(batches) == [[BOS, *ids("ab"), BOS, *ids("cde")]]


def test_packed_without_any_mark():
    batches = make_batches(documents_of("ab", "cde"), byte_tokenizer(eos=False), DataConfig(max_length=5), packed=True)
    assert rows_of(batches) == [ids("abcde")]


def test_documents_are_padded_and_masked():
    config = DataConfig(max_length=6, batch_size=3)
    batch = make_batches(documents_of("abc", "defgh", "ij"), byte_tokenizer(), config, packed=False)[0]
    a, b, c = ids("abc"), ids("defgh"), ids("ij")
    assert batch["input_ids"].tolist() == [[*a, PAD, PAD], b, [*c, PAD, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


def test_mask_tells_padding_from_a_real_token_of_the_same_number():
    batches = Batches([{"input_ids": [0, 5, 0]}, {"input_ids": [7]}], 2, pad_id=0)
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_long_document_goes_on_in_further_sequences():
    config = DataConfig(max_length=4)
    batches = make_batches(documents_of("abcdefghij", "kl"), byte_tokenizer(), config, packed=False)
    assert rows_of(batches) == [ids("abcd"), ids("efgh"), ids("ij"), ids("kl")]
    labelled = make_batches([{"text": "abcdefghij", "label": 1}], byte_tokenizer(), config, packed=False)
    assert rows_of(labelled) == [ids("abcd")]  # a label belongs to one sequence


@pytest.mark.parametrize(("sequences", "packed", "expected"), [("packed", False, 1), ("documents", True, 2)])
def test_sequences_overrides_the_default(sequences, packed, expected):
    config = DataConfig(max_length=5, sequences=sequences)
    batches = make_batches(documents_of("ab", "cd"), byte_tokenizer(), config, packed=packed)
    assert len(batches.items) == expected


def test_tokenizer_without_a_pad_token_pads_with_zero():
    batches = make_batches(documents_of("abc", "de"), byte_tokenizer(pad=False), DataConfig(), packed=False)
    assert batches[0]["input_ids"].tolist() == [ids("abc"), [*ids("de"), 0]]


def items_of(*lengths: int) -> list[dict]:
    return [{"input_ids": [i] * n} for i, n in enumerate(lengths)]


def test_batches_are_a_sequence():
    batches = Batches(items_of(3, 1, 4, 1, 5), 2)
    assert len(batches) == len(list(batches)) == 3
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert batches.tokens == 14
    assert torch.equal(batches[1]["input_ids"], list(batches)[1]["input_ids"])
    with pytest.raises(IndexError):
        batches[3]


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (3, 1), (4, 2), (8, 3), (9, 4), (14, 5), (99, 5), (0, 0)])
def test_first_holds_just_enough(tokens, count):
    batches = Batches(items_of(3, 1, 4, 1, 5), 2, pad_id=9)
    assert batches.first(tokens).items == batches.items[:count]
    assert (batches.first(tokens).batch_size, batches.first(tokens).pad_id) == (2, 9)


def test_shuffled_is_a_permutation_that_follows_the_seed():
    batches = Batches(items_of(*range(1, 31)), 4, pad_id=9)
    first, same, other = batches.shuffled(1), batches.shuffled(1), batches.shuffled(2)
    assert first.items == same.items
    assert first.items != other.items
    assert first.items != batches.items
    assert sorted(len(i["input_ids"]) for i in first.items) == list(range(1, 31))
    assert (first.batch_size, first.pad_id, first.tokens) == (4, 9, batches.tokens)


def test_text_shorter_than_a_sequence():
    config = DataConfig(data="my.txt", max_length=100)
    with pytest.raises(UserError, match=r"my\.txt.*17 tokens.*100.*--max-length"):
        make_batches(documents_of("seventeen letters"), byte_tokenizer(), config, packed=True)


def test_documents_without_two_tokens():
    with pytest.raises(UserError, match=r"my\.txt.*two tokens"):
        make_batches(documents_of("a", "b"), byte_tokenizer(), DataConfig(data="my.txt"), packed=False)


def test_images_without_pillow(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"d2dmoe-toolkit\[vision\]"):
        make_batches([{"image": {"bytes": b""}}], None, DataConfig(), packed=False)


def test_processor_that_does_not_fit():
    with pytest.raises(UserError, match=re.escape("my.txt is text")):
        make_batches(documents_of("abc"), None, DataConfig(data="my.txt"), packed=True)
    with pytest.raises(UserError, match=r"images.*image processor"):
        make_batches([{"image": {"bytes": b""}}], byte_tokenizer(), DataConfig(), packed=False)
