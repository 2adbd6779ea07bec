"""Text, token ids and images from the Hub, local files or CPython itself, as documents.

A *document* is a dict with one of `text`, `input_ids` (already tokenised) or `image`, and maybe `label`.
"""

from __future__ import annotations

import csv
import io
import json
import pydoc_data.topics
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line

Document = dict[str, Any]
SEPARATOR = "<|endoftext|>"
SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
TEXT_COLUMNS = ("text", "sentence", "content", "document", "story")
LABEL_COLUMNS = ("label", "labels", "label_name")
HELD_OUT_NAMES = ("valid", "val", "dev", "test")
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Columns:
    """Names of the columns of tabular data, `None` where they are to be guessed; label `none` for no labels."""

    text: str | None = None
    label: str | None = None

    def check(self, present: list[str], source: str) -> None:
        """Raises `UserError` if one that was asked for is not there."""
        for name in (self.text, self.label if self.label != "none" else None):
            if name is not None and name not in present:
                raise UserError(f"--data {source}: no column {name!r}; it has {', '.join(present)}")

    @property
    def texts(self) -> tuple[str, ...]:
        """Names that a column of text may have."""
        return TEXT_COLUMNS if self.text is None else (self.text,)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names that a column of labels may have."""
        return () if self.label == "none" else LABEL_COLUMNS if self.label is None else (self.label,)


def read_documents(
    source: str, part: str = "all", text_column: str | None = None, label_column: str | None = None
) -> list[Document]:
    """Read the documents of one part of a data source.

    `builtin` and files in one piece are divided here (one topic in five, or the last tenth, is held out). A folder or
    hub data set that has its own training and validation files or splits keeps them.

    Args:
        source: `builtin`, a path, or a hub data set id (`id:configuration` to name a configuration).
        part: `calibration`, `held_out` or `all`.
        text_column: Name of the text column of tabular data; guessed when `None`.
        label_column: The same for the class numbers or names; `none` leaves them out.

    Raises:
        UserError: If the source does not exist, is empty, is not UTF-8, or has no usable column.
    """
    columns = Columns(text_column, label_column)
    if source == "builtin":
        documents = _builtin(part)
    elif Path(source).exists():
        documents = _local(Path(source), part, columns)
    elif source.startswith((".", "/", "~")) or Path(source).suffix in SUFFIXES:
        raise UserError(
            f"--data {source}: no such file or folder; give text/jsonl/csv/parquet files, a hub data set id or builtin"
        )
    else:
        documents = _hub(source, part, columns)
    if not documents:
        name = "" if part == "all" else f"{part.replace('_', '-')} "
        raise UserError(f"--data {source}: no usable {name}text, token ids or images in it; give more data")
    return documents


def _builtin(part: str) -> list[Document]:
    """The English documentation that every CPython carries; membership follows the topic's name, not its order."""
    topics = sorted(pydoc_data.topics.topics.items())
    held_out = {name: zlib.crc32(name.encode()) % 5 == 0 for name, _ in topics}
    return [{"text": text} for name, text in topics if part == "all" or held_out[name] == (part == "held_out")]


def _local(path: Path, part: str, columns: Columns) -> list[Document]:
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--data {path}: the folder holds none of {', '.join(SUFFIXES)}")
    train = [f for f in files if f.stem.lower().startswith("train")]
    held_out = next(([f for f in files if f.stem.lower().startswith(n)] for n in HELD_OUT_NAMES if _has(files, n)), [])
    if part != "all" and train and held_out:
        chosen = train if part == "calibration" else held_out
        return [d for f in chosen for d in _read_file(f, columns)]
    return _divide([d for f in files for d in _read_file(f, columns)], part)


def _has(files: list[Path], name: str) -> bool:
    return any(f.stem.lower().startswith(name) for f in files)


