"""Tables that are not alike in every row: nulls, types, labels, padding, long rows. No row has a special place."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import byte_tokenizer, ids, rows_of, write_table

from d2dmoe.config import DataConfig, UserError
from d2dmoe.data import Batches, make_batches, read_documents

CLASSES = {"no": 0, "yes": 1}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def refused(source: Path, *words: str, **options) -> str:
    with pytest.raises(UserError) as error:
        read_documents(str(source), **options)
    text = str(error.value)
    assert [w for w in words if w not in text] == [], text
    assert "\n" not in text
    return text


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


# --- whichever row comes first -------------------------------------------------------------------------------------

WORDS = st.sampled_from(["one", "two three", "", "\ud83d", "é"])
CELLS = {
    "text": st.one_of(WORDS, st.none(), st.integers(0, 3), st.lists(WORDS, max_size=2)),
    "title": st.one_of(WORDS, st.none(), st.floats(0, 1)),
    "label": st.one_of(
        st.none(), st.integers(0, 1), st.sampled_from([0.0, 1.0, 0.5, float("nan"), "yes", "1.0", True])
    ),
    "labels": st.one_of(st.none(), st.sampled_from(["no", "yes"])),
    "input_ids": st.one_of(st.none(), st.lists(st.integers(0, 9), max_size=4), st.just([1, -1]), st.just([0.5])),
    "attention_mask": st.one_of(st.none(), st.just([1, 1, 0]), st.just([1, 1])),
}
# Mostly plain values, so that tables that are good come up too.
PLAIN = {"text": st.sampled_from(["one", "two"]), "title": st.sampled_from(["a", "b"]), "label": st.integers(0, 1),
         "labels": st.just("no"), "input_ids": st.just([1, 2, 3]), "attention_mask": st.just([1, 1, 0])}  # fmt: skip


@st.composite
def tables(draw) -> list[dict]:
    names = draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=1, max_size=4, unique=True))
    odd = draw(st.sets(st.sampled_from(names), max_size=1))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        kept = [n for n in names if n not in odd or draw(st.booleans())]
        rows.append({n: draw((CELLS if n in odd else PLAIN)[n]) for n in draw(st.permutations(kept))})
    return rows


def outcome(path: Path, rows: list[dict]) -> object:
    """The documents in no order, or the sentence; where that names a row, any of several bad rows will do."""
    lines(path, *rows)
    try:
        documents = read_documents(str(path))
        batches = make_batches(documents, byte_tokenizer(), DataConfig(), packed=False, label2id=CLASSES)
        return sorted(json.dumps(item, sort_keys=True) for item in batches.items)
    except UserError as error:
        return re.sub(r", line \d+: .*", ": a row", str(error))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables(), st.randoms(use_true_random=False))
def test_no_row_decides_for_the_others(tmp_path, rows, chance):
    expected = outcome(tmp_path / "t.jsonl", rows)
    for first in range(1, len(rows)):
        assert outcome(tmp_path / "t.jsonl", rows[first:] + rows[:first]) == expected
    shuffled = chance.sample(rows, len(rows))
    assert outcome(tmp_path / "t.jsonl", shuffled) == expected


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.parquet", "t.csv"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_null_leaves_its_row_out_and_no_other(tmp_path, name, at):
    rows = [{"title": f"title {i}", "text": f"story {i}", "n": i} for i in range(4)]
    rows[at]["text"] = None
    documents = read_documents(str(write_table(tmp_path / name, rows)))
    assert documents == [{"text": f"story {i}"} for i in range(4) if i != at]


def test_another_column_does_not_take_the_place_of_an_empty_one(tmp_path):
    rows = [{"text": None, "title": "x"}, {"text": None, "title": "y"}]
    refused(lines(tmp_path / "a.jsonl", *rows), "no usable text")
    refused(lines(tmp_path / "b.jsonl", *rows, {"text": 3, "title": "z"}), "line 3: column 'text'")
    documents = [{"text": "x"}, {"text": "y"}]
    assert read_documents(str(tmp_path / "a.jsonl"), text_column="title") == documents
    write_table(tmp_path / "c.jsonl", [{"document": 17, "title": "x"}, {"document": None, "title": "y"}])
    assert read_documents(str(tmp_path / "c.jsonl")) == documents  # a number of a document, not the document


def test_a_key_that_only_later_rows_have_is_a_column(tmp_path):
    path = lines(tmp_path / "t.jsonl", {"id": "a"}, {"id": "b", "body": "long"}, {"body": "longer", "id": "c"})
    assert read_documents(str(path), text_column="body") == [{"text": "long"}, {"text": "longer"}]
    refused(path, "cannot tell the text column among body, id", "--text-column")


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"text": 7}, ["line 3", "'text' holds a number", "--text-column"]),
        ({"text": ["a"]}, ["line 3", "'text' holds a list"]),
        ({"text": {"a": 1}}, ["line 3", "'text' holds an object"]),
        ({"text": True}, ["line 3", "'text' holds true or false"]),
        ('{"text": "a \\ud83d b"}', ["line 3", "'text' holds half a character (\\ud83d)", "UTF-8"]),
        ({"text": "a", "input_ids": [1, 2]}, ["line 1", "'text' and no 'input_ids'", "--text-column text"]),
    ],
    ids=str,
)
def test_a_row_of_another_type_is_named(tmp_path, odd, words):
    path = lines(tmp_path / "t.jsonl", {"text": "x"}, "", odd, {"text": "y"})
    refused(path, f"--data {path}, ", *words)


def test_both_halves_of_a_character_are_one(tmp_path):
    assert read_documents(str(lines(tmp_path / "t.jsonl", '{"text": "\\ud83d\\ude42"}'))) == [{"text": "🙂"}]


def test_rows_of_a_list_and_of_parquet_are_counted(tmp_path):
    (tmp_path / "t.json").write_text('[{"text": "x"},\n\n {"text": 3}]')
    refused(tmp_path / "t.json", f"{tmp_path}/t.json, row 2: column 'text'")
    write_table(tmp_path / "t.parquet", [{"input_ids": [1, 2]}, {"input_ids": [1, -2]}])
    refused(tmp_path / "t.parquet", "t.parquet, row 2: 'input_ids' holds -2")


@pytest.mark.parametrize("line", ['{"n": ' + "1" * 5000 + "}", "[" * 100_000])
def test_json_that_no_parser_takes(tmp_path, line):
    refused(lines(tmp_path / "t.jsonl", {"text": "x"}, line), "line 2")


def test_a_folder_of_two_kinds(tmp_path):
    write_table(tmp_path / "a.jsonl", [{"text": "x"}])
    write_table(tmp_path / "b.jsonl", [{"input_ids": [1, 2]}])
    refused(
        tmp_path, f"--data {tmp_path}: its files differ", f"text in {tmp_path}/a.jsonl", f"token ids in {tmp_path}/b"
    )


def test_a_folder_names_the_file_within(tmp_path):
    write_table(tmp_path / "a.jsonl", [{"text": "x"}])
    write_table(tmp_path / "b.jsonl", [{"text": "x"}, {"text": 5}])
    refused(tmp_path, f"--data {tmp_path}/b.jsonl, line 2: column 'text'")


# --- labels --------------------------------------------------------------------------------------------------------


def labels_of(path: Path, **options) -> list[int] | None:
    documents = read_documents(str(path))
    return make_batches(documents, byte_tokenizer(), DataConfig(), packed=False, **options)[0].get("labels")


@pytest.mark.parametrize("label2id", [None, CLASSES], ids=["unknown classes", "classes"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet", "t.csv"])
def test_whole_numbers_with_a_fraction_are_classes(tmp_path, name, label2id):
    path = write_table(tmp_path / name, [{"text": "some text", "label": v} for v in (1.0, 0.0, 1.0)])
    assert labels_of(path, label2id=label2id).tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet", "t.csv"])
def test_scores_are_no_classes_wherever_the_fraction_stands(tmp_path, name):
    path = write_table(tmp_path / name, [{"text": "some text", "label": v} for v in (1.0, 0.0, 3.8)])
    assert labels_of(path, label2id=CLASSES) is None


@pytest.mark.parametrize("missing", [None, "", float("nan"), "absent"], ids=str)
def test_one_missing_label(tmp_path, missing):
    rows = [{"text": "some text", "label": v} for v in (1, 0, missing, 1)]
    rows[2] = {"text": "some text"} if missing == "absent" else rows[2]
    path = lines(tmp_path / "t.jsonl", *rows)
    with pytest.raises(UserError, match=r"t\.jsonl, line 3: label None is none of .*--label-column none"):
        labels_of(path, label2id=CLASSES)
    assert labels_of(path) is None  # a model without classes has no use for them


def test_a_wrong_label_is_named_with_its_line(tmp_path):
    path = lines(tmp_path / "t.jsonl", {"text": "a b", "label": "yes"}, "", {"text": "a b", "label": "maybe"})
    with pytest.raises(UserError, match=r"t\.jsonl, line 3: label 'maybe' is none of the model's, no, yes"):
        labels_of(path, label2id=CLASSES)


# --- padding and long rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_padding_in_the_data_is_no_text(tmp_path, name):
    rows = [
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]},  # right
        {"input_ids": [9, 9, 7, 0, 8], "attention_mask": [0, 0, 1, 1, 1]},  # left, and a real token 0
        {"input_ids": [4, 3, 2], "attention_mask": [1, 1, 1]},
        {"input_ids": [0, 0], "attention_mask": [0, 0]},  # nothing but padding
    ]
    expected = [[5, 6], [7, 0, 8], [4, 3, 2]]
    documents = read_documents(str(write_table(tmp_path / name, rows)))
    assert documents == [{"input_ids": row} for row in expected]
    batches = make_batches(documents, None, DataConfig(), packed=True)
    assert rows_of(batches) == rows_of(make_batches(rows, None, DataConfig(), packed=True)) == expected
    assert batches.tokens == 8
    direct = Batches(rows[:3], 3)[0]
    assert torch.equal(direct["attention_mask"], torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [1, 2], "attention_mask": [1]}, ["'attention_mask' holds [1] for 2 token ids"]),
        ({"input_ids": [1, 2], "attention_mask": [1, 3]}, ["'attention_mask' holds 3", "0 for padding"]),
        ({"input_ids": [1, 2], "attention_mask": "11"}, ["'attention_mask' holds '11'"]),
        ({"input_ids": [1, -100]}, ["holds -100", "whole numbers from 0 on"]),
        ({"input_ids": [1, 2.5]}, ["holds 2.5", "whole numbers"]),
        ({"input_ids": [1, "2"]}, ["holds '2'"]),
        ({"input_ids": [1, None]}, ["holds None"]),
        ({"input_ids": [[1, 2]]}, ["holds [1, 2]"]),
        ({"input_ids": [True, 2]}, ["holds True"]),
        ({"input_ids": "1 2"}, ["holds '1 2'", "a list of token ids"]),
    ],
    ids=str,
)
def test_ids_that_are_none(tmp_path, row, words):
    path = lines(tmp_path / "t.jsonl", {"input_ids": [1, 2]}, row)
    refused(path, f"--data {path}, line 2: ", *words)


def test_whole_numbers_written_with_a_point_are_ids(tmp_path):
    assert read_documents(str(lines(tmp_path / "t.jsonl", '{"input_ids": [1.0, 2]}'))) == [{"input_ids": [1, 2]}]


def test_an_id_beyond_the_vocabulary(tmp_path):
    documents = read_documents(str(lines(tmp_path / "t.jsonl", {"input_ids": [63, 1]}, {"input_ids": [1, 64]})))
    make_batches(documents, None, DataConfig(), packed=True, vocabulary=65)
    with pytest.raises(UserError, match=r"t\.jsonl, line 2: token id 64 is out of range.*has 64 tokens \(0 to 63\)"):
        make_batches(documents, None, DataConfig(), packed=True, vocabulary=64)


@pytest.mark.parametrize("packed", [True, False])
def test_a_tokenizer_of_another_model(tmp_path, packed):
    documents = read_documents(str(lines(tmp_path / "t.jsonl", {"text": "!!!"}, {"text": "!~!"})))
    limit = max(ids("~"))
    config = DataConfig(max_length=4)
    make_batches(documents, byte_tokenizer(eos=False), config, packed=packed, vocabulary=limit + 1)
    with pytest.raises(UserError, match=rf"t\.jsonl, line 2: the tokenizer gives token id {limit}, .* has {limit} tok"):
        make_batches(documents, byte_tokenizer(eos=False), config, packed=packed, vocabulary=limit)


def test_the_padding_token_is_one_of_the_model():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    for tokenizer, vocabulary, pad, expected in (
        (None, None, None, 0), (None, 100, 3, 3), (byte_tokenizer(), 300, None, 258), (byte_tokenizer(), 300, 3, 3),
        (byte_tokenizer(), 300, 900, 258), (byte_tokenizer(), 256, 900, 0),
    ):  # fmt: skip
        batches = make_batches(rows, tokenizer, DataConfig(), packed=False, vocabulary=vocabulary, pad_id=pad)
        assert batches[0]["input_ids"].tolist() == [[5, 6, 7], [8, 9, expected]]


@pytest.mark.parametrize("length", [2, 3, 5, 7, 8, 20])
def test_long_rows_go_on_in_further_sequences(length):
    rows = [{"input_ids": list(range(10, 10 + n))} for n in (7, 1, 15)]
    batches = make_batches(rows, None, DataConfig(max_length=length), packed=True)
    expected = []
    for row in (r["input_ids"] for r in rows):
        pieces = [row[i : i + length] for i in range(0, len(row), length)]
        expected += pieces if len(pieces[-1]) > 1 or len(pieces) == 1 else pieces[:-1]
    assert rows_of(batches) == expected


def test_long_rows_with_labels_are_cut_and_counted():
    config = DataConfig(data="d.jsonl", max_length=4)
    rows = [{"input_ids": list(range(10, 10 + n)), "label": 1} for n in (7, 4, 15)]
    with pytest.warns(UserWarning, match=r"d\.jsonl: 2 of 3 rows with labels are longer than 4 tokens"):
        batches = make_batches(rows, None, config, packed=False)
    assert rows_of(batches) == 3 * [[10, 11, 12, 13]]
    texts = [{"text": t, "label": 0} for t in ("abcdefgh", "abcd", "ab")]
    with pytest.warns(UserWarning, match="1 of 3 rows with labels are longer than 4 tokens"):
        batches = make_batches(texts, byte_tokenizer(), config, packed=False)
    assert rows_of(batches) == [ids("abcd"), ids("abcd"), ids("ab")]


def test_long_text_goes_on_whatever_the_kind_of_tokenizer():
    from transformers import CanineTokenizer

    tokenizer = CanineTokenizer()  # written in Python, without offsets of its own
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    batches = make_batches([{"text": "abcdefg"}], tokenizer, DataConfig(max_length=5), packed=False)
    expected = [[begin, *map(ord, piece), end] for piece in ("abc", "def", "g")]
    assert rows_of(batches) == expected


# --- columns of parquet files that are packed otherwise -------------------------------------------------------------


def png(colour: int) -> bytes:
    """A picture of one colour."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (6, 4), (colour, 2 * colour, 0)).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(n) for n in range(1, 4)]
