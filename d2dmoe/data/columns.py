"""The columns of a table that are used, found by all of its rows, and its documents."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .table import Document, Table
from .token_ids import checked_ids

TEXT_COLUMNS = ("text", "sentence", "content", "document", "story")
LABEL_COLUMNS = ("label", "labels", "label_name")
IMAGE_COLUMNS = ("image", "img", "pixel_values")
WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of tabular data, `None` where they are to be guessed; label `none` for no labels."""

    text: str | None = None
    label: str | None = None

    def check(self, present: list[str], source: str) -> None:
        """Raises `UserError` if one that was asked for is not there."""
        for name in self.asked:
            if name not in present:
                raise UserError(f"--data {source}: no column {name!r}; it has {', '.join(present)}")

    @property
    def asked(self) -> list[str]:
        """Names that were asked for."""
        return [name for name in (self.text, self.label) if name is not None and (name, self.label) != ("none",) * 2]

    @property
    def texts(self) -> tuple[str, ...]:
        """Names that a column of text may have."""
        return TEXT_COLUMNS if self.text is None else (self.text,)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names that a column of labels may have."""
        return () if self.label == "none" else LABEL_COLUMNS if self.label is None else (self.label,)


def select(table: Table, columns: Columns) -> list[Document]:
    """Documents of a table; rows without content are left out.

    Raises:
        UserError: If a column is missing or cannot be told, or a row holds something else than the others.
    """
    if not table.rows:
        return []
    columns.check(table.names, table.source)
    label = _label_column(table, columns)
    kind, column = _content_column(table, columns, label)
    if kind == "input_ids":
        _check_mixture(table)
    documents = []
    for number, row in enumerate(table.rows):
        value = row.get(column)
        if is_missing(value):
            continue
        content = {kind: _content(kind, column, value, row, table.where(number))}
        if label and not is_missing(row.get(label)):
            content["label"] = _plain(row[label])
        if content[kind]:
            documents.append(Document(content, table.source, table.place(number)))
    return documents


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, NaN (what pandas writes for null), or an empty text or list."""
    return value is None or (isinstance(value, float) and value != value) or value in ("", [], {})


def _values(table: Table, name: str) -> Iterator[Any]:
    """What a column holds, missing values left out."""
    return (row[name] for row in table.rows if not is_missing(row.get(name)))


def _label_column(table: Table, columns: Columns) -> str | None:
    """The first possible name whose values are classes; one that was asked for is taken as it is."""
    for name in columns.labels:
        if name in table.names and (columns.label or _are_classes(list(_values(table, name)))):
            return name
    return None


def _are_classes(values: list[Any]) -> bool:
    """Whether these may be numbers or names of classes; scores are none."""
    if not values or not all(isinstance(v, int | float | str) for v in values):
        return False
    texts = [str(v).strip() for v in values]
    scores = all(NUMBER.fullmatch(t) for t in texts) and not all(WHOLE.fullmatch(t) for t in texts)
    return not scores and not any(isinstance(v, float) and not v.is_integer() for v in values)


def _content_column(table: Table, columns: Columns, label: str | None) -> tuple[str, str]:
    """What the documents hold, and the column with it."""
    names = table.names
    if columns.text is not None:
        return "text", columns.text
    if "input_ids" in names and any(True for _ in _values(table, "input_ids")):
        return "input_ids", "input_ids"
    for name in IMAGE_COLUMNS:
        if name in names and any(as_image(value) for value in _values(table, name)):
            return "image", name
    others = [name for name in names if name not in (*LABEL_COLUMNS, label)]
    strings = [name for name in others if any(isinstance(row.get(name), str) for row in table.rows)]
    named = [name for name in TEXT_COLUMNS if name in strings]
    if not named and TEXT_COLUMNS[0] in names:  # without any text in it; another column would be a guess
        named = [TEXT_COLUMNS[0]]
    named = named or (strings if len(strings) == 1 else [])
    if not named and not strings:
        named = [name for name in (*TEXT_COLUMNS, "input_ids") if name in names]
        images = [name for name in IMAGE_COLUMNS if name in names and any(True for _ in _values(table, name))]
        if images and not named:
            return "image", images[0]  # what is in it is told to be none
    if not named and not strings and (first := _first_structure(table, others)):
        raise UserError(
            f"--data {table.source}: no column holds text, token ids or images; {first}; give a column `text` with one "
            f"text in each row"
        )
    if not named:
        raise UserError(
            f"--data {table.source}: cannot tell the text column among {', '.join(names)}; give --text-column"
        )
    return "text", named[0]