def _divide(documents: list[Document], part: str) -> list[Document]:
    """First nine tenths for calibration, the rest held out; a single text is cut at a line end where it has one."""
    if part == "all":
        return documents
    if len(documents) == 1 and "text" in documents[0]:
        text = documents[0]["text"]
        most = int(len(text) * (1 - HELD_OUT_SHARE))
        cut = text.rfind("\n", len(text) // 2, most) + 1 or most
        return [{"text": text[:cut] if part == "calibration" else text[cut:]}]
    cut = max(1, min(len(documents) - 1, round(len(documents) * (1 - HELD_OUT_SHARE))))
    return documents[:cut] if part == "calibration" else documents[cut:]


def _read_file(path: Path, columns: Columns) -> list[Document]:
    """The documents of one file.

    Parquet goes by the builder in `datasets`. Its others change data without a word: CSV reads the text `NA` as
    missing and shifts columns where the first row holds an unquoted delimiter, JSON takes rows that are no objects,
    text keeps a byte order mark. None of them tells the line or byte of a mistake.
    """
    if path.stat().st_size == 0:
        raise UserError(f"--data {path}: the file is empty")
    if path.suffix == ".parquet":
        from datasets import load_dataset

        try:
            table = load_dataset("parquet", data_files=str(path), split="train")
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            raise UserError(f"--data {path}: not a parquet file with rows in it ({reason})") from None
        return _from_table(table, str(path), columns)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data {path}: not UTF-8 text (byte {error.start}); convert it, for instance with iconv"
        ) from None
    kind = SUFFIXES.get(path.suffix, "text")
    if kind == "text" and _has_header(text, columns):
        kind = "csv"
    if kind == "text":
        return [{"text": piece.strip("\n")} for piece in text.split(SEPARATOR) if piece.strip()]
    if kind == "csv":
        return _from_rows(_csv_rows(path, text), str(path), columns)
    return _from_rows(_json_rows(path, text), str(path), columns)


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    header = text.splitlines()[0]
    delimiter = max("\t" if path.suffix == ".tsv" else ",", ";", "\t", "|", key=header.count)
    csv.field_size_limit(2**31 - 1)  # a field may hold a whole document
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), []
    try:
        for row in reader:
            if None in row:  # what has no column: most likely the rest of a text that holds the delimiter
                raise csv.Error(f"line {reader.line_num} has more fields than the header")
            rows.append(row)
    except csv.Error as error:
        raise UserError(
            f"--data {path}: not valid CSV ({error}); quote fields that hold {delimiter!r}, quotes or line ends"
        ) from None
    return rows


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    listed = path.suffix == ".json" and text.lstrip().startswith("[")
    rows = []
    for number, line in [(1, text)] if listed else enumerate(text.split("\n"), 1):
        try:
            rows += json.loads(line) if listed else [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            line_number = number + error.lineno - 1
            raise UserError(
                f"--data {path}: not valid JSON in line {line_number}: {error.msg}; write one object per line"
            ) from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f'--data {path}: every row must be an object such as {{"text": "…"}}')
    return rows


def _from_rows(rows: list[dict[str, Any]], source: str, columns: Columns) -> list[Document]:
    return _select(rows, list(rows[0]) if rows else [], source, columns)


def _from_table(table: Any, source: str, columns: Columns) -> list[Document]:
    """Rows of a `datasets.Dataset`; images stay encoded until they are used."""
    import datasets

    for name, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return _select(table, list(table.column_names), source, columns)


def _select(rows: Any, present: list[str], source: str, columns: Columns) -> list[Document]:
    if not len(rows):
        return []
    first = rows[0]
    columns.check(present, source)
    label = next((c for c in columns.labels if c in present and (columns.label or _is_class(first[c]))), None)
    image = next((c for c in ("image", "img", "pixel_values") if c in present), None)
    kind, column = None, None
    if columns.text is None and "input_ids" in present:
        kind = column = "input_ids"
    elif columns.text is None and image:
        kind, column = "image", image
    else:
        strings = [c for c in present if isinstance(first[c], str) and c not in (*LABEL_COLUMNS, label)]
        named = [c for c in columns.texts if c in strings]
        column = columns.text or (named[0] if named else strings[0] if len(strings) == 1 else None)
        kind = "text"
    if column is None:
        raise UserError(f"--data {source}: cannot tell the text column among {', '.join(present)}; give --text-column")
    return [{kind: row[column], **({"label": row[label]} if label else {})} for row in rows if row.get(column)]


def _is_class(value: Any) -> bool:
    """Whether this may be the number or the name of a class; scores are none."""
    return isinstance(value, int | str)


def _has_header(text: str, columns: Columns) -> bool:
    """Whether a text file begins with the names of a column of text and one of labels: `text;label_name`."""
    header = re.split(r"[;,\t|]", text.partition("\n")[0].strip())
    return bool({*columns.texts} & {*header}) and bool({*columns.labels} & {*header})


def _hub(source: str, part: str, columns: Columns) -> list[Document]:
    name, _, configuration = source.partition(":")
    try:
        splits = _splits(name, configuration or None)
    except Exception as error:
        raise UserError(
            f"--data {source}: neither a local path nor a data set that can be had from the hub ({first_line(error)}); "
            f"without a network give a text/jsonl/csv/parquet file, a folder of them, or builtin"
        ) from None
    held_out = next((n for n in ("validation", "valid", "dev", "test") if n in splits), None)
    chosen = "train" if "train" in splits else next(iter(splits))
    if part == "held_out" and held_out:
        return _from_table(splits[held_out], source, columns)
    documents = _from_table(splits[chosen], source, columns)
    return documents if held_out and part == "calibration" else _divide(documents, part)


def _splits(name: str, configuration: str | None) -> Any:
    """The splits of a hub data set; without the hub, those of an earlier download.

    `load_dataset` with `DownloadConfig(local_files_only=True)` asks an absent hub for 23 seconds all the same.
    """
    from datasets import load_dataset
    from datasets.packaged_modules.cache.cache import Cache

    from ..hub import reachable

    if reachable():
        return load_dataset(name, configuration)
    folder = name.rpartition("/")[2]
    return Cache(dataset_name=folder, repo_id=name, config_name=configuration, version="auto", hash="auto").as_dataset()