PACKED_IMAGES = {
    "list of bytes": pyarrow.array([list(p) for p in PICTURES], pyarrow.list_(pyarrow.uint8())),
    "list of int64": pyarrow.array([list(p) for p in PICTURES]),
    "binary": pyarrow.array(PICTURES),
    "large binary": pyarrow.array(PICTURES, pyarrow.large_binary()),
    "object": pyarrow.array([{"bytes": p, "path": None} for p in PICTURES]),
    "object without a path": pyarrow.array([{"bytes": p} for p in PICTURES]),
    "object of a list": pyarrow.array([{"bytes": list(p), "path": "a.png"} for p in PICTURES]),
    "list of one object": pyarrow.array([[{"bytes": p}] for p in PICTURES]),
    "list of one": pyarrow.array([[p] for p in PICTURES]),
}


def write_columns(path: Path, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("column", PACKED_IMAGES.values(), ids=PACKED_IMAGES)
def test_images_however_they_are_packed(tmp_path, column):
    path = write_columns(tmp_path / "t.parquet", image=column, label=[1, 0, 1])
    documents = read_documents(str(path))
    assert [d["label"] for d in documents] == [1, 0, 1]

    def processor(images, return_tensors):
        return {
            "pixel_values": torch.stack(
                [torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).reshape(-1, 3) for one in images]
            )
        }

    processor.image_mean = 0
    pixels = make_batches(documents, processor, DataConfig(), packed=False)[0]["pixel_values"]
    assert pixels.tolist() == [[[n, 2 * n, 0]] * 24 for n in range(1, 4)]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": [[[[1, 2, 3]] * 2] * 2] * 3}, ["row 1: column 'image' holds a list and no image", "PNG or JPEG"]),
        ({"image": [[{"bytes": b"a"}] * 2] * 3}, ["row 1: column 'image' holds a list and no image"]),
        ({"text": [{"text": "a"}] * 3}, ["row 1: column 'text' holds an object (with text in its field 'text')"]),
        ({"text": [["a", "b"]] * 3, "title": ["x"] * 3}, ["row 1: column 'text' holds a list of texts", "--text-col"]),
        ({"doc": [{"id": 1, "text": "a"}] * 3}, ["no column holds text", "'doc' holds an object (with text in its"]),
        ({"n": [1, 2, 3], "parts": [["a"]] * 3}, ["no column holds text", "'parts' holds a list of texts"]),
        ({"text": [b"\xff\xfe"] * 3}, ["row 1: column 'text' holds bytes that are not UTF-8"]),
        ({"text": pyarrow.array([[("a", "b")]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.string()))},
         ["column 'text' is of the type map<"]),
    ],
    ids=("pixels", "two images", "object", "list", "object elsewhere", "list elsewhere", "bytes", "map"),
)  # fmt: skip
def test_packed_columns_that_cannot_be_read(tmp_path, columns, words):
    refused(write_columns(tmp_path / "t.parquet", **columns), f"--data {tmp_path}/t.parquet", *words)