def _first_structure(table: Table, names: list[str]) -> str:
    """What the first column of lists or objects holds; empty without such a column."""
    for name in names:
        value = next((v for v in _values(table, name) if isinstance(v, list | dict)), None)
        if value is not None:
            return f"{name!r} holds {_kind(value)}"
    return ""


def _check_mixture(table: Table) -> None:
    """Whether rows without token ids have text instead."""
    for number, row in enumerate(table.rows):
        text = next((name for name in TEXT_COLUMNS if isinstance(row.get(name), str) and row[name]), None)
        if text and is_missing(row.get("input_ids")):
            raise UserError(
                f"--data {table.where(number)}: it has {text!r} and no 'input_ids', which other rows have; give token "
                f"ids in every row, or take the text alone with --text-column {text}"
            )


def _content(kind: str, column: str, value: Any, row: dict[str, Any], place: str) -> Any:
    """The value of a document, checked."""
    if kind == "input_ids":
        return checked_ids(value, row.get("attention_mask"), place)
    if kind == "image":
        image = as_image(value)
        if image is None:
            raise UserError(
                f"--data {place}: column {column!r} holds {_kind(value)} and no image; give the content of one PNG or "
                f"JPEG file in each row"
            )
        return image
    value = _decoded(value)
    if not isinstance(value, str):
        raise UserError(
            f"--data {place}: column {column!r} holds {_kind(value)} and no text; mend the row, or name another "
            f"column with --text-column"
        )
    if not value.isascii() and (half := re.search("[\ud800-\udfff]", value)):
        raise UserError(
            f"--data {place}: column {column!r} holds half a character (\\u{ord(half[0]):04x}), which is no text; "
            f"write the file again as UTF-8"
        )
    return value


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        texts = [name for name, inner in value.items() if isinstance(inner, str)]
        return "an object" + (f" (with text in its field {texts[0]!r})" if texts else "")
    if isinstance(value, list):
        return "a list" + (" of texts" if value and all(isinstance(one, str) for one in value) else "")
    names = {bool: "true or false", int: "a number", float: "a number", bytes: "bytes that are not UTF-8"}
    return names.get(type(value), "text" if isinstance(value, str) else f"a {type(value).__name__}")


def _decoded(value: Any) -> Any:
    """Text of a parquet file whose writer has not marked its column as text."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    return value


def as_image(value: Any) -> dict[str, Any] | None:
    """An encoded image as `datasets` stores it, `None` if this is none.

    Args:
        value: Bytes, also as a list of their numbers; an object with `bytes` or `path`; or a list of one of these.
    """
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], int):
        value = value[0]
    if isinstance(value, dict) and value.get("path") and not value.get("bytes"):
        return value
    data = _as_bytes(value.get("bytes") if isinstance(value, dict) else value)
    return {"path": None, **(value if isinstance(value, dict) else {}), "bytes": data} if data else None


def _as_bytes(value: Any) -> bytes | None:
    if isinstance(value, list) and all(type(one) is int and 0 <= one < 256 for one in value):
        return bytes(value)
    return value if isinstance(value, bytes) else None


def _plain(label: Any) -> Any:
    """A class number stored as a float as a whole number."""
    return int(label) if isinstance(label, float) and label.is_integer() else label
