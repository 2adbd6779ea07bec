"""CSV and TSV as people have them: quotes that are text, no line of names, packed."""

from __future__ import annotations

import csv
import gzip
import io
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import TEXTS, texts
from test_rows import refused

from d2dmoe.data import read_documents

# --- quotes --------------------------------------------------------------------------------------------------------

LITERAL = [
    'He said "no".',
    '"Yes", she said.',
    '"All of it."',
    'An "odd number" of "quotes',
    'Five inches (5")',
    '"" ""',
]


@pytest.mark.parametrize("rows", [LITERAL, LITERAL[2:3], LITERAL[1:2], LITERAL[::-1]], ids=len)
def test_quotes_in_tsv_are_text(tmp_path, rows):
    path = tmp_path / "t.tsv"
    path.write_text("index\tsentence\tscore\n" + "".join(f"{i}\t{t}\t{i}.5\n" for i, t in enumerate(rows)))
    assert texts(path) == rows


def test_two_texts_that_begin_and_end_with_a_quote_stay_two(tmp_path):
    (tmp_path / "t.tsv").write_text('id\ttext\tother\na\t"Begun here\tx\nb\tended there"\ty\n')
    assert texts(tmp_path / "t.tsv") == ['"Begun here', 'ended there"']


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_a_program_that_quotes_fields_is_understood(tmp_path, quoting):
    rows = ["plain", 'with "quotes"', "with a\ttab", "with a\nline"]
    with (tmp_path / "t.tsv").open("w", newline="") as handle:
        csv.writer(handle, delimiter="\t", quoting=quoting).writerows([("n", "text"), *enumerate(rows)])
    assert texts(tmp_path / "t.tsv") == rows


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text('ab" ,;', min_size=1, max_size=8).map(lambda t: f"x{t}"), min_size=1, max_size=5), st.booleans()
)
def test_every_tsv_without_line_ends_in_fields_is_read_as_written(tmp_path, rows, quoted):
    """Texts do not begin with a quote; those are told apart by the tests above."""
    out = io.StringIO(newline="")
    if quoted:
        csv.writer(out, delimiter="\t", lineterminator="\n").writerows([("n", "text"), *enumerate(rows)])
    else:
        out.write("n\ttext\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(rows)))
    (tmp_path / "t.tsv").write_text(out.getvalue())
    assert texts(tmp_path / "t.tsv") == rows


# --- no line of names ----------------------------------------------------------------------------------------------

BARE = {
    "number.csv": ("good film,1\nbad film,0\n", "'1' is a number"),
    "number.tsv": ("0.5\ta film, really, is, long\n1.0\tanother\n", "'0.5' is a number"),
    "twice.csv": ("so,so,5\nbut,no,4\n", "'so' stands there twice"),
    "text.csv": ('"A long sentence, that is no name",pos\nshort,neg\n', "'A long sentence, that is no name' is a text"),
    "point.tsv": ("Really good.\tpos\nbad\tneg\n", "'Really good.' is a text"),
    "again.csv": ("good,x\nbad,y\ngood,z\n", "'good' stands below it too"),
    "semicolon.csv": ("fine film;3\nnot fine;1\n", "'3' is a number"),
}


@pytest.mark.parametrize("name", BARE)
def test_a_first_line_of_data_is_not_lost(tmp_path, name):
    text, reason = BARE[name]
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, f"--data {tmp_path / name}: its first line looks like data", f"({reason})", "--no-header")
    refused(tmp_path / name, "--no-header", text_column="2")
    rows = list(csv.reader(text.splitlines(), delimiter="\t" if ".tsv" in name else ";" if ";" in text else ","))
    assert texts(tmp_path / name, header=False) == [row[0] for row in rows]
    documents = read_documents(str(tmp_path / name), text_column="2", label_column="1", header=False)
    assert documents == [{"text": row[1], "label": row[0]} for row in rows]


@pytest.mark.parametrize(
    "header",
    ["review", "text,2019,2020", ",text,label", "id,review text,n", "Review,Sentiment", "my review (long),n", "Text,1"],
)
def test_names_of_columns_are_names(tmp_path, header):
    names = header.split(",")
    column = next(n for n in names if "ext" in n or "eview" in n)
    place = names.index(column)
    for rows in (["aa", "bb"], ["cc"]):
        lines = [",".join(t if i == place else "7" for i in range(len(names))) for t in rows]
        (tmp_path / "t.csv").write_text("\n".join([header, *lines]) + "\n")
        assert texts(tmp_path / "t.csv", text_column=column) == rows
        if len(names) == 1 or column == "text":
            assert texts(tmp_path / "t.csv") == rows


def test_a_number_is_a_name_if_it_is_asked_for(tmp_path):
    (tmp_path / "t.csv").write_text("0,1\nfirst,pos\nsecond,neg\n")
    assert texts(tmp_path / "t.csv", text_column="0") == ["first", "second"]


def test_a_column_that_is_not_there_without_names(tmp_path):
    (tmp_path / "t.csv").write_text("a b,1\nc d,0\n")
    refused(tmp_path / "t.csv", "no column '3'; it has 1, 2", header=False, label_column="3")