def test_bytes_of_text_and_columns_without_a_name(tmp_path):
    assert read_documents(str(write_columns(tmp_path / "a.parquet", text=["é".encode(), b"b"]))) == [
        {"text": "é"}, {"text": "b"},
    ]  # fmt: skip
    blank = write_columns(tmp_path / "b.parquet", **{"": [0, 1], "text": ["a", "b"], "tags": [["x"], []]})
    assert read_documents(str(blank)) == [{"text": "a"}, {"text": "b"}]
    odd = pyarrow.array([[("k", 1)]] * 2, pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    beside = write_columns(tmp_path / "c.parquet", facts=odd, text=["a", "b"])
    assert read_documents(str(beside)) == [{"text": "a"}, {"text": "b"}]
    refused(beside, "column 'facts' is of the type map<", text_column="facts")


def test_a_file_that_is_no_picture_is_named_before_any_work(tmp_path):
    path = write_columns(tmp_path / "t.parquet", image=[PICTURES[0], b"no picture"])
    processor = type("Processor", (), {"image_mean": 0})()
    with pytest.raises(UserError, match=r"t\.parquet, row 2: its image cannot be read \(no PNG or JPEG file\)"):
        make_batches(read_documents(str(path)), processor, DataConfig(), packed=False)
    lines(tmp_path / "t.jsonl", {"image": {"path": str(tmp_path / "absent.png")}})
    with pytest.raises(UserError, match=r"t\.jsonl, line 1: its image cannot be read"):
        make_batches(read_documents(str(tmp_path / "t.jsonl")), processor, DataConfig(), packed=False)
