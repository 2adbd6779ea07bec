"""CSV and TSV: the delimiter, quotes, and whether the first line holds the names of the columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .columns import IMAGE_COLUMNS, LABEL_COLUMNS, NUMBER, TEXT_COLUMNS, Columns
from .table import Table

KNOWN = {*TEXT_COLUMNS, *LABEL_COLUMNS, *IMAGE_COLUMNS, "input_ids"}
MOST_NAME_WORDS, MOST_NAME_LETTERS = 4, 40  # more is a text, not the name of a column
Line = tuple[int, list[str]]  # number of the first line of a row, from 1, and its fields


def read_delimited(path: Path, text: str, columns: Columns, header: bool = True) -> Table:
    """Rows of a table whose first line names the columns.

    Args:
        path: The file, whose ending tells the usual delimiter.
        text: What it holds.
        columns: Names that were asked for.
        header: Whether the first line holds names; if not, the columns are called 1, 2, ….

    Raises:
        UserError: If it is not valid, or the first line looks like data.
    """
    if not text.strip():
        return Table([], str(path), [], [])
    first = next(line for line in re.split(r"[\r\n]", text) if line.strip())
    delimiter = max("\t" if path.suffixes[-1:] != [".csv"] and ".tsv" in path.suffixes else ",", ";", "\t", "|",
                    key=first.count)  # fmt: skip
    if ".tsv" in path.suffixes and "\t" in first:
        delimiter = "\t"
    csv.field_size_limit(2**31 - 1)  # a field may hold a whole document
    try:
        rows = _lines(text, delimiter)
    except csv.Error as error:
        raise UserError(
            f"--data {path}: not valid CSV ({error}); quote fields that hold {delimiter!r}, quotes or line ends"
        ) from None
    names = rows[0][1]
    if not header:
        names = [str(number + 1) for number in range(len(names))]
    elif reason := _looks_like_data(rows, columns):
        raise UserError(
            f"--data {path}: its first line looks like data, not like names of columns ({reason}); add --no-header, "
            f"or write a line of names above it"
        )
    body = rows[1:] if header else rows
    table = [dict(zip(names, fields + [None] * (len(names) - len(fields)), strict=True)) for _, fields in body]
    return Table(table, str(path), [number for number, _ in body], names)


def _lines(text: str, delimiter: str) -> list[Line]:
    """Rows with their line numbers.

    Quotes in a tab-separated file are text, unless the file is as a program writes it that quotes fields.
    """
    if delimiter != "\t" or '"' not in text:
        return list(_parsed(text, delimiter, csv.QUOTE_MINIMAL))
    try:
        quoted = list(_parsed(text, delimiter, csv.QUOTE_MINIMAL))
    except csv.Error:
        return list(_parsed(text, delimiter, csv.QUOTE_NONE))
    try:
        plain = list(_parsed(text, delimiter, csv.QUOTE_NONE))
    except csv.Error:
        return quoted
    even = all(len(fields) == len(plain[0][1]) for _, fields in plain)
    return quoted if not even or _written_with_quotes(text, quoted, delimiter) else plain


def _parsed(text: str, delimiter: str, quoting: int) -> Iterator[Line]:
    """Rows of one way to read quotes.

    Raises:
        csv.Error: If quotes do not fit, or a row has more fields than the first one.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    width, begin = 0, 1
    for fields in reader:
        width = width or len(fields)
        if len(fields) > width:  # most likely the rest of a text that holds the delimiter
            raise csv.Error(f"line {reader.line_num} has more fields than the header")
        if fields:
            yield begin, fields
        begin = reader.line_num + 1


def _written_with_quotes(text: str, rows: list[Line], delimiter: str) -> bool:
    """Whether a program that quotes fields has written exactly this text.

    Without quotes every line has as many fields, so a quoted field with a line end or a delimiter would be two texts
    that begin and end with quotes by chance; only a table of one column has no such check.
    """
    if len(rows[0][1]) > 1 and any(re.search(r"[\r\n\t]", field) for _, fields in rows for field in fields):
        return False
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerows(f for _, f in rows)
        if out.getvalue().strip("\n") == text.strip("\n"):
            return True
    return False


def _looks_like_data(rows: list[Line], columns: Columns) -> str | None:
    """The reason why the first line holds no names of columns."""
    names = [name.strip() for name in rows[0][1]]
    twice = next((name for number, name in enumerate(names) if name and name in names[:number]), None)
    if twice is not None:
        return f"{twice!r} stands there twice"
    if any(name in names for name in columns.asked) or KNOWN & {name.casefold() for name in names}:
        return None
    for number, name in enumerate(names):
        if NUMBER.fullmatch(name):
            return f"{name!r} is a number"
        if len(name) > MOST_NAME_LETTERS or len(name.split()) > MOST_NAME_WORDS or name.endswith((".", "!")):
            return f"{name[:MOST_NAME_LETTERS]!r} is a text"
        if any(len(fields) > number and fields[number].strip() == name for _, fields in rows[1:] if name):
            return f"{name!r} stands below it too"
    return None
