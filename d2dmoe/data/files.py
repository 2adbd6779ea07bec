"""One file as documents: compressed or not, text, JSON, CSV or parquet."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..files import is_lfs_pointer
from .columns import IMAGE_COLUMNS, Columns, select
from .delimited import read_delimited
from .table import Document, Table

SEPARATOR = "<|endoftext|>"
SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst")
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # first bytes


def plain_name(path: Path) -> Path:
    """The name without the ending of a compressed file."""
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def kind_of(path: Path) -> str | None:
    """What a file of this name holds; `None` for endings that are not known."""
    return SUFFIXES.get(plain_name(path).suffix)


def read_file(path: Path, columns: Columns, header: bool = True) -> list[Document]:
    """The documents of one file.

    Parquet goes by the builder in `datasets`. Its others change data without a word: CSV reads the text `NA` as
    missing and shifts columns where the first row holds an unquoted delimiter, JSON takes rows that are no objects,
    and the text builder splits at every control character that `str.splitlines` knows.

    Raises:
        UserError: If it cannot be read, or has no usable column.
    """
    kind = kind_of(path) or "text"
    if kind == "parquet":
        return _parquet(path, columns)
    text = _decoded(path, _contents(path))
    if kind == "text" and _has_header(text, columns):
        kind = "csv"
    if kind == "text":
        return _pieces(text, str(path))
    if kind == "json":
        return select(_json_table(path, text), columns)
    columns = columns if header else replace(columns, text=columns.text or "1")
    return select(read_delimited(plain_name(path), text, columns, header), columns)


def _contents(path: Path) -> bytes:
    """The bytes of a file, unpacked; whether they are packed is told by the first ones, not by the name."""
    _check_fetched(path)
    data = path.read_bytes()
    try:
        if data.startswith(GZIP):
            data = gzip.decompress(data)
        elif data.startswith(ZSTD):
            data = _zstd(path, data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--data {path}: cannot be unpacked ({first_line(error)}); copy or compress it again") from None
    if not data:
        raise UserError(f"--data {path}: the file is empty")
    return data


def _check_fetched(path: Path) -> None:
    """Whether this is a file with something in it."""
    with path.open("rb") as handle:
        begin = handle.read(100)
    if not begin:
        raise UserError(f"--data {path}: the file is empty")
    if is_lfs_pointer(begin):
        raise UserError(f"--data {path}: a Git LFS pointer instead of the file; fetch it with git lfs pull")


def _zstd(path: Path, data: bytes) -> bytes:
    """Unpacked by pyarrow, which comes with `datasets`, or by the package zstandard."""
    if _pyarrow_has_zstd():
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
    try:
        import zstandard
    except ImportError:
        raise UserError(f"--data {path}: packed with zstd; pip install zstandard, or unpack it with zstd -d") from None
    try:
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as stream:
            return stream.read()
    except zstandard.ZstdError as error:
        raise OSError(first_line(error)) from None


def _pyarrow_has_zstd() -> bool:
    import pyarrow

    return pyarrow.Codec.is_available("zstd")


def _decoded(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data {path}: not UTF-8 text (byte {error.start}); convert it, for instance with iconv"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _pieces(text: str, source: str) -> list[Document]:
    """Texts between separators, each with the line in which it begins."""
    documents, line = [], 1
    for piece in text.split(SEPARATOR):
        if piece.strip():
            begin = line + len(piece) - len(piece.lstrip("\n"))
            documents.append(Document({"text": piece.strip("\n")}, source, f"line {begin}"))
        line += piece.count("\n")
    return documents


def _has_header(text: str, columns: Columns) -> bool:
    """Whether a text file begins with the names of a column of text and one of labels: `text;label_name`."""
    header = re.split(r"[;,\t|]", text.partition("\n")[0].strip())
    return bool({*columns.texts} & {*header}) and bool({*columns.labels} & {*header})


def _json_table(path: Path, text: str) -> Table:
    listed = plain_name(path).suffix == ".json" and text.lstrip().startswith("[")
    rows: list[Any] = []
    lines: list[int] = []
    for number, line in [(1, text)] if listed else enumerate(text.split("\n"), 1):
        try:
            found = json.loads(line) if listed else [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            line_number = number + error.lineno - 1
            raise UserError(
                f"--data {path}: not valid JSON in line {line_number}: {error.msg}; write one object per line"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
            reason = first_line(error)
            raise UserError(f"--data {path}: line {number} cannot be read ({reason}); mend or remove it") from None
        rows += found
        lines += [number] * len(found)
    table = Table(rows, str(path), None if listed else lines)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f'--data {table.where(number)}: every row must be an object such as {{"text": "…"}}')
    return table


def _parquet(path: Path, columns: Columns) -> list[Document]:
    import pyarrow.parquet
    from datasets import load_dataset

    _check_fetched(path)
    try:
        schema = pyarrow.parquet.read_schema(path)  # `datasets` would print its own line for a damaged file
        table = load_dataset("parquet", data_files=str(path), split="train", **_readable(path, schema, columns))
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"--data {path}: not a parquet file with rows in it ({reason})") from None
    return from_dataset(table, str(path), columns)


def _readable(path: Path, schema: Any, columns: Columns) -> dict[str, Any]:
    """Options of the builder in `datasets` that leave out columns whose type it does not know.

    Raises:
        UserError: If it knows none, or not that of a column that was asked for.
    """
    import datasets
    import pyarrow

    odd = {}
    for field in schema:
        try:
            datasets.Features.from_arrow_schema(pyarrow.schema([field]))
        except ValueError:
            odd[field.name] = field.type
    wanted = next((name for name in odd if name in columns.asked or len(odd) == len(schema)), None)
    if wanted is not None:
        raise UserError(
            f"--data {path}: column {wanted!r} is of the type {odd[wanted]}, which holds no text, token ids or images; "
            f"name another one with --text-column"
        )
    known = pyarrow.schema([field for field in schema if field.name not in odd])
    return {"columns": known.names, "features": datasets.Features.from_arrow_schema(known)} if odd else {}


def from_dataset(dataset: Any, source: str, columns: Columns) -> list[Document]:
    """The documents of a `datasets.Dataset`; images stay encoded until they are used."""
    import datasets

    names = list(dataset.column_names)
    columns.check(names, source)
    kept = ("input_ids", "attention_mask", *IMAGE_COLUMNS, *columns.texts, *columns.asked)
    dataset, others, found = dataset.with_format(None), [], False
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif name not in kept and not isinstance(feature, datasets.Value | datasets.ClassLabel):
            others.append(name)  # lists and structures that nothing here uses
        found = found or name in kept or "string" in str(getattr(feature, "dtype", ""))
    if found:
        dataset = dataset.remove_columns(others)
    return select(Table(dataset.to_list(), source, None, names), columns)