@pytest.mark.parametrize("name", ["t.jsonl", "t.txt", "builtin"])
def test_no_header_belongs_to_tables(tmp_path, name):
    (tmp_path / name).write_text('{"text": "x"}')
    refused(name if name == "builtin" else tmp_path / name, "--no-header is for csv and tsv files", header=False)


def test_lines_are_counted_with_those_inside_fields(tmp_path):
    (tmp_path / "t.csv").write_text('\ntext,n\n"two\nlines",1\n\nnext,2\n')
    assert [d.place for d in read_documents(str(tmp_path / "t.csv"))] == ["line 3", "line 6"]


@pytest.mark.parametrize("content", ["\ufeff", "\n\n", "  \n"], ids=repr)
def test_a_table_of_nothing(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    refused(tmp_path / "t.csv", "no usable")


# --- packed files --------------------------------------------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


PLAIN = {
    "t.txt": "<|endoftext|>".join(TEXTS),
    "t.csv": "text,n\n" + "".join(f"{t},1\n" for t in TEXTS),
    "t.tsv": "text\tn\n" + "".join(f"{t}\t1\n" for t in TEXTS),
    "t.jsonl": "".join(f'{{"text": "{t}"}}\n' for t in TEXTS),
    "t.json": "[" + ",".join(f'{{"text": "{t}"}}' for t in TEXTS) + "]",
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zstd)], ids=["gz", "zst"])
def test_packed_files_are_read_like_plain_ones(tmp_path, name, ending, pack):
    (tmp_path / name).write_text(PLAIN[name])
    expected = read_documents(str(tmp_path / name))
    whole, half = pack(PLAIN[name].encode()), len(PLAIN[name]) // 2
    in_two = pack(PLAIN[name][:half].encode()) + pack(PLAIN[name][half:].encode())
    (tmp_path / name).write_bytes(whole)  # packed, under a plain name
    assert read_documents(str(tmp_path / name)) == expected
    (tmp_path / name).unlink()
    for data in (whole, in_two):
        (tmp_path / f"{name}{ending}").write_bytes(data)
        assert read_documents(str(tmp_path / f"{name}{ending}")) == expected == read_documents(str(tmp_path))


def test_parts_of_a_folder_may_be_packed(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (tmp_path / "valid.txt.zst").write_bytes(zstd(b"b"))
    assert (texts(tmp_path, "calibration"), texts(tmp_path, "held_out")) == (["a"], ["b"])


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zstd)], ids=["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_damaged_packed_files(tmp_path, ending, pack, damage):
    data = pack(PLAIN["t.txt"].encode())
    path = tmp_path / f"t.txt{ending}"
    middle = len(data) // 2
    path.write_bytes(
        {"cut": data[:-9], "changed": data[:middle] + bytes(20) + data[middle + 20 :], "empty": pack(b"")}[damage]
    )
    refused(path, f"--data {path}: " + ("the file is empty" if damage == "empty" else "cannot be unpacked"))


@pytest.mark.parametrize("installed", [False, True], ids=["no zstandard", "zstandard"])
def test_zstd_where_pyarrow_has_none(tmp_path, monkeypatch, installed):
    monkeypatch.setattr("d2dmoe.data.files._pyarrow_has_zstd", lambda: False)
    (tmp_path / "t.txt.zst").write_bytes(zstd(b"some text"))
    if installed:
        pytest.importorskip("zstandard")
        assert texts(tmp_path / "t.txt.zst") == ["some text"]
    else:
        monkeypatch.setitem(sys.modules, "zstandard", None)
        refused(tmp_path / "t.txt.zst", "packed with zstd", "pip install zstandard", "zstd -d")


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.parquet", "t.csv"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 12345\n")
    refused(tmp_path / name, "Git LFS pointer", "git lfs pull")


# --- save_to_disk --------------------------------------------------------------------------------------------------


def data_set(*values: str):
    import datasets

    return datasets.Dataset.from_dict({"text": list(values), "n": list(range(len(values)))})


def test_a_saved_data_set_is_divided(tmp_path):
    data_set(*TEXTS).with_format("torch").save_to_disk(tmp_path / "set")
    assert texts(tmp_path / "set") == TEXTS
    assert texts(tmp_path / "set", "calibration") == TEXTS[:18]
    assert texts(tmp_path / "set", "held_out") == TEXTS[18:]


@pytest.mark.parametrize("as_dict", [True, False], ids=["DatasetDict", "folders"])
def test_a_saved_data_set_keeps_its_splits(tmp_path, as_dict):
    import datasets

    train = data_set(*TEXTS).filter(lambda row: row["n"] % 2)
    splits = {"train": train, "validation": data_set("v"), "test": data_set("t")}
    if as_dict:
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    else:
        for name, split in splits.items():
            split.save_to_disk(tmp_path / "set" / name)
    assert texts(tmp_path / "set", "calibration") == TEXTS[1::2]
    assert texts(tmp_path / "set", "held_out") == ["v"]
    assert texts(tmp_path / "set") == TEXTS[1::2]  # `all` of a data set is its training split, as from the hub


def test_a_saved_data_set_that_is_damaged(tmp_path):
    data_set("a").save_to_disk(tmp_path / "set")
    next(Path(tmp_path / "set").glob("*.arrow")).unlink()
    refused(tmp_path / "set", "not a data set that save_to_disk has written")
